"""`wancli model`: list, pull, path and rm, beside `model_info` and `model_convert`."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from wancli.catalog.hub_cache import (
    absent,
    cached_bytes,
    cached_repos,
    check_reachable,
    converted_folder,
    find_cached,
    hub_file,
    repo_folder,
)
from wancli.catalog.local import find_spec
from wancli.catalog.model_folders import model_roots
from wancli.catalog.specs import DEMO_FOLDER, SPECS, Checkpoint, ModelSpec
from wancli.cli.lazy import WancliCommand, WancliGroup
from wancli.cli.model_convert import convert
from wancli.cli.model_info import info
from wancli.cli.options import ModelName, OutputOptions, takes_output_options
from wancli.cli.screen import Screen
from wancli.errors import ModelError, UsageError, missing, some
from wancli.planning.lora import PACKAGED, Lora, cached_lora
from wancli.utils.units import gib

app = typer.Typer(
    cls=WancliGroup,
    add_completion=False,
    help="Models: list, download, inspect, delete, and convert checkpoints.",
)


@takes_output_options
def list_(
    *,
    output_options: OutputOptions,
    comfyui: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="List the files in the folders of this ComfyUI instead."),
    ] = None,
) -> None:
    """List the known models, and models and LoRAs in the hub's cache, with their size on disk.

    Then the files in the folders of WANCLI_MODEL_PATH.
    """
    from wancli.cli.model_files import show_files

    screen = Screen(output_options)
    if comfyui:
        if not comfyui.is_dir():
            raise missing("folder", comfyui)
        show_files([comfyui], screen)
        return
    repos = {spec.pulled_from for spec in SPECS.values()}
    others = [find_spec(repo) for repo in cached_repos() if repo not in repos]
    entries = [*filter(None, map(_list_entry, [*SPECS.values(), *others])), *_lora_entries()]
    rows = []
    for entry in entries:
        if output_options.json:
            screen.json(entry)
        size = gib(entry["bytes"]) if entry["bytes"] else ""
        rows.append((entry["name"], entry["task"], entry["state"], size, entry["description"]))
    if not output_options.json:
        screen.table("name", "task", "here", "size", "description", rows=rows, right=("size",))
    show_files(model_roots(), screen)


@takes_output_options
def pull(name: ModelName, output_options: OutputOptions) -> None:
    """Download a model from the hub, or a LoRA (REPO:FILE); resumes earlier downloads.

    wancli model pull wan2.1-t2v-1.3b
    """
    screen = Screen(output_options)
    if lora := hub_file(name):
        _fetch(*lora, screen=screen)
        _say_path(screen, name, lora[0], cached_lora(*lora))
        return
    from wancli.models.inspect import missing_files, spec_with_files

    spec = spec_with_files(name)
    if spec.checkpoint:
        folder = spec.folder or _convert_pulled(spec.name, spec.checkpoint, screen)
        _say_path(screen, spec.name, spec.repo, folder)
        return
    if spec.folder is not None:
        raise UsageError(
            f"model '{name}' is in {spec.folder}: there is nothing to download.",
            hint="wancli model list prints the models on the hub",
        )
    folder = _fetch(spec.repo, screen=screen)
    if missing := missing_files(folder):
        raise ModelError(
            f"{spec.name} is not a complete model: it lacks {some(missing, most=3)}.",
            hint="use a Wan model in diffusers' format",
        )
    _say_path(screen, spec.name, spec.repo, folder)


def _convert_pulled(name: str, checkpoint: Checkpoint, screen: Screen) -> Path:
    """Download a checkpoint and the rest of its base, and make a model folder of them."""
    base = _fetch(SPECS[checkpoint.base].repo, without=("transformer",), screen=screen)
    names = [name for name in (checkpoint.file, checkpoint.lora) if name]
    source, *loras = (_fetch(checkpoint.repo, name, screen=screen) / name for name in names)
    from wancli.models.convert import convert as write

    out = converted_folder(checkpoint.repo, name)
    screen.note(f"converting {checkpoint.file}")
    return write(source, out, base=base, entry=checkpoint.entry, loras=[*map(Lora, loras)]).path


def _fetch(repo: str, only: str = "", *, without: Collection[str] = (), screen: Screen) -> Path:
    """Download a model, or `only` one file of its repository; returns the folder in the cache.

    The weights of the parts `without` are not fetched.
    """
    from wancli.models.hub import bytes_to_download, check_space, download

    check_reachable(repo, only)
    needed = bytes_to_download(repo, only=only, without=without)
    if needed:
        check_space(repo, needed, only=only)
        screen.note(f"{repo}: {gib(needed)} to download")
    with screen.transfer(needed) as on_bytes:
        return download(repo, on_bytes, only=only, without=without)


@takes_output_options
def path(name: ModelName, output_options: OutputOptions) -> None:
    """Print the folder of a downloaded model, or the file of a LoRA (REPO:FILE)."""
    screen = Screen(output_options)
    if lora := hub_file(name):
        _say_path(screen, name, lora[0], cached_lora(*lora))
        return
    from wancli.models.inspect import local_folder

    spec, folder = local_folder(name)
    _say_path(screen, spec.name, spec.repo, folder)


@takes_output_options
def rm(
    name: ModelName,
    output_options: OutputOptions,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,  # noqa: FBT002
) -> None:
    """Delete all revisions of a model from the hub's cache, and what was converted from it."""
    from wancli.models.inspect import spec_with_files

    spec, screen = spec_with_files(name), Screen(output_options)
    repo = spec.pulled_from
    if spec.folder is not None and not spec.checkpoint:
        inside = spec.folder == DEMO_FOLDER
        raise UsageError(
            f"model '{name}' is {'inside the package' if inside else 'a local folder'}; only "
            "models in the hub's cache can be deleted.",
            hint="wancli model list" if inside else f"rm -r {spec.folder}",
        )
    if not repo_folder(repo).exists():
        raise absent(name, hint="wancli model list")
    question = f"delete {repo}, {gib(cached_bytes(repo))}?"
    if not yes and not screen.confirm(question, otherwise=f"wancli model rm {name} --yes"):
        screen.note("kept")
        return
    from wancli.models.hub import delete

    freed = delete(repo)
    screen.note(f"{gib(freed)} freed")
    if output_options.json:
        screen.json({"name": spec.name, "repo": repo, "deleted": True, "freed_bytes": freed})


def _list_entry(spec: ModelSpec) -> dict[str, Any] | None:
    """A model's entry in the list; None for a hub model that is not a Wan."""
    from wancli.models.inspect import find_local, missing_files

    cached = find_cached(spec.repo) if spec.repo else None
    size, state = cached_bytes(spec.repo) if spec.repo else 0, "no"
    try:
        spec = find_local(spec.name)
        if spec.folder == DEMO_FOLDER:
            state, size = "in the package", _size_of(DEMO_FOLDER)
        elif spec.checkpoint and spec.folder:
            state, size = "yes", _size_of(spec.folder)
        elif cached and not missing_files(cached):
            state = "yes"
        elif size:
            state = "partly"
    except ModelError:  # another kind of model, or a broken file
        state = "broken"
    if spec.name not in SPECS and (spec.folder is None or state == "broken"):
        return None
    return {
        "name": spec.name,
        "repo": spec.repo,
        "task": ", ".join(spec.tasks),
        "state": state,
        "bytes": size,
        "folder": str(spec.folder) if spec.folder else None,
        "description": spec.description,
    }


def _lora_entries() -> Iterator[dict[str, Any]]:
    """Entries of the LoRAs in the package and in the hub's cache."""
    from wancli.models.inspect import cached_loras, inspect_lora

    packaged = [(name, "", path) for name, path in sorted(PACKAGED.items())]
    for name, repo, path in [*packaged, *cached_loras()]:
        lora = inspect_lora(path)
        yield {
            "name": name,
            "repo": repo,
            "task": "LoRA",
            "state": "yes" if repo else "in the package",
            "bytes": lora.bytes,
            "folder": str(path.parent),
            "description": lora.description,
        }


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _say_path(screen: Screen, name: str, repo: str, path: Path) -> None:
    screen.answer(str(path), {"name": name, "repo": repo, "path": str(path)})


_COMMANDS = {
    "list": list_, "pull": pull, "info": info, "path": path, "rm": rm, "convert": convert
}  # fmt: skip
for _name, _function in _COMMANDS.items():
    app.command(_name, cls=WancliCommand)(_function)
