"""diffusers' schedulers, configured by the settings, and one that walks a list of timesteps."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from wancli.config.settings import Sampling
from wancli.errors import ModelError, first_line
from wancli.generation.flow import TRAIN_STEPS, Level, add_noise, few_step_levels, to_clean
from wancli.models.streams import to_device
from wancli.planning.listed_steps import listed_steps


class ListedScheduler:
    """Walks a list of noise levels, with what diffusers' pipelines need of a scheduler.

    Euler's method, or with a `generator` renoising: each step predicts the clean latents and adds
    fresh noise, drawn on the CPU in float32 so that a seed gives the same on every device.
    """

    order = 1  # forwards per step

    def __init__(self, levels: Sequence[Level], generator: torch.Generator | None = None) -> None:
        self.config = FrozenDict(num_train_timesteps=TRAIN_STEPS)
        self.timesteps = torch.tensor([level.timestep for level in levels])
        self.sigmas = torch.tensor([*(level.sigma for level in levels), 0.0], dtype=torch.float64)
        self.clean: Tensor | None = None  # prediction of the last step that renoised
        self._listed, self._generator = self.timesteps.tolist(), generator

    def set_timesteps(self, _count: int | None = None, device: Any = None) -> None:
        """Move the timesteps to a device; their number is that of the list."""
        self.timesteps = self.timesteps.to(device)

    def set_begin_index(self, _index: int) -> None:
        """Nothing: a step is found by its timestep."""

    def step(
        self, velocity: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The latents of the next level, after the last one clean, from those of `timestep`."""
        index = self._listed.index(float(timestep))
        sigma, after = self.sigmas[index : index + 2].tolist()
        if self._generator is None:
            return (to_clean(sample, velocity, sigma - after),)  # only as far as `after`
        self.clean = to_clean(sample, velocity, sigma)
        if not after:
            return (self.clean,)
        noise = torch.randn(sample.shape, generator=self._generator)
        return (add_noise(self.clean, to_device(noise, sample.device), after),)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents of a video to transform, at the first of `timesteps`."""
        return add_noise(clean, noise, self.sigmas[self._listed.index(float(timesteps[0]))].item())


def clip_scheduler(config: Any, sampling: Sampling, generator: torch.Generator) -> Any:
    """The scheduler of a clip with its timesteps set; few-step draws noise from `generator`.

    Raises ModelError if the model's own `config` does not give a working one.
    """
    if steps := listed_steps(sampling):
        levels = few_step_levels(steps, shift=sampling.flow_shift, warp=sampling.warp_steps)
        return ListedScheduler(levels, generator if sampling.scheduler == "few-step" else None)
    scheduler = make_scheduler(config, sampling)
    scheduler.set_timesteps(sampling.steps)
    return scheduler


def make_scheduler(config: Any, sampling: Sampling) -> Any:
    """The solver of `steps` that the settings name, for flow matching.

    Raises ModelError if the model's own `config` does not give a working one.
    """
    if sampling.scheduler == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=sampling.flow_shift)
    solvers = {"unipc": UniPCMultistepScheduler, "dpm++": DPMSolverMultistepScheduler}
    options = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": sampling.flow_shift,
    }
    try:
        solver = solvers[sampling.scheduler].from_config(config, **options)
        _try(deepcopy(solver))
    except Exception as error:
        raise ModelError(
            f"the model's scheduler_config.json gives no working scheduler: {first_line(error)}",
            hint="copy the model folder again, or `scheduler euler`",
        ) from error
    return solver


def _try(solver: Any) -> None:
    """Run three steps on a single latent. Raises whatever is wrong with the solver."""
    solver.set_timesteps(3)
    latent = torch.ones(1, 1, 1, 1, 1)
    for timestep in solver.timesteps:
        latent = solver.step(latent, timestep, latent, return_dict=False)[0]
    if not torch.isfinite(latent).all():
        raise ValueError("its output is not finite")
