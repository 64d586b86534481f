"""Cases 5 and 6: the causal denoiser, chunk after chunk with a full window."""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.models import (
    CHUNK,
    FRAMES,
    TIMESTEPS,
    Subject,
    latents,
    load_transformer,
    subject,
    text,
)
from benchmarks.gpu.session import Facts, Item, Session
from benchmarks.gpu.timing import Marks, kernel_ms, relative, wait
from wancli.catalog.geometry import Span, WindowConfig
from wancli.rollouts.denoiser import CausalDenoiser, PromptPair, causal



def eager(session: Session) -> Iterator[Item]:
    """Case 5: the denoiser as it is, its error, where it waits, and its kernels."""
    of = subject(session)
    transformer = load_transformer(session, of)
    for window in (9, 21):
        yield f"window {window}", rollout_of(session, of, transformer, window)
    yield "error", lambda: {"error": relative(*_two_chunks(session, of, transformer))}
    yield "waits, window 9", lambda: _waits(session, of, transformer)
    yield "kernels of a forward, window 9", lambda: _kernels(session, of, transformer)
    yield "window 12", rollout_of(session, of, transformer, 12)
    yield "window 12, sink 3", rollout_of(session, of, transformer, 12, sink=3)


@contextmanager
def denoiser(
    session: Session, of: Subject, transformer: Any, window: int, *, sink: int = 0
) -> Iterator[CausalDenoiser]:
    """A causal denoiser with a prompt."""
    config = WindowConfig(window, sink, CHUNK, of.shape.tokens_per_frame)
    rope = "sink" if sink else "absolute"
    with causal(transformer, config, rope=rope) as model:  # type: ignore[arg-type]
        model.set_prompt(PromptPair(text(session, of, transformer)))
        yield model


def rollout_of(
    session: Session, of: Subject, transformer: Any, window: int, *, sink: int = 0
) -> Callable[[], Facts]:
    """Milliseconds of a late chunk by events and by the clock, and frames per second."""

    def run() -> Facts:
        if session.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        noise = [latents(session, of, seed=seed) for seed in range(len(TIMESTEPS) + 1)]
        rows, walls = [], []
        with denoiser(session, of, transformer, window, sink=sink) as model:
            early, late = window // CHUNK, 1 if session.small else LATE
            started = perf_counter()
            for index in range(early + LATE):
                if index == early:
                    wait(session.device)
                    first_s = perf_counter() - started
                since = perf_counter()
                rows.append(chunk(session, model, index, noise))
                walls.append(1000 * (perf_counter() - since))  # of the host: nothing waits yet
            wait(session.device)
            late_s = perf_counter() - started - first_s
        late = [marks.ms() for marks in rows[early:]]
        chunk_ms = median(sum(row) for row in late)
        return {
            "transformer_fps": round(1000 * FRAMES / chunk_ms, 2),
            "wall_fps": round(FRAMES * LATE / late_s, 2),
            "chunk_ms": round(chunk_ms, 2),
            "forwards_ms": [round(median(column), 2) for column in zip(*late, strict=True)],
            "host_ms": round(median(walls[early:]), 2),
            "filling_s": round(first_s, 2),
            **memory(session),
        }

    return run


def chunk(session: Session, model: CausalDenoiser, index: int, noise: list[Tensor]) -> Marks:
    """Denoise a chunk; a mark after each forward."""
    model.begin(Span(index, index * CHUNK, CHUNK))
    marks = Marks(session.device)
    for noisy, timestep in zip(noise, TIMESTEPS, strict=False):
        model.velocity(noisy, timestep)
        marks.mark()
    model.commit(noise[-1], 0.0)
    marks.mark()
    return marks


def _two_chunks(session: Session, of: Subject, transformer: Any) -> tuple[Tensor, Tensor]:
    """The second chunk's velocity, and the same in float32."""
    return velocity_of(session, of, transformer), reference(session, of, transformer)


def velocity_of(session: Session, of: Subject, transformer: Any) -> Tensor:
    """The second chunk's velocity."""
    with denoiser(session, of, transformer, 9) as model:
        model.begin(Span(0, 0, CHUNK))
        model.commit(latents(session, of, seed=0), 0.0)
        model.begin(Span(1, CHUNK, CHUNK))
        return model.velocity(latents(session, of, seed=1), TIMESTEPS[1])


def reference(session: Session, of: Subject, transformer: Any) -> Tensor:
    """The same in float32."""
    return velocity_of(session, of, copy.deepcopy(transformer).float())


def _waits(session: Session, of: Subject, transformer: Any) -> Facts:
    """Where a chunk waits for the device: places and counts."""
    noise = [latents(session, of, seed=seed) for seed in range(len(TIMESTEPS) + 1)]
    with denoiser(session, of, transformer, 9) as model:
        for index in range(4):
            chunk(session, model, index, noise)
        wait(session.device)
        with warnings.catch_warnings(record=True) as caught, _sync_warnings(session.device):
            warnings.simplefilter("always")
            chunk(session, model, 4, noise)
    places = Counter(f"{'/'.join(w.filename.split('/')[-3:])}:{w.lineno}" for w in caught)
    return {"waits": sum(places.values()), "places": dict(places.most_common(12))}


@contextmanager
def _sync_warnings(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _kernels(session: Session, of: Subject, transformer: Any) -> Facts:
    noise = [latents(session, of, seed=seed) for seed in range(len(TIMESTEPS) + 1)]
    with denoiser(session, of, transformer, 9) as model:
        for index in range(4):
            chunk(session, model, index, noise)
        model.begin(Span(4, 4 * CHUNK, CHUNK))
        model.velocity(noise[0], TIMESTEPS[0])
        return kernel_ms(lambda: model.velocity(noise[1], TIMESTEPS[1]), session.device)


def memory(session: Session) -> Facts:
    """Peak bytes of the device in GiB."""
    if session.device.type != "cuda":
        return {}
    return {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
