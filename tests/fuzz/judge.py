"""What is wrong with what a command left behind."""

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
from tests.fuzz.place import Listing, Place, added, harmed
from tests.fuzz.warm import Ended

CODES = {0, 1, 2, 4, 5, 6, 7}  # of a command that nobody stopped; the table in README.md
CACHES = ("home/.cache", "tmp/torchinductor_")  # of ours, and of libraries
PIPE = 141  # nobody reads any more
# Escapes and other control characters, C1 among them, and what turns text around.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_RUBBISH = re.compile(r"(^|/)\.[^/]*|\.part(\.|/|$)|\.preview\.png$|\.tmp$|(^|/)tmp[^/]*$")
_FRAME = re.compile(r'File "(?:[^"]*/)?(wancli/[^"]*|tests/[^"]*)", line (\d+)')


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. Faults of one cause have equal kinds and causes."""

    kind: str
    cause: str
    detail: str = ""


def talk(ended: Ended, *, streams: tuple[str, str, str]) -> Iterator[Fault]:
    """Faults in how it ended and in what it said."""
    err = ended.err.decode(errors="surrogateescape")
    if ended.hung:
        yield Fault("hang", where(err), err[-2000:])
        return
    if ended.left:
        yield Fault("left", "a process that goes on")
    yield from _wrong(err)
    if ended.code not in CODES and not (Broken in streams and ended.code == PIPE):
        yield Fault("exit code", str(ended.code), err[-500:])
    elif ended.code and streams[2] == File:
        lines = [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))]
        if [line.split(":")[0] for line in lines] != ["error", "hint"] and ended.code in CODES:
            yield Fault("words", "no error and hint, or several", err[-500:])
    for name, said in (("stdout", ended.out), ("stderr", ended.err)):
        yield from _escapes(name, said.decode(errors="surrogateescape"))


def _wrong(err: str) -> Iterator[Fault]:
    """What no user should see."""
    if "Traceback" in err or "Exception ignored" in err:
        yield Fault("traceback", cause_of(err), err[-2000:])
    elif match := re.search("unexpected ([A-Z][A-Za-z]*): (.*)", err):
        yield Fault("unexpected", match[1], match[0])


def _escapes(name: str, text: str) -> Iterator[Fault]:
    """What a terminal would obey."""
    if found := _CONTROL.search(text):
        at = max(found.start() - 60, 0)
        yield Fault("escape", f"{found[0]!r} on {name}", repr(text[at : at + 120]))


def cause_of(err: str) -> str:
    """The exception and the last place in wancli of a traceback, but for what it was made into."""
    err = err.rpartition("\nThe above exception was the direct cause")[0] or err
    last = next((line for line in reversed(err.splitlines()) if re.match(r"[A-Za-z_.]+", line)), "")
    frames = _FRAME.findall(err)
    where = f"{frames[-1][0]}:{frames[-1][1]}" if frames else "nowhere"
    return f"{last.split(':')[0]} at {where}"


def where(err: str) -> str:
    """The innermost place in wancli where a process hung, as faulthandler says it."""
    main = err.rpartition("Current thread")[2] or err
    frames = _FRAME.findall(main)
    return f"{frames[0][0]}:{frames[0][1]}" if frames else "nowhere"


def files(
    ended: Ended, place: Place, before: Listing, *, may: Collection[str] = (),
    chosen: Collection[str] = (), dry: bool = False,
) -> Iterator[Fault]:  # fmt: skip
    """Faults in what is there: names that `may` be replaced; outputs that the line has `chosen`."""
    hidden = {Path(name).stem for name in chosen if Path(name).name.startswith(".")}
    after = place.look()
    for name, how in harmed(before, after, may=may):
        yield Fault(how, pattern(name), name)
    new = [name for name in added(before, after) if not name.startswith(CACHES)]
    for name in new:
        if not ours(name) and Path(name).stem not in hidden:
            yield Fault("rubbish", pattern(name), name)
        elif "/replaced-" not in name and (fault := whole(place.root / name)):  # set aside
            yield Fault("not whole", f"{pattern(name)}: {fault}", name)
    if new and (ended.code == 2 or dry):
        yield Fault("written", "files of a request that was refused or dry", str(new))


def ours(name: str) -> bool:
    """Whether a new file has a name that is meant to stay."""
    name = name.removeprefix("home/.config")
    if re.fullmatch(r"/wancli/presets/[^./][^/]*\.toml", name):  # `preset save new.part`
        return True
    return not _RUBBISH.search(name.partition("/")[2]) and not name.startswith("tmp/")


def results(ended: Ended, place: Place, *, json_lines: bool, paths: bool) -> Iterator[Fault]:
    """Faults in what it says is there."""
    if ended.code:
        return
    lines = ended.out.splitlines()
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
                yield Fault("words", "a result that is not there", repr(line[:200]))


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def whole(path: Path) -> str:
    """What is wrong with a new file; nothing of what is whole."""
    if not path.is_file() or path.is_symlink():
        return ""
    check = {
        ".mp4": _video, ".json": _json, ".safetensors": _tensors, ".png": _picture,
        ".gif": _picture, ".webp": _picture, ".html": _page, ".toml": _toml,
    }.get(path.suffix.lower())  # fmt: skip
    try:
        return check(path) if check else ""
    except Exception as error:  # noqa: BLE001 - whatever a reader says
        return type(error).__name__


def _video(path: Path) -> str:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-f", "null", "-"]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    return "does not decode" if done.returncode or done.stderr else ""


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
    return "" if path.read_text().rstrip().endswith("</html>") else "is cut"


def _toml(path: Path) -> str:
    import tomllib

    tomllib.loads(path.read_text())
    return ""


def pattern(name: str) -> str:
    """A name without what is by chance."""
    parts = [re.sub(r"\d+", "N", part)[:40] for part in name.split("/")]
    return "/".join(parts) if len(name) < 60 else "/".join(part[-12:] for part in parts)
