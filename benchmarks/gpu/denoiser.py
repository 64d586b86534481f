"""Cases 4, 5, 6 and 8: the causal denoiser, chunk after chunk with a full window."""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
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
    machine_of,
    memory,
    subject,
    text,
)
from benchmarks.gpu.session import Facts, Item, Session
from benchmarks.gpu.timing import Marks, kernel_ms, relative, wait
from benchmarks.rollout import concatenating
from wancli.catalog.geometry import Span, WindowConfig
from wancli.config.settings import RopePolicy
from wancli.models.attention import choose_kernel
from wancli.models.optimize import speed_up
from wancli.rollouts.denoiser import CausalDenoiser, PromptPair, causal

LATE = 5  # chunks with a full window, of which times are taken
COMPILED = {"compile": True}
FUSED = {"compile": True, "fuse_qkv": True}
FP8 = {"compile": True, "quantize": "fp8-dynamic"}


def eager(session: Session) -> Iterator[Item]:
    """Case 5: the denoiser as it is, where it waits, and one whose cache is concatenated."""
    transformer = _plain(session)
    yield from _windows(session, "eager", transformer)
    for window in (9, 21):
        yield f"concatenating, window {window}", partial(_concatenating, session, window)
    yield "eager, waits", partial(_waits, session, transformer)


def compiled(session: Session) -> Iterator[Item]:
    """Case 6: the same with compiled blocks."""
    transformer = _copy(session, COMPILED)
    yield from _windows(session, "compiled", transformer)
    yield "compiled, kernels of a forward", partial(_kernels, session, transformer)


def fp8(session: Session) -> Iterator[Item]:
    """Case 8: the same with products in fp8."""
    if session.device.type == "cuda":
        yield from _windows(session, "fp8-dynamic, compiled", _copy(session, FP8))


def more(session: Session) -> Iterator[Item]:
    """Case 6: other windows, and fused projections."""
    for name, machine in {"compiled": COMPILED, "eager": {}}.items():
        transformer = _copy(session, machine)
        yield f"{name}, window 12", partial(measure, session, transformer, 12)
        yield f"{name}, window 12, sink 3", partial(measure, session, transformer, 12, sink=3)
    yield from _windows(session, "compiled, fused", _copy(session, FUSED))


def kernels(session: Session) -> Iterator[Item]:
    """Case 4: kernels of one forward by kind; those of a compiled one are in case 6."""
    variants: Mapping[str, Mapping[str, Any]]
    variants = {"eager": {}, "fp8-dynamic, compiled": FP8}
    for name, machine in variants.items():
        if session.device.type == "cuda" or not machine:
            transformer = _copy(session, machine)
            yield f"{name}, kernels of a forward", partial(_kernels, session, transformer)


def _windows(session: Session, name: str, transformer: Any) -> Iterator[Item]:
    yield f"{name}, window 9", partial(measure, session, transformer, 9)
    yield f"{name}, error", partial(_error, session, transformer)
    yield f"{name}, window 21", partial(measure, session, transformer, 21)


def _plain(session: Session) -> Any:
    """The transformer as it was loaded; every case reads it, none changes it."""
    return session.once("transformer", lambda: load_transformer(session, subject(session)))


def _copy(session: Session, machine: Mapping[str, Any]) -> Any:
    transformer = copy.deepcopy(_plain(session))
    speed_up([transformer], machine_of(session, subject(session), **machine))
    return transformer


@contextmanager
def denoiser(
    session: Session, of: Subject, transformer: Any, window: int, *, sink: int = 0
) -> Iterator[CausalDenoiser]:
    """A causal denoiser with a prompt."""
    config = WindowConfig(window, sink, CHUNK, of.shape.tokens_per_frame)
    tokens, rope = CHUNK * of.shape.tokens_per_frame, _rope(sink)
    kernel = choose_kernel([transformer], machine_of(session, of), session.device, tokens=tokens)
    with causal(transformer, config, rope=rope, kernel=kernel) as model:
        model.set_prompt(PromptPair(text(session, of, transformer)))
        yield model


def _rope(sink: int) -> RopePolicy:
    return "sink" if sink else "absolute"


def measure(session: Session, transformer: Any, window: int, *, sink: int = 0) -> Facts:
    """Frames per second of late chunks, by events and by the clock."""
    of = subject(session)
    with denoiser(session, of, transformer, window, sink=sink) as model:
        since = perf_counter()
        spans = [Span(index, index * CHUNK, CHUNK) for index in range(window // CHUNK + LATE)]
        model.warm_up(spans, _noise(session)[0])
        wait(session.device)
        compile_s = round(perf_counter() - since, 2)
        late = late_chunks(session, window, partial(chunk, session, model))
        return {"kernel": model.kernel.name, "compile_s": compile_s, **late}


def late_chunks(session: Session, window: int, run: Callable[[int, list[Tensor]], Marks]) -> Facts:
    """Run chunks until the window is full, then take the times of some more."""
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    noise = _noise(session)
    started = perf_counter()
    for index in range(window // CHUNK):
        run(index, noise)
    wait(session.device)
    filled, rows, host = perf_counter(), list[Marks](), list[float]()
    for index in range(1 if session.small else LATE):
        since = perf_counter()
        rows.append(run(window // CHUNK + index, noise))
        host.append(1000 * (perf_counter() - since))
    wait(session.device)
    wall_s, late = perf_counter() - filled, [marks.ms() for marks in rows]
    chunk_ms = median(sum(row) for row in late)
    return {
        "transformer_fps": round(1000 * FRAMES / chunk_ms, 2),
        "wall_fps": round(FRAMES * len(rows) / wall_s, 2),
        "chunk_ms": round(chunk_ms, 2),
        "chunks_ms": [round(sum(row), 2) for row in late],
        "forwards_ms": [round(median(column), 2) for column in zip(*late, strict=True)],
        "host_ms": round(median(host), 2),
        "filling_s": round(filled - started, 2),
        **memory(session),
    }


def chunk(session: Session, model: CausalDenoiser, index: int, noise: list[Tensor]) -> Marks:
    """Denoise a chunk; a mark after each forward."""
    marks = Marks(session.device)
    model.begin(Span(index, index * CHUNK, CHUNK))
    for noisy, timestep in zip(noise, TIMESTEPS, strict=False):
        model.velocity(noisy, timestep)
        marks.mark()
    model.commit(noise[-1], 0.0)
    marks.mark()
    return marks


def _concatenating(session: Session, window: int) -> Facts:
    """The same with a cache that every layer concatenates in every forward (diffusers #13569)."""
    of, transformer = subject(session), copy.deepcopy(_plain(session))
    embeddings = text(session, of, transformer).to(transformer.dtype)
    step = concatenating(transformer, embeddings, window * of.shape.tokens_per_frame)

    @torch.no_grad()
    def run(index: int, noise: list[Tensor]) -> Marks:
        marks = Marks(session.device)
        wide = [tensor.to(transformer.dtype) for tensor in noise]
        step(index, wide[:-1], wide[-1])
        marks.mark()
        return marks

    return late_chunks(session, window, run)


def _error(session: Session, transformer: Any) -> Facts:
    """Relative error of the second chunk's velocity to that of the same weights in float32."""
    exact = session.once(
        "velocity", lambda: _velocity(session, copy.deepcopy(_plain(session)).float())
    )
    return {"error": relative(_velocity(session, transformer), exact)}


def _velocity(session: Session, transformer: Any) -> Tensor:
    """The second chunk's velocity."""
    of = subject(session)
    with denoiser(session, of, transformer, 9) as model:
        model.begin(Span(0, 0, CHUNK))
        model.commit(latents(session, of, seed=0), 0.0)
        model.begin(Span(1, CHUNK, CHUNK))
        return model.velocity(latents(session, of, seed=1), TIMESTEPS[1]).float()


def _waits(session: Session, transformer: Any) -> Facts:
    """Where a chunk waits for the device: places and counts."""
    noise = _noise(session)
    with denoiser(session, subject(session), transformer, 9) as model:
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


def _kernels(session: Session, transformer: Any) -> Facts:
    noise = _noise(session)
    with denoiser(session, subject(session), transformer, 9) as model:
        for index in range(4):
            chunk(session, model, index, noise)
        model.begin(Span(4, 4 * CHUNK, CHUNK))
        model.velocity(noise[0], TIMESTEPS[0])
        return kernel_ms(lambda: model.velocity(noise[1], TIMESTEPS[1]), session.device)


def _noise(session: Session) -> list[Tensor]:
    """Latents of the steps, and of the clean pass."""
    of = subject(session)
    return [latents(session, of, seed=seed) for seed in range(len(TIMESTEPS) + 1)]
