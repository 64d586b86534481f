"""Rules about settings that a family of models has no place for."""

from typing import Any

from wancli.catalog.hunyuan import HunyuanVideo
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import Family
from wancli.config.resolve import Resolved
from wancli.config.settings import Machine, PromptKV, Sampling, Settings
from wancli.errors import PlanError


def check_family(settings: Settings, spec: ModelSpec, family: Family) -> None:
    """Raise PlanError for a solver, a guidance, a cache or a speed-up that it does not take."""
    sampling = settings.sampling
    if sampling.scheduler not in family.schedulers:
        raise PlanError(
            f"--scheduler {sampling.scheduler} does not go with {spec.name}: its pipeline gives "
            "the sigmas, and that solver makes its own.",
            hint=f"--scheduler {' or '.join(family.schedulers)}",
        )
    if family.guidance == "true_cfg_scale":
        _check_told_guidance(sampling, spec)
    if not family.prompt_kv:
        _check_no_prompt_kv(settings.prompt_kv, spec.name)
    if not family.faster:
        _check_as_it_is(settings.machine, spec.name)


def check_family_given(resolved: Resolved[Any], family: Family) -> None:
    """Raise PlanError where a flag asks for what the family cannot have."""
    asked = resolved.sources.get("prompt_kv.prompt_kv") == "flag"
    if asked and resolved.settings.prompt_kv.prompt_kv and not family.prompt_kv:
        raise PlanError(
            "--prompt-kv: what this model makes of a prompt is another thing in every step.",
            hint="drop it",
        )


def _check_told_guidance(sampling: Sampling, spec: ModelSpec) -> None:
    if sampling.negative_prompt and sampling.true_cfg_scale <= 1:
        raise PlanError(
            f"a negative prompt does nothing in {spec.name} without guidance by it.",
            hint="--true-cfg-scale 6, which takes two forwards a step, or --negative-prompt ''",
        )
    shapes, scale = spec.architecture, sampling.guidance_scale
    if isinstance(shapes, HunyuanVideo) and not shapes.transformer.guidance and scale > 1:
        raise PlanError(
            f"{spec.name} cannot be told --guidance-scale {scale:g}.",
            hint="--guidance-scale 1 --true-cfg-scale 6",
        )


def _check_no_prompt_kv(chosen: PromptKV, model: str) -> None:
    asked = f"--kv-align {chosen.kv_align}" if chosen.kv_align.isdigit() else ""
    asked = "--free-kv-weights" if chosen.free_kv_weights else asked
    if asked:
        raise PlanError(
            f"{asked} does not go with {model}: its prompt has no K/V that last.",
            hint=f"drop {asked.split()[0]}",
        )


def _check_as_it_is(machine: Machine, model: str) -> None:
    """Raise PlanError for what would leave its blocks as they are, and say nothing."""
    asked = {
        f"--quantize {machine.quantize}": ("--quantize none", machine.quantize != "none"),
        "--fuse-qkv": ("--no-fuse-qkv", machine.fuse_qkv),
        "--compile": ("--no-compile", machine.compile),
    }
    for way, (hint, wanted) in asked.items():
        if wanted:
            raise PlanError(
                f"{way} knows the blocks of Wan's models, and {model} has others.", hint=hint
            )
