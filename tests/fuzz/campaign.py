"""Cases by number and seed, in several processes; faults by cause, with what makes them again."""

import contextlib
import importlib
import json
import os
import random
import shlex
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz import materials, warm
from tests.fuzz.child import Command, File, Null
from tests.fuzz.judge import Fault
from tests.fuzz.place import Place

LIGHT = "instant"
GROUPS = {
    LIGHT: "command lines that only tell: a short part of the next",
    "lines": "command lines over every command and flag",
    "hostile": "hostile files of every kind that is read",
    "kills": "kills at random moments",
    "disks": "disks that are full at every 64 KiB",
    "pairs": "two processes on one name",
    "first": "signals in the first second of real processes",
}


@dataclass
class Case:
    """One try. What it is follows from the seed and its number alone."""

    group: str
    seed: int
    number: int
    materials: Path
    root: Path
    debug: bool = False
    ran: list[Command] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    chance: random.Random = field(init=False)
    place: Place = field(init=False)

    def __post_init__(self) -> None:
        self.chance = random.Random(f"{self.group} {self.seed} {self.number}")
        self.place = Place(self.root, self.materials)

    def command(self, arguments: Sequence[str], **more: Any) -> Command:
        """`wancli ARGUMENTS` in work/, with a user's home and temporary folder."""
        variables = self.variables() | more.pop("variables", {})
        number = len(self.ran)
        made = Command(
            tuple(arguments), self.place.work, variables, self.place.said / str(number), **more
        )
        self.ran.append(made)
        return made

    def run(self, arguments: Sequence[str], **more: Any) -> warm.Ended:
        """Run it to its end."""
        ended = warm.run(self.command(arguments, **more))
        self.codes.append(ended.code)
        return ended

    def variables(self) -> dict[str, str]:
        """The environment of a command."""
        kept = {name: os.environ[name] for name in ("PATH", "VIRTUAL_ENV") if name in os.environ}
        home = str(self.place.home)
        return kept | {
            "HOME": home,
            "XDG_CONFIG_HOME": f"{home}/.config",
            "XDG_CACHE_HOME": f"{home}/.cache",
            "TMPDIR": str(self.place.tmp),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": f"{home}/.cache/hub",
            "OMP_NUM_THREADS": "1",
            "LANG": "C.UTF-8",
            **({"WANCLI_DEBUG": "1"} if self.debug else {}),
        }


@dataclass(frozen=True)
class Tried:
    """A case, and all that is wrong with it."""

    group: str
    seed: int
    number: int
    faults: tuple[Fault, ...]
    lines: tuple[str, ...]  # command lines, and how each ended

    @property
    def again(self) -> str:
        """What makes it again."""
        return f"python -m tests.fuzz {self.group} --seed {self.seed} --case {self.number}"


class Campaign:
    """Materials, a place to work in, and one warm process: a light one for what only tells."""

    def __init__(self, root: Path, *, light: bool = False) -> None:
        self.root = root
        with warm.silently(root / "warming"):
            (warm.warm_lightly if light else warm.warm)()
            make = materials.make_lightly if light else materials.make
            self.materials = make(root / "materials")
            warm.settle()

    def try_one(self, group: str, seed: int, number: int, *, keep: bool = False) -> Tried:
        """A case, and what is wrong with it."""
        faults, case = self._run(group, seed, number, keep=keep)
        if any(fault.kind == "unexpected" for fault in faults):
            found, _ = self._run(group, seed, number, debug=True)
            where = [fault for fault in found if fault.kind == "traceback"]
            faults = [f for f in faults if f.kind != "unexpected"] + [
                Fault("unexpected", fault.cause, fault.detail) for fault in where
            ] or faults
        lines = tuple(
            f"{spelt(command)}  -> {code}"
            for command, code in zip(case.ran, [*case.codes, "?"], strict=False)
        )
        return Tried(group, seed, number, tuple(faults), lines)

    def _run(
        self, group: str, seed: int, number: int, *, debug: bool = False, keep: bool = False
    ) -> tuple[list[Fault], Case]:
        root = self.root / f"{group}-{seed}-{number}-{os.getpid()}"
        case = Case(group, seed, number, self.materials, root, debug)
        try:
            return list(module(group).attempt(case)), case
        finally:
            if not keep:
                case.place.remove()


def module(group: str) -> Any:
    """The file of a group: `attempt(case)` yields faults, SIZE is how many cases a whole has."""
    return importlib.import_module(f"tests.fuzz.{group}")


def spelt(command: Command) -> str:
    """A command as a shell takes it."""
    said = " ".join(_quoted(argument) for argument in command.arguments)
    own = {"HOME", "PATH", "TMPDIR", "VIRTUAL_ENV", "LANG", "OMP_NUM_THREADS", "HF_HOME",
           "HF_HUB_OFFLINE", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "WANCLI_DEBUG"}  # fmt: skip
    more = {name: value for name, value in command.variables.items() if name not in own}
    streams = "" if command.streams == (Null, File, File) else str(command.streams)
    set_ = "".join(f"{name}={_quoted(value)} " for name, value in more.items())
    said = f"{set_}wancli {said}"
    notes = [streams, "as a user whose rights count" if command.plain else "",
             "" if command.encoding == "utf-8" else command.encoding]  # fmt: skip
    return said + "".join(f"  [{note}]" for note in notes if note)


def _quoted(text: str) -> str:
    if text.isprintable() and text.isascii():
        return shlex.quote(text) if len(text) < 300 else f"{shlex.quote(text[:40])}…{len(text)}"
    cut = text if len(text) < 300 else text[:40] + f"…{len(text)}"
    return "$" + repr(cut.encode(errors="surrogateescape"))[1:]


def in_processes(
    campaign: Campaign, group: str, seed: int, numbers: Sequence[int], *, processes: int,
    say: Callable[[Tried], None],
) -> list[Tried]:  # fmt: skip
    """Every case, in so many processes at once."""
    workers = []
    for first in range(processes):
        reader, writer = os.pipe()
        if not (child := os.fork()):
            os.close(reader)
            _work(campaign, group, seed, numbers[first::processes], writer)
        os.close(writer)
        workers.append((child, reader))
    failed = []
    for child, reader in workers:
        with os.fdopen(reader, encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                told = json.loads(line)
                faults = tuple(Fault(**fault) for fault in told.pop("faults"))
                failed.append(Tried(faults=faults, **told | {"lines": tuple(told["lines"])}))
                say(failed[-1])
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"a process of {group} ended early")
    return failed


def _work(campaign: Campaign, group: str, seed: int, numbers: Iterable[int], writer: int) -> None:
    code = 1
    try:
        with os.fdopen(writer, "w", encoding="utf-8", errors="surrogateescape") as lines:
            for number in numbers:
                tried = campaign.try_one(group, seed, number)
                if tried.faults:
                    told = {"group": group, "seed": seed, "number": number, "lines": tried.lines}
                    faults = [vars(fault) for fault in tried.faults]
                    lines.write(json.dumps(told | {"faults": faults}) + "\n")
                    lines.flush()
        code = 0
    except BaseException:  # noqa: BLE001 - it must not go on as the one that forked it
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def causes(failed: Sequence[Tried]) -> dict[tuple[str, str], list[Tried]]:
    """Failures by what is wrong, the commonest first."""
    found: dict[tuple[str, str], list[Tried]] = defaultdict(list)
    for one in failed:
        for kind, cause in dict.fromkeys((fault.kind, fault.cause) for fault in one.faults):
            found[kind, cause].append(one)
    return dict(sorted(found.items(), key=lambda entry: -len(entry[1])))


@contextlib.contextmanager
def rooted() -> Any:
    """A folder in memory, where there is one, gone at the end."""
    shared = Path("/dev/shm")
    base = shared if os.access(shared, os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))
    root = base / f"wancli-fuzz-{os.getpid()}-{time.time_ns() % 10**9}"
    root.mkdir()
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)
