"""Settings and their sources as rows of a table, in plain words."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from wancli.cli.messages import with_flags
from wancli.config.resolve import dotted, fields_of, when_unset
from wancli.config.settings import RolloutSettings

UNSET = "none"
NONE_UNUSED: Mapping[str, str] = {}


def settings_rows(
    values: Mapping[str, Any],
    sources: Mapping[str, str],
    unused: Mapping[str, str] = NONE_UNUSED,
    *,
    widest: int = sys.maxsize,
) -> Iterator[tuple[str, str, str]]:
    """Rows (name, value, source) of settings as JSON, each of their tables under its heading.

    `unused` says why some have no effect, by dotted key. Values are cut to `widest` characters.
    """
    last = None
    for table, name, field in fields_of(RolloutSettings):
        if (key := dotted(table, name)) not in sources:
            continue
        if table and table != last:
            yield f"[{table}]", "", ""
        last, value = table, (values[table] if table else values)[name]
        shown = in_words(value) if value not in (None, "") else with_flags(when_unset(field))
        if len(shown) > widest:
            shown = f"{shown[: widest - 1]}…"
        remark = f" (unused: {unused[key]})" if key in unused else ""
        yield f"  {name}" if table else name, f"{shown or UNSET}{remark}", sources[key]


def in_words(value: Any) -> str:
    """A value as help shows it: on, off, 0.8, a list joined by commas; `none` for nothing."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Iterable) and not isinstance(value, str):
        value = ", ".join(map(in_words, value))
    return UNSET if value in (None, "") else str(value)
