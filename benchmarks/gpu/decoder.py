"""Case 7: decoding with the VAE, chunk after chunk, by dtype, layout and padding."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.models import CHUNK, FRAMES, Subject, latents, load_decoder, memory, subject
from benchmarks.gpu.session import Facts, Item, Session
from benchmarks.gpu.timing import kernel_ms, relative, time_ms
from wancli.models.vae import StreamingDecoder, denormalize, to_pixels

Decode = Callable[[Tensor], Tensor]  # the next latents to video


def decoding(session: Session) -> Iterator[Item]:
    """Case 7: the VAE in float32, in bfloat16, and what makes it faster."""
    of = subject(session)
    exact = load_decoder(session, of, vae_dtype="float32")
    reference = cache(lambda: _video(session, of, StreamingDecoder(exact).video))
    half = copy.deepcopy(exact).to(torch.float32 if session.small else torch.bfloat16)

    def measure(make: Callable[[], Decode], **flags: bool) -> Callable[[], Facts]:
        return lambda: _measure(session, of, make, reference, flags)

    yield "float32", measure(lambda: StreamingDecoder(exact).video, benchmark=False)
    yield (
        "float32, TF32 (torch's default)",
        measure(lambda: StreamingDecoder(exact).video, benchmark=False, allow_tf32=True),
    )
    yield "bfloat16", measure(lambda: StreamingDecoder(half).video, benchmark=False)
    yield "bfloat16, cudnn.benchmark", measure(lambda: StreamingDecoder(half).video)
    yield "kernels, bfloat16", lambda: _kernels(session, of, StreamingDecoder(half).video)
    yield "to pixels", lambda: _to_pixels(session, of)
    narrow = channels_last(copy.deepcopy(half))
    yield "bfloat16, NDHWC", measure(lambda: StreamingDecoder(narrow).video)
    own_padding(half)
    yield "bfloat16, own padding", measure(lambda: whole(half, 1))
    own_padding(narrow)
    yield "bfloat16, NDHWC, own padding", measure(lambda: whole(narrow, 1))
    yield "bfloat16, NDHWC, own padding, 3 latents", measure(lambda: whole(narrow, 3))
    yield (
        "kernels, NDHWC, own padding, 3 latents",
        lambda: _kernels(session, of, whole(narrow, 3)),
    )
    if not session.small:
        narrow.decoder.forward = torch.compile(narrow.decoder.forward, dynamic=False)
        yield "bfloat16, NDHWC, own padding, compiled, 3", measure(lambda: whole(narrow, 3))
        yield "bfloat16, NDHWC, own padding, compiled, 1", measure(lambda: whole(narrow, 1))


def channels_last(vae: Any) -> Any:
    """The VAE with its kernels' channels last."""
    for parameter in vae.parameters():
        order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(parameter.ndim)
        if order:
            parameter.data = parameter.data.contiguous(memory_format=order)
    return vae


def own_padding(vae: Any) -> None:
    """Let each convolution pad by itself in space, and `F.pad` in time only."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module.forward = partial(_convolve, module)


def _convolve(conv: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    missing = conv._padding[4]
    if cache_x is not None and missing:
        x, missing = torch.cat([cache_x, x], 2), missing - cache_x.shape[2]
    if missing:
        x = functional.pad(x, (0, 0, 0, 0, missing, 0))
    side = (0, conv._padding[2], conv._padding[0])
    return functional.conv3d(x, conv.weight, conv.bias, conv.stride, side)


def whole(vae: Any, latents_a_call: int) -> Decode:
    """Decode `latents_a_call` latents in a call of the decoder; the video's first alone."""
    convolutions = sum(isinstance(m, WanCausalConv3d) for m in vae.decoder.modules())
    states: list[Any] = [None] * convolutions
    order = torch.contiguous_format
    if vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d):
        order = torch.channels_last_3d

    def call(some: Tensor) -> Tensor:
        prepared = vae.post_quant_conv(denormalize(vae, some)).contiguous(memory_format=order)
        out = vae.decoder(prepared, feat_cache=states, feat_idx=[0], first_chunk=states[0] is None)
        video: Tensor = unpatchify(out, vae.config.patch_size or 1).clamp(-1, 1)
        return video

    @torch.no_grad()
    def decode(some: Tensor) -> Tensor:
        head = 1 if states[0] is None else 0
        parts = [some[:, :, :1]] if head else []
        parts += torch.split(some[:, :, head:], latents_a_call, 2)
        return torch.cat([call(part) for part in parts], 2)

    return decode


FAST = {"benchmark": True, "allow_tf32": False}


def _measure(
    session: Session,
    of: Subject,
    make: Callable[[], Decode],
    reference: Callable[[], Tensor],
    flags: Mapping[str, bool],
) -> Facts:
    """Milliseconds of a late chunk, frames per second, and the error of the first 3 latents."""
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    chunks = [latents(session, of, seed=seed) for seed in range(2)]
    with torch.backends.cudnn.flags(**{**FAST, **flags}):
        decode = make()
        video = decode(chunks[0]).float()
        decode(chunks[1])
        times = time_ms(lambda: decode(chunks[1]), session.device, budget_s=1.0, least=3)
    return {
        "decode_fps": round(1000 * FRAMES / times["ms"], 2),
        "ms_per_latent": round(times["ms"] / CHUNK, 2),
        **times,
        "error": relative(video, reference()),
        "psnr_db": _psnr(video, reference()),
        **memory(session),
    }


def _video(session: Session, of: Subject, decode: Decode) -> Tensor:
    """The first chunk's video, without TF32."""
    with torch.backends.cudnn.flags(benchmark=False, allow_tf32=False):
        return decode(latents(session, of, seed=0)).float()


def _psnr(video: Tensor, exact: Tensor) -> float | None:
    error = float(((video - exact) / 2).square().mean())
    return round(-10 * math.log10(error), 1) if error else None


def _kernels(session: Session, of: Subject, decode: Decode) -> Facts:
    some = latents(session, of, seed=0)
    with torch.backends.cudnn.flags(**FAST):
        for _ in range(2):
            decode(some)
        return kernel_ms(lambda: decode(some), session.device)


def _to_pixels(session: Session, of: Subject) -> Facts:
    """A chunk's video to uint8 on the CPU."""
    size = (1, 3, FRAMES, of.height, of.width)
    video = torch.rand(size, device=session.device) * 2 - 1
    return time_ms(lambda: to_pixels(video), session.device)
