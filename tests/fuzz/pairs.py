"""Two processes writing the same name at once: one is rejected, and nothing is lost."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz import judge, warm
from tests.fuzz.campaign import Case
from tests.fuzz.child import File, Null
from tests.fuzz.judge import Fault
from tests.fuzz.kills import MATERIALS, TINY
from tests.fuzz.materials import CHUNKED
from tests.fuzz.warm import Outcome

SIZE = 120
STREAMS = (Null, File, File)
GENERATE = ("generate", "a", *TINY, "-o", "new-3.mp4", "-q")
OTHER = ("generate", "a", *TINY, "--seed", "2", "-o", "new-3.mp4", "-q")
ROLLOUT = (
    "rollout",
    "a",
    "--model",
    "tiny",
    *CHUNKED,
    "--seed",
    "1",
    "--chunks",
    "3",
    "-o",
    "new-3.mp4",
    "-q",
)
BENCH = ("bench", "a", *TINY, "--variant", "e: --no-prompt-kv", "-o", "new-3", "-q")
PREVIEW = ("preview", "made.mp4", "--gif", "new-3.gif", "--width", "900", "-q")
DECODE = ("decode", "latents.safetensors", "-o", "new-3.mp4", "-q")
CONVERT = ("model", "convert", "checkpoint.safetensors", "new-3", "--config", "heads.json", "-q")
SAVE = ("preset", "save", "quick", "--steps")
PAIRS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (GENERATE, OTHER), (GENERATE, ROLLOUT), (ROLLOUT, ROLLOUT), (BENCH, BENCH), (PREVIEW, PREVIEW),
    (DECODE, GENERATE), (DECODE, DECODE), (CONVERT, CONVERT), (ROLLOUT, DECODE),
    (GENERATE, tuple("new-3.MP4" if part == "new-3.mp4" else part for part in OTHER)),
    ((*SAVE, "3"), (*SAVE, "4")),
)  # fmt: skip


def attempt(case: Case) -> Iterator[Fault]:
    """Start two commands at almost the same time."""
    rng = case.rng
    pair = list(PAIRS[case.number % len(PAIRS)])
    rng.shuffle(pair)
    overwrite = ("--overwrite",) if rng.random() < 0.4 else ()
    case.place.copy_in(*MATERIALS)
    before = case.place.snapshot()
    children = []
    for line in pair:
        children.append(warm.start(case.command((*line, *overwrite), streams=STREAMS)))
        time.sleep(rng.choice((0.0, 0.0, rng.uniform(0, 0.4))))
    outcomes = [child.wait() for child in children]
    case.codes += [outcome.code for outcome in outcomes]
    for outcome in outcomes:
        yield from judge.check_streams(outcome, streams=STREAMS)
    yield from _check_exit_codes(pair, outcomes, overwrite=bool(overwrite))
    yield from judge.check_files(Outcome(0, b"", b"", 0), case.place, before)
    if [outcome.code for outcome in outcomes].count(0) == 1:
        yield from _check_record(case, pair, outcomes)


def _check_exit_codes(
    pair: list[tuple[str, ...]], outcomes: list[Outcome], *, overwrite: bool
) -> Iterator[Fault]:
    """One is rejected; with --overwrite both may succeed, one after the other."""
    names = "/".join(line[0] for line in pair)
    codes = sorted(outcome.code for outcome in outcomes)
    if codes == [0, 0] and overwrite:
        return
    if codes != [0, 2]:
        errors = " | ".join(outcome.err.decode(errors="replace")[-200:] for outcome in outcomes)
        yield Fault("pair", f"{names}: exit {codes}", errors)
    elif (loser := outcomes[0] if outcomes[0].code else outcomes[1]).seconds > 10:
        yield Fault("pair", f"{names}: rejected only after {loser.seconds:.0f} s", "")


def _check_record(
    case: Case, pair: list[tuple[str, ...]], outcomes: list[Outcome]
) -> Iterator[Fault]:
    """The record is that of the successful command."""
    line = pair[0] if outcomes[0].code == 0 else pair[1]
    name = next((part for part in line if part.lower() == "new-3.mp4"), None)
    if name is None:
        return
    path = case.place.work / Path(name).with_suffix(".json")
    if not path.exists():
        yield Fault("pair", f"{line[0]}: no record", "")
        return
    record = json.loads(path.read_text())
    if record["command"] != line[0]:
        yield Fault("pair", f"{line[0]}: the record is of {record['command']}", "")
