"""Parity of flow matching with the original (see tests/parity/README.md)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wancli.caching.rolling_attention import ExactTimesteps
from wancli.generation.flow import add_noise, few_step, few_step_levels, sigma_table, to_clean

PARITY = Path(__file__).parents[1] / "parity"


@pytest.fixture(scope="module")
def golden():
    return load_file(PARITY / "scheduler.safetensors")


def test_warped_steps_equal_those_of_the_original():
    levels = few_step_levels([1000, 750, 500, 250], shift=5, warp=True)
    assert [level.timestep for level in levels] == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert [level.sigma for level in levels] == pytest.approx([1, 0.9375, 2.5 / 3, 0.625])


def test_unwarped_steps_keep_their_timestep_with_the_nearest_sigma():
    (level,) = few_step_levels([937], shift=5, warp=False)
    assert level.timestep == 937.0
    table = sigma_table(5)
    assert level.sigma in table
    assert abs(1000 * level.sigma - 937) == min(abs(1000 * sigma - 937) for sigma in table)


@pytest.mark.parametrize("shift", [5, 8])
def test_the_sigma_table_equals_the_original(golden, shift: int):
    ours = torch.tensor(sigma_table(shift), dtype=torch.float64)
    original = golden[f"sigmas_shift{shift}"].double()  # computed in float32
    assert (ours - original).abs().max() < 3e-7


def test_noise_is_added_as_in_the_original(golden):
    for i, timestep in enumerate(golden["addnoise_t"].tolist()):
        (level,) = few_step_levels([round(timestep)], shift=5, warp=False)
        nearest = min(sigma_table(5), key=lambda sigma: abs(1000 * sigma - timestep))
        assert level.sigma == pytest.approx(nearest, abs=1e-3)
        noisy = add_noise(golden["addnoise_x0"][i], golden["addnoise_eps"][i], nearest)
        assert (noisy - golden["addnoise_out"][i]).abs().max() < 1e-6


def test_timesteps_are_embedded_as_in_the_original(golden):
    ours = ExactTimesteps(256)(golden["time_in"].float())
    assert (ours - golden["time_embedding"]).abs().max() < 2e-6


def test_removing_the_noise_gives_the_clean_latents():
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 2, 3, 4, 4, generator=generator) for _ in range(2))
    noisy = add_noise(clean, noise, 0.7)
    assert torch.allclose(to_clean(noisy, noise - clean, 0.7), clean, atol=1e-6)


def test_a_list_that_begins_below_1000_starts_from_as_much_noise_as_its_first_level_has():
    levels = few_step_levels([987.5], shift=1, warp=True)
    (only,) = few_step(lambda noisy, _: 0 * noisy, lambda _: torch.ones(1, 1, 1, 2, 2), levels)
    assert torch.allclose(only.latents, torch.tensor(0.9875))


def test_a_perfect_model_reaches_the_clean_latents_in_any_number_of_steps():
    answer = torch.full((1, 1, 1, 2, 2), 0.25)
    levels = few_step_levels([1000, 500], shift=5, warp=True)
    sigma_at = {level.timestep: level.sigma for level in levels}

    def velocity(noisy: torch.Tensor, timestep: float) -> torch.Tensor:
        return (noisy - answer) / sigma_at[timestep]

    def noise(step: int) -> torch.Tensor:
        return torch.full((1, 1, 1, 2, 2), float(step + 1))

    first, second = few_step(velocity, noise, levels)
    assert (first.index, second.index) == (0, 1)
    assert torch.allclose(first.latents, add_noise(answer, noise(1), levels[1].sigma))
    assert torch.allclose(second.latents, answer, atol=1e-6)
