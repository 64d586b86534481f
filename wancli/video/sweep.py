"""One labelled sheet of a sweep: a row for each prompt, a column for each value of what differs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw

from wancli.errors import UsageError
from wancli.records.record import settings_of
from wancli.video.lettering import Font, choose_font, with_letters_of
from wancli.video.read import probe
from wancli.video.sheet import INK, PAPER, Picture, middle_frame
from wancli.video.signature import sign

_GAP, _FONT = 8, 13  # pixels
_LINE = _FONT + 4
_HEAD = 170  # pixels of the labels of rows
_MOST_LINES = 6  # of a label
_MOST_PIXELS = 2**28
_OWN = ("prompt", "seed")  # of a row, where anything else differs


@dataclass(frozen=True)
class SweepGrid:
    """Videos by row and column, with the labels of both; "" where there is only one."""

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[int, int], Path]


def arrange(videos: Mapping[Path, Mapping[str, Any] | None]) -> SweepGrid:
    """Arrange videos by their records; without one, a video is known by its name.

    Prompts, and seeds where something else differs, make rows. All else makes columns, or a row for
    each value of the first and columns of the others where only settings differ.
    """
    values = {video: _values(record) for video, record in videos.items()}
    keys = _independent(list(values.values()))
    by_row = [key for key in keys if key in _OWN]
    by_column = [key for key in keys if key not in _OWN]
    if not by_column and len(by_row) > 1:
        by_row, by_column = by_row[:1], by_row[1:]
    elif not by_row and len(by_column) > 1:
        by_row, by_column = by_column[:1], by_column[1:]
    order = {name: _ranks(values.values(), name) for name in keys}
    videos_in_order = sorted(
        values, key=lambda v: [order[name][_text(values[v].get(name))] for name in by_column]
    )
    labels = {v: (_label(values[v], by_row), _label(values[v], by_column)) for v in videos_in_order}
    if len(set(labels.values())) < len(labels):  # as of two models with the same record
        labels = {
            video: (row, "\n".join(filter(None, (column, video.name))))
            for video, (row, column) in labels.items()
        }
    rows = list(dict.fromkeys(labels[video][0] for video in values))
    columns = list(dict.fromkeys(column for _, column in labels.values()))
    cells = {(rows.index(row), columns.index(col)): v for v, (row, col) in labels.items()}
    return SweepGrid(rows, columns, cells)


def _ranks(values: Iterable[Mapping[str, Any]], name: str) -> dict[str, int]:
    """The order of the values of a setting: numbers by size, others as they come."""
    seen: dict[str, Any] = {_text(one.get(name)): one.get(name) for one in values}
    numbers = all(isinstance(value, int | float) for value in seen.values())
    ordered = sorted(seen, key=seen.__getitem__) if numbers else list(seen)
    return {text: rank for rank, text in enumerate(ordered)}


def draw_sweep(grid: SweepGrid, *, width: int) -> Picture:
    """Draw the middle frame of each video as PNG, all of them `width` pixels wide.

    Raises InputError, UsageError.
    """
    frames = {
        place: _scaled(middle_frame(video, probe(video)), width)
        for place, video in grid.cells.items()
    }
    height = max(frame.height for frame in frames.values())
    font = choose_font([*grid.columns, *grid.rows], _FONT)
    tops = _labels(grid.columns, "column", width, font)
    sides = _labels(grid.rows, "row", _HEAD, font)
    left = _GAP + (_HEAD + _GAP if any(grid.rows) else 0)
    top = _GAP + max(len(lines) for lines in tops) * _LINE
    size = left + len(tops) * (width + _GAP), top + len(sides) * (height + _GAP)
    if size[0] * size[1] > _MOST_PIXELS:
        raise UsageError(
            f"a sheet of {len(sides)} rows and {len(tops)} columns has {size[0]}x{size[1]} pixels.",
            hint=f"a smaller `width`, such as {max(8, width // 4)}",
        )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(tops):
        draw.text((left + column * (width + _GAP), _GAP // 2), "\n".join(lines), INK, font)
    for row, lines in enumerate(sides):
        draw.text((_GAP, top + row * (height + _GAP)), "\n".join(lines), INK, font)
    for (row, column), frame in frames.items():
        sheet.paste(frame, (left + column * (width + _GAP), top + row * (height + _GAP)))
    content = iio.imwrite("<bytes>", np.asarray(sheet), extension=".png", plugin="pillow")
    return Picture(sign(content, list(grid.cells.values())), *sheet.size, len(frames))


def _scaled(frame: Image.Image, width: int) -> Image.Image:
    return frame.resize((width, max(1, round(frame.height * width / frame.width))))


def _values(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Prompt, seed and settings of a record; those that somebody chose first."""
    if record is None:
        return {}
    request = record["request"]
    tables = settings_of(record)
    sources = request.get("sources", {})
    values = {name: request.get(name) for name in (*_OWN, "model")}
    flat = {
        f"{table}.{name}": value
        for table, inner in tables.items()
        if isinstance(inner, Mapping)
        for name, value in inner.items()
    }
    chosen = [key for key in flat if "default" not in str(sources.get(key, "default"))]
    ordered = {key: flat[key] for key in (*chosen, *flat)}
    return values | {key.rpartition(".")[2]: value for key, value in ordered.items()}


def _independent(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names whose values differ; not those that follow from one before, as a model's defaults."""
    names = list(dict.fromkeys(name for one in values for name in one))
    kept: list[str] = []
    for name in names:
        own = [_text(one.get(name)) for one in values]
        if len(set(own)) == 1:
            continue
        before = [[_text(one.get(other)) for one in values] for other in kept]
        if not any(_follows(own, other) for other in before):
            kept.append(name)
    return kept


def _follows(values: Sequence[str], others: Sequence[str]) -> bool:
    """Whether each of `others` comes with only one of `values`."""
    return len(set(zip(others, values, strict=True))) == len(set(others))


def _label(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """`a red circle`, `seed 1`, `steps 20`: a line for each."""
    lines = [
        _text(values.get(name))
        if name == "prompt"
        else f"{name.replace('_', ' ')} {_text(values.get(name))}"
        for name in names
    ]
    return "\n".join(lines)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _labels(texts: Sequence[str], kind: str, width: int, font: Font) -> list[list[str]]:
    """The lines of each label; one that the font has no letters for is `row 1`, say."""
    numbered = enumerate(texts, 1)
    shown = (with_letters_of(font, text, other=f"{kind} {n}") for n, text in numbered)
    return [_wrapped(text, width, font) for text in shown]


def _wrapped(text: str, width: int, font: Font) -> list[str]:
    """Lines of at most `width` pixels, at words where possible."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    cut = lines[:_MOST_LINES]
    if len(lines) > _MOST_LINES:
        cut[-1] += " …"
    return [_shortened(line, width, font) for line in cut]


def _shortened(line: str, width: int, font: Font) -> str:
    """A word that is too long, cut."""
    while line and font.getlength(line) > width:
        line = f"{line[:-2]}…"
    return line
