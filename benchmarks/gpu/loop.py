"""Case 9: whole rollouts through `wancli.rollout`: denoise, decode, and frames in memory."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
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


def rollouts(session: Session) -> Iterator[Item]:
    """Case 9: frames per second by the clock, with the VAE; on a CPU not compiled."""
    cuda = session.device.type == "cuda"
    yield from _variant(session, "compiled" if cuda else "eager", (9, 21), compile=cuda)


def more_rollouts(session: Session) -> Iterator[Item]:
    """Case 9: the same eager, and with products in fp8."""
    if session.device.type == "cuda":
        yield from _variant(session, "eager", (9,))
        fp8 = {"compile": True, "quantize": "fp8-dynamic"}
        yield from _variant(session, "fp8-dynamic, compiled", (9,), **fp8)


def _variant(session: Session, name: str, windows: Sequence[int], **machine: Any) -> Iterator[Item]:
    of = subject(session)
    with (
        tempfile.TemporaryDirectory() as folder,
        wancli.load(of.name, device=session.device.type, **machine) as model,
    ):
        embeddings = _embeddings(of, Path(folder) / "embeddings.safetensors")
        for window in windows:
            arguments = {"prompt_embeds": embeddings, "rolling_window": window}
            yield f"{name}, window {window}", partial(_rollout, session, model, arguments)
        arguments = {"prompt_embeds": embeddings, "rolling_window": windows[0]}
        arguments |= {"output": Path(folder) / "video.mp4"}
        yield f"{name}, window {windows[0]}, MP4", partial(_rollout, session, model, arguments)


def _rollout(session: Session, model: Any, arguments: Mapping[str, Any]) -> Facts:
    """A late chunk by the clock; the parts of a late chunk in the record."""
    of, times = subject(session), list[float]()
    full = arguments["rolling_window"] // CHUNK
    started = perf_counter()
    stream = model.rollout(
        "x", seed=1, chunks=full + (2 if session.small else LATE), guidance_scale=1.0,
        sampler="few-step", steps_list="1000,750,500,250", size=f"{of.width}x{of.height}",
        **arguments,
    )  # fmt: skip
    for _ in stream:
        times.append(perf_counter())
    record, late = stream.record, times[full - 1 :]
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
