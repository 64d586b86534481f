"""Names of output files: a file, or a template with the prompt and the seed in it."""

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wancli.config.settings import Settings
from wancli.errors import UsageError
from wancli.utils.reading import user_path

DEFAULT = "{prompt:40}-{seed}.mp4"
FIELDS = ("prompt", "seed", "model", "steps", "width", "height")


class _NameFormatter(string.Formatter):
    """Truncates fields to their width and makes them safe for file names: `{prompt:40}`."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if key not in kwargs:
            raise UsageError(
                f"output template: unknown field '{{{key}}}'.",
                hint="known: " + ", ".join(f"{{{name}}}" for name in FIELDS),
            )
        return kwargs[str(key)]

    def format_field(self, value: Any, format_spec: str) -> str:
        width = int(format_spec) if format_spec.isdigit() else None
        return (
            re.sub(r"(?:[^\w.]|\.{2,})+", "-", str(value)).strip("-.")[:width].strip("-.")
            or "video"
        )


def name_fields(settings: Settings, *, prompt: str, seed: int, steps: int) -> dict[str, Any]:
    """Values of the FIELDS of one video."""
    video = settings.video
    values = (prompt, seed, settings.model, steps, video.width, video.height)
    return dict(zip(FIELDS, values, strict=True))


def name_output(
    template: str | None, fields: Mapping[str, Any], *, folder: Path, several: bool
) -> Path:
    """Output path of one video. With several videos, `{seed}` is added to a name without it.

    A template that contains a folder is used as is; a bare name goes into `folder`.
    """
    text = template or DEFAULT
    if several and "{seed" not in text:
        stem, dot, suffix = text.rpartition(".")
        text = f"{stem}-{{seed}}{dot}{suffix}" if dot else f"{text}-{{seed}}"
    try:
        name = _NameFormatter().vformat(text, (), fields)
    except ValueError as error:
        raise UsageError(f"output template {text!r}: {error}.", hint=DEFAULT) from None
    path = with_name(user_path(name))
    return path if len(path.parts) > 1 else folder / path


def with_name(path: Path) -> Path:
    """The path, if it names a file. Raises UsageError for `.` and the like."""
    if path.name in ("", ".."):
        raise UsageError(f"'{path}' is not a file name.", hint="a name such as x.mp4")
    return path
