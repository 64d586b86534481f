"""`wancli show` and `wancli decode`: the record in a file, and latents as a video."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wancli.cli.options import OutputOptions, Overwrite, takes_output_options, takes_settings
from wancli.cli.screen import Screen
from wancli.cli.timings import in_lines, phases
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import FEW_STEPS, Settings
from wancli.errors import InputError
from wancli.records.record import settings_of

if TYPE_CHECKING:
    from wancli.video.integrity import Check

CHECK_SCHEMA = "wancli.check/1"
# Lines of the summary; a part is left out if the record lacks one of its values.
_SUMMARY = {
    "prompt": ("{request.prompt}",),
    "model": ("{request.model}", "revision {request.model_revision}"),
    "video": (
        "{request.video.width}x{request.video.height}",
        "{request.video.num_frames} frames at {request.video.fps} fps",
    ),
    "sampling": (
        "seed {request.seed}",
        "{request.sampling.steps} steps",
        "{request.sampling.scheduler}",
        "guidance {request.sampling.guidance_scale}",
        "shift {request.sampling.flow_shift}",
    ),
    "step cache": ("{cache.method}", "{cache.reused} of {cache.forwards} forwards reused"),
    "made": ("{created}", "wancli {command}", "{status}", "{error.message}"),
    "memory": ("RAM {memory.ram_peak_gib} GiB", "VRAM {memory.vram_peak_gib} GiB"),
}
_ROLLOUT_SUMMARY = {
    "rollout": (
        "{request.rollout.chunks} chunks of {request.rollout.chunk_frames} latent frames",
        "window {request.rollout.rolling_window}",
        "sinks {request.rollout.sink_frames}",
    ),
}
_COLUMNS = 60  # of a line of times
_FIELD = re.compile(r"\{([\w.]+)\}")


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
    all_: Annotated[
        bool, typer.Option("--all", help="Print the whole record instead of a summary.")
    ] = False,
) -> None:
    """Print the record inside a video: how it was generated.

    Prints a summary, and with --all the whole record. Numbers are rounded; --json prints them as
    they are. --check tells whether each file is whole, damaged (exit code 4), or has no digest
    because it is unfinished or an earlier version wrote it; only those are decoded.
    """
    from wancli.planning.existing import read_record
    from wancli.video.read import streamed_frames

    screen = Screen(output_options)
    if check:
        _check(files, screen)
        return
    for file in files:
        record = read_record(file)
        if output_options.json:
            screen.json(record)
        else:
            streamed = streamed_frames(file) if file.suffix != ".json" else 0
            rows = _all_rows(record) if all_ else _summary_rows(record, streamed=streamed)
            screen.table("", "", rows=rows if len(files) == 1 else [("file", str(file)), *rows])


@takes_output_options
@takes_settings(
    Settings,
    only=("device", "vae", "vae_tiling", "vae_dtype", "vae_exact", "vae_decoder"),
    show_defaults=False,
)
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
    from wancli.models.warm import quiet_imports
    from wancli.planning.output_files import sidecar_files
    from wancli.utils.heap import keep_heap
    from wancli.utils.outputs import OutputFile, OutputSet
    from wancli.video.write import check_name

    check_name(output)
    keep_heap()
    _check_latents(latents, overrides)
    outputs = OutputSet(overwrite=overwrite, reads=[latents])
    outputs.add(OutputFile(output, "--output"), *sidecar_files(output))
    screen = Screen(output_options)
    with outputs.locked(), screen.progress() as report:
        with quiet_imports(report):
            from wancli.generation.runner import decode_file
        record = decode_file(latents, output, report, overrides, replaced=outputs.replaced)
    screen.done(record)


def _check_latents(latents: Path, overrides: Layer) -> None:
    """Raise WancliError for latents that the VAE of their model cannot decode."""
    from wancli.catalog.decoder_files import add_vae_decoder
    from wancli.catalog.local import check_files, find_spec
    from wancli.catalog.weight_files import add_weight_files
    from wancli.records.tensor_files import latents_record, latents_shape

    channels, record = latents_shape(latents)[1], latents_record(latents)
    layer = Layer(f"record of {latents.name}", settings_of(record))
    settings = resolve([layer, overrides], Settings).settings
    spec = add_weight_files(find_spec(settings.model), vae=settings.machine.vae)
    spec = add_vae_decoder(spec, settings.machine.vae_decoder)
    check_files(spec, ("vae",))
    if spec.architecture and channels != spec.latent_channels:
        raise InputError(
            f"{latents} has {channels} channels; {spec.name} has {spec.latent_channels}.",
            hint="use latents of that model",
        )


def _check(files: list[Path], screen: Screen) -> None:
    """Print a line per file. Raises InputError unless all are intact."""
    from wancli.video.integrity import NO_DIGEST, WHOLE

    failed = 0
    for file in files:
        result = _check_file(file)
        failed += result.status not in (WHOLE, NO_DIGEST)
        screen.answer(
            f"{result.status:9}  {file}{result.why and f': {result.why}'}",
            {"schema": CHECK_SCHEMA, "path": str(file), **asdict(result)},
        )
    if failed:
        raise InputError(
            f"{failed} of {len(files)} files are damaged or cannot be checked.",
            hint="generate one again from its record: wancli repro FILE -o FILE --overwrite",
        )


def _check_file(file: Path) -> "Check":
    """Check a video by the record inside or beside it; for a record, the video beside it."""
    from wancli.planning.existing import record_beside, record_in
    from wancli.video.integrity import MISSING, Check, check_video

    video = file.with_suffix(".mp4") if file.suffix == ".json" else file
    if not video.is_file():
        return Check(MISSING)
    inside = record_in(file) if file == video else None
    record = inside or record_beside(file)
    return check_video(video, record) if record else Check("no record")


def _all_rows(table: Mapping[str, Any], *path: str) -> list[tuple[str, str]]:
    """Rows (key, value) of a record, each table under its name."""
    values = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    rows = [(f"[{'.'.join(path)}]", "")] if path and values else []
    rows += [(f"  {key}" if path else key, _text(value)) for key, value in values.items()]
    tables = {key: inner for key, inner in table.items() if isinstance(inner, Mapping)}
    return rows + [row for key, inner in tables.items() for row in _all_rows(inner, *path, key)]


def _summary_rows(record: Mapping[str, Any], *, streamed: int) -> list[tuple[str, str]]:
    """Rows (name, text) of what one asks first; what the record lacks is left out.

    `streamed` is the number of frames in a rollout's video that is not finished, else 0.
    """
    timings, sources = _at(record, "timings"), _at(record, "request.sources")
    spent = timings if isinstance(timings, Mapping) else {}
    numbers = {name: value for name, value in spent.items() if isinstance(value, int | float)}
    origins = sources if isinstance(sources, Mapping) else {}
    flags = [str(key).rpartition(".")[2] for key, source in origins.items() if source == "flag"]
    others = dict.fromkeys(str(source) for source in origins.values() if source != "flag")
    changed = [f"flags {', '.join(flags)}"] if flags else []
    settings = settings_of(record)
    if streamed:
        planned = settings["video"]["num_frames"]
        settings["video"] = {**settings["video"], "num_frames": f"{streamed} of {planned}"}
    record = {**record, "request": {**record["request"], **settings}}
    texts = {name: _filled(parts, record) for name, parts in _lines(record).items()}
    texts["prompt"] = "; ".join([texts["prompt"], *_prompt_changes(record)])
    prompt, model = texts.pop("prompt"), texts.pop("model")
    texts = {"prompt": prompt, "model": model, "files": ", ".join(_files(record)), **texts}
    texts |= {
        "settings from": "; ".join([*changed, *others]),
        "time": "\n".join(in_lines(phases(numbers, start_s=0), _COLUMNS)),
    }
    return [(name, text) for name, text in texts.items() if text]


def _lines(record: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """The lines of a record: a rollout has some besides, and a list of timesteps no `steps`."""
    seed, steps, solver, guidance, shift = _SUMMARY["sampling"]
    rollout = "rollout" in record["request"]
    scheduler = _at(record, "request.sampling.scheduler")
    listed = _at(record, "request.sampling.steps_list")
    if scheduler == "few-step" or (scheduler == "euler" and listed):
        steps = f"timesteps {listed or FEW_STEPS}"
    elif rollout:
        steps += " a chunk"
    guided = () if scheduler == "few-step" else (guidance,)
    lines: dict[str, Sequence[str]] = {
        **_SUMMARY,
        "sampling": (seed, steps, solver, *guided, shift),
    }
    return {**lines, **_ROLLOUT_SUMMARY} if rollout else lines


def _files(record: Mapping[str, Any]) -> list[str]:
    """Names of the files of weights that replaced the model's own, and LoRAs with their scales."""
    weights, loras = _at(record, "request.weights"), _at(record, "request.machine.lora")
    entries = weights if isinstance(weights, list) else []
    names = [str(entry["name"]) for entry in entries if isinstance(entry, Mapping)]
    return names + [str(text) for text in (loras if isinstance(loras, list) else [])]


def _prompt_changes(record: Mapping[str, Any]) -> list[str]:
    changes = _at(record, "request.inputs.changes")
    pairs = changes if isinstance(changes, list) else []
    return [f"chunk {pair[0]}: {pair[1]}" for pair in pairs if isinstance(pair, list) and pair[1:]]


def _filled(parts: Sequence[str], record: Mapping[str, Any]) -> str:
    """The parts of a line whose values are all in the record."""
    lines = []
    for part in parts:
        values = {path: _at(record, path) for path in _FIELD.findall(part)}
        if all(value not in (None, "", [], {}) for value in values.values()):
            lines.append(_FIELD.sub(lambda match: _text(values[match[1]]), part))  # noqa: B023
    return ", ".join(lines)


def _at(record: Any, path: str) -> Any:
    """The value at a dotted path, or None."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def _text(value: Any) -> str:
    """Text, or another value as JSON, with numbers rounded to four significant digits."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
