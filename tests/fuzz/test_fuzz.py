"""The campaign, a short part of it: whole it is `make fuzz`. And that it would see a fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import judge
from tests.fuzz.campaign import Case, causes
from tests.fuzz.child import File, Null
from tests.fuzz.judge import Fault
from tests.fuzz.place import added, harmed
from tests.fuzz.warm import Ended

ROOT = Path(__file__).parents[2]
TOLD = b"error: x\nhint:  y\n"
STREAMS = (Null, File, File)


def tried(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments], cwd=ROOT, capture_output=True,
        encoding="utf-8", check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_command_lines_that_only_tell_stand_whatever_is_typed():
    assert " 0 failed" in tried("instant", "--processes", "1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [("lines", "hostile", "--cases", "100"), ("kills", "pairs", "first", "disks", "--cases", "11")],
    ids=lambda asked: " ".join(asked),
)
def test_a_part_of_every_group_stands(asked: tuple[str, ...]):
    said = tried(*asked, "--seed", "7")
    assert said.count(" 0 failed") == len(asked) - 2


def ended(*, code: int = 0, out: bytes = b"", err: bytes = b"", hung: bool = False) -> Ended:
    return Ended(code, out, err, 0.1, hung)


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        (ended(hung=True), "hang"),
        (
            ended(code=1, err=b"Traceback (most recent call last):\nKeyError\n" + TOLD),
            "traceback",
        ),
        (ended(code=1, err=b"error: unexpected KeyError: 1\nhint:  x\n"), "unexpected"),
        (ended(code=3, err=TOLD), "exit code"),
        (ended(code=-11), "exit code"),
        (ended(code=2, err=b"oh\n"), "words"),
        (ended(out=b"\x1b[31mred"), "escape"),
        (ended(err="\u009b31m".encode()), "escape"),
        (ended(code=4, err=TOLD), None),
        (ended(), None),
    ],
)
def test_what_is_said_is_judged(what: Ended, kind: str | None):
    found = {fault.kind for fault in judge.talk(what, streams=STREAMS)}
    assert found == ({kind} if kind else set())


def test_what_is_lost_replaced_left_or_cut_is_seen(tmp_path: Path):
    case = Case("lines", 0, 0, tmp_path, tmp_path / "case")
    before = case.place.look()
    work = case.place.work
    (work / "notes.txt").unlink()
    (work / "mine.mp4").write_text("another")
    (work / ".x.part").write_text("")
    (work / "cut.json").write_text("{")
    after = case.place.look()
    assert harmed(before, after) == [("work/mine.mp4", "replaced"), ("work/notes.txt", "lost")]
    assert added(before, after) == ["work/.x.part", "work/cut.json"]
    kinds = [fault.kind for fault in judge.files(ended(), case.place, before)]
    assert kinds == ["replaced", "lost", "rubbish", "not whole"]


def test_a_case_is_the_same_whenever_it_is_tried(tmp_path: Path):
    one, other = (
        Case("lines", 3, 14, tmp_path, tmp_path / name).chance.random() for name in ("a", "b")
    )
    assert one == other


def test_failures_of_one_cause_are_one(tmp_path: Path):
    from tests.fuzz.campaign import Tried

    failed = [Tried("lines", 0, n, (Fault("hang", "here", str(n)),), ()) for n in range(3)]
    assert list(causes(failed)) == [("hang", "here")]
    assert failed[2].again == "python -m tests.fuzz lines --seed 0 --case 2"
