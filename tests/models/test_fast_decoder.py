"""The fast decoder is the VAE's own but for rounding, for both Wan VAEs, however it is chunked."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tests.fakes import tiny_vae
from tests.hunyuan import tiny_hunyuan
from tests.models.test_vae import Failing, Whole, stream, wan21_vae, wan22_vae, whole
from wancli.errors import DecodeError
from wancli.generation.denoise import decode
from wancli.models import fast_decoder
from wancli.models.fast_decoder import (
    DecoderSpeedups,
    benchmark_decoder,
    compile_decoder,
    latents_per_call,
    speed_up_decoder,
)
from wancli.models.offload import place
from wancli.models.vae import StreamingDecoder, denormalize, encode

VAES = {"wan2.1": wan21_vae, "wan2.2": wan22_vae}
PARTS: dict[str, dict[str, Any]] = {
    "latents_per_call": {"channels_last": False, "pad_in_convolution": False},
    "pad_in_convolution": {"channels_last": False, "latents_per_call": 1},
    "channels_last": {"pad_in_convolution": False, "latents_per_call": 1},
}
CHUNKS = {1: (1,) * 8, 3: (3, 3, 2), 7: (7, 1)}
FRAMES = 8  # latent frames
# Relative to the norm of the video. Measured: float32 1.1e-6, bfloat16 2.0e-2 (random weights).
FLOAT32, BFLOAT16 = 2e-6, 3e-2


def fast(name: str, **speedups: Any) -> AutoencoderKLWan:
    vae = VAES[name]()
    speed_up_decoder(vae, DecoderSpeedups(**speedups))
    return vae


def streamed(vae: AutoencoderKLWan, latents: Tensor, chunks: Sequence[int]) -> Tensor:
    return torch.cat(list(stream(StreamingDecoder(vae), latents, chunks)), 2)


def relative(video: Tensor, exact: Tensor) -> float:
    return float((video - exact).norm() / exact.norm())


@pytest.fixture(scope="module", params=VAES)
def case(request: pytest.FixtureRequest) -> tuple[str, Whole]:
    return request.param, whole(VAES[request.param](), frames=FRAMES, batch=1)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_any_chunks_decode_to_the_same_video_but_for_rounding(
    case: tuple[str, Whole], chunks: tuple[int, ...]
):
    name, exact = case
    video = streamed(fast(name), exact.latents, chunks)
    assert video.shape == exact.video.shape
    assert not torch.equal(video, exact.video)  # else the fast layers are not used
    assert relative(video, exact.video) < FLOAT32


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_it_changes_rounding_at_most(case: tuple[str, Whole], part: str):
    name, exact = case
    video = streamed(fast(name, **PARTS[part]), exact.latents, (3, 3, 2))
    assert relative(video, exact.video) < FLOAT32


def test_bfloat16_is_as_close_as_its_precision_allows(case: tuple[str, Whole]):
    name, exact = case
    vae = fast(name, dtype=torch.bfloat16)
    video = streamed(vae, exact.latents, (3, 3, 2))
    assert video.dtype == torch.float32
    assert FLOAT32 < relative(video, exact.video) < BFLOAT16


def test_diffusers_own_decode_and_its_tiles_use_it(case: tuple[str, Whole]):
    name, exact = case
    vae = fast(name)
    with torch.no_grad():
        video = vae.decode(denormalize(vae, exact.latents)).sample
    assert relative(video, exact.video) < FLOAT32
    assert not torch.equal(video, exact.video)


def test_hunyuanvideo_gets_a_narrow_decoder_and_no_more():
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    exact, vae = (tiny_hunyuan().vae.eval() for _ in range(2))
    latents = latents[:, : exact.config.latent_channels]
    speed_up_decoder(vae, DecoderSpeedups(dtype=torch.bfloat16))
    assert latents_per_call(vae) == 1
    frames = [decode(each, latents).astype(int) for each in (exact, vae)]
    assert 0 < np.abs(frames[0] - frames[1]).max() <= 4


def test_the_encoder_stays_in_its_dtype_bit_for_bit(case: tuple[str, Whole]):
    name, exact = case
    vae = fast(name, dtype=torch.bfloat16)
    video = exact.video[:, :, :5]
    assert vae.dtype == torch.float32
    assert {p.dtype for p in vae.decoder.parameters()} == {torch.bfloat16}
    assert torch.equal(encode(vae, video), encode(exact.vae, video))


def test_its_layers_keep_the_channels_last():
    vae = fast("wan2.1")
    features = torch.randn(1, 16, 2, 4, 6).contiguous(memory_format=torch.channels_last_3d)
    decoder, state = vae.decoder.decoder, list[Any](["Rep"])
    with torch.no_grad():
        normalized = decoder.norm_out(features[:, : decoder.norm_out.gamma.numel()].clone())
        doubled = decoder.up_blocks[0].upsamplers[0](features, state, [0])
    assert doubled.shape == (1, 8, 4, 8, 12)
    for tensor in (normalized, doubled, state[0]):
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("done", [0, 3], ids=["at the start", "later"])
def test_a_failed_chunk_can_be_decoded_again(case: tuple[str, Whole], done: int):
    name, exact = case
    vae, latents = fast(name), exact.latents
    decoder = StreamingDecoder(vae)
    parts = [decoder.video(latents[:, :, :done])] if done else []
    hook = vae.decoder.decoder.conv_out.register_forward_hook(Failing())
    with pytest.raises(MemoryError):
        decoder.video(latents[:, :, done:])
    hook.remove()
    parts.append(decoder.video(latents[:, :, done:]))
    assert relative(torch.cat(parts, 2), exact.video) < FLOAT32


def test_offloaded_by_layer_it_decodes_the_same_video(case: tuple[str, Whole]):
    name, exact = case
    resident, offloaded = fast(name), fast(name)
    place(SimpleNamespace(components={"vae": offloaded}), torch.device("cpu"), "sequential")
    assert all(weight.is_meta for weight in offloaded.decoder.parameters())  # until it is used
    assert not compile_decoder(offloaded)
    videos = [streamed(vae, exact.latents, (3, 3, 2)) for vae in (resident, offloaded)]
    assert torch.equal(*videos)


def test_its_cache_is_no_larger_than_that_of_the_exact_decoder(case: tuple[str, Whole]):
    name, exact = case
    sizes = []
    for vae in (exact.vae, fast(name)):
        decoder = StreamingDecoder(vae)
        decoder.video(exact.latents)
        sizes.append(decoder.nbytes)
    assert sizes[0] == sizes[1] > 0


def test_non_finite_video_is_rejected_before_clamping():
    vae = tiny_vae()
    torch.nn.init.constant_(vae.decoder.conv_out.bias, float("inf"))
    speed_up_decoder(vae, DecoderSpeedups())
    with pytest.raises(DecodeError, match="not finite"):
        StreamingDecoder(vae)(torch.zeros(1, 4, 1, 2, 2))


def test_cudnn_benchmarks_when_it_should_and_during_a_call_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    vae, during = fast("wan2.1", benchmark=False), []
    vae.decoder.decoder.register_forward_pre_hook(
        lambda *_: during.append(torch.backends.cudnn.benchmark)
    )
    streamed(vae, torch.zeros(1, 16, 1, 4, 6), (1,))
    benchmark_decoder(vae)
    streamed(vae, torch.zeros(1, 16, 1, 4, 6), (1,))
    assert during == [False, True]
    assert not torch.backends.cudnn.benchmark


@pytest.mark.slow
def test_compiled_it_makes_three_graphs_for_each_number_of_channels(
    monkeypatch: pytest.MonkeyPatch,
):
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = {
        function: torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
        for function in (fast_decoder._activate, fast_decoder._activate_biased, fast_decoder._add)
    }
    monkeypatch.setattr(fast_decoder, "_compiled", compiled.__getitem__)
    wide = {"base_dim": 8, "dim_mult": [1, 2, 2, 2]}
    exact = whole(tiny_vae(**wide), frames=12, batch=1)
    vae = tiny_vae(**wide)
    speed_up_decoder(vae, DecoderSpeedups(compiled=True))
    video = streamed(vae, exact.latents, (3,) * 4)
    assert relative(video, exact.video) < FLOAT32
    assert graphs.frame_count == 6


def test_a_plain_vae_decodes_one_latent_per_call():
    assert latents_per_call(tiny_vae()) == 1


def on_gpu(name: str, **speedups: Any) -> AutoencoderKLWan:
    return fast(name, dtype=torch.bfloat16, **speedups).to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", VAES)
def test_the_exact_decoder_on_a_gpu_equals_the_whole_decode(name: str):
    latents = whole(VAES[name](), frames=FRAMES, batch=1).latents.to("cuda")
    vae = VAES[name]().to("cuda")
    with torch.no_grad():
        video = vae.decode(denormalize(vae, latents)).sample
    assert torch.equal(streamed(vae, latents, (3, 3, 2)), video)


@pytest.mark.gpu
@pytest.mark.parametrize("name", VAES)
def test_the_fast_decoder_on_a_gpu_is_as_close_as_bfloat16_allows(name: str):
    exact = whole(VAES[name](), frames=FRAMES, batch=1)
    video = streamed(on_gpu(name), exact.latents.to("cuda"), (3, 3, 2)).cpu()
    assert relative(video, exact.video) < BFLOAT16


@pytest.mark.gpu
def test_activations_on_a_gpu_stay_channels_last():
    vae, layouts = on_gpu("wan2.1"), list[bool]()
    decoder, latents = StreamingDecoder(vae), torch.randn(1, 16, 6, 16, 24, device="cuda")
    decoder.video(latents[:, :, :3])
    for layer in vae.decoder.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.register_forward_pre_hook(
                lambda _layer, args: layouts.append(
                    args[0].is_contiguous(memory_format=torch.channels_last_3d)
                )
            )
    decoder.video(latents[:, :, 3:])
    assert layouts
    assert all(layouts)


@pytest.mark.gpu
def test_a_gpu_finds_video_that_is_not_finite():
    vae = tiny_vae()
    torch.nn.init.constant_(vae.decoder.conv_out.bias, float("nan"))
    speed_up_decoder(vae, DecoderSpeedups(dtype=torch.bfloat16))
    with pytest.raises(DecodeError, match="not finite"):
        StreamingDecoder(vae.to("cuda"))(torch.zeros(1, 4, 1, 2, 2))


@pytest.mark.gpu
@pytest.mark.slow
def test_the_compiled_decoder_on_a_gpu_is_as_close_as_bfloat16_allows():
    torch._dynamo.reset()
    exact = whole(wan21_vae(), frames=FRAMES, batch=1)
    video = streamed(on_gpu("wan2.1", compiled=True), exact.latents.to("cuda"), (3, 3, 2)).cpu()
    assert relative(video, exact.video) < BFLOAT16
