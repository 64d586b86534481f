"""Files written beside a video, and how an existing one is recognized as wancli's own."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from wancli.errors import OVERWRITE_HINT, UsageError, WancliError
from wancli.planning.earlier_rollout import stored_request
from wancli.records.record import (
    UNFINISHED_JSON,
    Request,
    is_same_video,
    parse_record,
    read_record_file,
)
from wancli.records.tensor_files import latents_record
from wancli.utils.files import files_in, is_part
from wancli.utils.outputs import PREVIEW_MARK, OutputFile, preview_file, sidecar, stream_part


def sidecar_files(video: Path, *, previews: bool = False) -> Iterator[OutputFile]:
    """Sidecar and preview of a video, or of latents written instead."""
    record = sidecar(video)
    yield OutputFile(
        record, f"the record of {video.name}", partial(is_record, of=video), named=False
    )
    if previews:
        role = f"the preview of {video.name}"
        yield OutputFile(preview_file(video), role, is_preview, named=False)


def rollout_files(store: Path, video: Path | None) -> Iterator[OutputFile]:
    """Chunk folder of a rollout, and the stream that can be watched meanwhile."""
    yield OutputFile(store, "the folder of that rollout", is_rollout, named=False, folder=True)
    if video:
        yield OutputFile(
            stream_part(video), f"the part of {video.name}", is_stream_part, named=False
        )


def bench_folder(folder: Path, *, overwrite: bool) -> OutputFile:
    """Output folder of a bench; `overwrite` replaces an earlier bench, and nothing else.

    Checking it raises UsageError.
    """
    return OutputFile(folder, "`output`", partial(_check_bench, overwrite=overwrite), folder=True)


def _check_bench(folder: Path, *, overwrite: bool) -> bool:
    existing = [path for path in folder.iterdir() if not is_part(path.name)]
    if existing and not overwrite:
        raise UsageError(f"{folder} exists.", hint=OVERWRITE_HINT)
    try:
        runs = json.loads((folder / "bench.json").read_bytes())["runs"]
        ours = {folder / run["video"] for run in runs} if existing else set()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = set()
    else:
        ours |= {folder / name for name in ("bench.json", "report.html")}
    if foreign := sorted(set(files_in(folder)) - ours):
        raise UsageError(
            f"{folder} is not a bench report and is not replaced: it holds "
            f"{foreign[0].relative_to(folder)}.",
            hint="another `output`",
        )
    return True


def is_record(path: Path, *, of: Path) -> bool:
    """Whether a file is the sidecar of the file `of`."""
    output = _record_in(path).get("output")
    return isinstance(output, Mapping) and Path(str(output.get("path"))).name == of.name


def is_preview(path: Path) -> bool:
    """Whether a file is a picture written by `preview_every`."""
    with path.open("rb") as file:
        return "\0".join(PREVIEW_MARK).encode() in file.read(200)


def is_stream_part(path: Path) -> bool:
    """Whether a file is the partial video of an interrupted rollout."""
    from wancli.video.read import read_comment

    try:
        return read_comment(path) == UNFINISHED_JSON or _record_in(path).get("status", "ok") != "ok"
    except (WancliError, OSError):
        return False


def is_rollout(folder: Path) -> bool:
    """Whether a folder is empty or holds a rollout."""
    if all(is_part(path.name) for path in folder.iterdir()):
        return True
    try:
        stored_request(folder)
    except WancliError:
        return False
    return True


def is_of_rollout(path: Path, *, before: Mapping[str, Any]) -> bool:
    """Whether a video or latents are the output of the rollout with request `before`."""
    record = _record_in(path)
    if not record and path.suffix == ".mp4" and is_record(sidecar(path), of=path):  # --no-metadata
        record = _record_in(sidecar(path))
        record = record if record["output"].get("bytes") == path.stat().st_size else {}
    request = record.get("request")
    if record.get("command") != "rollout" or not isinstance(request, Mapping):
        return False
    return all(request.get(name) == before.get(name) for name in ("prompt", "seed"))


def is_latents_of(path: Path, *, request: Request) -> bool:
    """Whether latents are those of a request, whatever the machine's settings were."""
    record = _record_in(path)
    return bool(record) and is_same_video(record["request"], request.as_json())


def _record_in(path: Path) -> dict[str, Any]:
    """The record in a file, or an empty one."""
    from wancli.video.read import read_comment

    try:
        if path.suffix.lower() == ".mp4":
            return parse_record(read_comment(path) or "", origin=str(path))
        return read_record_file(path) if path.suffix == ".json" else latents_record(path)
    except (WancliError, OSError):
        return {}
