"""Components are moved to the device in turn; each call offloads the previous one."""

from typing import Any

import pytest
import torch
from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped]
from torch import nn

from tests.fakes import tiny_pipeline
from wancli.catalog.geometry import Span, WindowConfig
from wancli.models.offload import OffloadHook, OffloadManager, ResidentHook, place
from wancli.models.vae import StreamingDecoder
from wancli.rollouts.denoiser import PromptPair, causal

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class Part(nn.Module):
    """Logs the devices it is moved to; it has no weights to move."""

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
    manager = OffloadManager(GPU)
    high, low = (
        add_hook_to_module(Part(name, log), OffloadHook(manager)) for name in ("high", "low")
    )
    for part in (high, high, low, high):
        assert part() == part.name
    assert log == [
        ("high", "cuda"), ("high", "cpu"), ("low", "cuda"), ("low", "cpu"), ("high", "cuda"),
    ]  # fmt: skip


def test_after_a_component_did_not_fit_another_is_onloaded_again():
    log: list[tuple[str, str]] = []

    class Large(Part):
        def to(self, device: torch.device) -> "Part":  # type: ignore[override]
            super().to(device)
            if device == GPU:
                raise torch.OutOfMemoryError
            return self

    manager, high, low = OffloadManager(GPU), Part("high", log), Large("low", log)
    manager.onload(high)
    with pytest.raises(torch.OutOfMemoryError):
        manager.onload(low)
    manager.onload(high)
    assert log == [
        ("high", "cuda"), ("high", "cpu"), ("low", "cuda"), ("low", "cpu"), ("high", "cuda"),
    ]  # fmt: skip


def test_resident_components_report_their_device():
    pipeline = tiny_pipeline()
    place(pipeline, CPU, "model", stays=("vae",))
    assert isinstance(pipeline.vae._hf_hook, ResidentHook)
    assert isinstance(pipeline.transformer._hf_hook, OffloadHook)


def test_group_offload_leaves_the_vae_where_it_is():
    pipeline = tiny_pipeline()
    place(pipeline, CPU, "group")
    hooked = [
        any(hasattr(module, "_diffusers_hook") for module in part.modules())
        for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae)
    ]
    assert hooked == [True, True, False]


def roll(mode: str | None) -> tuple[torch.Tensor, Any]:
    """Latents and frames of two chunks."""
    pipeline = tiny_pipeline()
    if mode:
        place(pipeline, CPU, mode, stays=("vae",))
    text = torch.ones(1, 9, 16)
    frames, chunks = StreamingDecoder(pipeline.vae), []
    decoded = []
    with causal(pipeline.transformer, WindowConfig(4, 0, 2, 6)) as model:
        assert model.device == CPU
        for first in (0, 2):
            model.set_prompt(PromptPair(text))
            model.begin(Span(first // 2, first, 2))
            latents = torch.full((1, 4, 2, 4, 6), 0.5)
            for timestep in (900.0, 500.0):
                latents = latents - 0.1 * model.velocity(latents, timestep)
            chunks.append(latents)
            decoded.append(torch.from_numpy(frames(latents)))
            model.commit(latents, 0.0)
    return torch.cat(chunks, 2), torch.cat(decoded)


@pytest.mark.parametrize("mode", ["model", "group", "sequential"])
def test_chunks_are_bit_identical_when_offloaded(mode: str):
    for one, other in zip(roll(mode), roll(None), strict=True):
        assert torch.equal(one, other)
