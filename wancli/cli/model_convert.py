"""`wancli model convert`: a checkpoint in its authors' format becomes a model folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wancli.cli.options import OutputOptions, takes_output_options
from wancli.cli.screen import Screen
from wancli.errors import InputError
from wancli.planning.lora import find_lora
from wancli.records.tensor_files import checkpoint_files
from wancli.utils.outputs import OutputFile, OutputSet
from wancli.utils.reading import user_path

if TYPE_CHECKING:
    from wancli.models.convert import ConvertedModel


Source = Annotated[
    Path, typer.Argument(help="Checkpoint: .pt, .safetensors, or a folder of its shards.")
]
Out = Annotated[Path, typer.Argument(help="Folder to write.")]
Config = Annotated[
    Path | None,
    typer.Option(help='JSON with what the weights cannot tell, such as {"num_heads": 12}.'),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Model to copy the VAE, text encoder and tokenizer from: a name or folder.",
    ),
]
EntryName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Entry of a .pt that has several; by default generator_ema, else generator.",
    ),
]
LoraFiles = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE", help="LoRA to merge into the weights: FILE or FILE=SCALE; repeatable."
    ),
]
Replace = Annotated[
    bool, typer.Option("--overwrite", help="Replace a folder from an earlier conversion.")
]


@takes_output_options
def convert(  # noqa: PLR0913 - one parameter a flag
    *,
    source: Source,
    out: Out,
    output_options: OutputOptions,
    config: Config = None,
    base: Base = None,
    entry: EntryName = "",
    lora: LoraFiles = None,
    overwrite: Replace = False,
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
    from wancli.models.inspect import local_folder

    path = user_path(base)
    return path if path.is_dir() else local_folder(base)[1]


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
    summary = {"path": str(model.path), "parameters": model.parameters, "dtype": model.dtype}
    screen.answer(str(model.path), {**summary, "config": model.config})
