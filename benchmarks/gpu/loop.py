"""Case 9: whole rollouts through `wancli.rollout`: denoise, decode, and frames in memory."""

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file

import wancli
from benchmarks.gpu.models import CHUNK, FRAMES, Subject, memory, subject
from benchmarks.gpu.session import Facts, Item, Session

LATE = 6  # chunks after the window is full
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "compiled": {"compile": True},
    "eager": {},
    "fp8-dynamic, compiled": {"compile": True, "quantize": "fp8-dynamic"},
}


def rollouts(session: Session) -> Iterator[Item]:
    """Case 9: frames per second by the clock, with the VAE."""
    for name, settings in VARIANTS.items():
        if settings and session.device.type != "cuda":
            continue
        for window in (9, 21, 12):
            if window == 9 or name == "compiled":
                yield f"{name}, window {window}", partial(_rollout, session, window, settings)
    yield "eager, window 9, MP4", partial(_rollout, session, 9, {}, writes=True)


def _rollout(
    session: Session, window: int, settings: Mapping[str, Any], *, writes: bool = False
) -> Facts:
    """A late chunk by the clock; the parts of a late chunk in the record."""
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    of, times = subject(session), list[float]()
    full = window // CHUNK
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "video.mp4" if writes else None
        started = perf_counter()
        stream = wancli.rollout(
            "x", model=of.name, seed=1, output=output, prompt_embeds=_embeddings(of, folder),
            chunks=full + (1 if session.small else LATE), rolling_window=window, guidance_scale=1.0,
            sampler="few-step", steps_list="1000,750,500,250", size=f"{of.width}x{of.height}",
            device=session.device.type, **settings,
        )  # fmt: skip
        for _ in stream:
            times.append(perf_counter())
    late = times[full - 1 :]
    record = stream.record or {}
    return {
        "wall_fps": round(FRAMES * (len(late) - 1) / (late[-1] - late[0]), 2),
        "first_chunk_s": round(times[0] - started, 2),
        **_parts(record["timings"]["chunks"][full:]),
        "record_fps": {k: round(v, 2) for k, v in record["timings"]["fps"].items()},
        **memory(session),
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


def _embeddings(of: Subject, folder: str) -> Path:
    from wancli.catalog.hf_configs import part_config

    spec, path = of.spec, Path(folder) / "embeddings.safetensors"
    size = (1, spec.text_length, part_config(spec.wan, "transformer")["text_dim"])
    generator = torch.Generator().manual_seed(0)
    save_file({"prompt_embeds": torch.randn(size, generator=generator)}, path)
    return path
