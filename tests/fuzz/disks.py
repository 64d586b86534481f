"""Disks that are full after every 64 KiB of what a run writes."""

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
from tests.fuzz.place import MINE, Listing, added, harmed

EVERY = 64 * 1024
FILLER = "work/disk/filler"
STREAMS = (Null, File, File)
_BIG = ("--model", "tiny", "--size", "128x128", "--fps", "8", "--seed", "1", "--lossless", "-q")
_FRAMES = (*_BIG, "--steps", "1", "--num-frames", "9")
_CHUNKS = (*_BIG, "--chunk-frames", "2", "--steps-list", "1000", "--chunks", "3")


@dataclass(frozen=True)
class Writes:
    """A command that writes into disk/, and at most so many bytes of it."""

    line: tuple[str, ...]
    bytes: int


def _writes(line: str, size: int, more: tuple[str, ...] = ("-q",)) -> Writes:
    return Writes((*shlex.split(line), *more), size)


COMMANDS = (
    _writes("generate a -o disk/new-3.mp4 --save-latents disk/new-3.safetensors --perf-json "
            "disk/perf.json --preview-every 1", 14 * EVERY, _FRAMES),
    _writes("rollout a -o disk/new-3.mp4", 18 * EVERY, _CHUNKS),
    _writes("bench a --variant 'e: --no-prompt-kv' -o disk/new-3", 12 * EVERY, _FRAMES),
    _writes("preview made.mp4 --gif disk/new-3.gif --webp disk/new-3.webp --sheet disk/new-3.png "
            "--width 600", 10 * EVERY),
    _writes("decode latents.safetensors -o disk/new-3.mp4", 2 * EVERY),
    _writes("model convert checkpoint.safetensors disk/new-3 --config heads.json", 4 * EVERY),
)  # fmt: skip
# Each command at each 64 KiB, the tenths between them for what is small.
TRIES = tuple(
    (command, at)
    for command in COMMANDS
    for at in range(0, command.bytes, EVERY if command.bytes > 4 * EVERY else EVERY // 16)
)
SIZE = len(TRIES)


def attempt(case: Case) -> Iterator[Fault]:
    """A command on a disk with so much room."""
    command, room = TRIES[case.number % SIZE]
    case.place.take(*MATERIALS)
    disk = case.place.work / "disk"
    disk.mkdir()
    with mounted(disk) as real:
        if not real:
            return
        for name in MINE:
            if "/" not in name:
                (disk / name).write_text(name)
        filler = fill(disk, room)
        before = case.place.look()
        ended = case.run(command.line, streams=STREAMS)
        yield from judge.talk(ended, streams=STREAMS)
        if ended.code not in (0, 6):
            yield Fault(
                "exit code",
                f"{command.line[0]}: {ended.code} on a full disk",
                ended.err.decode()[-500:],
            )
        yield from _left(case, before, rolls=command.line[0] == "rollout")
        filler.unlink()
        if ended.code:
            yield from _again(case, command, {n: seen for n, seen in before.items() if n != FILLER})


def _left(case: Case, before: Listing, *, rolls: bool) -> Iterator[Fault]:
    after = case.place.look()
    for name, how in harmed(before, after):
        yield Fault(how, judge.pattern(name), name)
    for name in added(before, after):
        kept = name.endswith("latents.safetensors")  # which may lie in the temporary folder
        if not judge.ours(name) and not kept and not (rolls and _goes_on(name)):
            yield Fault("rubbish", judge.pattern(name), name)
        elif judge.ours(name) and (fault := judge.whole(case.place.root / name)):
            yield Fault("not whole", f"{judge.pattern(name)}: {fault}", name)


def _goes_on(name: str) -> bool:
    """Whether it is of a rollout that can go on."""
    return name.startswith(("work/disk/new-3.rollout/", "work/disk/new-3.part.mp4"))


def _again(case: Case, command: Writes, before: Listing) -> Iterator[Fault]:
    """With room it does it: a rollout from where it stopped."""
    begun = (case.place.work / "disk" / "new-3.rollout" / "rollout.json").exists()
    line = ("rollout", "--resume", *command.line[2:]) if begun else (*command.line, "--overwrite")
    ended = case.run(line, streams=STREAMS)
    if ended.code:
        said = ended.err.decode(errors="replace")
        yield Fault("again", f"{line[0]}: exit {ended.code}", said[-500:])
    for fault in _left(case, before, rolls=False):
        yield replace(fault, cause=f"again: {fault.cause}")


def fill(disk: Path, room: int) -> Path:
    """A file that leaves so many bytes free."""
    found = os.statvfs(disk)
    free = found.f_bavail * found.f_frsize
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - room, 1))
    return filler


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[bool]:
    """A small disk of its own at `folder`; False where this user cannot mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        yield False
        return
    if done.returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, stdin=subprocess.DEVNULL)


def left_out(root: Path) -> str:
    """Why this group cannot be tried here; "" where it can."""
    folder = root / "mount"
    folder.mkdir(exist_ok=True)
    with mounted(folder) as real:
        return "" if real else "mounting a small disk takes root"
