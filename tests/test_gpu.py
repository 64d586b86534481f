"""Whole videos on a CUDA GPU: `make test-gpu`."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

import wancli
from wancli.catalog.local import find_spec
from wancli.errors import CapacityError
from wancli.models.random_weights import random_part

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MODES = ("model", "group", "sequential")


@cache
def clip(mode: str = "none", dtype: str = "auto", device: str = DEVICE) -> wancli.Video:
    settings: Any = {"steps": 2, "device": device, "offload": mode, "dtype": dtype}
    return wancli.generate("a red circle", seed=1, **settings)


def frames_of_a_rollout(mode: str) -> np.ndarray[Any, Any]:
    # Two steps: offloading by group and by layer copies thousands of small weights a forward.
    settings: Any = {"chunks": 2, "steps": 2, "device": DEVICE, "offload": mode}
    stream = wancli.rollout("a red circle", seed=1, **settings)
    return np.concatenate([chunk.frames for chunk in stream])


@cache
def rolled() -> np.ndarray[Any, Any]:
    return frames_of_a_rollout("none")


@pytest.mark.parametrize("mode", MODES)
def test_an_offloaded_clip_is_bit_identical(mode: str):
    plain, offloaded = clip(), clip(mode)
    assert offloaded.record["memory"]["offload"] == mode
    assert np.array_equal(offloaded.frames, plain.frames)
    assert offloaded.latents is not None
    assert plain.latents is not None
    assert torch.equal(offloaded.latents, plain.latents)


@pytest.mark.parametrize("mode", MODES)
def test_an_offloaded_rollout_is_bit_identical(mode: str):
    assert np.array_equal(frames_of_a_rollout(mode), rolled())


def test_a_seed_gives_the_same_video_twice():
    clip.cache_clear()
    first = clip()
    clip.cache_clear()
    assert np.array_equal(clip().frames, first.frames)
    assert np.array_equal(frames_of_a_rollout("none"), rolled())


def test_a_seed_gives_nearly_the_video_of_a_cpu():
    ours, theirs = (clip(dtype="float32", device=device).latents for device in (DEVICE, "cpu"))
    assert ours is not None
    assert theirs is not None
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_random_weights_are_drawn_alike_twice():
    spec = find_spec("random:wan2.1-t2v-1.3b", layers=1)
    options: Any = {"dtype": torch.bfloat16, "device": torch.device(DEVICE)}
    first, second = (
        random_part(WanTransformer3DModel, spec, "transformer", **options) for _ in range(2)
    )
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@contextmanager
def at_most(more: int) -> Iterator[None]:
    """Let this process reserve that many more bytes of GPU memory."""
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_model_that_does_not_fit_is_exit_code_5(wancli: Any):
    with at_most(2 * 2**20):
        result = wancli("generate", "a red circle", "--device", DEVICE, "--steps", 1)
    assert result.code == 5
    assert "does not fit in memory" in result.err


def test_a_video_that_does_not_fit_is_an_error_after_which_the_model_works():
    with wancli.load("demo", device=DEVICE, steps=1) as model:
        with at_most(2**20), pytest.raises(CapacityError, match="does not fit") as error:
            model.generate("a red circle", seed=1)
        assert error.value.exit_code == 5
        assert model.generate("a red circle", seed=1).frames.shape == (33, 96, 96, 3)


SIZE: Any = {"layers": 4, "size": "832x480", "device": DEVICE}


def test_a_clip_needs_the_memory_that_is_planned():
    settings: Any = {"model": "random:wan2.1-t2v-1.3b", "num_frames": 17, "steps": 2}
    planned = wancli.plan(**settings, **SIZE)
    record = wancli.generate("a cat", seed=1, **settings, **SIZE).record
    check_peak(record, planned)


def test_a_rollout_needs_the_memory_that_is_planned():
    settings: Any = {"model": "random:self-forcing", "chunks": 5, "rolling_window": 9}
    planned = wancli.plan(**settings, **SIZE)
    torch.cuda.reset_peak_memory_stats()
    with wancli.rollout("a cat", seed=1, **settings, **SIZE) as stream:
        for _ in stream:
            pass
    check_peak(stream.record, planned)


def check_peak(record: Any, planned: wancli.VideoPlan) -> None:
    """The most that was in use is within 10 % of the plan."""
    peak = record["memory"]["vram_peak_gib"] * 2**30
    assert planned.needed == pytest.approx(peak, rel=0.1), f"{peak / 2**30:.2f} GiB"
