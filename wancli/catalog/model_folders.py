"""Folders of weights that programs share, as ComfyUI lays them out: those of WANCLI_MODEL_PATH.

ComfyUI's folders: folder_paths.py and utils/extra_config.py of
https://github.com/comfyanonymous/ComfyUI (0c853f3).
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from wancli.catalog.hub_cache import cached_file
from wancli.catalog.tiny_decoder import DECODER
from wancli.errors import InputError, SettingsError, closest, missing, some
from wancli.utils.reading import read_yaml, unreadable, user_path

VARIABLE = "WANCLI_MODEL_PATH"
EXTRA = "extra_model_paths.yaml"  # ComfyUI's, of folders elsewhere
# The setting that takes the files of each folder; "" for files of any part.
FOLDERS = {
    "diffusion_models": "transformer",
    "unet": "transformer",
    "vae": "vae",
    "vae_approx": DECODER,
    "text_encoders": "text_encoder",
    "clip": "text_encoder",
    "loras": "lora",
    "checkpoints": "",
}


@dataclass(frozen=True)
class ModelFolder:
    """A folder, and the setting that takes its files: "" for files of any part."""

    path: Path
    setting: str = ""

    def files(self) -> Iterator[Path]:
        """All files in it and below, sorted; links are followed, to each folder once."""
        visited = set()
        for place, folders, names in os.walk(self.path, followlinks=True):
            if (real := os.path.realpath(place)) in visited:
                folders.clear()
                continue
            visited.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (Path(place, name) for name in sorted(names))


def model_roots() -> list[Path]:
    """The folders that WANCLI_MODEL_PATH names."""
    return [user_path(text) for text in os.environ.get(VARIABLE, "").split(os.pathsep) if text]


def folders_of(root: Path) -> list[ModelFolder]:
    """The folders of ComfyUI at `root`, or of its `models` folder; otherwise `root` itself.

    Those that extra_model_paths.yaml names come last. Raises InputError for a broken one.
    """
    base = root / "models" if (root / "models").is_dir() else root
    own = [ModelFolder(base / name, setting) for name, setting in FOLDERS.items()]
    there = [folder for folder in own if folder.path.is_dir()]
    folders = [*there, *_extra_folders(root / EXTRA)]
    return list(dict.fromkeys(folders)) or [ModelFolder(root)]


def _extra_folders(path: Path) -> list[ModelFolder]:
    """The folders that exist of those in ComfyUI's list, in which a text may name several."""
    try:
        groups = read_yaml(path).values() if path.is_file() else ()
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint="correct that file") from None
    folders = []
    for group in groups:
        entries = group if isinstance(group, dict) else {}
        base = path.parent / user_path(os.path.expandvars(str(entries.get("base_path") or "")))
        for name, text in entries.items():
            if name in FOLDERS:
                lines = map(str.strip, str(text).splitlines())
                folders += [ModelFolder(base / line, FOLDERS[name]) for line in lines if line]
    return [folder for folder in folders if folder.path.is_dir()]


def find_file(setting: str, name: str, *, kind: str = "file") -> Path:
    """The file that a setting names by its path, or by its name in WANCLI_MODEL_PATH.

    A path that exists comes first. A name is that of a file in the folders for this setting, alone
    or after names of folders within. Raises SettingsError if several files have it, InputError if
    none has.
    """
    path = user_path(name)
    if path.exists():
        return path
    if path.is_absolute() or not model_roots():
        raise missing(kind, path)
    named = find_named(setting, path)
    if not named:
        raise _not_found(kind, path, all_files(setting))
    if len(named) > 1:
        raise SettingsError(
            f"`{setting} {name}` is the name of {len(named)} files: "
            f"{some(sorted(map(str, named)))}.",
            hint=f"give the path of one, such as {min(map(str, named))}",
        )
    return named[0]


def find_on_hub(setting: str, repo: str, file: str) -> Path | None:
    """A file of the hub, in its cache or, if just one has its name, in WANCLI_MODEL_PATH."""
    if cached := cached_file(repo, file):
        return cached
    named = find_named(setting, PurePath(file).name)
    return named[0] if len(named) == 1 else None


def find_named(setting: str, name: str | Path) -> list[Path]:
    """Every file of that name, alone or after names of folders, in the folders for a setting."""
    parts = Path(name).parts
    files = [file for file in all_files(setting) if file.parts[-len(parts) :] == parts]
    return list({os.path.realpath(file): file for file in reversed(files)}.values())


def all_files(setting: str) -> list[Path]:
    """Every file in the folders of WANCLI_MODEL_PATH for a setting. Raises InputError."""
    folders = (folder for root in model_roots() for folder in folders_of(root))
    return [f for folder in folders if folder.setting in ("", setting) for f in folder.files()]


def _not_found(kind: str, path: Path, files: Sequence[Path]) -> InputError:
    # Stems are compared: a shared suffix would make short names look similar.
    near = closest(path.stem, [file.stem for file in files])
    name = next((file.name for file in files if file.stem == near), None)
    return InputError(
        f"{kind} '{path}' not found, here or in {os.environ[VARIABLE]} ({VARIABLE}).",
        hint=f"did you mean '{name}'?" if name else "wancli model list names those there",
    )
