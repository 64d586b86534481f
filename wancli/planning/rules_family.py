"""Rules about settings that a family of models does not support."""

from typing import Any

from wancli.catalog.hunyuan import HunyuanVideo
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import Family
from wancli.config.resolve import Resolved
from wancli.config.settings import Machine, PromptKV, Sampling, Settings
from wancli.errors import PlanError


def check_family(settings: Settings, spec: ModelSpec, family: Family) -> None:
    """Raise PlanError for a scheduler, guidance, cache or speed-up the family does not support."""
    sampling = settings.sampling
    if sampling.scheduler not in family.schedulers:
        raise PlanError(
            f"`scheduler {sampling.scheduler}` does not work with {spec.name}: its pipeline sets "
            "the sigmas, and this solver computes its own.",
            hint=f"`scheduler` {' or '.join(family.schedulers)}",
        )
    if family.guidance == "true_cfg_scale":
        _check_true_cfg(sampling, spec)
    if not family.prompt_kv:
        _check_no_prompt_kv(settings.prompt_kv, spec.name)
    if not family.faster:
        _check_speedups(settings.machine, spec.name)


def check_family_flags(resolved: Resolved[Any], family: Family) -> None:
    """Raise PlanError for an explicit flag that the family does not support."""
    explicit = resolved.is_explicit("prompt_kv.prompt_kv")
    if explicit and resolved.settings.prompt_kv.prompt_kv and not family.prompt_kv:
        raise PlanError(
            "`prompt_kv` does not work with this model: its prompt K/V change in every step.",
            hint="drop `prompt_kv`",
        )


def _check_true_cfg(sampling: Sampling, spec: ModelSpec) -> None:
    if sampling.negative_prompt and sampling.true_cfg_scale <= 1:
        raise PlanError(
            f"a negative prompt does nothing in {spec.name} without `true_cfg_scale`.",
            hint="`true_cfg_scale 6` (two forwards per step), or `negative_prompt ''`",
        )
    shapes, scale = spec.architecture, sampling.guidance_scale
    if isinstance(shapes, HunyuanVideo) and not shapes.transformer.guidance and scale > 1:
        raise PlanError(
            f"{spec.name} does not support `guidance_scale {scale:g}`.",
            hint="`guidance_scale 1` `true_cfg_scale 6`",
        )


def _check_no_prompt_kv(chosen: PromptKV, model: str) -> None:
    option = "kv_align" if chosen.kv_align.isdigit() else ""
    option = "free_kv_weights" if chosen.free_kv_weights else option
    if option:
        raise PlanError(
            f"`{option}` does not work with {model}: its prompt K/V change in every step.",
            hint=f"drop `{option}`",
        )


def _check_speedups(machine: Machine, model: str) -> None:
    """Raise PlanError for speed-ups that would silently do nothing."""
    options = {
        f"`quantize {machine.quantize}`": ("`quantize none`", machine.quantize != "none"),
        "`fuse_qkv`": ("`no_fuse_qkv`", machine.fuse_qkv),
        "`compile`": ("`no_compile`", machine.compile),
    }
    for option, (hint, enabled) in options.items():
        if enabled:
            raise PlanError(
                f"{option} supports only Wan's blocks, and {model} has others.", hint=hint
            )
