"""Damaged or made-up files of every kind that wancli reads, and non-files."""

from collections.abc import Iterator

from tests.fuzz import judge
from tests.fuzz.bad_folders import cache, model, rollout, special
from tests.fuzz.bad_numbers import RAN, checkpoint, latents, lora, noise, weights
from tests.fuzz.bad_pixels import picture, video
from tests.fuzz.bad_text import bench, preset, record, record_inside, script
from tests.fuzz.campaign import Case
from tests.fuzz.child import File, Null
from tests.fuzz.judge import Fault
from tests.fuzz.spoiling import Kind

EACH = 200
KINDS: tuple[Kind, ...] = (
    record, record_inside, preset, bench, script, latents, video, picture, model, rollout, lora,
    noise, checkpoint, cache, special, weights,
)  # fmt: skip
SIZE = EACH * len(KINDS)
STREAMS = (Null, File, File)
# Files that a resumed rollout rewrites or sets aside.
GROWS = ("work/roll.mp4", "work/roll.json", "work/roll.rollout/")


def attempt(case: Case) -> Iterator[Fault]:
    """One hostile file in place of a valid one, and a command that reads it."""
    kind = KINDS[case.number % len(KINDS)]
    case.place.copy_in("tiny")
    line = case.rng.choice(kind(case, case.rng))
    before = case.place.snapshot()
    outcome = case.run(line, streams=STREAMS)
    yield from judge.check_streams(outcome, streams=STREAMS)
    if (case.place.work / RAN).exists():
        yield Fault("code", "code in a file was run")
    grows = GROWS if {"--resume", "--rerender"} & set(line) else ()
    dry = "--dry-run" in line or line[0] in ("show", "compare", "plan")
    for fault in judge.check_files(outcome, case.place, before, dry=dry):
        if not (fault.kind in ("lost", "replaced") and fault.detail.startswith(grows)):
            yield fault
    yield from judge.check_results(outcome, case.place, json_lines="--json" in line, paths=False)
