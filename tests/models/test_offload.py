"""Parts come to the device in turns, and are sent back by whoever is next."""

import json
from typing import Any

import pytest
import torch
from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped]
from torch import nn

from tests.fakes import tiny_pipeline
from wancli.catalog.geometry import Span, WindowConfig
from wancli.errors import PlanError
from wancli.models.offload import OffloadHook, OffloadManager, ResidentHook, offload_to, place
from wancli.models.vae import StreamingDecoder
from wancli.rollouts.denoiser import PromptPair, causal

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class Part(nn.Module):
    """Notes where it was sent; it has no weights that could really go."""

    def __init__(self, name: str, log: list[tuple[str, str]]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def to(self, device: torch.device) -> "Part":  # type: ignore[override]
        self.log.append((self.name, device.type))
        return self

    def forward(self) -> str:
        return self.name


def test_a_component_is_onloaded_when_called_and_offloads_the_previous_one():
    log: list[tuple[str, str]] = []
    turns = OffloadManager(GPU)
    high, low = (
        add_hook_to_module(Part(name, log), OffloadHook(turns)) for name in ("high", "low")
    )
    for part in (high, high, low, high):
        assert part() == part.name
    assert log == [
        ("high", "cuda"), ("high", "cpu"), ("low", "cuda"), ("low", "cpu"), ("high", "cuda"),
    ]  # fmt: skip


def test_offload_without_a_gpu_is_refused():
    with pytest.raises(PlanError, match="torch finds none"):
        place(tiny_pipeline(), CPU, "model")
    place(tiny_pipeline(), CPU, "auto")


def test_resident_components_report_their_device():
    pipeline = tiny_pipeline()
    offload_to(pipeline, CPU, "model", stays=("vae",))
    assert isinstance(pipeline.vae._hf_hook, ResidentHook)
    assert isinstance(pipeline.transformer._hf_hook, OffloadHook)


def rolled(way: str | None) -> tuple[torch.Tensor, Any]:
    """Two chunks by hand, and their frames."""
    pipeline = tiny_pipeline()
    if way:
        offload_to(pipeline, CPU, way, stays=("vae",))
    text = torch.ones(1, 9, 16)
    frames, chunks = StreamingDecoder(pipeline.vae), []
    shown = []
    with causal(pipeline.transformer, WindowConfig(4, 0, 2, 6)) as model:
        assert model.device == CPU
        for first in (0, 2):
            model.set_prompt(PromptPair(text))
            model.begin(Span(first // 2, first, 2))
            latents = torch.full((1, 4, 2, 4, 6), 0.5)
            for timestep in (900.0, 500.0):
                latents = latents - 0.1 * model.velocity(latents, timestep)
            chunks.append(latents)
            shown.append(torch.from_numpy(frames(latents)))
            model.commit(latents, 0.0)
    return torch.cat(chunks, 2), torch.cat(shown)


@pytest.mark.parametrize("way", ["model", "group", "sequential"])
def test_chunks_are_the_same_with_model_offload(way: str):
    for one, other in zip(rolled(way), rolled(None), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["model", "group", "sequential"])
def test_the_demo_is_offloaded_and_onloaded_on_cuda(way: str, wancli: Any):
    some = ("--steps", 4, "--seed", 1, "--device", "cuda", "--lossless", "--json")
    plain = json.loads(wancli("generate", "a red circle", *some, "--offload", "none").out)
    said = wancli("generate", "a red circle", *some, "--offload", way, "-o", "offloaded.mp4")
    told = json.loads(said.out)
    assert told["memory"]["offload"] == way
    assert told["memory"]["vram_peak_gib"] <= plain["memory"]["vram_peak_gib"]
    assert told["output"]["framemd5"] == plain["output"]["framemd5"]
    assert wancli("rollout", "a red circle", "--chunks", 2, "--offload", way).code == 0
