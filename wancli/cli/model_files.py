"""Files of weights in folders that programs share, as `wancli model list` prints them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.catalog.model_folders import VARIABLE, ModelFolder, folders_of, model_roots
from wancli.cli.screen import Screen
from wancli.errors import some
from wancli.utils.units import gib

if TYPE_CHECKING:
    from wancli.models.weight_summary import WeightSummary


def show_files(roots: Sequence[Path], screen: Screen) -> None:
    """Print the files under `roots` that wancli can use, and how many others there are."""
    roots = _existing(roots, screen)
    files = [(folder, info, _parts(folder, info)) for folder, info in _files(roots)]
    usable = [file for file in files if file[2]]
    if screen.options.json:
        for file in usable:
            screen.json(_entry(*file))
    elif usable:
        rows = [_row(*file) for file in usable]
        screen.table("file", "part", "dtype", "size", "for", rows=rows, right=("size",))
    if others := len(files) - len(usable):
        screen.note(f"not of a Wan model: {others:,} more")
    if usable:
        _show_export(roots, screen)
    elif roots:
        screen.note(f"no weights of a Wan model in {', '.join(map(str, roots))}")


def _existing(roots: Sequence[Path], screen: Screen) -> list[Path]:
    """The folders that are there; warns of each other one."""
    for root in roots:
        if not root.is_dir():
            screen.warn(f"folder '{root}' not found.", hint=f"correct {VARIABLE}")
    return [root for root in roots if root.is_dir()]


def _show_export(roots: Sequence[Path], screen: Screen) -> None:
    """Print how files under `roots` that are not looked in get names."""
    if new := [str(root.absolute()) for root in roots if root not in model_roots()]:
        screen.note(f"to use them by name: export {VARIABLE}={os.pathsep.join(new)}")


def _parts(folder: ModelFolder, info: "WeightSummary") -> tuple[str, ...]:
    """The settings that take a file from its folder; a broken one is for those of the folder."""
    from wancli.models.weight_summary import READ, UNPICKLED

    weights = info.path.suffix in READ
    if info.problem and not info.parts:  # a pickle that is not in a folder for it is no LoRA
        return (folder.setting,) if weights or folder.setting in UNPICKLED else ()
    parts = (part for part in info.parts if weights or part in UNPICKLED)
    return tuple(part for part in parts if folder.setting in ("", part))


def _files(roots: Sequence[Path]) -> Iterator[tuple[ModelFolder, "WeightSummary"]]:
    """Each file of weights once, and the folder that it is in."""
    from wancli.models.weight_summary import READ, summarize_weights
    from wancli.planning.lora_keys import PICKLES

    visited = set()
    for root in roots:
        for folder in folders_of(root):
            for path in folder.files():
                real = os.path.realpath(path)
                if path.suffix in (*READ, *PICKLES) and real not in visited:
                    visited.add(real)
                    yield folder, summarize_weights(path)


def _entry(folder: ModelFolder, info: "WeightSummary", parts: Sequence[str]) -> dict[str, object]:
    about = {"name": str(info.path.relative_to(folder.path)), "folder": str(folder.path)}
    return {**about, **info.as_json(), "parts": [*parts], "description": info.description}


def _row(folder: ModelFolder, info: "WeightSummary", parts: Sequence[str]) -> tuple[str, ...]:
    """The cells of a file; the last says what it is for, and which models it fits."""
    fits = some(info.models, most=2) or "no known model"
    described = info.rank or info.problem
    purpose = ": ".join(filter(None, (info.description, "" if described else fits)))
    name = str(info.path.relative_to(folder.path))
    return name, ", ".join(parts), info.dtype, gib(info.bytes), purpose
