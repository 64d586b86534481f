"""Jobs that reproduce videos from their records."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import wancli
from tests.fakes import tiny_image
from wancli.api.requests import Listener
from wancli.batches.jobs import JOB_KEYS
from wancli.batches.plan import plan_batch
from wancli.batches.worker import BatchWorker
from wancli.planning.jobs import read_jobs
from wancli.records.ledger import create_ledger

SMALL: Any = {"steps": 2, "size": "32x32", "fps": 8}


def made(*jobs: dict[str, Any]) -> list[Mapping[str, Any]]:
    """The records of jobs."""
    Path("j.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    batch = read_jobs(Path("j.jsonl"), JOB_KEYS)
    planned = plan_batch(batch, Path(), Listener(None))
    jobs_and_settings = planned.settings, planned.jobs
    with create_ledger(Path("j.ledger"), batch.digest, *jobs_and_settings, version="1") as ledger:
        outcomes = list(BatchWorker(ledger).run())
    assert [outcome.error for outcome in outcomes] == [None] * len(jobs)
    return [outcome.record or {} for outcome in outcomes]


def frames(record: Mapping[str, Any]) -> Any:
    return record["hash"], record["output"]["framemd5"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_clip_is_reproduced_and_what_a_job_sets_is_changed(tiny_model: Path):
    more: Any = {"num_frames": 5, "guidance_scale": 3.5, "scheduler": "euler", "lossless": True}
    first = wancli.generate(
        "a circle", model=str(tiny_model), seed=7, output="a{{x}}.mp4", **SMALL, **more
    )
    job = {"command": "repro", "file": "a{x}.json", "seed": 8, "steps": 1, "size": "48x32"}
    same, other = made(
        {"command": "repro", "file": "a{x}.mp4", "model": str(tiny_model)},
        {**job, "output": "b.mp4"},
    )
    assert frames(same) == frames(first.record)
    assert same["output"]["path"].endswith("a{x}-repro.mp4")
    request = other["request"]
    assert (request["prompt"], request["seed"]) == ("a circle", 8)
    assert (request["sampling"]["steps"], request["video"]["width"]) == (1, 48)
    assert request["sampling"]["guidance_scale"] == 3.5


def test_a_rollout_with_another_prompt_is_reproduced():
    chunks: Any = {"chunks": 2, "steps": 1, "size": "48x48", "at": {1: "a blue square"}}
    stream = wancli.rollout("a circle", model="demo", seed=3, output="r.mp4", **chunks)
    list(stream)
    (same,) = made({"command": "repro", "file": "r.mp4"})
    assert stream.record
    assert frames(same) == frames(stream.record)


def test_a_file_that_a_video_was_made_from_is_found_or_missed_with_the_line():
    tiny_image(Path("p.png"), 1)
    list(
        wancli.rollout(
            "a circle", seed=3, output="r.mp4", image="p.png", chunks=1, steps=1, size="48x48"
        )
    )
    Path("j.jsonl").write_text('{"command": "repro", "file": "r.mp4"}')
    batch = read_jobs(Path("j.jsonl"), JOB_KEYS)
    with pytest.raises(wancli.InputError, match=r"^j.jsonl:1: .*`image`"):
        plan_batch(batch, Path(), Listener(None))
