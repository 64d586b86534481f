"""Layers of settings: the model's preset, the user's configuration, presets, environment."""

import os
from dataclasses import replace

import platformdirs

from wancli.catalog.random import known_spec
from wancli.config.presets import (
    find_preset,
    layers,
    read_file,
    step_cache_layer,
    unreadable_places,
)
from wancli.config.resolve import Layer
from wancli.errors import Warn


def settings_layers(
    warn: Warn, given: Layer, preset: str | None, cache_preset: str | None = None
) -> list[Layer]:
    """Every layer over the declared defaults: model default, user, preset, environment, flags."""
    warn_of_unreadable_presets(warn)
    named = preset or os.environ.get("WANCLI_PRESET") or None
    from_preset = layers(find_preset(named)) if named else []
    if cache_preset:
        from_preset.append(step_cache_layer(find_preset(cache_preset)))
    environment = {"model": os.environ["WANCLI_MODEL"]} if os.environ.get("WANCLI_MODEL") else {}
    chosen = [*user_layers(warn), *from_preset, Layer("WANCLI_MODEL", environment), given]
    model = next((la.tables["model"] for la in reversed(chosen) if "model" in la.tables), "demo")
    spec = known_spec(model)
    defaults = layers(find_preset(spec.name)) if spec else []
    return [*(replace(layer, source="model default") for layer in defaults), *chosen]


def user_layers(warn: Warn) -> list[Layer]:
    """The user's own config.toml, where there is one; none where there may not be looked."""
    path = platformdirs.user_config_path("wancli") / "config.toml"
    try:
        if not path.is_file():
            return []
    except OSError as error:
        warn(
            f"no settings are taken from {path}: {error.strerror}.",
            hint=f"chmod u+rx {path.parent}",
        )
        return []
    return [Layer(str(path), read_file(path).tables)]


def warn_of_unreadable_presets(warn: Warn) -> None:
    """Warn of folders of presets that are left out."""
    for folder, reason in unreadable_places():
        warn(f"no presets are taken from {folder}: {reason}.", hint=f"chmod u+rx {folder}")
