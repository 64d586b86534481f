"""Distilled LoRAs known by the name of their file: what the packaged presets that have them say."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath

from wancli.config.presets import PACKAGED, layers, read_file
from wancli.config.resolve import resolve
from wancli.config.settings import Sampling, Settings
from wancli.errors import PlanError, PlanWarning

TRAINED = ("scheduler", "steps_list", "warp_steps", "flow_shift")


@dataclass(frozen=True)
class DistilledLora:
    """A LoRA among the settings, and the preset that has it."""

    file: str
    expert: str  # high or low; "" for a single expert
    preset: str
    sampling: Sampling  # of the preset


def check_distilled(settings: Settings) -> None:
    """Raise PlanError for guidance with a LoRA that was distilled to run without."""
    sampling = settings.sampling
    if sampling.guidance_scale <= 1 or sampling.scheduler == "few-step":
        return
    for lora in _distilled_loras(settings):
        name = "guidance_scale"
        if lora.expert == "low" and sampling.guidance_scale_2 is not None:
            name = "guidance_scale_2"
        scale: float = getattr(sampling, name)
        if scale > 1:
            raise PlanError(
                f"LoRA {lora.file} was distilled to run without guidance; `{name}` is {scale:g}.",
                hint=f"`{name} 1`, or `preset {lora.preset}`",
            )


def distilled_warnings(settings: Settings) -> tuple[PlanWarning, ...]:
    """A warning of each LoRA that was distilled to other timesteps than those of the settings."""
    sampling, warnings = settings.sampling, []
    for lora in _distilled_loras(settings):
        wanted = {name: getattr(lora.sampling, name) for name in TRAINED}
        other = [f"`{name} {v}`" for name, v in wanted.items() if getattr(sampling, name) != v]
        if other:
            text = f"LoRA {lora.file} was distilled for {', '.join(other)}."
            warnings.append(PlanWarning(text, f"`preset {lora.preset}`"))
    return tuple(warnings)


def _distilled_loras(settings: Settings) -> list[DistilledLora]:
    known = _packaged() if settings.machine.lora else {}
    found = [known.get(_file(text)) for text in settings.machine.lora]
    return [lora for lora in found if lora]


@cache
def _packaged() -> Mapping[str, DistilledLora]:
    """The LoRAs of the packaged presets, by the name of their file."""
    loras = {}
    for path in sorted(PACKAGED.glob("*.toml")):
        preset = read_file(path)
        if "lora" not in preset.tables.get("machine", {}):
            continue
        settings = resolve(layers(preset), Settings).settings
        for text in settings.machine.lora:
            expert = text.rpartition("@")[2] if "@" in text else ""
            lora = DistilledLora(_file(text), expert, preset.name, settings.sampling)
            loras[lora.file] = lora
    return loras


def _file(text: str) -> str:
    """The file's name in `PATH@expert=SCALE` or `REPO:FILE@expert=SCALE`."""
    return PurePath(re.sub(r"(@(high|low))?(=[^=]*)?$", "", text).rpartition(":")[2]).name
