"""diffusers' schedulers, configured by the settings."""

from copy import deepcopy
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from wancli.config.settings import Sampling
from wancli.errors import ModelError, first_line


def make_scheduler(config: Any, sampling: Sampling) -> Any:
    """The scheduler that the settings name, for flow matching.

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
