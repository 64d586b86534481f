"""`wancli model`: list, pull, info, path, rm and convert."""

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wancli.catalog.hub_cache import (
    absent,
    cached_bytes,
    cached_file,
    cached_repos,
    check_reachable,
    converted_folder,
    find_cached,
    hub_file,
    repo_folder,
)
from wancli.catalog.local import find_spec
from wancli.catalog.model_folders import find_file, find_named, model_roots
from wancli.catalog.specs import DEMO_FOLDER, RANDOM, SPECS, Checkpoint, ModelSpec
from wancli.catalog.tiny_decoder import DECODER
from wancli.cli.completion import complete_models
from wancli.cli.lazy import WancliCommand, WancliGroup
from wancli.cli.messages import with_flags
from wancli.cli.options import OutputOptions, takes_output_options
from wancli.cli.screen import Screen
from wancli.config.settings import WEIGHTS
from wancli.errors import InputError, ModelError, UsageError, missing
from wancli.planning.lora import PACKAGED, Lora, cached_lora, find_lora, is_lora
from wancli.records.tensor_files import checkpoint_files
from wancli.utils.outputs import OutputFile, OutputSet
from wancli.utils.reading import user_path
from wancli.utils.units import gib

if TYPE_CHECKING:
    from wancli.models.convert import ConvertedModel
    from wancli.models.inspect import ModelInfo

app = typer.Typer(
    cls=WancliGroup,
    add_completion=False,
    help="Models: list, download, inspect, delete, and convert checkpoints.",
)
command = partial(app.command, cls=WancliCommand)
Model = Annotated[
    str,
    typer.Argument(
        autocompletion=complete_models, help="Model: a name (wancli model list), hub id or folder."
    ),
]


@command("list")
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
    repos = [spec.checkpoint.repo if spec.checkpoint else spec.repo for spec in SPECS.values()]
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


@command()
@takes_output_options
def pull(name: Model, output_options: OutputOptions) -> None:
    """Download a model from the hub, or a LoRA (REPO:FILE); resumes earlier downloads.

    wancli model pull wan2.1-t2v-1.3b
    """
    screen = Screen(output_options)
    if lora := hub_file(name):
        _fetch(*lora, screen=screen)
        _say_lora_path(screen, *lora)
        return
    spec = _with_files(name)
    if spec.checkpoint:
        _say_path(screen, spec, spec.folder or _convert_pulled(spec.name, spec.checkpoint, screen))
        return
    if spec.folder is not None:
        raise UsageError(
            f"model '{name}' is in {spec.folder}: there is nothing to download.",
            hint="wancli model list prints the models on the hub",
        )
    from wancli.models.inspect import missing_files

    folder = _fetch(spec.repo, screen=screen)
    if missing := missing_files(folder):
        raise ModelError(
            f"{spec.name} is not a complete model: it lacks {', '.join(missing[:3])}.",
            hint="use a Wan model in diffusers' format",
        )
    _say_path(screen, spec, folder)


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

    check_reachable(repo)
    needed = bytes_to_download(repo, only=only, without=without)
    if needed:
        check_space(repo, needed)
        screen.note(f"{repo}: {gib(needed)} to download")
    with screen.transfer(needed) as tell:
        return download(repo, tell, only=only, without=without)


@command()
@takes_output_options
def info(name: Model, output_options: OutputOptions) -> None:
    """Describe a model (task, parts, parameters, whether it fits here), or a LoRA or GGUF file."""
    if weights := _weights_file(name):
        _show_weights(weights, Screen(output_options))
        return
    if is_lora(name):
        _show_lora(name, Screen(output_options))
        return
    from wancli.cli.plan_table import default_json
    from wancli.cost.capacity import check_default_capacity
    from wancli.models.inspect import inspect_model

    model, screen = inspect_model(name), Screen(output_options)
    if model.spec.on_hub and model.spec.name not in SPECS:
        raise absent(name)
    if model.missing:
        some = ", ".join(model.missing[:3])
        screen.warn(f"{name} is incomplete: it lacks {some}.", hint=f"wancli model pull {name}")
    capacity = check_default_capacity(name, model.spec).capacity
    if output_options.json:
        screen.json(model.as_json() | default_json(capacity))
        return
    verdict = [("on this machine", with_flags(capacity.verdict))] if capacity.estimate else []
    screen.table("", "", rows=[*_facts(model), *verdict])
    if model.parts:
        rows = [
            (
                p.name,
                p.kind,
                f"{p.parameters:,}" if p.parameters else "",
                ", ".join(p.dtypes),
                gib(p.bytes) if p.bytes else "",
            )
            for p in model.parts
        ]
        columns = ("parameters", "size")
        screen.table("part", "class", "parameters", "dtype", "size", rows=rows, right=columns)


@command()
@takes_output_options
def path(name: Model, output_options: OutputOptions) -> None:
    """Print the folder of a downloaded model, or the file of a LoRA (REPO:FILE)."""
    if lora := hub_file(name):
        _say_lora_path(Screen(output_options), *lora)
        return
    _say_path(Screen(output_options), *_local_folder(name))


@command()
@takes_output_options
def rm(
    name: Model,
    output_options: OutputOptions,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,  # noqa: FBT002
) -> None:
    """Delete all revisions of a model from the hub's cache, and what was converted from it."""
    spec, screen = _with_files(name), Screen(output_options)
    repo = spec.checkpoint.repo if spec.checkpoint else spec.repo
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


@command()
@takes_output_options
def convert(  # noqa: PLR0913 - one parameter a flag
    *,
    source: Annotated[
        Path, typer.Argument(help="Checkpoint: .pt, .safetensors, or a folder of its shards.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    output_options: OutputOptions,
    config: Annotated[
        Path | None,
        typer.Option(help='JSON with what the weights cannot tell, such as {"num_heads": 12}.'),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Model to copy the VAE, text encoder and tokenizer from: a name or folder.",
        ),
    ] = None,
    entry: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Entry of a .pt that has several; by default generator_ema, else generator.",
        ),
    ] = "",
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="LoRA to merge into the weights: FILE or FILE=SCALE; repeatable."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder from an earlier conversion.")
    ] = False,
) -> None:
    """Convert a checkpoint in Wan's or Self-Forcing's format to a model folder.

    wancli model convert self_forcing_dmd.pt self-forcing --base wan2.1-t2v-1.3b
    """
    from wancli.models.convert_folder import check_target

    sources = [path for path in (source, config) if path]
    for path in sources:
        if not path.exists():
            raise InputError(f"'{path}' not found.", hint="check the path")
    folder = _base_folder(base) if base else None
    sources += [folder] if folder else []
    loras = [find_lora(text) for text in lora or ()]
    check_target(out, sources=[*sources, *(each.path for each in loras)], overwrite=overwrite)
    checkpoint_files(source)
    from wancli.models.convert import convert as write

    screen, outputs = Screen(output_options), OutputSet(another="another folder")
    # `write` checks whether a folder may be replaced, under its lock.
    outputs.add(OutputFile(out, "OUT", ours=lambda _: True, folder=True))
    with outputs.locked():
        converted = write(
            source, out, config=config, base=folder, entry=entry, loras=loras, overwrite=overwrite
        )
    _say_converted(screen, converted, alone=folder is None)


def _base_folder(base: str) -> Path:
    """A folder, which needs no transformer, or that of a model by name."""
    path = user_path(base)
    return path if path.is_dir() else _local_folder(base)[1]


def _say_converted(screen: Screen, model: "ConvertedModel", *, alone: bool) -> None:
    layers, heads, width = (
        model.config[name] for name in ("num_layers", "num_attention_heads", "attention_head_dim")
    )
    screen.note(
        f"{model.parameters:,} parameters, {model.dtype}: {layers} layers, "
        f"dim {heads * width}, {heads} heads"
    )
    if alone:
        screen.note(
            "only a transformer: --base MODEL adds the rest; without it, "
            "wancli rollout needs --prompt-embeds and --no-video"
        )
    if screen.options.json:
        summary = {"path": str(model.path), "parameters": model.parameters, "dtype": model.dtype}
        screen.json({**summary, "config": model.config})
    else:
        screen.result(str(model.path))


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


def _show_lora(name: str, screen: Screen) -> None:
    """Describe a LoRA by the header of its file."""
    from wancli.models.inspect import inspect_lora

    lora = inspect_lora(find_lora(name).path)
    if screen.options.json:
        screen.json(lora.as_json())
        return
    facts = {
        "file": str(lora.path),
        "form": lora.form,
        "keys": f"{lora.keys:,}",
        "layers": f"{lora.layers:,}",
        "rank": ", ".join(map(str, lora.ranks)),
        "size": lora.size,
        "blocks": f"{lora.blocks} of dim {lora.dim}" if lora.dim else str(lora.blocks or ""),
        "task": lora.task,
        "expert": lora.expert and f"{lora.expert} noise, by its name",
        "fits": ", ".join(lora.models) or "no known model",
        "first keys": ", ".join(lora.first_keys),
        "on disk": gib(lora.bytes),
    }
    screen.table("", "", rows=[(fact, value) for fact, value in facts.items() if value])


def _weights_file(name: str) -> Path | None:
    """The file of weights, and of no LoRA, that a name stands for; None for any other name.

    Raises ModelError or InputError for a GGUF file that is not there: no model or LoRA is one.
    """
    from wancli.models.weight_summary import READ, summarize_weights

    path = user_path(name)
    if not path.is_file():
        setting = next((part for part in (*WEIGHTS, DECODER) if find_named(part, name)), None)
        path = find_file(setting, name) if setting else path
    if on_hub := hub_file(name):
        path = cached_file(*on_hub) or path
    if path.suffix == ".gguf":
        if not path.exists():
            raise absent(name, kind="file") if on_hub else missing("file", path)
        return path
    if path.suffix not in READ or not path.is_file():
        return None
    summary = summarize_weights(path)
    broken = summary.problem and not summary.parts
    return path if broken or {*summary.parts} - {"lora"} else None


def _show_weights(path: Path, screen: Screen) -> None:
    """Describe a file of weights by its header."""
    from wancli.models.inspect import inspect_weights

    weights = inspect_weights(path)
    if screen.options.json:
        screen.json(weights.as_json())
        return
    facts = {
        "file": str(path),
        "architecture": weights.kind,
        "part": weights.part.replace("_", " ") or "none of a Wan",
        "keys": f"{weights.keys:,}",
        "parameters": f"{weights.parameters:,}",
        "types": ", ".join(f"{count:,} {dtype}" for dtype, count in weights.dtypes.items()),
        "size": weights.size,
        "blocks": f"{weights.blocks} of dim {weights.dim}" if weights.blocks else "",
        "task": weights.task,
        "expert": weights.expert and f"{weights.expert} noise, by its name",
        "fits": ", ".join(weights.models)
        or ("no known model" if weights.part == "transformer" else ""),
        "on disk": gib(weights.bytes),
    }
    screen.table("", "", rows=[(fact, value) for fact, value in facts.items() if value])


def _say_lora_path(screen: Screen, repo: str, file: str) -> None:
    path = cached_lora(repo, file)
    if screen.options.json:
        screen.json({"name": f"{repo}:{file}", "repo": repo, "path": str(path)})
    else:
        screen.result(str(path))


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _local_folder(name: str) -> tuple[ModelSpec, Path]:
    """The model and its folder. Raises ModelError if it is not downloaded."""
    from wancli.models.inspect import missing_files

    spec = _with_files(name)
    if spec.folder is not None:
        return spec, spec.folder
    cached = find_cached(spec.repo)
    if cached is None:
        raise absent(name)
    if missing := missing_files(cached):
        raise ModelError(
            f"model '{name}' is incomplete: it lacks {', '.join(missing[:3])}.",
            hint=f"wancli model pull {name}",
        )
    return spec, cached


def _with_files(name: str) -> ModelSpec:
    """The model. Raises UsageError for a random one, which has no files."""
    spec = find_spec(name)
    if spec.random:
        raise UsageError(
            f"model '{name}' has no files: its weights are random.",
            hint=f"the model itself: {name.removeprefix(RANDOM)}",
        )
    return spec


def _say_path(screen: Screen, spec: ModelSpec, folder: Path) -> None:
    if screen.options.json:
        screen.json({"name": spec.name, "repo": spec.repo, "path": str(folder)})
    else:
        screen.result(str(folder))


def _facts(model: "ModelInfo") -> list[tuple[str, ...]]:
    spec = model.spec
    strides = spec.strides
    causal = {True: "yes", False: "no", None: "unknown"}[spec.causal]
    facts = {
        "name": spec.name,
        "repo": spec.repo,
        "checkpoint": f"{spec.checkpoint.repo}:{spec.checkpoint.file}" if spec.checkpoint else "",
        "folder": "" if spec.random else str(spec.folder or "not on this machine"),
        "description": spec.description,
        "draws": spec.draws,
        "task": ", ".join(spec.tasks),
        "causal": causal,
        "strides": f"{strides.temporal} video frames, {strides.spatial} pixels a latent; "
        f"{strides.patch}x{strides.patch} latents a token",
        "latent channels": str(spec.latent_channels),
        "text tokens": str(spec.text_length),
        "blocks": f"{spec.layers} of dim {spec.dim}" if spec.layers else "",
        "experts": str(spec.experts),
        "parameters": f"{model.parameters:,}" if model.parts else "",
        "size": gib(model.bytes) if model.bytes else "",
    }
    return [(name, fact) for name, fact in facts.items() if fact]
