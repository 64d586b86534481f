"""Disks that fill up after every 64 KiB that a run writes."""

import contextlib
import os
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.fuzz import judge
from tests.fuzz.campaign import Case
from tests.fuzz.child import File, Null
from tests.fuzz.judge import Fault
from tests.fuzz.kills import MATERIALS
from tests.fuzz.place import USER_FILES, Listing, added, damaged

EVERY = 64 * 1024
FILLER = "work/disk/filler"
STREAMS = (Null, File, File)
_BIG = ("--model", "tiny", "--size", "128x128", "--fps", "8", "--seed", "1", "--lossless", "-q")
_FRAMES = (*_BIG, "--steps", "1", "--num-frames", "9")
_CHUNKS = (*_BIG, "--chunk-frames", "2", "--steps-list", "1000", "--chunks", "3")


@dataclass(frozen=True)
class DiskCommand:
    """A command that writes into disk/, and the most bytes it writes."""

    line: tuple[str, ...]
    bytes: int


def _case(line: str, size: int, more: tuple[str, ...] = ("-q",)) -> DiskCommand:
    return DiskCommand((*shlex.split(line), *more), size)


COMMANDS = (
    _case("generate a -o disk/new-3.mp4 --save-latents disk/new-3.safetensors --perf-json "
          "disk/perf.json --preview-every 1", 14 * EVERY, _FRAMES),
    _case("rollout a -o disk/new-3.mp4", 18 * EVERY, _CHUNKS),
    _case("bench a --variant 'e: --no-prompt-kv' -o disk/new-3", 12 * EVERY, _FRAMES),
    _case("preview made.mp4 --gif disk/new-3.gif --webp disk/new-3.webp --sheet disk/new-3.png "
          "--width 600", 10 * EVERY),
    _case("decode latents.safetensors -o disk/new-3.mp4", 2 * EVERY),
    _case("model convert checkpoint.safetensors disk/new-3 --config heads.json", 4 * EVERY),
)  # fmt: skip
# Each command at every 64 KiB, small ones at every 4 KiB.
TRIES = tuple(
    (command, at)
    for command in COMMANDS
    for at in range(0, command.bytes, EVERY if command.bytes > 4 * EVERY else EVERY // 16)
)
SIZE = len(TRIES)


def attempt(case: Case) -> Iterator[Fault]:
    """Run a command on a disk with limited room."""
    command, room = TRIES[case.number % SIZE]
    case.place.copy_in(*MATERIALS)
    disk = case.place.work / "disk"
    disk.mkdir()
    with mounted(disk) as is_mounted:
        if not is_mounted:
            return
        for name in USER_FILES:
            if "/" not in name:
                (disk / name).write_text(name)
        filler = fill(disk, room)
        before = case.place.snapshot()
        outcome = case.run(command.line, streams=STREAMS)
        yield from judge.check_streams(outcome, streams=STREAMS)
        if outcome.code not in (0, 6):
            yield Fault(
                "exit code",
                f"{command.line[0]}: {outcome.code} on a full disk",
                outcome.err.decode()[-500:],
            )
        yield from _check_leftovers(case, before, rolls=command.line[0] == "rollout")
        filler.unlink()
        if outcome.code:
            yield from _check_rerun(
                case, command, {n: seen for n, seen in before.items() if n != FILLER}
            )


def _check_leftovers(case: Case, before: Listing, *, rolls: bool) -> Iterator[Fault]:
    after = case.place.snapshot()
    for name, how in damaged(before, after):
        yield Fault(how, judge.pattern(name), name)
    for name in added(before, after):
        rescued = name.endswith("latents.safetensors")  # may be in the temporary folder
        if not judge.is_ours(name) and not rescued and not (rolls and _is_resumable(name)):
            yield Fault("rubbish", judge.pattern(name), name)
        elif judge.is_ours(name) and (fault := judge.defect(case.place.root / name)):
            yield Fault("not whole", f"{judge.pattern(name)}: {fault}", name)


def _is_resumable(name: str) -> bool:
    """Whether the file belongs to a rollout that can be resumed."""
    return name.startswith(("work/disk/new-3.rollout/", "work/disk/new-3.part.mp4"))


def _check_rerun(case: Case, command: DiskCommand, before: Listing) -> Iterator[Fault]:
    """With enough room the command succeeds; a rollout resumes."""
    started = (case.place.work / "disk" / "new-3.rollout" / "rollout.json").exists()
    line = ("rollout", "--resume", *command.line[2:]) if started else (*command.line, "--overwrite")
    outcome = case.run(line, streams=STREAMS)
    if outcome.code:
        err = outcome.err.decode(errors="replace")
        yield Fault("again", f"{line[0]}: exit {outcome.code}", err[-500:])
    for fault in _check_leftovers(case, before, rolls=False):
        yield replace(fault, cause=f"again: {fault.cause}")


def fill(disk: Path, room: int) -> Path:
    """Create a file that leaves `room` bytes free."""
    stats = os.statvfs(disk)
    free = stats.f_bavail * stats.f_frsize
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - room, 1))
    return filler


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[bool]:
    """Mount a small disk at `folder`; yields False if this user may not."""
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    try:
        process = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        yield False
        return
    if process.returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, stdin=subprocess.DEVNULL)


def skip_reason(root: Path) -> str:
    """Why this group cannot run here, or ""."""
    folder = root / "mount"
    folder.mkdir(exist_ok=True)
    with mounted(folder) as is_mounted:
        return "" if is_mounted else "mounting a small disk takes root"
