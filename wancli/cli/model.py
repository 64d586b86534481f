"""`wancli model`: the group, and `convert`."""

from pathlib import Path
from typing import Annotated

import typer

from wancli.cli import models
from wancli.cli.options import Talk, takes_talk
from wancli.cli.screen import Screen
from wancli.errors import InputError
from wancli.tensor_files import checkpoint_files

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Models: list, download, inspect, delete, and make one from a checkpoint.",
)
app.command("list")(models.list_)
app.command()(models.pull)
app.command()(models.info)
app.command()(models.path)
app.command()(models.rm)


@app.command()
@takes_talk
def convert(
    *,
    source: Annotated[
        Path, typer.Argument(help="Checkpoint: .pt, .safetensors, or a folder of its shards.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    talk: Talk,
    config: Annotated[
        Path | None,
        typer.Option(help='JSON with what the weights do not say, such as {"num_heads": 12}.'),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Model folder whose VAE, text encoder and tokenizer are put beside."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that was converted before.")
    ] = False,
) -> None:
    """Turn a checkpoint in Wan's or Self-Forcing's own format into a model folder.

    wancli model convert self_forcing_dmd.pt self-forcing --base Wan2.1-T2V-1.3B-Diffusers
    """
    from wancli.models.folder import check_target

    sources = [path for path in (source, config, base) if path]
    for path in sources:
        if not path.exists():
            raise InputError(f"{path} not found.", hint="check the path")
    check_target(out, sources=sources, overwrite=overwrite)
    checkpoint_files(source)
    from wancli.models.convert import convert as write

    screen = Screen(talk)
    done = write(source, out, config=config, base=base, overwrite=overwrite)
    layers, heads, width = (
        done.config[name] for name in ("num_layers", "num_attention_heads", "attention_head_dim")
    )
    screen.say(
        f"{done.parameters:,} parameters, {done.dtype}: {layers} layers, dim {heads * width}, "
        f"{heads} heads"
    )
    if base is None:
        screen.say(
            "only a transformer: --base FOLDER adds the rest; without it, "
            "wancli rollout takes --prompt-embeds and --no-video"
        )
    if talk.json:
        told = {"path": str(out), "parameters": done.parameters, "dtype": done.dtype}
        screen.json({**told, "config": done.config})
    else:
        screen.result(str(out))
