"""Case 7: decoding with the VAE, chunk after chunk: exact, and fast in whole and in parts."""

import copy
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.models import CHUNK, FRAMES, latents, load_decoder, memory, subject
from benchmarks.gpu.session import Facts, Item, Session
from benchmarks.gpu.timing import cudnn, kernel_ms, relative, time_ms
from wancli.models.fast_decoder import DecoderSpeedups, speed_up_decoder
from wancli.models.vae import StreamingDecoder

Decode = Callable[[Tensor], Tensor]  # the next latents to video
HALF = torch.bfloat16
FAST = DecoderSpeedups(dtype=HALF)
PARTS = {
    "fast, but NCDHW": DecoderSpeedups(dtype=HALF, channels_last=False),
    "fast, but 1 latent a call": DecoderSpeedups(dtype=HALF, latents_per_call=1),
    "fast, but padded by copying": DecoderSpeedups(dtype=HALF, pad_in_convolution=False),
    "fast, but cuDNN's own choice": DecoderSpeedups(dtype=HALF, benchmark=False),
    "fast, in float32": DecoderSpeedups(),
}


def decoding(session: Session) -> Iterator[Item]:
    """Case 7: the VAE as diffusers decodes, in float32, and fast."""
    exact, measure = _measurer(session)
    fast = _sped_up(exact, FAST)
    yield "fast", partial(measure, fast)
    yield "float32", partial(measure, exact)
    if session.device.type == "cuda":
        yield "fast, kernels", partial(_kernels, session, fast)


def decoding_compiled(session: Session) -> Iterator[Item]:
    """Case 7: the same compiled, and in other precisions; on CUDA only."""
    if session.device.type != "cuda":
        return
    exact, measure = _measurer(session)
    yield "bfloat16", partial(measure, copy.deepcopy(exact).to(HALF))
    yield "float32, TF32 (torch's default)", partial(measure, exact, tf32=True)
    compiled = _sped_up(exact, DecoderSpeedups(dtype=HALF, compiled=True))
    yield "fast, compiled", partial(measure, compiled)
    yield "fast, compiled, kernels", partial(_kernels, session, compiled)


def decoding_parts(session: Session) -> Iterator[Item]:
    """Case 7: fast decoding without each of its parts."""
    exact, measure = _measurer(session)
    for name, speedups in PARTS.items():
        yield name, partial(measure, _sped_up(exact, speedups))


def _measurer(session: Session) -> tuple[Any, Callable[..., Facts]]:
    """The VAE in float32, and what measures another with its error to it."""
    exact = _exact(session)
    reference = cache(lambda: _video(session, StreamingDecoder(exact).video))
    return exact, partial(_measure, session, reference)


def _exact(session: Session) -> Any:
    return load_decoder(session, subject(session), vae_dtype="float32", vae_exact=True)


def _sped_up(exact: Any, speedups: DecoderSpeedups) -> Any:
    vae = copy.deepcopy(exact)
    speed_up_decoder(vae, speedups)
    return vae


def _measure(
    session: Session, reference: Callable[[], Tensor], vae: Any, *, tf32: bool = False
) -> Facts:
    """Milliseconds of a late chunk, frames per second, and the error of the first one."""
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    chunks = [latents(session, subject(session), seed=seed) for seed in range(2)]
    with cudnn(tf32=tf32):
        decode = StreamingDecoder(vae).video
        video = decode(chunks[0]).float()
        times = time_ms(lambda: decode(chunks[1]), session.device, budget_s=0.6, least=2)
    facts = {
        "decode_fps": round(1000 * FRAMES / times["ms"], 2),
        "ms_per_latent": round(times["ms"] / CHUNK, 2),
        **times,
        **memory(session),
    }
    return facts | {"error": relative(video, reference()), "psnr_db": _psnr(video, reference())}


def _video(session: Session, decode: Decode) -> Tensor:
    """The first chunk's video, without TF32."""
    with cudnn():
        return decode(latents(session, subject(session), seed=0)).float()


def _psnr(video: Tensor, exact: Tensor) -> float | None:
    error = float(((video - exact) / 2).square().mean())
    return round(-10 * math.log10(error), 1) if error else None


def _kernels(session: Session, vae: Any) -> Facts:
    some, decode = latents(session, subject(session), seed=0), StreamingDecoder(vae).video
    for _ in range(2):
        decode(some)
    return kernel_ms(lambda: decode(some), session.device)
