"""The caches of one generation, installed and removed together."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from wancli.caching.cfg_cache import CFGGate, cfg_gate
from wancli.caching.prompt_attention import WeightOffloader
from wancli.caching.prompt_kv import PromptKVCache, prompt_kv
from wancli.caching.session import Session
from wancli.caching.step_cache import step_cache
from wancli.catalog.tasks import TASKS
from wancli.config.settings import Sampling, Settings, StepCache
from wancli.cost.estimate import rates_here
from wancli.cost.kernels import tokens_to_align
from wancli.models.load import Loaded, transformers_of
from wancli.planning.plan import Plan
from wancli.planning.step_caches import MAG_RATIOS, STEP_CACHES
from wancli.records.record import ForwardStats


@dataclass(frozen=True)
class Caches:
    """The caches of one generation, and what they computed and reused."""

    sessions: Sequence[Session]
    gate: CFGGate | None
    split: Sequence[tuple[Any, int]]  # transformers and their numbers of steps, in order
    block_lists: Sequence[str]  # attributes of a transformer
    guided: bool
    offloaders: Sequence[WeightOffloader]  # of the weights that project prompts

    @property
    def freed_bytes(self) -> int:
        """Size of the prompt projections that are off the device now."""
        return sum(offloader.nbytes for offloader in self.offloaders)

    def stats(self) -> list[ForwardStats]:
        """Statistics of each branch of each step, in order, including skipped forwards."""
        forwards = (forward for session in self.sessions for forward in session.stats())
        recorded = {(forward.step, forward.branch): forward for forward in forwards}
        skipped = self.gate.skipped if self.gate else ()
        stats, step = [], 0
        for transformer, steps in self.split:
            blocks = sum(len(getattr(transformer, name)) for name in self.block_lists)
            for index in range(step, step + steps):
                for branch in ("cond", "uncond") if self.guided else ("cond",):
                    full = ForwardStats(index, branch, blocks, blocks, reused=False)
                    forward = recorded.get((index, branch), full)
                    if branch == "uncond" and index in skipped:
                        forward = ForwardStats(index, branch, 0, blocks, reused=True)
                    stats.append(forward)
            step += steps
        return stats


@contextmanager
def caches(
    loaded: Loaded,
    memory: PromptKVCache,
    settings: Settings,
    plan: Plan,
    timesteps: Sequence[float],
) -> Iterator[Caches]:
    """Install the configured caches on the pipeline's transformers, and remove them at the end.

    `timesteps`, one per step, decide which of two experts runs a step.
    """
    chosen, pipeline, task = settings.prompt_kv, loaded.pipeline, TASKS[plan.task]
    uniform = task.expands_timesteps and bool(pipeline.config.get("expand_timesteps"))
    split = split_steps(pipeline, timesteps, boundary_ratio(pipeline, settings.sampling))
    offloaders: list[WeightOffloader] = []
    with ExitStack() as stack:
        if plan.prompt_kv:
            for transformer, _ in split:
                offloaders += stack.enter_context(
                    prompt_kv(
                        transformer,
                        memory,
                        align=prompt_alignment(loaded.device, settings),
                        uniform_timesteps=uniform,
                        offload_to=torch.device("cpu") if chosen.free_kv_weights else None,
                    )
                )
        sessions = stack.enter_context(
            step_caches(split, settings.step_cache, loaded.spec.name, guided=plan.guided)
        )
        gate = None
        if plan.gate is not None:
            gate = stack.enter_context(cfg_gate(pipeline, plan.gate, sessions))
        block_lists = STEP_CACHES[task.transformer].blocks
        yield Caches(sessions, gate, split, block_lists, plan.guided, offloaders)


@contextmanager
def step_caches(
    split: Sequence[tuple[Any, int]], chosen: StepCache, model: str, *, guided: bool
) -> Iterator[list[Session]]:
    """Install a step cache on each transformer, for its share of the steps."""
    with ExitStack() as stack:
        sessions, first = [], 0
        for transformer, steps in split:
            session = step_cache(
                transformer,
                chosen,
                steps=steps,
                guided=guided,
                first_step=first,
                mag_ratios=MAG_RATIOS.get(model, ()),
            )
            sessions.append(stack.enter_context(session))
            first += steps
        yield sessions


def prompt_alignment(device: torch.device, settings: Settings) -> int:
    """Multiple to which the prompt's tokens are padded: measured on GPUs only."""
    rates = rates_here(settings.machine) if device.type == "cuda" else None
    return tokens_to_align(settings.prompt_kv.kv_align, rates.aligned if rates else {})


def boundary_ratio(pipeline: Any, sampling: Sampling) -> float | None:
    """The noise level below which the second expert denoises: as set, or the model's."""
    return sampling.boundary_ratio or pipeline.config.get("boundary_ratio")


def split_steps(
    pipeline: Any, timesteps: Sequence[float], boundary: float | None
) -> list[tuple[Any, int]]:
    """The transformers that will denoise, each with its number of steps."""
    experts = transformers_of(pipeline)
    if len(experts) < 2 or boundary is None:
        return [(experts[0], len(timesteps))]
    least = boundary * pipeline.scheduler.config.num_train_timesteps
    high = sum(timestep >= least for timestep in timesteps)
    counts = (high, len(timesteps) - high)
    return [(expert, steps) for expert, steps in zip(experts, counts, strict=True) if steps]
