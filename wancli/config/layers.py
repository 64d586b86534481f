"""Layers of settings: model defaults, user configuration, presets, environment, flags."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import platformdirs

from wancli.catalog.random import known_spec
from wancli.catalog.specs import ModelSpec
from wancli.config.presets import (
    find_preset,
    layers,
    read_file,
    step_cache_layer,
    unreadable_places,
    with_bases,
)
from wancli.config.resolve import EXPLICIT, Layer, Resolved, SettingsT, fields_of, overlay
from wancli.config.settings import RolloutSettings
from wancli.errors import ModelError, PresetError, WancliError, Warn


def settings_layers(
    warn: Warn, overrides: Layer, preset: str | None, cache_preset: str | None = None
) -> list[Layer]:
    """Layers over the declared defaults: model default, user, preset, environment, flags."""
    warn_of_unreadable_presets(warn)
    chosen = [*user_layers(warn), *_command_layers(overrides, preset, cache_preset)]
    model = next((la.tables["model"] for la in reversed(chosen) if "model" in la.tables), "demo")
    spec = known_spec(model)
    defaults = layers(find_preset(spec.name)) if spec else []
    return [*(replace(layer, source="model default") for layer in defaults), *chosen]


def environment() -> dict[str, str]:
    """The `model` and the `preset` that the environment names, if it does."""
    named = {name: os.environ.get(f"WANCLI_{name.upper()}") for name in ("model", "preset")}
    return {name: value for name, value in named.items() if value}


def resuming_layers(
    overrides: Layer, preset: str | None, cache_preset: str | None = None
) -> list[Layer]:
    """Layers over a rollout's stored settings: a preset that is named again, and flags.

    Without one the environment does not count: it may have changed since the rollout began.
    """
    named = preset or cache_preset
    return _command_layers(overrides, preset, cache_preset) if named else [overrides]


def find_model(resolved: Resolved[SettingsT]) -> ModelSpec:
    """The spec of the model in settings. Raises ModelError with the model's source, PlanError."""
    # Here, since a help needs no folders.
    from wancli.catalog.decoder_files import add_vae_decoder
    from wancli.catalog.local import find_spec
    from wancli.catalog.weight_files import add_weight_files

    settings, source = resolved.settings, resolved.sources["model"]
    try:
        spec = find_spec(settings.model, layers=settings.machine.layers)
    except ModelError as error:
        if source in (*EXPLICIT, "default"):
            raise
        raise ModelError(f"{source}: {error}", hint=error.hint) from None
    machine = settings.machine
    spec = add_weight_files(
        spec, machine.transformer, vae=machine.vae, text_encoder=machine.text_encoder
    )
    return add_vae_decoder(spec, machine.vae_decoder)


def _command_layers(overrides: Layer, preset: str | None, cache_preset: str | None) -> list[Layer]:
    """Presets, environment and flags, above what applies to every command."""
    from_preset = _preset_layers(preset)
    if cache_preset:
        from_preset.append(step_cache_layer(find_preset(cache_preset)))
    model = {name: value for name, value in environment().items() if name == "model"}
    return [*from_preset, Layer("WANCLI_MODEL", model), overrides]


def _preset_layers(preset: str | None) -> list[Layer]:
    """The layers of `preset`, or of the one that WANCLI_PRESET names. Raises PresetError."""
    if preset:
        return layers(find_preset(preset))
    named = environment().get("preset")
    try:
        return layers(find_preset(named)) if named else []
    except PresetError as error:
        raise PresetError(f"WANCLI_PRESET: {error}", hint=error.hint) from None


def user_layers(warn: Warn) -> list[Layer]:
    """The user's config.toml, if there is a readable one."""
    path = platformdirs.user_config_path("wancli") / "config.toml"
    try:
        if not path.is_file():
            return []
    except OSError as error:
        warn(
            f"cannot read settings from {path}: {error.strerror}.",
            hint=f"chmod u+rx {path.parent}",
        )
        return []
    return [Layer(str(path), read_file(path).tables)]


def user_tables(presets: Iterable[str]) -> list[Mapping[str, Any]]:
    """The user's own settings: config.toml, and presets of these names outside the package.

    Those that cannot be read are left out: whatever resolves settings says so.
    """
    tables: list[Mapping[str, Any]] = []
    with suppress(WancliError):
        tables += [layer.tables for layer in user_layers(lambda text, *, hint: None)]
    for name in sorted(set(presets)):
        with suppress(WancliError):
            chain = with_bases(find_preset(name))
            tables += [preset.tables for preset in chain if preset.place != "packaged"]
    return tables


def warn_of_unreadable_presets(warn: Warn) -> None:
    """Warn of preset folders that cannot be read."""
    for folder, reason in unreadable_places():
        warn(f"cannot read presets from {folder}: {reason}.", hint=f"chmod u+rx {folder}")


def values_of(layers: Sequence[Layer]) -> Mapping[str, Any]:
    """Value of every setting by name, as the layers and the declared defaults give it."""
    merged, _ = overlay(layers, RolloutSettings)
    values = {}
    for table, name, info in fields_of(RolloutSettings):
        group = merged.get(table, {}) if table else merged
        values[name] = group.get(name, info.default)
    return values
