"""Faults in what a command left behind."""

import json
import os
import re
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg

from tests.fuzz.child import Broken, File
from tests.fuzz.place import Listing, Place, added, damaged
from tests.fuzz.warm import Outcome

CODES = {0, 1, 2, 3, 4, 5, 6, 7}  # without signals; see the table in README.md
CACHES = ("home/.cache", "tmp/torchinductor_")  # caches of wancli and of libraries
SIGPIPE_CODE = 141  # the reader has closed the pipe
# Escapes and other control characters, including C1, and those that reverse text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_RUBBISH = re.compile(r"(^|/)\.[^/]*|\.part(\.|/|$)|\.preview\.png$|\.tmp$|(^|/)tmp[^/]*$")
_FRAME = re.compile(r'File "(?:[^"]*/)?(wancli/[^"]*|tests/[^"]*)", line (\d+)')


@dataclass(frozen=True)
class Fault:
    """One fault. Faults of the same cause have equal kinds and causes."""

    kind: str
    cause: str
    detail: str = ""


def check_streams(outcome: Outcome, *, streams: tuple[str, str, str]) -> Iterator[Fault]:
    """Faults in the exit code and in what was printed."""
    err = outcome.err.decode(errors="surrogateescape")
    if outcome.hung:
        yield Fault("hang", hang_location(err), err[-2000:])
        return
    if outcome.left_processes:
        yield Fault("left", "a process that is still running")
    yield from _check_errors(err)
    if outcome.code not in CODES and not (Broken in streams and outcome.code == SIGPIPE_CODE):
        yield Fault("exit code", str(outcome.code), err[-500:])
    elif outcome.code and streams[2] == File:
        _, error, rest = f"\n{err}".partition("\nerror: ")  # warnings with hints come before
        hints = re.findall("^(?:error|hint): ", rest, re.MULTILINE)
        if not (error and hints == ["hint: "]) and outcome.code in CODES:
            yield Fault("words", "no error and hint, or several", err[-500:])
    for name, content in (("stdout", outcome.out), ("stderr", outcome.err)):
        yield from _check_escapes(name, content.decode(errors="surrogateescape"))


def _check_errors(err: str) -> Iterator[Fault]:
    """Errors that no user should see."""
    if "Traceback" in err or "Exception ignored" in err:
        yield Fault("traceback", cause_of(err), err[-2000:])
    elif match := re.search("unexpected ([A-Z][A-Za-z]*): (.*)", err):
        yield Fault("unexpected", match[1], match[0])


def _check_escapes(name: str, text: str) -> Iterator[Fault]:
    """Control characters that a terminal would act on."""
    if control := _CONTROL.search(text):
        at = max(control.start() - 60, 0)
        yield Fault("escape", f"{control[0]!r} on {name}", repr(text[at : at + 120]))


def cause_of(err: str) -> str:
    """The original exception of a traceback, and the last location in wancli."""
    err = err.rpartition("\nThe above exception was the direct cause")[0] or err
    last = next((line for line in reversed(err.splitlines()) if re.match(r"[A-Za-z_.]+", line)), "")
    frames = _FRAME.findall(err)
    location = f"{frames[-1][0]}:{frames[-1][1]}" if frames else "nowhere"
    return f"{last.split(':')[0]} at {location}"


def hang_location(err: str) -> str:
    """The innermost location in wancli where a process hung, from faulthandler's output."""
    main = err.rpartition("Current thread")[2] or err
    frames = _FRAME.findall(main)
    return f"{frames[0][0]}:{frames[0][1]}" if frames else "nowhere"


def check_files(
    outcome: Outcome, place: Place, before: Listing, *, may: Collection[str] = (),
    chosen: Collection[str] = (), dry: bool = False,
) -> Iterator[Fault]:  # fmt: skip
    """Faults in the files that exist now.

    Names in `may` may be replaced; `chosen` are the outputs that the line names.
    """
    hidden = {Path(name).stem for name in chosen if Path(name).name.startswith(".")}
    after = place.snapshot()
    for name, change in damaged(before, after, may=may):
        yield Fault(change, pattern(name), name)
    new = [name for name in added(before, after) if not name.startswith(CACHES)]
    for name in new:
        if not is_ours(name) and Path(name).stem not in hidden:
            yield Fault("rubbish", pattern(name), name)
        elif "/replaced-" not in name and (fault := defect(place.root / name)):  # set aside
            yield Fault("not whole", f"{pattern(name)}: {fault}", name)
    if new and (outcome.code == 2 or dry):
        yield Fault("written", "files of a rejected request or a dry run", str(new))


def is_ours(name: str) -> bool:
    """Whether a new file is an output, not a temporary file."""
    name = name.removeprefix("home/.config")
    if re.fullmatch(r"/wancli/presets/[^./][^/]*\.toml", name):  # `preset save new.part`
        return True
    return not _RUBBISH.search(name.partition("/")[2]) and not name.startswith("tmp/")


def check_results(
    outcome: Outcome, place: Place, *, json_lines: bool, paths: bool
) -> Iterator[Fault]:
    """Faults in the results that a command reports."""
    if outcome.code:
        return
    lines = outcome.out.splitlines()
    if json_lines:
        for line in lines:
            try:
                json.loads(line, parse_constant=_refuse)
            except ValueError as error:
                yield Fault("words", f"--json says no JSON: {error}"[:60], repr(line[:200]))
    elif paths:
        for line in lines:
            escaped = b"\\u" in line  # a control character in the name
            if not escaped and not (place.work / os.fsdecode(line)).exists():
                yield Fault("words", "a result that does not exist", repr(line[:200]))


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def defect(path: Path) -> str:
    """What is wrong with a new file; "" if it is whole."""
    if not path.is_file() or path.is_symlink():
        return ""
    check = {
        ".mp4": _video, ".json": _json, ".safetensors": _tensors, ".png": _picture,
        ".gif": _picture, ".webp": _picture, ".html": _page, ".toml": _toml,
    }.get(path.suffix.lower())  # fmt: skip
    try:
        return check(path) if check else ""
    except Exception as error:  # noqa: BLE001 - whatever a reader raises
        return type(error).__name__


def _video(path: Path) -> str:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-f", "null", "-"]
    process = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    return "does not decode" if process.returncode or process.stderr else ""


def _json(path: Path) -> str:
    json.loads(path.read_text(), parse_constant=_refuse)
    return ""


def _tensors(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)
    return ""


def _picture(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()
    return ""


def _page(path: Path) -> str:
    return "" if path.read_text().rstrip().endswith("</html>") else "is truncated"


def _toml(path: Path) -> str:
    import tomllib

    tomllib.loads(path.read_text())
    return ""


def pattern(name: str) -> str:
    """A name without its numbers, so that equal faults group together."""
    parts = [re.sub(r"\d+", "N", part)[:40] for part in name.split("/")]
    return "/".join(parts) if len(name) < 60 else "/".join(part[-12:] for part in parts)
