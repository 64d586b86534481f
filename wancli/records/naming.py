"""Names of output files: a file, or a template with the prompt and the seed in it."""

import re
import string
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wancli.config.resolve import fields_of
from wancli.config.settings import RolloutSettings, Settings
from wancli.errors import UsageError
from wancli.utils.reading import user_path
from wancli.utils.units import is_count

DEFAULT = "{prompt:40}-{seed}.mp4"
FIELDS = ("prompt", "seed", "model", "steps", "width", "height")
_KNOWN = {*FIELDS, *(name for _, name, _ in fields_of(RolloutSettings))}
_OTHERS = re.compile(r"(?:[^\w.]|\.{2,})+")  # than letters, digits, and single dots


class NameTemplate:
    """A template of names, such as `{prompt:40}-{seed}.mp4`."""

    def __init__(self, text: str) -> None:
        """Raises UsageError for an invalid template."""
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UsageError(f"output template {text!r}: {error}.", hint=DEFAULT) from None
        self._parts = [(before, field, _width(spec)) for before, field, spec, _ in parts]
        for _, field, _, converted in parts:
            if converted or (field is not None and field not in _KNOWN):
                raise _unknown(f"{field}!{converted}" if converted else str(field))

    @property
    def name(self) -> str | None:
        """The only name that it stands for; None if it has fields."""
        texts = [before for before, field, _ in self._parts if field is None]
        return "".join(texts) if len(texts) == len(self._parts) else None

    def fill(self, fields: Mapping[str, Any]) -> str:
        """The template with each field safe for a file name, and cut to its width.

        Raises UsageError for a setting that the command does not have.
        """
        try:
            return "".join(
                before if field is None else before + _clean(str(fields[field]), width)
                for before, field, width in self._parts
            )
        except KeyError as missing:
            raise _unknown(missing.args[0]) from None


def literal(name: str | Path) -> str:
    """The template of this very name, whatever braces are in it."""
    return str(name).replace("{", "{{").replace("}", "}}")


def _unknown(field: str) -> UsageError:
    known = ", ".join(f"{{{name}}}" for name in FIELDS)
    return UsageError(
        f"output template: unknown field '{{{field}}}'.",
        hint=f"known: {known}, and settings by name: {{guidance_scale}}",
    )


def _width(spec: str | None) -> int | None:
    if spec and (not is_count(spec) or spec.startswith("0")):
        raise UsageError(f"output template: ':{spec[:40]}' is no width.", hint=DEFAULT)
    return int(spec) if spec else None


def _clean(text: str, width: int | None) -> str:
    """A value as part of a name: every run of other characters is one dash."""
    if text.isalnum():
        return text[:width] or "video"
    cleaned = ""
    if width is not None:  # enough of a long text, unless it is full of such runs
        cleaned = _OTHERS.sub("-", text[: width + 10]).strip("-.")
    if width is None or len(cleaned) <= width:
        cleaned = _OTHERS.sub("-", text).strip("-.")
    return cleaned[:width].strip("-.") or "video"


def name_fields(settings: Settings, *, prompt: str, seed: int, steps: int) -> dict[str, Any]:
    """Values of the FIELDS of one video, and of all other settings."""
    tables = settings.model_dump()
    values = dict(ChainMap(*(table for table in tables.values() if isinstance(table, dict))))
    return values | {"prompt": prompt, "seed": seed, "model": settings.model, "steps": steps}


def name_output(
    template: str | None, fields: Mapping[str, Any], *, folder: Path, several: bool
) -> Path:
    """Output path of one video. With several videos, `{seed}` is added to a name without it.

    A template that contains a folder is used as is; a bare name goes into `folder`. Raises
    UsageError for one that ends in a slash.
    """
    text = template or DEFAULT
    if text.endswith("/"):
        raise UsageError(f"'{text}' is not a file name.", hint=f"a name such as {text}x.mp4")
    if several and "{seed" not in text:
        text = re.sub(r"(\.[^./]*)?$", r"-{seed}\1", text, count=1)
    path = with_name(user_path(NameTemplate(text).fill(fields)))
    return path if len(path.parts) > 1 else folder / path


def with_name(path: Path) -> Path:
    """The path, if it names a file. Raises UsageError for `.` and the like."""
    if path.name in ("", ".."):
        raise UsageError(f"'{path}' is not a file name.", hint="a name such as x.mp4")
    return path
