"""Case 9: whole rollouts through `wancli.rollout`: denoise, decode, and frames in memory."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file

import wancli
from benchmarks.gpu.models import CHUNK, FRAMES, Subject, subject
from benchmarks.gpu.session import Facts, Item, Session
from wancli.catalog.hf_configs import part_config

LATE = 6  # chunks after the window is full


Start = Callable[..., "wancli.RolloutStream"]  # `rollout` of a loaded model, or wancli's


def rollouts(session: Session) -> Iterator[Item]:
    """Case 9: frames per second by the clock, with the VAE; on a CPU not compiled."""
    cuda = session.device.type == "cuda"
    with wancli.load(subject(session).name, device=session.device.type, compile=cuda) as model:
        yield from _items(session, "compiled" if cuda else "eager", model.rollout, 21)


def more_rollouts(session: Session) -> Iterator[Item]:
    """Case 9: the same eager, with diffusers' own decoding, and with products in fp8."""
    if session.device.type != "cuda":
        return
    start: Start = partial(wancli.rollout, model=subject(session).name, device="cuda")
    yield from _items(session, "eager", start)
    yield from _items(session, "eager, --vae-exact", partial(start, vae_exact=True))
    # not loaded once: weights to quantize are drawn on the CPU, and the text encoder's are many
    fp8 = partial(start, compile=True, quantize="fp8-dynamic")
    yield from _items(session, "fp8-dynamic, compiled", fp8)


def _items(session: Session, name: str, start: Start, *others: int) -> Iterator[Item]:
    with tempfile.TemporaryDirectory() as folder:
        embeddings = _embeddings(subject(session), Path(folder) / "embeddings.safetensors")
        start = partial(start, "x", seed=1, prompt_embeds=embeddings)
        written = partial(start, output=Path(folder) / "video.mp4")
        yield f"{name}, window 9", partial(_rollout, session, start, 9)
        yield f"{name}, window 9, MP4", partial(_rollout, session, written, 9)
        for window in others:
            yield f"{name}, window {window}", partial(_rollout, session, start, window)


def _rollout(session: Session, start: Start, window: int) -> Facts:
    """A late chunk by the clock; the parts of a late chunk in the record."""
    of, times, full = subject(session), list[float](), window // CHUNK
    started = perf_counter()
    stream = start(
        chunks=full + (2 if session.small else LATE), rolling_window=window, guidance_scale=1.0,
        scheduler="few-step", steps_list="1000,750,500,250", size=f"{of.width}x{of.height}",
    )  # fmt: skip
    for _ in stream:
        times.append(perf_counter())
    record, late = stream.record or {}, times[full - 1 :]
    return {
        "wall_fps": round(FRAMES * (len(late) - 1) / (late[-1] - late[0]), 2),
        "first_chunk_s": round(times[0] - started, 2),
        "compile_s": round(record["timings"].get("compile_s", 0.0), 2),
        "kernel": record["env"]["attention"],
        **_parts(record["timings"]["chunks"][full:-1]),  # the last one has no clean pass
        "record_fps": {k: round(v, 2) for k, v in record["timings"]["fps"].items()},
        "memory": record["memory"],
    }


def _parts(rows: list[dict[str, Any]]) -> Facts:
    """Medians of a chunk's parts, as the record has them."""
    transformer = median(sum(row["steps_ms"]) + row["clean_ms"] for row in rows)
    others = {
        name: round(median(row[name] for row in rows), 2)
        for name, value in rows[-1].items()
        if name.endswith("_ms") and isinstance(value, (int, float))
    }
    return {"transformer_fps": round(1000 * FRAMES / transformer, 2), **others}


def _embeddings(of: Subject, path: Path) -> Path:
    """A file of random prompt embeddings."""
    spec = of.spec
    size = (1, spec.text_length, part_config(spec.wan, "transformer")["text_dim"])
    generator = torch.Generator().manual_seed(0)
    save_file({"prompt_embeds": torch.randn(size, generator=generator)}, path)
    return path
