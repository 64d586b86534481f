"""Tables as lines of text: as wide as the terminal, without splitting a name or a path."""

from collections.abc import Collection, Iterator, Sequence

from rich.cells import cell_len, chop_cells

_GAP = "  "
_INDENT = "    "  # of what does not fit beside its row
_PROSE = 20  # columns of the terminal; longer cells may be wrapped to this width
_WORD = 40  # columns of the longest word that is kept whole


def table_lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str], width: int
) -> Iterator[str]:
    """The lines of a table; the first is the header, unless all of `columns` are blank.

    Columns in `right` are aligned to the right and never wrapped. Where the rest cannot be wrapped
    to fit, the last columns move to lines below their row; if the last is in `right`, the first
    moves above.
    """
    cells = [list(columns), *map(list, rows)]
    narrowest = [
        _narrowest([row[i] for row in cells], wraps=name not in right)
        for i, name in enumerate(columns)
    ]
    beside = list(range(len(columns)))
    while len(beside) > 1 and _total(narrowest[i] for i in beside) > width:
        if columns[beside[-1]] in right:
            beside = beside[1:]
            break
        beside.pop()
    indent = _INDENT if beside[0] else ""
    widths = _shrunk(
        [max(cell_len(line) for row in cells for line in row[i].split("\n")) for i in beside],
        [narrowest[i] for i in beside],
        width - len(indent),
    )
    for number, row in enumerate(cells):
        if number == 0 and not any(row):
            continue
        if beside[0]:
            yield from _apart(row[: beside[0]], "", width)
        wrapped = [_wrap(row[i], size) for i, size in zip(beside, widths, strict=True)]
        for line in range(max(map(len, wrapped))):
            parts = [
                _padded(w[line] if line < len(w) else "", size, right=columns[i] in right)
                for i, w, size in zip(beside, wrapped, widths, strict=True)
            ]
            yield indent + _GAP.join(parts).rstrip()
        if number:
            yield from _apart(row[beside[-1] + 1 :], _INDENT, width)


def _apart(cells: Sequence[str], indent: str, width: int) -> Iterator[str]:
    """Cells on lines of their own."""
    for cell in filter(None, cells):
        yield from (indent + line for line in _wrap(cell, width - len(indent)))


def _wrap(text: str, width: int) -> list[str]:
    """A text as lines of at most `width` columns, each paragraph with its indent.

    Only words that are longer are split.
    """
    lines = []
    for paragraph in text.split("\n"):
        if cell_len(paragraph) <= width:
            lines.append(paragraph)
            continue
        lines.append("")
        for word in _words(paragraph):
            if lines[-1] and cell_len(lines[-1]) + 1 + cell_len(word.lstrip()) > width:
                lines.append("")
            line = f"{lines[-1]} {word.lstrip()}" if lines[-1] else word
            lines[-1:] = [line] if cell_len(line) <= width else chop_cells(line, max(2, width))
    return lines


def _words(paragraph: str) -> list[str]:
    """The words, each with the paragraph's indent."""
    words = paragraph.split()
    indent = paragraph[: len(paragraph) - len(paragraph.lstrip())]
    return [indent + word for word in words]


def _narrowest(cells: Sequence[str], *, wraps: bool) -> int:
    """The least width of a column in which no short cell is wrapped, and no word is split."""
    natural = max(cell_len(line) for cell in cells for line in cell.split("\n"))
    if natural <= _PROSE or not wraps:
        return natural
    words = (word for cell in cells for line in cell.split("\n") for word in _words(line))
    # Text in wide characters has no spaces and may be broken anywhere.
    word = max((len(word) for word in words if cell_len(word) == len(word)), default=0)
    return max(_PROSE, min(word, _WORD))


def _total(widths: Collection[int] | Iterator[int]) -> int:
    """Width of columns and the gaps between them."""
    sizes = list(widths)
    return sum(sizes) + len(_GAP) * (len(sizes) - 1)


def _shrunk(natural: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """Widths that fit, as far as `least` allows; the widest column shrinks first."""
    widths = list(natural)
    while _total(widths) > width:
        shrinkable = [i for i, size in enumerate(widths) if size > least[i]]
        if not shrinkable:
            break
        widths[max(shrinkable, key=widths.__getitem__)] -= 1
    return widths


def _padded(text: str, width: int, *, right: bool) -> str:
    """Text filled up with spaces."""
    space = " " * (width - cell_len(text))
    return space + text if right else text + space
