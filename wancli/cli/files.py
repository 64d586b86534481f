"""`wancli show` and `wancli decode`: what a file holds, and latents made into a video."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from wancli.cli.generate import Overwrite
from wancli.cli.naming import check_sidecar
from wancli.cli.options import Talk, takes_settings, takes_talk
from wancli.cli.repro import read_record
from wancli.cli.screen import Screen
from wancli.errors import InputError, UsageError
from wancli.folders import check_files, find_spec
from wancli.records import settings_of
from wancli.resolve import Layer, resolve
from wancli.settings import Settings
from wancli.tensor_files import latents_record, latents_shape


@takes_talk
def show(
    file: Annotated[Path, typer.Argument(help="A video of wancli's, or its JSON.")], talk: Talk
) -> None:
    """Print the record inside a video: the recipe that made it."""
    record, screen = read_record(file), Screen(talk)
    if talk.json:
        screen.json(record)
        return
    screen.table("", "", "value", rows=_rows(record))


@takes_talk
@takes_settings(Settings, only=("device", "vae_tiling", "vae_dtype"))
def decode(
    *,
    latents: Annotated[Path, typer.Argument(help="Latents that wancli wrote.")],
    given: Layer,
    talk: Talk,
    output: Annotated[Path, typer.Option("--output", "-o", help="MP4 to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Turn saved latents into a video.

    The VAE works as it did for them, or as the flags say.
    """
    from wancli.video.write import check_destination

    check_destination(output)
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists.", hint="--overwrite, or another --output")
    check_sidecar(output)
    _check_latents(latents, given)
    from wancli.pipeline.run import decode_file

    screen = Screen(talk)
    with screen.progress() as report:
        record = decode_file(latents, output, report, given)
    screen.done(record)


def _check_latents(latents: Path, given: Layer) -> None:
    """Raise WancliError for what no VAE of the model they are of can decode."""
    channels, record = latents_shape(latents)[1], latents_record(latents)
    layer = Layer(f"record of {latents.name}", settings_of(record))
    spec = find_spec(resolve([layer, given], Settings).settings.model)
    check_files(spec, ("vae",))
    if spec.architecture and channels != spec.latent_channels:
        raise InputError(
            f"{latents} has {channels} channels; {spec.name} has {spec.latent_channels}.",
            hint="give latents of that model",
        )


def _rows(value: Any, *path: str) -> list[tuple[str, ...]]:
    """A record as (table, key, value)."""
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in _rows(inner, *path, key)]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(".".join(path[:-1]), path[-1], text)]
