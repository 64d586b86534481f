"""Cases by number and seed, run in several processes; faults grouped by cause."""

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
    LIGHT: "command lines that only print: a short part of the next",
    "lines": "command lines over every command and flag",
    "hostile": "hostile files of every kind that wancli reads",
    "kills": "kills at random moments",
    "batches": "kills of the processes of a batch",
    "disks": "disks that fill up at every 64 KiB",
    "pairs": "two processes on one name",
    "first": "signals in the first second of real processes",
}


@dataclass
class Case:
    """One case, determined by its group, seed and number alone."""

    group: str
    seed: int
    number: int
    materials: Path
    root: Path
    debug: bool = False
    commands: list[Command] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    rng: random.Random = field(init=False)
    place: Place = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.group} {self.seed} {self.number}")
        self.place = Place(self.root, self.materials)

    def command(self, arguments: Sequence[str], **more: Any) -> Command:
        """`wancli ARGUMENTS` in work/, with the home and temporary folder of a user."""
        variables = self.variables() | more.pop("variables", {})
        number = len(self.commands)
        command = Command(
            tuple(arguments), self.place.work, variables, self.place.output / str(number), **more
        )
        self.commands.append(command)
        return command

    def run(self, arguments: Sequence[str], **more: Any) -> warm.Outcome:
        """Run a command to its end."""
        outcome = warm.run(self.command(arguments, **more))
        self.codes.append(outcome.code)
        return outcome

    def variables(self) -> dict[str, str]:
        """The environment of a command."""
        inherited = {
            name: os.environ[name] for name in ("PATH", "VIRTUAL_ENV") if name in os.environ
        }
        home = str(self.place.home)
        return inherited | {
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
class CaseResult:
    """A case and its faults."""

    group: str
    seed: int
    number: int
    faults: tuple[Fault, ...]
    lines: tuple[str, ...]  # command lines and their exit codes

    @property
    def rerun(self) -> str:
        """The command that runs this case again."""
        return f"python -m tests.fuzz {self.group} --seed {self.seed} --case {self.number}"


class Campaign:
    """Materials, a scratch folder, and one warm process, without torch if `light`."""

    def __init__(self, root: Path, *, light: bool = False) -> None:
        self.root = root
        with warm.output_to(root / "warming"):
            (warm.warm_lightly if light else warm.warm)()
            make = materials.make_lightly if light else materials.make
            self.materials = make(root / "materials")
            warm.freeze_objects()

    def run_case(self, group: str, seed: int, number: int, *, keep: bool = False) -> CaseResult:
        """Run a case; unexpected errors are run again for their traceback."""
        faults, case = self._run(group, seed, number, keep=keep)
        if any(fault.kind == "unexpected" for fault in faults):
            debug_faults, _ = self._run(group, seed, number, debug=True)
            tracebacks = [fault for fault in debug_faults if fault.kind == "traceback"]
            faults = [f for f in faults if f.kind != "unexpected"] + [
                Fault("unexpected", fault.cause, fault.detail) for fault in tracebacks
            ] or faults
        lines = tuple(
            f"{shell_line(command)}  -> {code}"
            for command, code in zip(case.commands, [*case.codes, "?"], strict=False)
        )
        return CaseResult(group, seed, number, tuple(faults), lines)

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
    """The module of a group: `attempt(case)` yields faults, SIZE is its number of cases."""
    return importlib.import_module(f"tests.fuzz.{group}")


def shell_line(command: Command) -> str:
    """A command as it would be typed in a shell."""
    text = " ".join(_quoted(argument) for argument in command.arguments)
    usual = {"HOME", "PATH", "TMPDIR", "VIRTUAL_ENV", "LANG", "OMP_NUM_THREADS", "HF_HOME",
           "HF_HUB_OFFLINE", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "WANCLI_DEBUG"}  # fmt: skip
    more = {name: value for name, value in command.variables.items() if name not in usual}
    streams = "" if command.streams == (Null, File, File) else str(command.streams)
    set_ = "".join(f"{name}={_quoted(value)} " for name, value in more.items())
    text = f"{set_}wancli {text}"
    notes = [streams, "as an unprivileged user" if command.unprivileged else "",
             "" if command.encoding == "utf-8" else command.encoding]  # fmt: skip
    return text + "".join(f"  [{note}]" for note in notes if note)


def _quoted(text: str) -> str:
    if text.isprintable() and text.isascii():
        return shlex.quote(text) if len(text) < 300 else f"{shlex.quote(text[:40])}…{len(text)}"
    cut = text if len(text) < 300 else text[:40] + f"…{len(text)}"
    return "$" + repr(cut.encode(errors="surrogateescape"))[1:]


def run_in_processes(
    campaign: Campaign, group: str, seed: int, numbers: Sequence[int], *, processes: int,
    report: Callable[[CaseResult], None],
) -> list[CaseResult]:  # fmt: skip
    """Run all cases in several processes; returns the failed ones."""
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
                record = json.loads(line)
                faults = tuple(Fault(**fault) for fault in record.pop("faults"))
                failed.append(
                    CaseResult(faults=faults, **record | {"lines": tuple(record["lines"])})
                )
                report(failed[-1])
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"a process of {group} ended early")
    return failed


def _work(campaign: Campaign, group: str, seed: int, numbers: Iterable[int], writer: int) -> None:
    code = 1
    try:
        with os.fdopen(writer, "w", encoding="utf-8", errors="surrogateescape") as lines:
            for number in numbers:
                result = campaign.run_case(group, seed, number)
                if result.faults:
                    record = {"group": group, "seed": seed, "number": number, "lines": result.lines}
                    faults = [vars(fault) for fault in result.faults]
                    lines.write(json.dumps(record | {"faults": faults}) + "\n")
                    lines.flush()
        code = 0
    except BaseException:  # noqa: BLE001 - the fork must not continue as its parent
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def group_by_cause(failed: Sequence[CaseResult]) -> dict[tuple[str, str], list[CaseResult]]:
    """Failures by kind and cause, the most frequent first."""
    groups: dict[tuple[str, str], list[CaseResult]] = defaultdict(list)
    for one in failed:
        for kind, cause in dict.fromkeys((fault.kind, fault.cause) for fault in one.faults):
            groups[kind, cause].append(one)
    return dict(sorted(groups.items(), key=lambda entry: -len(entry[1])))


@contextlib.contextmanager
def scratch_folder() -> Any:
    """A scratch folder, in memory if possible, removed at the end."""
    shared = Path("/dev/shm")
    base = shared if os.access(shared, os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))
    root = base / f"wancli-fuzz-{os.getpid()}-{time.time_ns() % 10**9}"
    root.mkdir()
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)
