"""`wancli show` and `wancli decode`: the record in a file, and latents as a video."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from wancli.catalog.local import check_files, find_spec
from wancli.cli.options import OutputOptions, Overwrite, takes_output_options, takes_settings
from wancli.cli.repro import read_record
from wancli.cli.screen import Screen
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Settings
from wancli.errors import InputError
from wancli.planning.existing import record_beside, record_in
from wancli.planning.output_files import sidecar_files
from wancli.records.record import settings_of
from wancli.records.tensor_files import latents_record, latents_shape
from wancli.utils.outputs import OutputFile, OutputSet
from wancli.video.integrity import NO_DIGEST, WHOLE, Check, check_video

CHECK_SCHEMA = "wancli.check/1"


@takes_output_options
def show(
    *,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="wancli videos, or their JSON.")
    ],
    output_options: OutputOptions,
    check: Annotated[
        bool,
        typer.Option("--check", help="Check instead whether the videos are intact."),
    ] = False,
) -> None:
    """Print the record inside a video: how it was generated.

    --check tells whether each file is whole, damaged (exit code 4), or has no digest because an
    earlier version wrote it; only those are decoded.
    """
    screen = Screen(output_options)
    if check:
        _check(files, screen)
        return
    for file in files:
        record = read_record(file)
        if output_options.json:
            screen.json(record)
        else:
            screen.table("", "", "value" if len(files) == 1 else str(file), rows=_rows(record))


@takes_output_options
@takes_settings(Settings, only=("device", "vae_tiling", "vae_dtype"), show_defaults=False)
def decode(
    *,
    latents: Annotated[Path, typer.Argument(help="Latents (.safetensors) from wancli.")],
    overrides: Layer,
    output_options: OutputOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="MP4 to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Decode saved latents into a video.

    The VAE settings are those of their record, unless flags change them.
    """
    from wancli.video.write import check_name

    check_name(output)
    _check_latents(latents, overrides)
    outputs = OutputSet(overwrite=overwrite, reads=[latents])
    outputs.add(OutputFile(output, "--output"), *sidecar_files(output))
    screen = Screen(output_options)
    with outputs.locked():
        from wancli.generation.runner import decode_file

        with screen.progress() as report:
            record = decode_file(latents, output, report, overrides, replaced=outputs.replaced)
    screen.done(record)


def _check_latents(latents: Path, overrides: Layer) -> None:
    """Raise WancliError for latents that the VAE of their model cannot decode."""
    channels, record = latents_shape(latents)[1], latents_record(latents)
    layer = Layer(f"record of {latents.name}", settings_of(record))
    spec = find_spec(resolve([layer, overrides], Settings).settings.model)
    check_files(spec, ("vae",))
    if spec.architecture and channels != spec.latent_channels:
        raise InputError(
            f"{latents} has {channels} channels; {spec.name} has {spec.latent_channels}.",
            hint="use latents of that model",
        )


def _check(files: list[Path], screen: Screen) -> None:
    """Print a line per file. Raises InputError unless all are intact."""
    failed = 0
    for file in files:
        result = _check_file(file)
        failed += result.status not in (WHOLE, NO_DIGEST)
        if screen.options.json:
            screen.json({"schema": CHECK_SCHEMA, "path": str(file), **asdict(result)})
        else:
            screen.result(f"{result.status:9}  {file}{result.why and f': {result.why}'}")
    if failed:
        raise InputError(
            f"{failed} of {len(files)} files are not known to be intact.",
            hint="wancli repro FILE -o FILE --overwrite reproduces one whose record is readable",
        )


def _check_file(file: Path) -> Check:
    """Check a video by the record inside or beside it; for a record, the video beside it."""
    video = file.with_suffix(".mp4") if file.suffix == ".json" else file
    if not video.is_file():
        return Check("missing")
    inside = record_in(file) if file == video else None
    record = inside or record_beside(file)
    return check_video(video, record) if record else Check("no record")


def _rows(value: Any, *path: str) -> list[tuple[str, ...]]:
    """Rows (table, key, value) of a record."""
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in _rows(inner, *path, key)]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(".".join(path[:-1]), path[-1], text)]
