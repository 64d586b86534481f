"""Parity of a chunk's solver with the original (see tests/parity/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from wancli.config.settings import Sampling
from wancli.rollouts.sampler import make_solver

SCHEDULES = json.loads((Path(__file__).parents[1] / "parity" / "solver_schedules.json").read_text())


def solver_of(steps: int, shift: float, scheduler: str = "unipc"):
    sampling = Sampling(steps=steps, flow_shift=shift, scheduler=scheduler)
    return make_solver(UniPCMultistepScheduler().config, sampling, device=torch.device("cpu"))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: f"{schedule['steps']} steps")
def test_the_schedule_of_a_chunk_equals_the_original(schedule):
    solver = solver_of(schedule["steps"], schedule["shift"])
    assert solver.timesteps.tolist() == schedule["timesteps"]
    assert torch.equal(solver.sigmas, torch.tensor(schedule["sigmas"]))


@pytest.mark.parametrize("scheduler", ["unipc", "dpm++", "euler"])
def test_sigmas_decrease_evenly_from_0_999_and_are_shifted(scheduler: str):
    steps, shift = 20, 5.0
    line = [0.999 * (1 - step / steps) for step in range(steps + 1)]  # float64
    expected = torch.tensor([shift * s / (1 + (shift - 1) * s) for s in line], dtype=torch.float64)
    sigmas = solver_of(steps, shift, scheduler).sigmas.double()
    assert (sigmas - expected).abs().max() < 1e-7  # the solver's are float32
