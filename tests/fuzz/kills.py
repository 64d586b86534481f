"""Commands that are killed at a random moment: nothing is lost, and what is there is whole."""

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
from tests.fuzz.place import Listing, added, harmed
from tests.fuzz.warm import Ended

SIZE = 120
TINY = ("--model", "tiny", *SMALL, "--num-frames", "5")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STREAMS = (Null, File, File)
# Parts that may be left: a rollout's, which goes on; all, where nobody could tidy up.
STAYS = (("work/new-3.rollout/", "work/new-3.part.mp4"), ("work/", "tmp/"))
MATERIALS = ("tiny", "made.mp4", "made.json", "latents.safetensors", "checkpoint.safetensors",
             "heads.json")  # fmt: skip


@dataclass(frozen=True)
class Killed:
    """A command, what a whole run takes when nothing else runs, and what it leaves."""

    line: tuple[str, ...]
    seconds: float
    made: tuple[str, ...]

    @property
    def again(self) -> tuple[str, ...]:
        """The same, whatever is there."""
        return self.line if "--overwrite" in self.line else (*self.line, "--overwrite")


def _killed(line: str, seconds: float, *made: str, small: tuple[str, ...] = TINY) -> Killed:
    command, *rest = shlex.split(line)
    return Killed((command, *small, *rest), seconds, made)


_CHUNKS = ("--model", "tiny", *CHUNKED, "--chunks", "4")
_ROLL = "rollout 'a red circle' --seed 1 -o new-3.mp4"
COMMANDS = (
    _killed("generate a --seed 1-3 -o new-3.mp4 --preview-every 1 --save-latents new-3.safetensors "
            "--perf-json perf.json", 1.6, "new-3-1.mp4", "new-3-2.mp4", "new-3-3.mp4"),
    _killed(_ROLL, 1.2, "new-3.mp4", "new-3.json", small=_CHUNKS),
    _killed(f"{_ROLL} --report drift.html --save-latents new-3.safetensors", 1.3,
            "new-3.mp4", "new-3.json", small=_CHUNKS),
    _killed("bench a --variant 'e: --no-prompt-kv' -o new-3", 1.5, "new-3/report.html"),
    _killed("preview made.mp4 --gif new-3.gif --webp new-3.webp --sheet new-3.png --width 800",
            0.5, "new-3.gif", "new-3.webp", "new-3.png", small=()),
    _killed("decode latents.safetensors -o new-3.mp4", 0.4, "new-3.mp4", "new-3.json", small=()),
    _killed("model convert checkpoint.safetensors new-3 --config heads.json", 0.4, "new-3",
            small=()),
    _killed("repro made.mp4 --model tiny -o made.mp4 --overwrite", 0.6, "made.mp4", "made.json",
            small=()),
    _killed("generate a --seed 9 -o made.mp4 --overwrite", 0.8, "made.mp4", "made.json"),
)  # fmt: skip


def attempt(case: Case) -> Iterator[Fault]:
    """A command that gets a signal, and then is made whole."""
    chance = case.chance
    killed = COMMANDS[case.number % len(COMMANDS)]
    number = chance.choice(SIGNALS)
    case.place.take(*MATERIALS)
    before = case.place.look()
    child = warm.start(case.command(killed.line, streams=STREAMS))
    time.sleep(chance.uniform(0.0, killed.seconds))
    child.send(number)
    ended = child.wait()
    case.codes.append(ended.code)
    yield from _how(ended, number)
    ours = {"work/made.mp4", "work/made.json"} if "--overwrite" in killed.line else set()
    yield from _left(case, before, ours=ours, stays=STAYS[number == signal.SIGKILL])
    yield from _whole_again(case, killed, before, ours)


def _how(ended: Ended, number: int) -> Iterator[Fault]:
    """It says that it was interrupted, or had ended before."""
    if ended.hung:
        yield Fault("hang", signal.Signals(number).name)
    elif number == signal.SIGKILL:
        if ended.code not in (-9, 0):
            yield Fault(
                "exit code", f"{ended.code} of SIGKILL", ended.err.decode(errors="replace")[-500:]
            )
    else:
        err = ended.err.decode(errors="replace")
        if ended.code not in (0, 128 + number):
            yield Fault("exit code", f"{ended.code} of {signal.Signals(number).name}", err[-1500:])
        if "Traceback" in err or "Exception ignored" in err or "unexpected" in err:
            yield Fault("traceback", judge.cause_of(err), err[-2000:])
        if "\x1b" in err:
            yield Fault("escape", "on stderr", repr(err[-200:]))


def _left(
    case: Case, before: Listing, *, ours: set[str], stays: tuple[str, ...] = ()
) -> Iterator[Fault]:
    """What is there is whole; of parts only what begins with one of `stays` is there."""
    after = case.place.look()
    for name, how in harmed(before, after, may=ours):
        yield Fault(how, judge.pattern(name), name)
    for name in sorted({*added(before, after), *ours}):
        if not judge.ours(name):
            if not name.startswith(stays):
                yield Fault("rubbish", judge.pattern(name), name)
        elif fault := judge.whole(case.place.root / name):
            yield Fault("not whole", f"{judge.pattern(name)}: {fault}", name)


def _whole_again(case: Case, killed: Killed, before: Listing, ours: set[str]) -> Iterator[Fault]:
    """Run what finishes it; a rollout comes out bit for bit as one that was never killed."""
    rolls = killed.line[0] == "rollout"
    resumes = rolls and (case.place.work / "new-3.rollout" / "rollout.json").exists()
    line = ("rollout", "--resume", "-o", "new-3.mp4") if resumes else killed.again
    ended = case.run(line, streams=STREAMS)
    if ended.hung:
        yield from judge.talk(ended, streams=STREAMS)
        return
    if ended.code:
        said = ended.err.decode(errors="replace")
        yield Fault("again", f"{line[0]}: exit {ended.code}", said[-800:])
        return
    for name in killed.made:
        if not (case.place.work / name).exists():
            yield Fault("again", f"{line[0]}: no {name}")
    for fault in _left(case, before, ours=ours):
        yield replace(fault, cause=f"again: {fault.cause}")
    if rolls:
        yield from _same_frames(case)


def _same_frames(case: Case) -> Iterator[Fault]:
    """Whether the frames are those of a rollout that was never killed."""
    told = json.loads((case.place.work / "new-3.json").read_text())["output"]["framemd5"]
    if told != reference(case):
        yield Fault("frames", "a resumed rollout differs", told)


def reference(case: Case) -> str:
    """The frames of the whole rollout: made once, in the materials."""
    kept = Path(case.materials) / "whole-rollout.json"
    if not kept.exists():
        folder = case.place.root / "reference"
        folder.mkdir()
        model = str(case.materials / "tiny")
        line = [model if part == "tiny" else part for part in COMMANDS[1].line]
        warm.run(Command(tuple(line), folder, case.variables(), folder / "said"), hangs_s=120)
        part = kept.with_name(f"{kept.name}.{case.number}")
        part.write_text((folder / "new-3.json").read_text())
        part.replace(kept)
    return str(json.loads(kept.read_text())["output"]["framemd5"])
