"""Distilled LoRAs known by the name of their file: what the packaged presets that have them say."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from wancli.config.presets import PACKAGED, layers, read_file
from wancli.config.resolve import Resolved, resolve
from wancli.config.settings import Sampling, Settings
from wancli.errors import PlanError, PlanWarning
from wancli.planning.listed_steps import listed_steps

TRAINED = ("scheduler", "steps_list", "warp_steps", "flow_shift")


@dataclass(frozen=True)
class DistilledLora:
    """A LoRA among the settings, and the preset that has it."""

    file: str
    expert: str  # high or low; "" for a single expert
    preset: str
    sampling: Sampling  # of the preset


def check_distilled(resolved: Resolved[Any]) -> None:
    """Raise PlanError for guidance with a LoRA that was distilled to run without.

    few-step runs without it, too: there, only an explicit scale is refused.
    """
    sampling: Sampling = resolved.settings.sampling
    if sampling.guidance_scale <= 1:
        return
    for lora in _distilled_loras(resolved.settings):
        name = guidance_name(sampling, lora.expert)
        scale, explicit = getattr(sampling, name), resolved.is_explicit(f"sampling.{name}")
        if scale > 1 and (explicit or sampling.scheduler != "few-step"):
            raise PlanError(
                f"LoRA {lora.file} was distilled to run without guidance; `{name}` is {scale:g}.",
                hint=_way_out(resolved, lora, name, *_untrained(sampling, lora.sampling)),
            )


def guidance_name(sampling: Sampling, expert: str) -> str:
    """The setting that guides an expert: the low one's own, where there is one."""
    low = expert == "low" and sampling.guidance_scale_2 is not None
    return "guidance_scale_2" if low else "guidance_scale"


def distilled_warnings(resolved: Resolved[Any]) -> tuple[PlanWarning, ...]:
    """A warning of each LoRA that was distilled to other timesteps than those of the settings."""
    warnings = []
    for lora in _distilled_loras(resolved.settings):
        names = _untrained(resolved.settings.sampling, lora.sampling)
        values = [_with_value(name, getattr(lora.sampling, name)) for name in names]
        if names:
            text = f"LoRA {lora.file} was distilled for {', '.join(values)}."
            warnings.append(PlanWarning(text, _way_out(resolved, lora, *names)))
    return tuple(warnings)


def _way_out(resolved: Resolved[Any], lora: DistilledLora, *names: str) -> str:
    """A hint that sets these as in training: the LoRA's preset, and what it leaves to flags."""
    typed = [name for name in names if resolved.is_explicit(f"sampling.{name}")]
    values = lora.sampling.model_dump() | {"guidance_scale_2": 1.0}  # which a preset may leave out
    flags = [_with_value(name, values[name]) for name in typed]
    preset = [f"`preset {lora.preset}`"] if len(typed) < len(names) else []
    return " ".join([*preset, *flags])


def preset_of(lora: str | Path) -> str:
    """The packaged preset that has a LoRA of this name; "" if none has."""
    known = _packaged().get(_name(str(lora)))
    return known.preset if known else ""


def _untrained(sampling: Sampling, trained: Sampling) -> list[str]:
    """The settings by which the timesteps differ from those of the training."""
    same = sampling.model_copy(update={"scheduler": trained.scheduler})
    listed = listed_steps(same) == listed_steps(trained)  # a list may be the sampler's own
    names = [name for name in TRAINED if getattr(sampling, name) != getattr(trained, name)]
    return [name for name in names if name != "steps_list" or not listed]


def _with_value(name: str, value: object) -> str:
    """A setting as it can be typed."""
    if isinstance(value, bool):
        return f"`{name}`" if value else f"`no_{name}`"
    return f"`{name} {value:g}`" if isinstance(value, float) else f"`{name} {value}`"


def _distilled_loras(settings: Settings) -> list[DistilledLora]:
    known = _packaged() if settings.machine.lora else {}
    return [*filter(None, (known.get(_name(text)) for text in settings.machine.lora))]


@cache
def _packaged() -> Mapping[str, DistilledLora]:
    """The LoRAs of the packaged presets, by the name of their file without its suffix."""
    loras = {}
    for path in sorted(PACKAGED.glob("*.toml")):
        preset = read_file(path)
        if "lora" not in preset.tables.get("machine", {}):
            continue
        settings = resolve(layers(preset), Settings).settings
        for text in settings.machine.lora:
            expert = text.rpartition("@")[2] if "@" in text else ""
            lora = DistilledLora(_file(text), expert, preset.name, settings.sampling)
            loras[_name(text)] = lora
    return loras


def _name(text: str) -> str:
    """The same for a file and for its name in the package, which has no suffix."""
    return _file(text).removesuffix(".safetensors")


def _file(text: str) -> str:
    """The file's name in `PATH@expert=SCALE` or `REPO:FILE@expert=SCALE`."""
    return PurePath(re.sub(r"(@(high|low))?(=[^=]*)?$", "", text).rpartition(":")[2]).name
