"""A short part of the campaign (`make fuzz` runs all), and tests that faults are detected."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.batches.fakes import FakeWorker, fake_ledger
from tests.fuzz import judge
from tests.fuzz.batches import KilledBatch
from tests.fuzz.campaign import Case, group_by_cause
from tests.fuzz.child import File, Null
from tests.fuzz.judge import Fault
from tests.fuzz.place import added, damaged
from tests.fuzz.warm import Outcome

ROOT = Path(__file__).parents[2]
ERROR_AND_HINT = b"error: x\nhint:  y\n"
STREAMS = (Null, File, File)


def run_fuzz(*arguments: str) -> str:
    process = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments], cwd=ROOT, capture_output=True,
        encoding="utf-8", check=False, env=os.environ,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.mark.slow
def test_command_lines_that_only_print_survive_any_input():
    assert " 0 failed" in run_fuzz("instant", "--processes", "1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("lines", "hostile", "--cases", "100"),
        ("kills", "pairs", "first", "disks", "--cases", "11"),
        ("batches", "--cases", "1"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_a_part_of_every_group_finds_no_fault(arguments: tuple[str, ...]):
    output = run_fuzz(*arguments, "--seed", "7")
    assert output.count(" 0 failed") == len(arguments) - 2


def outcome(*, code: int = 0, out: bytes = b"", err: bytes = b"", hung: bool = False) -> Outcome:
    return Outcome(code, out, err, 0.1, hung)


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        (outcome(hung=True), "hang"),
        (
            outcome(code=1, err=b"Traceback (most recent call last):\nKeyError\n" + ERROR_AND_HINT),
            "traceback",
        ),
        (outcome(code=1, err=b"error: unexpected KeyError: 1\nhint:  x\n"), "unexpected"),
        (outcome(code=9, err=ERROR_AND_HINT), "exit code"),
        (outcome(code=-11), "exit code"),
        (outcome(code=2, err=b"oh\n"), "words"),
        (outcome(out=b"\x1b[31mred"), "escape"),
        (outcome(err="\u009b31m".encode()), "escape"),
        (outcome(code=4, err=ERROR_AND_HINT), None),
        (outcome(), None),
    ],
)
def test_faults_in_output_are_detected(result: Outcome, kind: str | None):
    kinds = {fault.kind for fault in judge.check_streams(result, streams=STREAMS)}
    assert kinds == ({kind} if kind else set())


def test_lost_replaced_leftover_and_truncated_files_are_detected(tmp_path: Path):
    case = Case("lines", 0, 0, tmp_path, tmp_path / "case")
    before = case.place.snapshot()
    work = case.place.work
    (work / "notes.txt").unlink()
    (work / "mine.mp4").write_text("another")
    (work / ".x.part").write_text("")
    (work / "cut.json").write_text("{")
    after = case.place.snapshot()
    assert damaged(before, after) == [("work/mine.mp4", "replaced"), ("work/notes.txt", "lost")]
    assert added(before, after) == ["work/.x.part", "work/cut.json"]
    kinds = [fault.kind for fault in judge.check_files(outcome(), case.place, before)]
    assert kinds == ["replaced", "lost", "rubbish", "not whole"]


def test_lost_repeated_and_damaged_videos_of_a_batch_are_detected(tmp_path: Path):
    batch = KilledBatch(Case("batches", 0, 0, tmp_path, tmp_path / "case"))
    with fake_ledger(tmp_path, ["a"] * 5) as ledger:
        batch.ledger = ledger.path
        made = list(FakeWorker(ledger).run())
        assert batch.look() == 5
    made[0].job.output.unlink()
    made[1].job.output.write_text("made again")
    line = '{"job": 3, "status": "ok"}\n'
    batch.runs = 2
    for run in range(batch.runs):
        (batch.case.place.output / f"out{run}").write_text(line)
    faults = [(fault.kind, fault.cause) for fault in batch.check()]
    assert faults[:4] == [
        ("lost", "5 of 12 jobs are done"),
        ("twice", "a video was made again"),
        ("twice", "a video was made again"),
        ("twice", "a job was printed as made twice"),
    ]
    assert {kind for kind, _ in faults[4:]} == {"not whole"}


def test_cases_are_reproducible(tmp_path: Path):
    one, other = (
        Case("lines", 3, 14, tmp_path, tmp_path / name).rng.random() for name in ("a", "b")
    )
    assert one == other


def test_failures_are_grouped_by_cause(tmp_path: Path):
    from tests.fuzz.campaign import CaseResult

    failed = [CaseResult("lines", 0, n, (Fault("hang", "here", str(n)),), ()) for n in range(3)]
    assert list(group_by_cause(failed)) == [("hang", "here")]
    assert failed[2].rerun == "python -m tests.fuzz lines --seed 0 --case 2"
