"""Images on a terminal: the bytes of each protocol, and no interference with the progress bar."""

import io
import os
import re
import sys
from base64 import standard_b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image

from tests.cli.test_preview import gray_video
from wancli.cli.options import OutputOptions
from wancli.cli.progress import ROWS
from wancli.cli.screen import Screen
from wancli.cli.terminal_images import Encode, Place, find_encode, fit, iterm2, kitty
from wancli.records.progress import Phase, PreviewEvent, Step

KITTY = {"TERM": "xterm-kitty"}
ITERM2 = {"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}


def png(width: int = 64, height: int = 16, *, noise: bool = False) -> bytes:
    content = io.BytesIO()
    pixels = os.urandom(3 * width * height) if noise else bytes(3 * width * height)
    Image.frombytes("RGB", (width, height), pixels).save(content, "PNG")
    return content.getvalue()


def as_documented(keys: dict[str, object], content: bytes) -> bytes:
    """The example of Kitty's documentation that writes a PNG."""
    text, escapes = standard_b64encode(content), b""
    while text:
        chunk, text = text[:4096], text[4096:]
        keys["m"] = 1 if text else 0
        escapes += b"\033_G" + ",".join(f"{k}={v}" for k, v in keys.items()).encode("ascii")
        escapes += b";" + chunk + b"\033\\"
        keys.clear()
    return escapes


@pytest.mark.parametrize("size", [3072, 3073, 10_000])
def test_kitty_escape_codes_follow_its_documentation(size: int):
    content = os.urandom(size)
    keys = {"a": "T", "f": 100, "i": 31, "q": 2, "c": 32, "r": 4}
    assert kitty(content, 31, 32, 4).encode() == as_documented(keys, content)


def test_iterm2_escape_codes_follow_its_documentation():
    # ESC ] 1337 ; File = [arguments] : base-64 encoded file contents ^G
    expected = "\033]1337;File=inline=1;size=5;width=32;height=4:aGVsbG8=\a"
    assert iterm2(b"hello", 31, 32, 4) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (KITTY, kitty),
        ({"TERM": "xterm-ghostty"}, kitty),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, kitty),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, kitty),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "230804"}, kitty),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "211203"}, None),
        (ITERM2, iterm2),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, iterm2),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, iterm2),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode", "KITTY_WINDOW_ID": "1"}, iterm2),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
        (KITTY | {"TERM_PROGRAM": "WezTerm"}, kitty),  # kitty, started from the other
        ({"TERM": "xterm-256color"}, None),
        (KITTY | {"TMUX": "/tmp/tmux-0/default,1,0"}, None),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "WezTerm"}, None),
        ({"TERM": "screen.xterm-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "screen", "LC_TERMINAL": "iTerm2"}, None),
        ({"TERM": "dumb", "TERM_PROGRAM": "iTerm.app"}, None),
        ({}, None),
    ],
)
def test_the_protocol_follows_from_the_environment(
    environment: dict[str, str], expected: Encode | None
):
    assert find_encode(environment) is expected


@pytest.mark.parametrize(
    ("size", "room", "expected"),
    [
        ((768, 192), (80, 8), (64, 8)),
        ((416, 60), (80, 8), (80, 6)),  # as wide as the terminal
        ((100, 400), (80, 8), (4, 8)),
        ((4000, 10), (80, 8), (80, 1)),
        ((10, 4000), (80, 8), (1, 8)),
    ],
)
def test_an_image_keeps_its_aspect_ratio_in_cells(
    size: tuple[int, int], room: tuple[int, int], expected: tuple[int, int]
):
    assert fit(png(*size), columns=room[0], rows=room[1]) == expected


class Terminal:
    """Interprets the bytes sent to a terminal: lines of text, and images."""

    TOKEN = re.compile(
        r"\x1b_G(?P<keys>[^;]*);[^\x1b]*\x1b\\|\x1b\]1337;File=(?P<file>[^:]*):[^\a]*\a|"
        r"\x1b\[(?P<value>[?\d;]*)(?P<control>[A-Za-z])|\x1b(?P<cursor>[78])|(?P<text>[^\x1b])",
        re.DOTALL,
    )

    def __init__(self, sent: str) -> None:
        self.lines = [""] * 200
        self.pictures: list[tuple[int, int, str]] = []  # line, column, keys
        self._line = self._column = 0
        self._saved = (0, 0)
        end = 0
        for token in self.TOKEN.finditer(sent):
            assert token.start() == end, sent[end : end + 40]
            end = token.end()
            self._apply(token)
        assert end == len(sent)

    def _apply(self, token: re.Match[str]) -> None:
        keys = token["keys"] or token["file"]
        if keys:
            if "=T" in keys or "inline" in keys:
                self.pictures.append((self._line, self._column, keys))
            self._column += 5  # anywhere: terminals differ
            self._line += 2
        elif token["cursor"] == "7":
            self._saved = self._line, self._column
        elif token["cursor"] == "8":
            self._line, self._column = self._saved
        elif token["control"]:
            self._control(token["control"], token["value"])
        elif token["text"] == "\n":  # \r\n, if the terminal is not raw
            self._line += 1
        elif token["text"] == "\r":
            self._column = 0
        else:
            line = self.lines[self._line].ljust(self._column)
            self.lines[self._line] = line[: self._column] + token["text"] + line[self._column + 1 :]
            self._column += 1

    def _control(self, control: str, value: str) -> None:
        if control == "A":
            self._line -= int(value or 1)
        elif control == "B":
            self._line += int(value or 1)
        elif control == "K":
            self.lines[self._line] = ""
        else:
            assert control in "mhl", (control, value)  # colour; the cursor is hidden and shown


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Iterator[list[bytes]]:
    """Make stderr a terminal; the yielded list holds its bytes once the block has ended."""
    for name in ("TMUX", "STY", "ZELLIJ", "TERM_PROGRAM", "LC_TERMINAL", "KITTY_WINDOW_ID",
                 "KONSOLE_VERSION", "NO_COLOR", "FORCE_COLOR"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    for name, text in {"COLUMNS": "80", "LINES": "24", **environment}.items():
        monkeypatch.setenv(name, text)
    ours, theirs = os.openpty()
    sent: list[bytes] = []

    def listen() -> None:
        try:
            while content := os.read(ours, 65536):
                sent.append(content)
        except OSError:  # the other end is closed
            return

    listener = Thread(target=listen)
    listener.start()
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield sent
    listener.join()
    os.close(ours)


def denoised(output_options: OutputOptions) -> None:
    with Screen(output_options).progress() as report:
        report(Phase("denoise"))
        for index in range(4):
            report(Step(index, 4, 0.5))
            report(PreviewEvent(png(768, 192, noise=True)))


@pytest.mark.parametrize("environment", [KITTY, ITERM2], ids=["kitty", "iterm2"])
def test_images_replace_each_other_above_the_bar(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
):
    with terminal(monkeypatch, environment) as sent:
        denoised(OutputOptions())
        Screen(OutputOptions()).note("done")
    shown = Terminal(b"".join(sent).decode())
    assert [place[:2] for place in shown.pictures] == [(0, 0)] * 4
    assert len({keys for *_, keys in shown.pictures if "i=" in keys}) <= 1  # one replaces another
    assert [line for line in shown.lines if line.strip()] == ["done"]  # the bar is gone
    assert shown.lines[ROWS] == "done"


def test_the_bar_stays_below_the_image(monkeypatch: pytest.MonkeyPatch):
    with terminal(monkeypatch, KITTY) as sent:
        denoised(OutputOptions())
    whole = b"".join(sent).decode()
    shown = Terminal(whole[: whole.rindex("4/4") + 3])
    assert [place[:2] for place in shown.pictures] == [(0, 0)] * 4
    bars = [number for number, line in enumerate(shown.lines) if "denoise" in line]
    assert bars == [ROWS]


@pytest.mark.parametrize(
    ("output_options", "environment"),
    [
        (OutputOptions(quiet=True), KITTY),
        (OutputOptions(json=True), KITTY),
        (OutputOptions(color=False), KITTY),
        (OutputOptions(), KITTY | {"NO_COLOR": "1"}),
        (OutputOptions(), KITTY | {"TMUX": "x"}),
        (OutputOptions(), {"TERM": "xterm-256color"}),
    ],
)
def test_no_images_are_sent_where_unwanted_or_invisible(
    monkeypatch: pytest.MonkeyPatch, output_options: OutputOptions, environment: dict[str, str]
):
    with terminal(monkeypatch, environment) as sent:
        denoised(output_options)
        Screen(output_options).picture(png())
    assert b"\x1b_G" not in b"".join(sent)
    assert b"1337" not in b"".join(sent)


def test_no_images_are_sent_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TERM", "xterm-kitty")
    monkeypatch.setenv("FORCE_COLOR", "1")
    denoised(OutputOptions())
    assert "\x1b_G" not in capfd.readouterr().err


def test_a_sheet_is_shown_at_the_size_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from wancli.cli.preview import preview

    file = gray_video(tmp_path / "a.mp4")
    with terminal(monkeypatch, KITTY) as sent:
        preview(
            files=[file], json_lines=False, quiet=False, verbose=False, no_color=False,
            rows=1, columns=1, width=64,
        )  # fmt: skip
    (place,) = Terminal(b"".join(sent).decode()).pictures
    assert place[:2] == (0, 0)
    assert "r=22," in place[2]


def test_a_second_image_reserves_no_lines():
    place = Place(kitty, 7, columns=80, rows=8)
    assert place.draw(png(768, 192)).startswith("\n" * 8 + "\x1b[8A\x1b7")
    assert place.draw(png(768, 192)).startswith("\x1b[8A\x1b7")
