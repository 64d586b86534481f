"""Input pictures and videos: checks before anything loads, and lookup from a record."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from wancli.catalog.geometry import Strides, size_like
from wancli.catalog.tasks import TEXT
from wancli.config.settings import VideoShape
from wancli.errors import InputError, PlanWarning, UsageError
from wancli.planning.inputs import SQUARE, VIDEOS, WHOLE, InputFiles
from wancli.planning.plan import Plan
from wancli.utils.files import digest

_MUCH = 0.1  # of a picture that is cut off
_SAME_FPS = 0.02  # ffmpeg prints rates with two decimals


def check_input_files(
    inputs: InputFiles, video: VideoShape, strides: Strides
) -> tuple[PlanWarning, ...]:
    """Warn of files of which much is cut off to fit the video.

    Raises InputError for an unreadable file, UsageError for a video of another length or fps.
    """
    warnings: list[PlanWarning] = []
    for name, paths in inputs.named().items():
        for path in paths:
            size = _check_clip(f"`{name}`", path, video) if name in VIDEOS else _picture_size(path)
            if name not in (*WHOLE, *SQUARE):
                warnings += _cropping_warnings(name, path, size, video, strides)
    return tuple(warnings)


def check_picture(
    name: str, path: Path, video: VideoShape, strides: Strides
) -> tuple[PlanWarning, ...]:
    """Warn if much of a picture is cut off to fit the video. Raises InputError."""
    return tuple(_cropping_warnings(name, path, _picture_size(path), video, strides))


def _picture_size(path: Path) -> tuple[int, int]:
    from wancli.video.images import open_image

    return open_image(path).size


def _cropping_warnings(
    name: str, path: Path, shape: tuple[int, int], video: VideoShape, strides: Strides
) -> Iterator[PlanWarning]:
    size = (video.width, video.height)
    ratio = shape[0] * size[1] / (shape[1] * size[0])
    if (cut := 1 - min(ratio, 1 / ratio)) > _MUCH:
        width, height = size_like(shape, size, strides)
        yield PlanWarning(
            f"`{name}` {path.name} is {shape[0]}x{shape[1]}: {cut:.0%} of it is cut off to fit "
            f"{size[0]}x{size[1]}.",
            f"`size {width}x{height}`",
        )


def _check_clip(name: str, path: Path, video: VideoShape) -> tuple[int, int]:
    """Width and height of an input video."""
    from wancli.video.read import probe

    info = probe(path)
    if info.frames != video.num_frames:
        raise UsageError(
            f"{name} {path} has {info.frames} video frames; the output has {video.num_frames}.",
            hint=f"cut it to {video.num_frames}"
            if info.frames > video.num_frames
            else f"`num_frames {info.frames}`",
        )
    check_rate(f"{name} {path}", info.fps, video)
    return info.width, info.height


def check_rate(clip: str, fps: float, video: VideoShape) -> None:
    """Raise UsageError for a clip of another frame rate than the output's."""
    if abs(fps - video.fps) <= _SAME_FPS:
        return
    whole = f"`fps {fps:.0f}`, or " if abs(fps - round(fps)) <= _SAME_FPS else ""
    raise UsageError(
        f"{clip} has {fps:g} frames per second; the output has {video.fps}.",
        hint=f"{whole}convert it: ffmpeg -i CLIP -vf fps={video.fps} NEW.mp4",
    )


def inputs_json(inputs: InputFiles, plan: Plan) -> dict[str, Any]:
    """The task and its files as a request stores them; empty for text-to-video."""
    if plan.task == TEXT:
        return {}
    stored: dict[str, Any] = {"task": plan.task}
    for name, paths in inputs.named().items():
        entries = [
            {"name": p.name, "sha256": digest(name, p), "path": str(p.absolute())} for p in paths
        ]
        stored[name] = entries if name == "ref_image" else entries[0]
    return stored


def find_recorded_files(stored: Mapping[str, Any], record: Path) -> InputFiles:
    """Find a request's files at their old path or beside its record, by SHA-256.

    Raises InputError for a file that is missing or has changed.
    """
    files: dict[str, Any] = {}
    for name in (field.name for field in fields(InputFiles)):
        if name in stored:
            entries = stored[name] if name == "ref_image" else [stored[name]]
            paths = tuple(_find(name, entry, record) for entry in entries)
            files[name] = paths if name == "ref_image" else paths[0]
    return InputFiles(**files)


def _find(name: str, entry: Mapping[str, str], record: Path) -> Path:
    beside = record.parent / entry["name"]
    for path in (Path(entry.get("path", beside)), beside):
        if path.is_file() and digest(name, path) == entry["sha256"]:
            return path
    raise InputError(
        f"{record} was made from `{name}` {entry['name']}, which is missing or has changed.",
        hint=f"put the original {entry['name']} beside it",
    )
