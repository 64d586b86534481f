"""Rules about a list of timesteps, which distilled models take instead of a number of steps."""

from itertools import pairwise
from typing import Any

from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import Task
from wancli.config.resolve import Resolved
from wancli.config.settings import FEW_STEPS, Sampling, Settings
from wancli.errors import PlanError

LISTED = ("steps", "steps_list", "warp_steps", "guidance_scale")  # useless with a list, or without


def timesteps(text: str, name: str = "steps_list") -> tuple[float, ...]:
    """Parse a comma-separated list of timesteps. Raises PlanError unless it decreases."""
    values = tuple(float(word) for word in text.split(","))
    decreases = all(a > b for a, b in pairwise(values))
    if not decreases or not 0 < values[0] <= 1000:
        raise PlanError(
            f"`{name} {text}` must decrease, from at most 1000.",
            hint=f"`{name} {FEW_STEPS}`",
        )
    return values


def listed_steps(sampling: Sampling) -> tuple[float, ...]:
    """The listed timesteps; empty for a solver that spaces `steps` of them. Raises PlanError."""
    if sampling.scheduler == "few-step":
        return timesteps(sampling.steps_list or FEW_STEPS)
    listed = sampling.scheduler == "euler" and sampling.steps_list
    return timesteps(sampling.steps_list) if listed else ()


def step_count(sampling: Sampling) -> int:
    """Denoising steps: those listed, or `steps`."""
    return len(listed_steps(sampling)) or sampling.steps


def check_listed_steps(settings: Settings, spec: ModelSpec, task: Task) -> None:
    """Raise PlanError for a model or cache that a list of timesteps rules out."""
    steps, caches = listed_steps(settings.sampling), settings.step_cache
    if not steps:
        return
    if not task.family.listed_steps:
        raise PlanError(
            f"`steps_list` does not work with {spec.name}: its pipeline sets the sigmas.",
            hint="`steps_list ''`",
        )
    if task.segmented and steps[0] < 1000:
        raise PlanError(
            f"`steps_list` begins at {steps[0]:g}: {task.name} draws noise for 1000.",
            hint="begin it at 1000",
        )
    if caches.step_cache != "none":
        raise PlanError(
            f"`step_cache {caches.step_cache}` does not work with `steps_list`: {len(steps)} "
            "listed steps have nothing to reuse.",
            hint="`step_cache none` instead",
        )
    if caches.cfg_gate is not None and settings.sampling.scheduler == "few-step":
        raise PlanError(
            "`cfg_gate` needs guidance, and `scheduler few-step` runs without.",
            hint="drop `cfg_gate`",
        )


def check_listed_flags(resolved: Resolved[Any]) -> None:
    """Raise PlanError for an explicit flag that a list of timesteps, or none, makes useless."""
    sampling: Sampling = resolved.settings.sampling
    steps, scale = listed_steps(sampling), sampling.guidance_scale
    if steps and resolved.is_explicit("sampling.steps") and sampling.steps != len(steps):
        raise PlanError("`steps` does nothing with `steps_list`.", hint="drop `steps`")
    if resolved.is_explicit("sampling.steps_list") and sampling.steps_list and not steps:
        key = "sampling.scheduler"
        whose = "" if resolved.is_explicit(key) else f", the {resolved.sources[key]}"
        raise PlanError(
            f"`steps_list` does nothing with `scheduler {sampling.scheduler}`{whose}.",
            hint="`scheduler few-step` or `scheduler euler`",
        )
    for key in ("sampling.warp_steps", "rollout.first_chunk_steps"):
        if resolved.is_explicit(key) and not steps:
            name = key.partition(".")[2]
            raise PlanError(f"`{name}` does nothing without `steps_list`.", hint=f"drop `{name}`")
    guided = resolved.is_explicit("sampling.guidance_scale") and scale > 1
    if sampling.scheduler == "few-step" and guided:
        raise PlanError(
            f"`guidance_scale {scale:g}` does nothing: `scheduler few-step` is for models "
            "distilled to run without guidance.",
            hint="`guidance_scale 1`, or `scheduler euler`",
        )
