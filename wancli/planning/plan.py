"""Plan a request: derive shapes and step counts, and check combinations, before anything loads."""

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from wancli.catalog.geometry import LatentShape, Span, WindowConfig, latent_shape, lay_out
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import TASKS, TEXT, Family
from wancli.catalog.wan import Architecture
from wancli.config.resolve import Resolved
from wancli.config.settings import (
    PromptKV,
    Rollout,
    RolloutSettings,
    RopePolicy,
    Sampling,
    Settings,
    VideoShape,
)
from wancli.errors import PlanError, PlanWarning
from wancli.planning.distilled import check_distilled
from wancli.planning.inputs import (
    NO_INPUTS,
    InputFiles,
    choose_task,
    effective_steps,
    reference_frames,
    segments,
)
from wancli.planning.listed_steps import (
    check_listed_flags,
    check_listed_steps,
    listed_steps,
    timesteps,
)
from wancli.planning.lora import LoraUse, check_loras
from wancli.planning.offload import (
    check_rollout_vae,
    check_tiling,
    check_vae_decoder,
    offloads,
)
from wancli.planning.rules_family import check_family, check_family_flags
from wancli.planning.rules_machine import (
    check_compile_mode,
    check_generation,
    check_machine,
    check_output,
    check_packed,
    check_rollout,
)
from wancli.planning.rules_rollout import check_window, rope_policy
from wancli.planning.step_caches import (
    WITH_THRESHOLD,
    check_step_cache,
    check_step_cache_task,
    gate_step,
)


@dataclass(frozen=True)
class Plan:
    """Quantities derived from the settings of one video."""

    model: str
    task: str
    shape: LatentShape
    tokens: int  # sequence length in the transformer, reference frames included
    references: int  # latent frames of reference pictures, prepended and not part of the video
    guided: bool
    boundary_ratio: float | None  # noise level (0-1) below which the low-noise expert runs
    steps: int  # denoising steps of all segments; video-to-video skips the first ones
    segments: int  # denoised one after the other
    segment_frames: int  # video frames per segment
    prompt_kv: bool  # whether the prompt's keys and values are computed once
    gate: int | None  # first step that skips the uncond branch
    forwards: int  # transformer calls in total
    offloads: tuple[str, ...]  # modes compatible with the other settings
    duration_s: float
    lora: tuple[LoraUse, ...] = ()  # what becomes of their keys


def make_plan(
    settings: Settings, spec: ModelSpec, inputs: InputFiles = NO_INPUTS, *, task: str | None = None
) -> Plan:
    """Check the combination and derive the plan; the task follows from the inputs by default.

    Raises PlanError for incompatible settings.
    """
    sampling, video = settings.sampling, settings.video
    chosen = choose_task(spec, inputs, task)
    shape = _shape(video, spec, num_frames=video.num_frames)
    loras = _check_experts(settings, spec)
    check_machine(settings.machine)
    check_output(settings.output)
    check_family(settings, spec, chosen.family)
    check_listed_steps(settings, spec, chosen)
    check_generation(settings, chosen.transformer)
    check_tiling(settings)
    check_vae_decoder(settings.machine, chosen)
    _check_prompt_kv(settings.prompt_kv)
    count, segment_frames = segments(chosen, video)
    steps = effective_steps(sampling, chosen) * count
    check_step_cache(settings.step_cache, steps=steps, model=spec.name, layers=spec.shortest)
    check_step_cache_task(settings.step_cache, chosen)
    guided = is_guided(sampling, chosen.family)
    gate = gate_step(settings, chosen, steps=steps, segments=count)
    prepended = reference_frames(chosen, inputs)
    frames = (segment_frames - 1) // spec.strides.temporal + 1 + prepended
    _check_positions(spec, shape, frames=frames)
    tokens = frames * shape.tokens_per_frame
    return Plan(
        model=spec.name,
        task=chosen.name,
        shape=shape,
        tokens=tokens,
        references=prepended,
        guided=guided,
        boundary_ratio=sampling.boundary_ratio or spec.boundary_ratio,
        steps=steps,
        segments=count,
        segment_frames=segment_frames,
        prompt_kv=settings.prompt_kv.prompt_kv and chosen.family.prompt_kv,
        gate=gate,
        forwards=steps + ((gate or steps) if guided else 0),
        offloads=offloads(settings, spec, chosen),
        duration_s=video.num_frames / video.fps,
        lora=loras,
    )


def is_guided(sampling: Sampling, family: Family) -> bool:
    """Whether guidance is on: a step then has an uncond forward, of the negative prompt.

    Never where few-step samples: those models are distilled to run without.
    """
    scale: float = getattr(sampling, family.guidance)
    return scale > 1 and sampling.scheduler != "few-step"


@dataclass(frozen=True)
class RolloutPlan:
    """Quantities derived from the settings of one rollout."""

    model: str
    shape: LatentShape  # of the whole video, context included
    context: tuple[Span, ...]  # chunks of the initial context
    spans: tuple[Span, ...]  # chunks to generate
    window: WindowConfig
    rope: RopePolicy
    guided: bool
    steps: tuple[int, ...]  # denoising steps of every chunk to generate
    forwards: int  # transformer calls in total
    offloads: tuple[str, ...]  # modes compatible with the other settings
    num_frames: int  # video frames in total
    duration_s: float
    lora: tuple[LoraUse, ...] = ()  # what becomes of their keys

    @property
    def start_frames(self) -> int:
        """Latent frames to start from: the initial context, or what the first chunk begins with."""
        return self.spans[0].first_frame + self.spans[0].clean_frames

    def as_json(self) -> dict[str, Any]:
        """The plan with counts instead of the chunks, of which there may be a million."""
        several = ("model", "shape", "window", "spans", "context", "steps")
        return {
            "chunks": len(self.spans),
            "context_chunks": len(self.context),
            "steps": sum(self.steps),
            "model": self.model,
            "shape": asdict(self.shape),
            **{name: getattr(self.window, name) for name in ("window", "sink", "chunk")},
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name not in several},
            "lora": [asdict(use) for use in self.lora],
        }


def make_rollout_plan(
    settings: RolloutSettings, spec: ModelSpec, *, context_frames: int = 0,
    changes: Collection[int] = (), force: bool = False,
) -> RolloutPlan:  # fmt: skip
    """Lay out the chunks after `context_frames` latent frames of initial context.

    `changes` are the chunks at which the prompt changes. Raises PlanError for incompatible
    settings.
    """
    chosen = settings.rollout
    loras = _check_rollout(settings, spec, force=force)
    clean = context_frames if chosen.image_start == "first-frame" and context_frames == 1 else 0
    context, spans = lay_out(
        chosen.chunks,
        chunk_frames=chosen.chunk_frames,
        context=context_frames - clean,
        clean_frames=clean,
        independent_first_frame=chosen.independent_first_frame,
    )
    num_frames = (spans[-1].end - 1) * spec.strides.temporal + 1
    shape = _shape(settings.video, spec, num_frames=num_frames)
    guided = is_guided(settings.sampling, spec.family)
    steps = tuple(len(chunk_steps(settings, span)) or settings.sampling.steps for span in spans)
    window = _window(chosen, shape)
    clean_passes = (len(context) + len(spans) - 1) * spec.experts
    if window.recompute:
        clean_passes = sum(len(recomputed(span, window)) for span in spans) * spec.experts
    return RolloutPlan(
        model=spec.name,
        shape=shape,
        context=context,
        spans=_in_shots(spans, chosen, changes),
        window=window,
        rope=rope_policy(chosen),
        guided=guided,
        steps=steps,
        forwards=(sum(steps) + clean_passes) * (2 if guided else 1),
        offloads=offloads(settings, spec, TASKS[TEXT]),
        num_frames=num_frames,
        duration_s=num_frames / settings.video.fps,
        lora=loras,
    )


def _in_shots(
    spans: tuple[Span, ...], chosen: Rollout, changes: Collection[int]
) -> tuple[Span, ...]:
    """The chunks, with what the shots that begin at `changes` do to them."""
    if not changes or not (chosen.shot_offset or chosen.shot_sink):
        return spans
    begins = sorted(changes)
    return tuple(
        replace(
            span,
            offset=chosen.shot_offset * bisect_right(begins, span.index),
            begins_shot=chosen.shot_sink and span.index in changes,
        )
        for span in spans
    )


def _shape(video: VideoShape, spec: ModelSpec, *, num_frames: int) -> LatentShape:
    return latent_shape(
        num_frames=num_frames,
        width=video.width,
        height=video.height,
        channels=spec.latent_channels,
        strides=spec.strides,
    )


def _check_positions(spec: ModelSpec, shape: LatentShape, *, frames: int) -> None:
    """Raise PlanError for more tokens along an axis than the model has rotary positions.

    Rollouts compute theirs, without end.
    """
    if not isinstance(spec.architecture, Architecture):
        return
    positions, strides = spec.architecture.transformer.positions, spec.strides
    longest = max(frames, *(side // strides.patch for side in (shape.height, shape.width)))
    if longest > positions:
        side = positions * strides.cell
        raise PlanError(
            f"{longest} tokens along one axis: {spec.name} has positions for {positions}.",
            hint=f"at most `num_frames {(positions - 1) * strides.temporal + 1}` and "
            f"`size {side}x{side}`; a rollout may be longer",
        )


def _window(chosen: Rollout, shape: LatentShape) -> WindowConfig:
    """The window, no larger than the whole video of `shape`."""
    return WindowConfig(
        window=min(chosen.rolling_window or shape.frames, shape.frames),
        sink=min(chosen.sink_frames, max(0, shape.frames - chosen.chunk_frames)),
        chunk=chosen.chunk_frames,
        tokens_per_frame=shape.tokens_per_frame,
        trim=chosen.trim,
        recache_by=chosen.recache_by,
        recompute=chosen.kv_recompute,
    )


def recomputed(span: Span, window: WindowConfig) -> range:
    """First frames of the parts in which `kv_recompute` computes a chunk's context; it has an end.

    They are counted from the first that the chunk attends to.
    """
    return range(0, min(window.window - span.frames, span.first_frame), window.chunk)


def chunk_steps(settings: RolloutSettings, span: Span) -> tuple[float, ...]:
    """Listed timesteps of a chunk, the first of which may have its own; empty without a list."""
    first = settings.rollout.first_chunk_steps
    steps = listed_steps(settings.sampling)
    return timesteps(first, "first_chunk_steps") if steps and first and span.index == 0 else steps


def _check_rollout(
    settings: RolloutSettings, spec: ModelSpec, *, force: bool
) -> tuple[LoraUse, ...]:
    """What the LoRAs' keys do. Raises PlanError for what a rollout does not support."""
    if TEXT not in spec.tasks:
        raise PlanError(
            f"{spec.name} is {' and '.join(spec.tasks)}; rollouts take text-to-video models.",
            hint="`model self-forcing`",
        )
    if spec.causal is False and not force:
        raise PlanError(
            f"{spec.name} was not trained to continue its own chunks: they will drift.",
            hint="`model self-forcing`, or `force` to try it anyway",
        )
    check_machine(settings.machine)
    check_output(settings.output)
    check_rollout(settings.machine)
    check_rollout_vae(settings.machine)
    loras = _check_experts(settings, spec)
    check_window(settings.rollout)
    _check_caches(settings, spec)
    return loras


def clip_warnings(spec: ModelSpec) -> tuple[PlanWarning, ...]:
    """A warning about a whole video by a model that was trained for rollouts alone, or none."""
    if spec.clips or spec.random:
        return ()
    text = f"{spec.name} was trained to generate chunk by chunk, and not whole videos."
    return (PlanWarning(text, f"wancli rollout --model {spec.name}; its plan: `chunks 7`"),)


def _check_caches(settings: RolloutSettings, spec: ModelSpec) -> None:
    """Raise PlanError for a lossy cache or attention backend that rollouts do not support."""
    method = settings.step_cache.step_cache
    check_listed_steps(settings, spec, TASKS[TEXT])
    if method not in ("none", "cachedit"):
        raise PlanError(
            f"`step_cache {method}` works only in diffusers' own loop, not in rollouts.",
            hint="`use_cachedit`",
        )
    check_step_cache(settings.step_cache, steps=settings.sampling.steps, layers=spec.layers)
    if settings.step_cache.cfg_gate is not None:
        raise PlanError("`cfg_gate` does not work with rollouts.", hint="drop `cfg_gate`")


def _check_prompt_kv(chosen: PromptKV) -> None:
    """Raise PlanError for options of a prompt K/V cache that is off."""
    aligned = chosen.kv_align.isdigit()
    if not chosen.prompt_kv and (aligned or chosen.free_kv_weights):
        option = "`kv_align`" if aligned else "`free_kv_weights`"
        raise PlanError(f"{option} needs the prompt K/V cache.", hint="drop `no_prompt_kv`")


def _check_experts(settings: Settings, spec: ModelSpec) -> tuple[LoraUse, ...]:
    """What the LoRAs' keys do. Raises PlanError for settings of an expert that is not there."""
    for name in ("guidance_scale_2", "boundary_ratio"):
        if getattr(settings.sampling, name) is not None and spec.experts < 2:
            raise PlanError(
                f"`{name}` needs a model with two experts; {spec.name} has one.",
                hint=f"drop `{name}`",
            )
    check_packed(settings.machine, spec)
    return check_loras(settings.machine.lora, spec)


def check_unused_settings(resolved: Resolved[Any], task: str = TEXT) -> None:
    """Raise PlanError for a flag that would have no effect, or guidance that a LoRA rules out."""
    check_distilled(resolved)
    check_family_flags(resolved, TASKS[task].family)
    check_listed_flags(resolved)
    check_compile_mode(resolved)
    for key in _of_other_tasks(task):
        if resolved.is_explicit(key):
            name = key.partition(".")[2]
            raise PlanError(f"`{name}` does nothing in {task}.", hint=f"drop `{name}`")
    method = resolved.settings.step_cache.step_cache
    for key in filter(resolved.is_explicit, resolved.sources):
        table, _, name = key.rpartition(".")
        if table != "step_cache" or name in ("step_cache", "cfg_gate"):
            continue
        wanted = ("cachedit",) if name != "step_cache_threshold" else WITH_THRESHOLD
        if method not in wanted:
            raise PlanError(
                f"`{name}` does nothing without `step_cache` {' or '.join(wanted)}.",
                hint="`use_cachedit`" if wanted == ("cachedit",) else f"`step_cache {wanted[0]}`",
            )


def unused_settings(settings: Settings, task: str = TEXT) -> dict[str, str]:
    """Why settings that may come from a preset have no effect, by dotted key."""
    sampling, steps = settings.sampling, listed_steps(settings.sampling)
    unused = dict.fromkeys(_of_other_tasks(task), f"not in {task}")
    if steps:
        unused["sampling.steps"] = f"the list has {len(steps)}"
    else:
        listed = ("sampling.warp_steps", "rollout.first_chunk_steps")
        unused |= dict.fromkeys(listed, "no list of timesteps")
    if sampling.steps_list and not steps:
        unused["sampling.steps_list"] = f"not by {sampling.scheduler}"
    if sampling.scheduler == "few-step":
        unused["sampling.guidance_scale"] = "few-step runs without guidance"
    if sampling.negative_prompt and not is_guided(sampling, TASKS[task].family):
        unused["sampling.negative_prompt"] = "guidance is off"
    return unused


def _of_other_tasks(task: str) -> list[str]:
    """Dotted keys of the settings that only other tasks have."""
    keys = ("sampling.strength", "sampling.true_cfg_scale", "video.segment_frames")
    return [key for key in keys if key.partition(".")[2] not in TASKS[task].settings]
