"""Input pictures and videos: checks before anything loads, and lookup from a record."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from wancli.catalog.tasks import TEXT
from wancli.config.settings import VideoShape
from wancli.errors import InputError, UsageError
from wancli.planning.inputs import VIDEOS, InputFiles
from wancli.planning.plan import Plan
from wancli.utils.files import digest


def check_input_files(inputs: InputFiles, video: VideoShape) -> None:
    """Raise InputError for an unreadable file, UsageError for a video of another length or fps."""
    from wancli.video.images import open_image

    for name, paths in inputs.named().items():
        for path in paths:
            if name in VIDEOS:
                _check_clip(f"`{name}`", path, video)
            else:
                open_image(path)


def _check_clip(name: str, path: Path, video: VideoShape) -> None:
    from wancli.video.read import probe

    info = probe(path)
    if info.frames != video.num_frames:
        raise UsageError(
            f"{name} {path} has {info.frames} video frames; the output has {video.num_frames}.",
            hint=f"cut it to {video.num_frames}"
            if info.frames > video.num_frames
            else f"`num_frames {info.frames}`",
        )
    if abs(info.fps - video.fps) > 0.02:
        raise UsageError(
            f"{name} {path} has {info.fps:g} frames per second; the output has {video.fps}.",
            hint=f"`fps {info.fps:g}`, or convert it",
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
