"""Files of a batch as rows, each a number and its values: JSON lines, CSV, TOML, or prompts."""

import csv
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from wancli.config.settings import ALIASES
from wancli.errors import UsageError, WancliError, missing, shortened, some
from wancli.utils.reading import parse_json, read_stream, read_text, read_toml, unreadable

LARGEST_BATCH = 512 * 2**20  # bytes
STDIN = Path("-")
HINT = 'JSON lines such as {"prompt": "a red circle", "seed": "0-3"}, CSV, TOML, or prompts'

Row = tuple[int, Mapping[str, Any] | str]  # the line in the file, and its values or their JSON
Defaults = tuple[int | None, Mapping[str, Any]]  # the same; in TOML they have no line
NO_DEFAULTS: Defaults = None, {}


def read_rows(path: Path, origin: str) -> tuple[Defaults, Iterator[Row]]:
    """The defaults of a file, and its rows. Raises InputError, or UsageError for its content."""
    try:
        if path.suffix.lower() == ".toml":
            return _toml_rows(path)
        if path == STDIN:
            text = read_stream(sys.stdin.buffer, most=LARGEST_BATCH)
        else:
            text = read_text(path, most=LARGEST_BATCH)
    except FileNotFoundError:
        raise missing("batch", path) from None
    except OSError as error:
        raise unreadable(Path(origin), error, hint=HINT) from None
    except ValueError as error:
        raise unreadable(Path(origin), error, kind=UsageError, hint=HINT) from None
    if path.suffix.lower() in (".csv", ".tsv"):
        return NO_DEFAULTS, _csv_rows(text, origin, "\t" if path.suffix.lower() == ".tsv" else ",")
    lines = enumerate(io.StringIO(text, newline=None), 1)
    filled = ((number, line.strip()) for number, line in lines if line.strip())
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json") or _is_json(text):
        return _json_rows(filled, origin)
    return NO_DEFAULTS, ((number, {"prompt": line}) for number, line in filled)


def _is_json(text: str) -> bool:
    return text[:1000].lstrip().startswith("{")


def _json_rows(lines: Iterator[tuple[int, str]], origin: str) -> tuple[Defaults, Iterator[Row]]:
    """Rows of JSON lines, whose first may be {"defaults": {...}}."""
    for number, line in lines:
        with suppress(ValueError):
            values = parse_json(line)
            if values.keys() == {"defaults"}:
                return (number, _table(values["defaults"], "defaults", origin, number)), lines
        return NO_DEFAULTS, chain([(number, line)], lines)
    return NO_DEFAULTS, lines


def _toml_rows(path: Path) -> tuple[Defaults, Iterator[Row]]:
    """Rows of [[jobs]], and the table [defaults]."""
    tables = read_toml(path)
    jobs = tables.pop("jobs", [])
    defaults = _table(tables.pop("defaults", {}), "defaults", str(path), None)
    if tables:
        name = next(iter(tables))
        raise UsageError(f"{path}: unknown table '{name}'.", hint="[defaults] and [[jobs]]")
    if not isinstance(jobs, list):
        raise UsageError(f"{path}: 'jobs' is not a list of tables.", hint="[[jobs]]")
    rows = enumerate(jobs, 1)
    return (None, defaults), (
        (number, _table(row, "jobs", str(path), number)) for number, row in rows
    )


def _table(value: Any, name: str, origin: str, line: int | None) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise at_line(origin, line, UsageError(f"'{name}' is no table of settings.", hint=HINT))


def _csv_rows(text: str, origin: str, delimiter: str) -> Iterator[Row]:
    """Rows of CSV under a header; an empty cell is unset."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not any(cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                _check_header(header, origin, reader.line_num)
                continue
            if len(cells) > len(header):
                wide = UsageError(
                    f"{len(cells)} cells under {len(header)} keys.",
                    hint='put text with commas in quotes: "a, b"',
                )
                raise at_line(origin, reader.line_num, wide)
            yield reader.line_num, {k: c for k, c in zip(header, cells, strict=False) if c.strip()}
    except csv.Error as error:
        broken = UsageError(f"not CSV: {error}.", hint='quotes within text are doubled: ""')
        raise at_line(origin, reader.line_num, broken) from None


def _check_header(header: Sequence[str], origin: str, line: int) -> None:
    """Raise UsageError for semicolons, a column without a key, or twice the same."""
    if len(header) == 1 and ";" in header[0]:
        parted = UsageError("its cells are not parted by commas.", hint="prompt,seed,steps")
        raise at_line(origin, line, parted)
    for key in header:
        if key and not keyword(key).isidentifier():
            unnamed = f"{shortened(key)} is no key: CSV begins with the names of its columns."
            raise at_line(origin, line, UsageError(unnamed, hint="prompt,seed,steps"))
        if not key or header.count(key) > 1:
            wrong = f"the column '{key}' stands twice." if key else "a column has no key."
            raise at_line(origin, line, UsageError(wrong, hint="prompt,seed,steps"))


def parse_row(line: str) -> dict[str, Any]:
    """The values of a line of JSON. Raises UsageError."""
    try:
        return parse_json(line)
    except ValueError as error:
        raise UsageError(f"{error}.", hint=HINT) from None


@lru_cache(maxsize=1000)
def keyword(key: str) -> str:
    """A key as a keyword argument: `num_frames` for `--num-frames`, and for its other names."""
    name = key.strip().removeprefix("--").replace("-", "_")
    return ALIASES.get(name, name)


def job_unit(origin: str) -> str:
    """What the number of a job counts: lines, but in TOML, where it has several, jobs."""
    return "job" if origin.lower().endswith(".toml") else "line"


def at_line(origin: str, line: int | None, error: WancliError) -> WancliError:
    """The same kind of error, which begins with the file and the line."""
    unit = job_unit(origin)
    numbered = f"{origin}:{line}" if unit == "line" else f"{origin}: {unit} {line}"
    where = origin if line is None else numbered
    return type(error)(f"{where}: {error}", hint=error.hint)


def at_lines(origin: str, errors: Mapping[int, WancliError]) -> WancliError:
    """The error of the first of these lines, with the numbers of the others."""
    first, *others = sorted(errors)
    error = errors[first]
    if others:
        lines = job_unit(origin) + "s" * (len(others) > 1)
        too = f"{error} Wrong, too: {lines} {some([*map(str, others)])}."
        error = type(error)(too, hint=error.hint)
    return at_line(origin, first, error)


def about_defaults(origin: str, defaults: Defaults, error: WancliError) -> WancliError:
    """An error that a file's defaults have, and not a job."""
    return at_line(origin, defaults[0], type(error)(f"'defaults': {error}", hint=error.hint))
