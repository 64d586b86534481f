"""What --tune found, saved as a preset that holds only where it was found."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wancli.catalog.specs import ModelSpec
from wancli.config.presets import save_preset
from wancli.config.resolve import TUNED_FOR, worded
from wancli.config.settings import Settings

SAMPLING = ("steps", "flow_shift", "scheduler", "guidance_scale", "guidance_scale_2")
VIDEO = ("num_frames", "width", "height")
MACHINE = ("device", "dtype", "attention_backend")  # as they were here
MODEL = ("layers", "quantize", "fuse_qkv", "compile", "lora")  # what the blocks were made into


def tuned_for(settings: Settings, machine: Mapping[str, str]) -> dict[str, Any]:
    """The settings under which a threshold was found, by dotted key."""
    sampling, video = settings.sampling.model_dump(), settings.video.model_dump()
    found: dict[str, Any] = {"model": settings.model}
    found |= {f"sampling.{name}": sampling[name] for name in SAMPLING}
    found |= {f"video.{name}": video[name] for name in VIDEO}
    found |= {f"machine.{name}": machine[name] for name in MACHINE}
    found |= {f"machine.{name}": getattr(settings.machine, name) for name in MODEL}
    return {key: worded(value) for key, value in found.items()}


def save_tuned(
    spec: ModelSpec, settings: Settings, key: Mapping[str, Any], *, name: str | None
) -> Path:
    """Save the step cache of `settings`; a name of ours says what it was tuned for."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:6]
    ours = f"{re.sub(r'[^a-z0-9.]+', '-', spec.name.lower()).strip('-.')}-tuned-{digest}"
    return save_preset(
        name or ours,
        {"step_cache": settings.step_cache.model_dump(exclude_none=True), TUNED_FOR: dict(key)},
        description=f"Step cache for {spec.name}, found by wancli bench --tune.",
        overwrite=name is None,
    )
