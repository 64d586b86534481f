"""Input pictures and videos: checks before anything loads, and lookup from a record."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.catalog.geometry import Strides, cut_off, size_like
from wancli.catalog.tasks import TEXT
from wancli.config.settings import VideoShape
from wancli.errors import InputError, PlanWarning, UsageError
from wancli.planning.inputs import SQUARE, VIDEOS, WHOLE, InputFiles
from wancli.planning.plan import Plan
from wancli.utils.files import digest

if TYPE_CHECKING:
    from wancli.video.read import VideoInfo

_MUCH = 0.1  # of a picture that is cut off
_SAME_FPS = 0.02  # ffmpeg prints rates with two decimals
_TO_SDR = "zscale=t=linear:npl=100,tonemap=hable,zscale=p=bt709:t=bt709:m=bt709,format=yuv420p"


def check_input_files(
    inputs: InputFiles, video: VideoShape, strides: Strides
) -> tuple[PlanWarning, ...]:
    """Warn of files of which much is cut off to fit the video, and of colours that are not mapped.

    Raises InputError for an unreadable file, UsageError for a video of another length or fps.
    """
    from wancli.video.read import probe

    warnings: list[PlanWarning] = []
    for name, paths in inputs.named().items():
        for path in paths:
            if name in VIDEOS:
                info = probe(path)
                warnings += check_clip(f"`{name}` {path.name}", info, video)
                _check_length(f"`{name}` {path}", info.frames, video, strides)
                size = info.width, info.height
            else:
                size = _picture_size(path)
            if name not in (*WHOLE, *SQUARE):
                warnings += _cropping_warnings(name, path, size, video, strides)
    return tuple(warnings)


def check_picture(
    name: str, path: Path, video: VideoShape, strides: Strides
) -> tuple[PlanWarning, ...]:
    """Warn if much of a picture is cut off, and another size needs less. Raises InputError."""
    return tuple(_cropping_warnings(name, path, _picture_size(path), video, strides))


def _picture_size(path: Path) -> tuple[int, int]:
    from wancli.video.images import open_image

    return open_image(path).size


def _cropping_warnings(
    name: str, path: Path, shape: tuple[int, int], video: VideoShape, strides: Strides
) -> Iterator[PlanWarning]:
    size = (video.width, video.height)
    cut, (width, height) = cut_off(shape, size), size_like(shape, size, strides)
    if cut > _MUCH and cut_off(shape, (width, height)) < cut:
        yield PlanWarning(
            f"`{name}` {path.name} is {shape[0]}x{shape[1]}: {cut:.0%} of it is cut off to fit "
            f"{size[0]}x{size[1]}.",
            f"`size {width}x{height}`",
        )


def check_clip(clip: str, info: "VideoInfo", video: VideoShape) -> tuple[PlanWarning, ...]:
    """Warn of a clip in HDR. Raises UsageError for another frame rate, and for wide pixels."""
    if abs(info.fps - video.fps) > _SAME_FPS:
        whole = abs(info.fps - round(info.fps)) <= _SAME_FPS
        raise UsageError(
            f"{clip} has {info.fps:g} frames per second; the output has {video.fps}.",
            hint=(f"`fps {info.fps:.0f}`, or convert it: " if whole else "convert it: ")
            + f"ffmpeg -i CLIP -vf fps={video.fps} NEW.mp4",
        )
    if not info.square:
        raise UsageError(
            f"{clip} has pixels that are not square, and would be distorted.",
            hint="convert it: ffmpeg -i CLIP -vf scale=iw*sar:ih,setsar=1 NEW.mp4",
        )
    if not info.hdr:
        return ()
    hint = f"convert it: ffmpeg -i CLIP -vf {_TO_SDR} NEW.mp4"
    return (PlanWarning(f"{clip} is in HDR, and its colours would be pale.", hint),)


def _check_length(clip: str, frames: int, video: VideoShape, strides: Strides) -> None:
    """Raise UsageError for a clip of another length than the output."""
    if frames == video.num_frames:
        return
    fitting = (frames - 1) // strides.temporal * strides.temporal + 1
    cut = f"ffmpeg -i CLIP -frames:v {min(fitting, video.num_frames)} NEW.mp4"
    more = "" if frames == fitting else f", and cut it: {cut}"
    raise UsageError(
        f"{clip} has {frames} video frames; the output has {video.num_frames}.",
        hint=f"cut it: {cut}" if frames > video.num_frames else f"`num_frames {fitting}`{more}",
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
