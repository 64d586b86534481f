"""Tuned step caches, saved as presets that apply only to the settings they were tuned for."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wancli.catalog.specs import ModelSpec
from wancli.config.presets import save_preset
from wancli.config.resolve import TUNED_FOR, toml_value
from wancli.config.settings import Settings

SAMPLING = ("steps", "flow_shift", "scheduler", "guidance_scale", "guidance_scale_2")
VIDEO = ("num_frames", "width", "height")
MACHINE = ("device", "dtype", "attention_backend")  # as resolved
MODEL = ("layers", "quantize", "fuse_qkv", "compile", "lora")  # changes to the blocks


def tuned_for(settings: Settings, machine: Mapping[str, str]) -> dict[str, Any]:
    """Settings that a threshold depends on, by dotted key."""
    sampling, video = settings.sampling.model_dump(), settings.video.model_dump()
    values: dict[str, Any] = {"model": settings.model}
    values |= {f"sampling.{name}": sampling[name] for name in SAMPLING}
    values |= {f"video.{name}": video[name] for name in VIDEO}
    values |= {f"machine.{name}": machine[name] for name in MACHINE}
    values |= {f"machine.{name}": getattr(settings.machine, name) for name in MODEL}
    return {key: toml_value(value) for key, value in values.items()}


def save_tuned(
    spec: ModelSpec, settings: Settings, key: Mapping[str, Any], *, name: str | None
) -> Path:
    """Save the step cache of `settings` under `name`, or one with the model and a digest."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:6]
    default_name = f"{re.sub(r'[^a-z0-9.]+', '-', spec.name.lower()).strip('-.')}-tuned-{digest}"
    return save_preset(
        name or default_name,
        {"step_cache": settings.step_cache.model_dump(exclude_none=True), TUNED_FOR: dict(key)},
        description=f"Step cache for {spec.name}, tuned by wancli bench --tune.",
        overwrite=name is None,
    )
