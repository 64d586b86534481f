"""The scheduler that walks a list, held to loops written out by hand in float64."""

import pytest
import torch

from wancli.config.settings import Sampling
from wancli.generation.flow import few_step, few_step_levels
from wancli.generation.schedulers import ListedScheduler, clip_scheduler

STEPS, SHIFT = (1000, 750, 500, 250), 5.0
SIGMAS = [SHIFT * t / 1000 / (1 + (SHIFT - 1) * t / 1000) for t in STEPS]


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def velocity(latents: torch.Tensor, timestep: float) -> torch.Tensor:
    return torch.sin(3 * latents) + timestep / 1000


def walk(scheduler: ListedScheduler, latents: torch.Tensor) -> torch.Tensor:
    for timestep in scheduler.timesteps:
        output = velocity(latents, timestep.item())
        (latents,) = scheduler.step(output, timestep, latents, return_dict=False)
    return latents


def make(scheduler: str, seed: int = 0, **settings: object) -> ListedScheduler:
    sampling = Sampling(
        scheduler=scheduler, steps_list=",".join(map(str, STEPS)), flow_shift=SHIFT, **settings
    )
    made: ListedScheduler = clip_scheduler({}, sampling, drawn(seed))
    return made


def test_a_list_at_shift_5_gives_the_timesteps_that_distilled_loras_were_trained_at():
    # diffusers' Euler spaces 4 steps at 1000, 910, 717 and 24.
    expected = torch.tensor([1000, 937.5, 2500 / 3, 625])
    assert torch.allclose(make("euler").timesteps, expected, rtol=1e-6)
    assert torch.allclose(make("euler").sigmas, torch.tensor([*expected / 1000, 0]).double())
    assert make("euler", warp_steps=False).timesteps.tolist() == list(STEPS)


def test_a_list_may_have_spaces_and_fractions():
    sampling = Sampling(scheduler="euler", steps_list="1000, 987.5", flow_shift=1.0)
    assert clip_scheduler({}, sampling, drawn(0)).timesteps.tolist() == [1000.0, 987.5]
    assert sampling.steps_list == "1000,987.5"  # as in a preset, and in the hash


def test_euler_goes_down_the_list_as_written_out_in_float64():
    start = torch.randn(1, 2, 3, 4, 4, generator=drawn(1), dtype=torch.float64)
    latents = start
    for sigma, after in zip(SIGMAS, [*SIGMAS[1:], 0.0], strict=True):
        latents = latents + (after - sigma) * velocity(latents, 1000 * sigma)
    assert torch.allclose(walk(make("euler"), start), latents, rtol=0, atol=1e-6)


def test_few_step_renoises_as_written_out_in_float64_with_the_noise_of_the_seed():
    start = torch.randn(1, 2, 3, 4, 4, generator=drawn(1), dtype=torch.float64)
    noises, latents = drawn(7), start
    for sigma, after in zip(SIGMAS, [*SIGMAS[1:], 0.0], strict=True):
        clean = latents - sigma * velocity(latents, 1000 * sigma)
        fresh = torch.randn(start.shape, generator=noises).double() if after else 0
        latents = (1 - after) * clean + after * fresh
    assert torch.allclose(walk(make("few-step", seed=7), start), latents, rtol=0, atol=1e-6)


def test_a_clip_renoises_as_a_rollout_does():
    shape, noises = (1, 2, 3, 4, 4), drawn(3)
    draws = [torch.randn(shape, generator=noises) for _ in STEPS]
    levels = few_step_levels(STEPS, shift=SHIFT, warp=True)
    *_, last = few_step(velocity, lambda step: draws[step], levels)
    generator = drawn(3)
    start = torch.randn(shape, generator=generator)
    # The scheduler's timesteps are float32, as those of diffusers' are.
    clip = walk(ListedScheduler(levels, generator), start)
    assert torch.allclose(clip, last.latents, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheduler", ["few-step", "euler"])
def test_a_video_to_transform_starts_at_the_level_of_its_first_step(scheduler: str):
    listed, clean, noise = make(scheduler), torch.ones(1, 1, 1, 2, 2), torch.full((1,), 3.0)
    noisy = listed.add_noise(clean, noise, listed.timesteps[1:2])
    assert torch.allclose(noisy, torch.tensor(1 - SIGMAS[1] + 3 * SIGMAS[1]))
