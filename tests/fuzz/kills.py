"""Commands killed at a random moment: nothing is lost, and remaining files are whole."""

import json
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.fuzz import judge, warm
from tests.fuzz.campaign import Case
from tests.fuzz.child import Command, File, Null
from tests.fuzz.judge import Fault
from tests.fuzz.materials import CHUNKED, SMALL
from tests.fuzz.place import Listing, added, damaged
from tests.fuzz.warm import Outcome

SIZE = 120
TINY = ("--model", "tiny", *SMALL, "--num-frames", "5")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STREAMS = (Null, File, File)
# Files that may be left: those of a resumable rollout; any after SIGKILL.
STAYS = (("work/new-3.rollout/", "work/new-3.part.mp4"), ("work/", "tmp/"))
MATERIALS = ("tiny", "made.mp4", "made.json", "latents.safetensors", "checkpoint.safetensors",
             "heads.json")  # fmt: skip


@dataclass(frozen=True)
class KilledCommand:
    """A command, the seconds that an undisturbed run takes, and its outputs."""

    line: tuple[str, ...]
    seconds: float
    outputs: tuple[str, ...]

    @property
    def rerun(self) -> tuple[str, ...]:
        """The same command, replacing existing files."""
        return self.line if "--overwrite" in self.line else (*self.line, "--overwrite")


def _case(line: str, seconds: float, *outputs: str, small: tuple[str, ...] = TINY) -> KilledCommand:
    command, *rest = shlex.split(line)
    return KilledCommand((command, *small, *rest), seconds, outputs)


_CHUNKS = ("--model", "tiny", *CHUNKED, "--chunks", "4")
_ROLL = "rollout 'a red circle' --seed 1 -o new-3.mp4"
COMMANDS = (
    _case("generate a --seed 1-3 -o new-3.mp4 --preview-every 1 --save-latents new-3.safetensors "
          "--perf-json perf.json", 1.6, "new-3-1.mp4", "new-3-2.mp4", "new-3-3.mp4"),
    _case(_ROLL, 1.2, "new-3.mp4", "new-3.json", small=_CHUNKS),
    _case(f"{_ROLL} --report drift.html --save-latents new-3.safetensors", 1.3,
          "new-3.mp4", "new-3.json", small=_CHUNKS),
    _case("bench a --variant 'e: --no-prompt-kv' -o new-3", 1.5, "new-3/report.html"),
    _case("preview made.mp4 --gif new-3.gif --webp new-3.webp --sheet new-3.png --width 800",
          0.5, "new-3.gif", "new-3.webp", "new-3.png", small=()),
    _case("decode latents.safetensors -o new-3.mp4", 0.4, "new-3.mp4", "new-3.json", small=()),
    _case("model convert checkpoint.safetensors new-3 --config heads.json", 0.4, "new-3",
          small=()),
    _case("repro made.mp4 --model tiny -o made.mp4 --overwrite", 0.6, "made.mp4", "made.json",
          small=()),
    _case("generate a --seed 9 -o made.mp4 --overwrite", 0.8, "made.mp4", "made.json"),
)  # fmt: skip


def attempt(case: Case) -> Iterator[Fault]:
    """Interrupt a command by a signal, then complete it."""
    rng = case.rng
    target = COMMANDS[case.number % len(COMMANDS)]
    number = rng.choice(SIGNALS)
    case.place.copy_in(*MATERIALS)
    before = case.place.snapshot()
    child = warm.start(case.command(target.line, streams=STREAMS))
    time.sleep(rng.uniform(0.0, target.seconds))
    child.send(number)
    outcome = child.wait()
    case.codes.append(outcome.code)
    yield from _check_ending(outcome, number)
    replaced = {"work/made.mp4", "work/made.json"} if "--overwrite" in target.line else set()
    yield from _check_leftovers(
        case, before, replaced=replaced, stays=STAYS[number == signal.SIGKILL]
    )
    yield from _check_rerun(case, target, before, replaced)


def _check_ending(outcome: Outcome, number: int) -> Iterator[Fault]:
    """The command reports the interruption, or had finished before."""
    if outcome.hung:
        yield Fault("hang", signal.Signals(number).name)
    elif number == signal.SIGKILL:
        if outcome.code not in (-9, 0):
            yield Fault(
                "exit code",
                f"{outcome.code} of SIGKILL",
                outcome.err.decode(errors="replace")[-500:],
            )
    else:
        err = outcome.err.decode(errors="replace")
        if outcome.code not in (0, 128 + number):
            yield Fault(
                "exit code", f"{outcome.code} of {signal.Signals(number).name}", err[-1500:]
            )
        if "Traceback" in err or "Exception ignored" in err or "unexpected" in err:
            yield Fault("traceback", judge.cause_of(err), err[-2000:])
        if "\x1b" in err:
            yield Fault("escape", "on stderr", repr(err[-200:]))


def _check_leftovers(
    case: Case, before: Listing, *, replaced: set[str], stays: tuple[str, ...] = ()
) -> Iterator[Fault]:
    """New files are whole; partial files only where they start with one of `stays`."""
    after = case.place.snapshot()
    for name, how in damaged(before, after, may=replaced):
        yield Fault(how, judge.pattern(name), name)
    for name in sorted({*added(before, after), *replaced}):
        if not judge.is_ours(name):
            if not name.startswith(stays):
                yield Fault("rubbish", judge.pattern(name), name)
        elif fault := judge.defect(case.place.root / name):
            yield Fault("not whole", f"{judge.pattern(name)}: {fault}", name)


def _check_rerun(
    case: Case, target: KilledCommand, before: Listing, replaced: set[str]
) -> Iterator[Fault]:
    """Complete the command; a rollout must be bit-identical to one that was never killed."""
    rolls = target.line[0] == "rollout"
    resumes = rolls and (case.place.work / "new-3.rollout" / "rollout.json").exists()
    line = ("rollout", "--resume", "-o", "new-3.mp4") if resumes else target.rerun
    outcome = case.run(line, streams=STREAMS)
    if outcome.hung:
        yield from judge.check_streams(outcome, streams=STREAMS)
        return
    if outcome.code:
        err = outcome.err.decode(errors="replace")
        yield Fault("again", f"{line[0]}: exit {outcome.code}", err[-800:])
        return
    for name in target.outputs:
        if not (case.place.work / name).exists():
            yield Fault("again", f"{line[0]}: no {name}")
    for fault in _check_leftovers(case, before, replaced=replaced):
        yield replace(fault, cause=f"again: {fault.cause}")
    if rolls:
        yield from _same_frames(case)


def _same_frames(case: Case) -> Iterator[Fault]:
    """The frames equal those of a rollout that was never killed."""
    digest = json.loads((case.place.work / "new-3.json").read_text())["output"]["framemd5"]
    if digest != reference(case):
        yield Fault("frames", "a resumed rollout differs", digest)


def reference(case: Case) -> str:
    """Frame digest of the uninterrupted rollout, cached in the materials."""
    cached = Path(case.materials) / "whole-rollout.json"
    if not cached.exists():
        folder = case.place.root / "reference"
        folder.mkdir()
        model = str(case.materials / "tiny")
        line = [model if part == "tiny" else part for part in COMMANDS[1].line]
        warm.run(Command(tuple(line), folder, case.variables(), folder / "output"), hang_s=120)
        part = cached.with_name(f"{cached.name}.{case.number}")
        part.write_text((folder / "new-3.json").read_text())
        part.replace(cached)
    return str(json.loads(cached.read_text())["output"]["framemd5"])
