"""Presets: TOML files of settings by name; later folders shadow earlier ones."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import platformdirs

from wancli.config.resolve import TUNED_FOR, Layer, check_names, resolve
from wancli.config.settings import RolloutSettings
from wancli.errors import PresetError, UsageError, closest
from wancli.utils.reading import read_toml, unreadable, user_path

_HERE = Path(__file__).parents[1]
PACKAGED = next(p for p in (_HERE / "_presets", _HERE.parent / "presets") if p.is_dir())
ABOUT = ("extends", "description", "source")  # keys of a preset file that are not settings


@dataclass(frozen=True)
class Preset:
    """A preset file: settings by table, and its description."""

    name: str
    path: Path
    place: str
    tables: Mapping[str, Any]
    description: str = ""
    source: str = ""
    extends: str | None = None
    tuned_for: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Listed:
    """A preset as `wancli preset list` shows it."""

    preset: Preset
    shadows: tuple[Path, ...]


def user_folder() -> Path:
    """Folder that `wancli preset save` writes to."""
    return platformdirs.user_config_path("wancli") / "presets"


def places() -> list[tuple[str, Path]]:
    """(name, folder) of every place to search; the last one wins."""
    extra = os.environ.get("WANCLI_PRESET_PATH", "")
    return [
        ("packaged", PACKAGED),
        ("user", user_folder()),
        ("./presets", Path("presets").absolute()),
        *(("$WANCLI_PRESET_PATH", user_path(p)) for p in extra.split(os.pathsep) if p),
    ]


def find_files() -> dict[str, list[tuple[str, Path]]]:
    """(place, file) of every preset by name, the winner last.

    A folder that is two places (in a clone, ./presets is the packaged one) counts as the later.
    """
    return _scan()[0]


def unreadable_places() -> list[tuple[Path, str]]:
    """(folder, reason) of the places that cannot be read."""
    return _scan()[1]


def _scan() -> tuple[dict[str, list[tuple[str, Path]]], list[tuple[Path, str]]]:
    searched = {folder.resolve(): (place, folder) for place, folder in places()}
    files: dict[str, list[tuple[str, Path]]] = {}
    unreadable = []
    for place, folder in searched.values():
        try:
            paths = sorted(path for path in folder.iterdir() if path.suffix == ".toml")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            unreadable.append((folder, str(error.strerror)))
            continue
        for path in paths:
            files.setdefault(path.stem, []).append((place, path))
    return files, unreadable


def list_presets() -> list[Listed]:
    """List the presets by name; the description of a broken file is its error."""
    out = []
    for name, files in sorted(find_files().items()):
        place, path = files[-1]
        try:
            preset = read_file(path, place=place)
        except UsageError as error:
            preset = Preset(name, path, place, {}, description=f"broken: {error}")
        out.append(Listed(preset, tuple(p for _, p in files[:-1])))
    return out


def find_preset(name: str) -> Preset:
    """Load a preset by name, or by path if it ends in .toml. Raises PresetError."""
    if name.endswith(".toml"):
        return read_file(user_path(name), place="file")
    files = find_files()
    if name not in files:
        near = closest(name, files)
        raise PresetError(
            f"preset '{name}' not found.",
            hint=f"did you mean '{near}'? list: wancli preset list"
            if near
            else "wancli preset list",
        )
    place, path = files[name][-1]
    return read_file(path, place=place)


def read_file(path: Path, *, place: str = "file") -> Preset:
    """Parse and check a file. Raises PresetError or SettingsError with the file and key."""
    try:
        tables = read_toml(path)
    except FileNotFoundError:
        raise PresetError(f"preset file '{path}' not found.", hint="wancli preset list") from None
    except ValueError as error:
        hint = "save it as TOML in UTF-8: https://toml.io"
        raise unreadable(path, error, kind=PresetError, hint=hint) from None
    except OSError as error:
        raise unreadable(path, error, kind=PresetError, hint="wancli preset list") from None
    about = {key: tables.pop(key, None) for key in ABOUT}
    for key, value in about.items():
        if value is not None and not isinstance(value, str):
            raise PresetError(f"{path}: '{key}' must be text.", hint=f'{key} = "..."')
    tuned_for = tables.pop(TUNED_FOR, {})
    _check_tuned_for(path, tuned_for)
    check_names(Layer(str(path), tables))
    return Preset(
        path.stem,
        path,
        place,
        tables,
        about["description"] or "",
        about["source"] or "",
        about["extends"],
        tuned_for,
    )


def _check_tuned_for(path: Path, values: Any) -> None:
    if not isinstance(values, dict):
        raise PresetError(f"{path}: '{TUNED_FOR}' must be a table.", hint=f"[{TUNED_FOR}]")
    for key, value in values.items():
        if not isinstance(value, str | int | float):
            raise PresetError(
                f"{path}: [{TUNED_FOR}] '{key}' must be text or a number.", hint=f'{key} = "..."'
            )


def layers(preset: Preset) -> list[Layer]:
    """The layers of a preset and of those it extends, the base first."""
    return [Layer(f"preset {p.name}", p.tables, p.tuned_for) for p in with_bases(preset)]


def with_bases(preset: Preset) -> list[Preset]:
    """The preset and those it extends, the base first. Raises PresetError."""
    chain, seen = [preset], {preset.path.resolve()}
    while (base := chain[-1].extends) is not None:
        other = _base_of(chain[-1], base)
        if other.path.resolve() in seen:
            raise PresetError(
                f"{chain[-1].path}: extends '{base}', which extends it in turn.",
                hint="remove one of the two 'extends'",
            )
        seen.add(other.path.resolve())
        chain.append(other)
    return chain[::-1]


def layers_to_show(preset: Preset) -> list[Layer]:
    """The layers without the check of what they were tuned for, which only use needs."""
    return [replace(layer, tuned_for={}) for layer in layers(preset)]


def step_cache_layer(preset: Preset) -> Layer:
    """The step cache of a preset alone. Raises PresetError if it has none."""
    chain = layers(preset)
    merged: dict[str, Any] = {}
    for layer in chain:
        merged |= layer.tables.get("step_cache", {})
    if "step_cache" not in merged and "cfg_gate" not in merged:
        raise PresetError(
            f"preset '{preset.name}' does not turn on a step cache.", hint="wancli preset list"
        )
    tuned_for = {key: value for layer in chain for key, value in layer.tuned_for.items()}
    return Layer(f"preset {preset.name}", {"step_cache": merged}, tuned_for)


def _base_of(preset: Preset, base: str) -> Preset:
    """The preset that `preset` extends; of the same name, the one that it shadows."""
    if base != preset.name:
        return find_preset(base)
    own = preset.path.resolve()
    files = find_files().get(base, [])
    index = next((i for i, (_, p) in enumerate(files) if p.resolve() == own), len(files))
    if index == 0:
        raise PresetError(f"{preset.path}: extends itself.", hint="remove 'extends'")
    place, path = files[index - 1]
    return read_file(path, place=place)


def validate_file(path: Path) -> Preset:
    """Read a file and resolve it with what it extends. Raises PresetError or SettingsError."""
    preset = read_file(path)
    resolve(layers_to_show(preset), RolloutSettings)
    return preset


def save_preset(
    name: str, tables: Mapping[str, Any], *, description: str = "", extends: str | None = None,
    overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write settings to the user's folder; returns the file."""
    import tomli_w  # here, since these take time that most commands do not need

    from wancli.utils.files import write_whole

    path = preset_file(name, overwrite=overwrite)
    about = {"description": description, "extends": extends}
    text = tomli_w.dumps({k: v for k, v in about.items() if v} | dict(tables))
    hint = "set XDG_CONFIG_HOME to a writable folder"
    write_whole(path, text.encode(), hint=hint, overwrite=overwrite)
    return path


def preset_file(name: str, *, overwrite: bool = False, hint: str = "add `overwrite`") -> Path:
    """File of a new preset. Raises PresetError for an invalid or existing name."""
    if not name or name != Path(name).name or name.startswith(".") or name.endswith(".toml"):
        raise PresetError(f"'{name}' is not a preset name.", hint="a plain word: my-preset")
    path = user_folder() / f"{name}.toml"
    if os.path.lexists(path) and not overwrite:
        raise PresetError(f"preset '{name}' exists at {path}.", hint=hint)
    return path
