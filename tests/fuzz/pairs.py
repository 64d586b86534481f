"""Two processes on one name, at once: one is refused, and nothing is lost."""

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
from tests.fuzz.warm import Ended

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
    """Two commands that start together, or nearly."""
    chance = case.chance
    pair = list(PAIRS[case.number % len(PAIRS)])
    chance.shuffle(pair)
    overwrite = ("--overwrite",) if chance.random() < 0.4 else ()
    case.place.take(*MATERIALS)
    before = case.place.look()
    children = []
    for line in pair:
        children.append(warm.start(case.command((*line, *overwrite), streams=STREAMS)))
        time.sleep(chance.choice((0.0, 0.0, chance.uniform(0, 0.4))))
    ended = [child.wait() for child in children]
    case.codes += [one.code for one in ended]
    for one in ended:
        yield from judge.talk(one, streams=STREAMS)
    yield from _one_of_them(pair, ended, overwrite=bool(overwrite))
    yield from judge.files(Ended(0, b"", b"", 0), case.place, before)
    if [one.code for one in ended].count(0) == 1:
        yield from _is_the_winners(case, pair, ended)


def _one_of_them(
    pair: list[tuple[str, ...]], ended: list[Ended], *, overwrite: bool
) -> Iterator[Fault]:
    """One is refused; with --overwrite both may be done, where one wrote after the other."""
    names = "/".join(line[0] for line in pair)
    codes = sorted(one.code for one in ended)
    if codes == [0, 0] and overwrite:
        return
    if codes != [0, 2]:
        said = " | ".join(one.err.decode(errors="replace")[-200:] for one in ended)
        yield Fault("pair", f"{names}: exit {codes}", said)
    elif (loser := ended[0] if ended[0].code else ended[1]).seconds > 10:
        yield Fault("pair", f"{names}: refused only after {loser.seconds:.0f} s", "")


def _is_the_winners(case: Case, pair: list[tuple[str, ...]], ended: list[Ended]) -> Iterator[Fault]:
    """The record is of the command that ended well."""
    line = pair[0] if ended[0].code == 0 else pair[1]
    name = next((part for part in line if part.lower() == "new-3.mp4"), None)
    if name is None:
        return
    path = case.place.work / Path(name).with_suffix(".json")
    if not path.exists():
        yield Fault("pair", f"{line[0]}: no record", "")
        return
    told = json.loads(path.read_text())
    if told["command"] != line[0]:
        yield Fault("pair", f"{line[0]}: the record is of {told['command']}", "")
