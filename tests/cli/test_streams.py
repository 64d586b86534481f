"""Closed and full streams end commands cleanly; no control character reaches the terminal."""

import ctypes
import io
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Wancli
from tests.forked import Run
from wancli.cli.options import OutputOptions
from wancli.cli.screen import Screen
from wancli.cli.streams import printable
from wancli.records.progress import Phase

HOSTILE = "\x1b[31mred\x9b\x7f\u202e"
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
FULL, CLOSED = "/dev/full", ""


@pytest.mark.parametrize(
    ("streams", "expected", "error"),
    [
        ({1: CLOSED}, 0, ""),
        ({2: CLOSED}, 0, ""),
        ({0: CLOSED, 1: CLOSED, 2: CLOSED}, 0, ""),
        ({1: FULL}, 6, "error: cannot write to standard output: No space left on device."),
        ({2: FULL}, 0, ""),
        ({1: FULL, 2: FULL}, 6, ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("arguments", [["preset", "list"], ["--help"]])
def test_closed_and_full_streams_end_commands_cleanly(
    arguments, streams, expected, error, forked: Run, tmp_path
):
    chosen = {f"STREAM_{number}": path for number, path in streams.items()}
    code, _, out, err = forked(*arguments, folder=tmp_path, **chosen)
    assert code == expected
    assert err.partition("\n")[0] == error
    assert bool(out) == (1 not in streams)


@pytest.mark.parametrize("columns", ["0", "00", ""])
def test_errors_are_printed_on_a_terminal_of_0_columns(columns: str, forked: Run, tmp_path):
    code, _, _, err = forked("generate", "", folder=tmp_path, COLUMNS=columns)
    assert (code, err.partition("\n")[0]) == (2, "error: the prompt is empty.")


def test_a_prompt_from_a_closed_stream_is_empty(forked: Run, tmp_path):
    code, _, _, err = forked("generate", "-", folder=tmp_path, STREAM_0=CLOSED)
    assert (code, err.partition("\n")[0]) == (2, "error: the prompt is empty.")


def test_a_reader_that_stops_early_is_no_error():
    command = [sys.executable, "-m", "wancli", "preset", "list", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()  # before the first line
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (141, "")


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path):
    prompt = "é \N{GRINNING FACE}"
    command = [sys.executable, "-m", "wancli", "generate", prompt, "--dry-run", "--json"]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout.decode("ascii"))["request"]["prompt"] == prompt


def test_a_name_that_is_not_utf_8_is_rejected(wancli: Wancli):
    result = wancli("generate", "x", "-o", os.fsdecode(b"bad\xff.mp4"))
    assert result.code == 2
    assert "is not UTF-8 text" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", f"{HOSTILE}.mp4", "x.mp4"],
        ["generate", HOSTILE, "--dry-run", "--json"],
        ["generate", "x", "--model", HOSTILE],
        ["generate", "x", "--preset", HOSTILE],
        ["preset", "validate", "x.toml"],
        ["preset", "list"],
        ["preset", "list", "--json"],
        ["show", f"{HOSTILE}.mp4"],
        ["bench", "x", "--variant", f"{HOSTILE}: --width 32"],
    ],
    ids=str,
)
def test_no_control_character_reaches_the_terminal(arguments, wancli: Wancli):
    Path("x.toml").write_text(f'[sampling]\n"{json.dumps(HOSTILE)[1:-1]}" = 1\n')
    Path("presets").mkdir()
    Path("presets/y.toml").write_text(f'description = "{json.dumps(HOSTILE)[1:-1]}"\n')
    result = wancli(*arguments)
    assert CONTROL_CHARACTERS.search(result.out + result.err) is None
    assert "u001b[31mred" in result.out + result.err
    assert CONTROL_CHARACTERS.search("".join(wancli(HOSTILE).err)) is None  # Typer quotes it


def test_escaped_json_keeps_its_meaning():
    text = json.dumps({"prompt": HOSTILE + "\udcff é\n"}, ensure_ascii=False)
    assert CONTROL_CHARACTERS.search(printable(text)) is None
    assert json.loads(printable(text)) == json.loads(text)


def test_progress_without_color_has_no_escape_codes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.isatty", lambda _: True)  # as on a terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    for color in (True, False):
        screen = Screen(OutputOptions(color=color))
        with screen.progress() as report:
            report(Phase("load"))
        with screen.transfer(8) as update:
            update(4)
        assert ("\x1b" in capfd.readouterr().err) == color


@pytest.mark.parametrize("arguments", [["nosuch"], ["preset", "list"], ["preset", "--help"]])
def test_no_color_removes_all_colors(arguments, wancli: Wancli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = wancli(*arguments)
    assert "\x1b[" in result.out + result.err or "--help" in arguments
    result = wancli(*arguments, "--no-color")
    assert "\x1b" not in result.out + result.err


def test_markup_in_user_text_is_printed_literally(wancli: Wancli):
    for text in (r"\[/]", "[bold]x[/bold]", ":red_circle:", "[link=x]"):
        assert f"'{text}'" in wancli("model", "path", text).err


def test_a_deleted_working_directory_is_one_error(wancli: Wancli, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = wancli("preset", "list")
    assert (result.code, result.err.partition("\n")[0]) == (
        4,
        "error: cannot work in this folder: No such file or directory.",
    )


@contextmanager
def permissions_enforced():
    """Enforce permissions even for root: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    system = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of capabilities, this thread
    before, without = ((ctypes.c_uint32 * 6)() for _ in range(2))  # effective, permitted, ...
    assert system.capget(header, before) == system.capget(header, without) == 0
    without[0] &= ~0b110
    assert system.capset(header, without) == 0
    try:
        yield
    finally:
        assert system.capset(header, before) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("preset list", 0),
        ("rollout x --no-video --save-latents x.st --dry-run --device cpu", 0),
        ("generate x --model closed", 4),
        ("generate x --image closed/a.png --model wan2.1-i2v-14b-480p --force", 4),
        ("preview closed/a.mp4", 4),
        ("show closed/a.mp4", 4),
        ("preset validate closed/a.toml", 2),
    ],
)
def test_an_unreadable_folder_stops_only_commands_that_need_it(command, expected, wancli: Wancli):
    for name in ("presets", "closed"):
        Path(name).mkdir(mode=0)
    with permissions_enforced():
        result = wancli(*command.split())
    assert result.code == expected, result.err
    assert "unexpected" not in result.err
    assert "Permission denied" in result.err


def test_output_waits_for_a_full_pipe():
    from wancli.cli.streams import _Stdout

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    script = "import sys, time; time.sleep(0.2); print(len(sys.stdin.buffer.read()))"
    done = subprocess.Popen(
        [sys.executable, "-c", script], stdin=reader, stdout=subprocess.PIPE, text=True
    )
    os.close(reader)
    with io.BufferedWriter(_Stdout(writer, "w")) as file:
        file.write(b"x" * 300_000)
    assert done.communicate(timeout=20)[0] == "300000\n"


def test_a_signal_after_a_write_does_not_repeat_what_was_written():
    script = """
import os, signal
from io import FileIO
from wancli.cli import streams
from wancli.utils import interrupts

class Interrupting(FileIO):
    def write(self, data):
        count = super().write(data)
        os.kill(os.getpid(), signal.SIGINT)
        return count

streams._Stdout.__bases__ = (Interrupting,)
interrupts.handle()
interrupts.unwind_from_here()
streams.open_streams()
try:
    print("path")
    signal.pause()
except interrupts.Interrupted as error:
    raise SystemExit(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("path\n", "", 130)
