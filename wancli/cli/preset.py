"""`wancli preset`: named settings."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from wancli.cli.completion import complete_presets
from wancli.cli.lazy import WancliCommand, WancliGroup
from wancli.cli.options import OutputOptions, takes_output_options, takes_settings
from wancli.cli.screen import Screen
from wancli.cli.settings_table import in_words, settings_rows
from wancli.config.layers import warn_of_unreadable_presets
from wancli.config.presets import (
    Preset,
    find_preset,
    layers_to_show,
    list_presets,
    read_file,
    save_preset,
    validate_file,
)
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import RolloutSettings
from wancli.errors import SettingsError, WancliError

app = typer.Typer(
    cls=WancliGroup,
    add_completion=False,
    help="Named settings: list, show, check and save them.",
)
command = partial(app.command, cls=WancliCommand)
Name = Annotated[
    str, typer.Argument(autocompletion=complete_presets, help="Preset: a name or a TOML file.")
]


@command("list")
@takes_output_options
def list_(output_options: OutputOptions) -> None:
    """List the presets, where each comes from and what it shadows."""
    screen = Screen(output_options)
    warn_of_unreadable_presets(screen.warn)
    rows = []
    for listed in list_presets():
        preset, shadows = listed.preset, [str(path) for path in listed.shadows]
        model, task = _model(preset)
        if output_options.json:
            screen.json({**_preset_json(preset), "model": model, "task": task, "shadows": shadows})
        other = f" (model {model})" if model not in ("", preset.name) else ""
        shadowing = f" (shadows {', '.join(shadows)})" if shadows else ""
        rows.append((preset.name, preset.place, preset.description + other + shadowing))
    if not output_options.json:
        screen.table("name", "from", "description", rows=rows)


@command()
@takes_output_options
def show(name: Name, output_options: OutputOptions) -> None:
    """Print all settings of a preset, and where each comes from."""
    preset, screen = find_preset(name), Screen(output_options)
    resolved = resolve(layers_to_show(preset), RolloutSettings)
    if output_options.json:
        settings = resolved.settings.model_dump(mode="json")
        screen.json(
            {**_preset_json(preset), "settings": settings, "sources": dict(resolved.sources)}
        )
        return
    values = resolved.settings.model_dump(mode="json")
    about = [("description", preset.description), ("source", preset.source)]
    tuned = [(f"tuned for {key}", in_words(value)) for key, value in preset.tuned_for.items()]
    screen.table("", "", rows=[row for row in (*about, *tuned) if row[1]])
    screen.table("", "value", "from", rows=[*settings_rows(values, resolved.sources)])


@command()
@takes_output_options
def path(name: Name, output_options: OutputOptions) -> None:
    """Print the file of a preset."""
    screen, file = Screen(output_options), find_preset(name).path
    screen.answer(str(file), {"path": str(file)})


@command()
@takes_output_options
def validate(
    file: Annotated[Path, typer.Argument(help="TOML file to check.")],
    output_options: OutputOptions,
) -> None:
    """Check a preset file: its syntax, names, values, and what it extends."""
    preset, screen = validate_file(file), Screen(output_options)
    screen.answer(f"{file}: valid", {**_preset_json(preset), "valid": True})


@command()
@takes_output_options
@takes_settings(RolloutSettings, show_defaults=False)
def save(
    *,
    name: Annotated[str, typer.Argument(help="Name to save under.")],
    overrides: Layer,
    output_options: OutputOptions,
    preset: Annotated[
        str | None,
        typer.Option(metavar="PRESET", autocompletion=complete_presets, help="Preset to extend."),
    ] = None,
    description: Annotated[str, typer.Option(help="One line about the preset.")] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a preset of the same name.")
    ] = False,
) -> None:
    """Save flags as a preset in your configuration directory.

    wancli preset save quick --preset demo --steps 8
    """
    if not overrides.tables:
        raise SettingsError("no settings to save.", hint=f"wancli preset save {name} --steps 8")
    resolve([*(layers_to_show(find_preset(preset)) if preset else []), overrides], RolloutSettings)
    saved = save_preset(
        name, overrides.tables, description=description, extends=preset, overwrite=overwrite
    )
    Screen(output_options).answer(str(saved), _preset_json(read_file(saved, place="user")))


def _preset_json(preset: Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "description": preset.description,
        "source": preset.source,
        "from": preset.place,
        "path": str(preset.path),
        "extends": preset.extends,
        "tuned_for": dict(preset.tuned_for),
    }


def _model(preset: Preset) -> tuple[str, str]:
    """Model and task of a preset; empty for a broken one."""
    from wancli.catalog.local import find_spec

    try:
        model = resolve(layers_to_show(preset), RolloutSettings).settings.model
        model = preset.tuned_for.get("model", model)
        return model, ", ".join(find_spec(model).tasks)
    except WancliError:
        return "", ""
