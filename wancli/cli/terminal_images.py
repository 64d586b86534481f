r"""PNG pictures in terminals: which can show them, and the bytes that do.

Two protocols:

- Kitty's (kitty, Ghostty, Konsole): https://sw.kovidgoyal.net/kitty/graphics-protocol/.
  `ESC _G <keys> ; <base64> ESC \`, in chunks of at most 4096 characters of which only the first has
  all keys: `a=T` transmit and show, `f=100` a PNG, `i` the id, whose picture it replaces, `q=2` no
  answer, `c` and `r` the columns and rows it fills, `m` whether more follows.
- iTerm2's (iTerm2, WezTerm, VS Code): https://iterm2.com/documentation-images.html and
  https://wezterm.org/imgcat.html. `ESC ]1337;File=<keys>:<base64> BEL`, with size in bytes, and
  width and height in cells.

WezTerm has Kitty's as well, but turned off. tmux and screen are not supported: they pass such bytes
through only if configured to, and lose track of the picture.
"""

from binascii import b2a_base64
from collections.abc import Callable, Mapping

from wancli.utils.units import is_count

CHUNK = 4096  # characters of base64 per chunk of Kitty's protocol
CELL = 2  # approximate height of a cell over its width
KONSOLE = 220400  # first version with pictures

Encode = Callable[[bytes, int, int, int], str]  # (png, number, columns, rows)


def kitty(png: bytes, number: int, columns: int, rows: int) -> str:
    """Escape codes that show a PNG by Kitty's protocol."""
    text = _base64(png)
    chunks = [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
    keys = f"a=T,f=100,i={number},q=2,c={columns},r={rows},"
    codes = []
    for index, chunk in enumerate(chunks):
        more = int(index < len(chunks) - 1)
        codes.append(f"\x1b_G{'' if index else keys}m={more};{chunk}\x1b\\")
    return "".join(codes)


def iterm2(png: bytes, number: int, columns: int, rows: int) -> str:
    """Escape codes that show a PNG by iTerm2's protocol, which has no ids: drawing replaces."""
    keys = f"inline=1;size={len(png)};width={columns};height={rows}"
    return f"\x1b]1337;File={keys}:{_base64(png)}\x07"


BY_TERM = {"xterm-kitty": kitty, "xterm-ghostty": kitty}
BY_PROGRAM = {"ghostty": kitty, "iTerm.app": iterm2, "WezTerm": iterm2, "vscode": iterm2}


def find_encode(environment: Mapping[str, str]) -> Encode | None:
    """Protocol of the terminal, from its environment variables; None where it shows no pictures.

    A terminal started inside another inherits its variables, so $TERM and $TERM_PROGRAM, which
    nearly all set, come first.
    """
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM")
    inside = any(environment.get(name) for name in ("TMUX", "STY", "ZELLIJ"))
    if inside or not term.startswith(("xterm", "wezterm")):  # not screen, tmux, dumb, linux
        return None
    if term in BY_TERM:
        return BY_TERM[term]
    if program:
        return BY_PROGRAM.get(program)
    if environment.get("LC_TERMINAL") == "iTerm2":  # handed on by ssh
        return iterm2
    konsole = environment.get("KONSOLE_VERSION", "")
    newer = is_count(konsole) and int(konsole) >= KONSOLE
    return kitty if newer or environment.get("KITTY_WINDOW_ID") else None


class Place:
    """A place in a terminal where one picture replaces another.

    Drawn from the start of a line, it ends at the start of the line below; before the next picture
    the cursor has to be there again.
    """

    def __init__(self, encode: Encode, number: int, *, columns: int, rows: int) -> None:
        """Use at most `columns` by `rows` cells; `number` is the id of its pictures."""
        self._encode, self._number = encode, number
        self._columns, self._rows = columns, rows
        self._room = 0  # rows reserved by the first picture

    def draw(self, png: bytes) -> str:
        """Escape codes that draw `png` and restore the cursor, which terminals leave anywhere."""
        columns, rows = fit(png, columns=self._columns, rows=self._room or self._rows)
        room, self._room = "" if self._room else "\n" * rows, self._room or rows
        picture = self._encode(png, self._number, columns, rows)
        return f"{room}\x1b[{self._room}A\x1b7{picture}\x1b8\x1b[{self._room}B"


def fit(png: bytes, *, columns: int, rows: int) -> tuple[int, int]:
    """Largest (columns, rows) within the limits at the picture's aspect ratio."""
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    wide = rows * CELL * width / height
    if wide <= columns:
        return max(1, round(wide)), rows
    return columns, max(1, min(rows, round(columns * height / (CELL * width))))


def _base64(content: bytes) -> str:
    return b2a_base64(content, newline=False).decode("ascii")
