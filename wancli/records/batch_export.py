"""Rows of a ledger for other programs, and as a file of jobs that can be run again."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from wancli.config.resolve import ADAPTED
from wancli.records.ledger_file import LedgerSettings, damaged, parse_column
from wancli.records.naming import literal

Row = Mapping[str, Any]
_PLAIN = ("line", "id", "state", "attempt", "prompt", "seed", "output", "host", "pid", "bytes")


def export_row(row: Row, settings: Sequence[LedgerSettings]) -> dict[str, Any]:
    """A row of a ledger with its settings, error and record; times in UTC, durations in seconds."""
    shared = _shared(row, settings)
    began, ended = row["began"], row["ended"]
    spent = None if began is None or ended is None or ended < began else round(ended - began, 3)
    return {
        **{name: row[name] for name in _PLAIN},
        "command": shared.command,
        "settings": {**shared.values, **(parse_column(row, "files") or {})},
        "began": _utc(began),
        "ended": _utc(ended),
        "seconds": spent,
        "error": parse_column(row, "error"),
        "record": parse_column(row, "record"),
    }


def flat_row(row: Row, settings: Sequence[LedgerSettings]) -> dict[str, Any]:
    """The same without tables, for CSV: a column for each setting, and no record."""
    whole = export_row(row, settings)
    values, error = whole.pop("settings"), whole.pop("error") or {}
    del whole["record"]
    tables = (list, dict)
    values = {n: json.dumps(v) if isinstance(v, tables) else v for n, v in values.items()}
    return {**whole, "error": error.get("message"), "hint": error.get("hint"), **values}


def job_lines(rows: Iterable[Row], settings: Sequence[LedgerSettings]) -> Iterator[dict[str, Any]]:
    """Jobs as a file of them has them, with their seeds and final names.

    Without an id of its own, a job's is its line in the file that it came from.
    """
    ids: dict[str, int] = {}
    for row in rows:
        shared = _shared(row, settings)
        name = row["id"] or f"line-{row['line']}"
        ids[name] = number = ids.get(name, 0) + 1
        job = {
            "id": name if number == 1 else f"{name}.{number}",
            "command": shared.command,
            "prompt": row["prompt"],
            "seed": row["seed"],
            "output": literal(row["output"]),
        }
        files = {name: literal(path) for name, path in (parse_column(row, "files") or {}).items()}
        job = {key: value for key, value in job.items() if value is not None}
        values = {**shared.values, **shared.values.get(ADAPTED, {})}
        values.pop(ADAPTED, None)
        yield {**job, **values, **files}


def _shared(row: Row, settings: Sequence[LedgerSettings]) -> LedgerSettings:
    """The settings of a row. Raises InputError for a damaged ledger."""
    try:
        return settings[row["settings"]]
    except (IndexError, TypeError):
        raise damaged(f"the settings of line {row['line']}") from None


def _utc(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
