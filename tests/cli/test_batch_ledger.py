"""`wancli batch status`, `retry`, `cancel` and `export`: reading and changing a ledger."""

import csv
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Wancli
from tests.records.test_ledger import SETTINGS, claim, make
from wancli.errors import RunError
from wancli.records.batch_export import export_row, job_lines
from wancli.records.ledger import create_ledger, open_ledger
from wancli.records.ledger_file import LedgerJob
from wancli.records.ledger_worker import LedgerWorker

ROWS = [(1, "a"), (1, "a"), (2, None), (2, None), (3, None), (4, "b")]  # line and id


@pytest.fixture
def folder(wancli: Wancli, tmp_path: Path) -> Path:
    """A folder v with the ledger of six jobs: one each done, failed, kept and cancelled."""
    place = tmp_path / "v {x}"
    jobs = [
        LedgerJob(line, line % 2, f"prompt {n}", n, str(place / f"{n}.mp4"), name)
        for n, (line, name) in enumerate(ROWS)
    ]
    with create_ledger(place / "b.ledger", "d", SETTINGS, jobs, version="1") as ledger:
        worker = LedgerWorker(ledger)
        first = [claim(worker) for _ in range(3)]  # of lines 2 and 4
        worker.done(first[0], make(first[0]))
        worker.failed(first[1], RunError("no memory.", hint="`steps 1`"))
        worker.done(first[2], make(first[2]), kept=True)
        ledger.cancel([1])
        worker.close()
    return place


def counts(folder: Path) -> str:
    with open_ledger(folder) as ledger:
        return " ".join(f"{n} {state}" for state, n in ledger.counts().items() if n)


def test_the_status_has_counts_times_and_failures_with_hints(wancli: Wancli, folder: Path):
    result = wancli("batch", "status", folder)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == "2 pending, 1 done, 1 failed, 1 skipped, 1 cancelled"
    assert "a video" in lines[1]
    assert lines[3:] == ["failed: line 2: no memory.", "hint:   --steps 1"]
    record = json.loads(wancli("batch", "status", folder / "b.ledger", "--json").out)
    assert record["counts"]["failed"] == 1
    assert record["failed"][0]["lines"] == [2]


def test_watching_ends_with_the_batch(wancli: Wancli, folder: Path):
    assert wancli("batch", "cancel", folder).out == "2 jobs are cancelled\n"
    result = wancli("batch", "status", folder, "--watch")
    assert result.out.startswith("1 done, 1 failed, 1 skipped, 3 cancelled\n")
    assert result.out.splitlines()[-1] == f"again:  wancli batch retry '{folder}/b.ledger'"


@pytest.mark.parametrize(
    ("arguments", "after"),
    [
        ((), "3 pending 1 done 1 skipped 1 cancelled"),
        (("--cancelled",), "3 pending 1 done 1 failed 1 skipped"),
        (("--cancelled", "--line", 1), "3 pending 1 done 1 failed 1 skipped"),
        (("--line", 2, "--line", 9), "3 pending 1 done 1 skipped 1 cancelled"),
        (("--line", 3), ""),
        (("--id", "b"), ""),
    ],
)
def test_some_jobs_wait_again(wancli: Wancli, folder: Path, arguments: tuple[object], after: str):
    before = counts(folder)
    result = wancli("batch", "retry", folder, *arguments)
    assert result.code == (0 if after else 2), result.err
    assert counts(folder) == (after or before)


def test_jobs_are_cancelled_by_line_or_id(wancli: Wancli, folder: Path):
    assert wancli("batch", "cancel", folder, "--line", 4).code == 2  # it is done
    assert wancli("batch", "cancel", folder, "--id", "a").out == "1 job is cancelled\n"
    assert counts(folder) == "1 pending 1 done 1 failed 1 skipped 2 cancelled"


def test_missing_and_damaged_videos_are_told_and_made_again(wancli: Wancli, folder: Path):
    result = wancli("batch", "status", folder, "--check")
    assert result.code == 4
    # The files here are five bytes.
    assert result.out.count("damaged    line") == 2
    (folder / "5.mp4").unlink()
    result = wancli("batch", "status", folder, "--check")
    assert f"missing    line 4  {folder}/5.mp4\n" in result.out
    assert "2 of 2 finished videos are missing or damaged" in result.err
    assert "retry" in result.err
    assert wancli("batch", "retry", folder, "--missing", "--line", 4).code == 0
    assert counts(folder) == "3 pending 1 done 1 failed 1 cancelled"


def test_an_export_has_a_line_for_each_job(wancli: Wancli, folder: Path):
    rows = [json.loads(line) for line in wancli("batch", "export", folder).out.splitlines()]
    assert [row["line"] for row in rows] == [1, 1, 2, 2, 3, 4]
    assert rows[2]["record"] == {"id": "3"}
    assert rows[2]["seconds"] >= 0
    assert rows[3]["error"]["message"] == "no memory."
    result = wancli("batch", "export", folder, "-o", "x.csv")
    assert result.out == "x.csv\n"
    with Path("x.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["state"] for row in table][2:] == ["done", "failed", "pending", "skipped"]
    assert (table[3]["hint"], table[3]["steps"]) == ("`steps 1`", "0")
    assert wancli("batch", "export", folder, "-o", "x.csv").code == 2  # it exists


@pytest.mark.parametrize("command", ["export", "report"])
def test_nothing_is_written_over_the_ledger_that_it_is_made_from(
    wancli: Wancli, folder: Path, command: str
):
    ledger = folder / "b.ledger"
    result = wancli("batch", command, folder, "-o", ledger, "--overwrite")
    assert (result.code, "is an input" in result.err) == (2, True)
    assert counts(folder)


def test_an_exported_job_has_the_names_of_all_its_files(tmp_path: Path):
    files = {"save_latents": str(tmp_path / "{x}.safetensors")}
    job = LedgerJob(1, 0, "a", 1, str(tmp_path / "a.mp4"), files=files)
    with create_ledger(tmp_path / "b.ledger", "d", SETTINGS, [job], version="1") as ledger:
        row, settings = ledger.row(1), ledger.settings()
    assert export_row(row, settings)["settings"]["save_latents"] == files["save_latents"]
    values = {**settings[0].values, "adapt": {"dtype": "bfloat16"}}
    (line,) = job_lines([row], [replace(settings[0], values=values)])
    assert line["save_latents"].format() == files["save_latents"]
    assert (line["dtype"], "adapt" in line) == ("bfloat16", False)


def test_failed_jobs_are_exported_as_a_file_of_the_same_jobs(wancli: Wancli, folder: Path):
    from wancli.planning.jobs import read_jobs

    with open_ledger(folder) as ledger:
        worker = LedgerWorker(ledger)
        ledger.retry([1])
        while job := worker.claim():
            worker.failed(job, RunError("no.", hint=""))
        failed = [(row["prompt"], row["seed"], row["output"]) for row in ledger.rows("failed")]
    assert wancli("batch", "export", folder, "--failed", "-o", "again.jsonl").code == 0
    batch = read_jobs(Path("again.jsonl"), {"generate": ["steps"]})
    assert [job.id for job in batch.jobs] == ["a", "a.2", "line-2", "line-3"]
    outputs = [(job.output or "").format() for job in batch.jobs]
    prompts = [(job.prompt, job.seed) for job in batch.jobs]
    assert [(*p, o) for p, o in zip(prompts, outputs, strict=True)] == failed
    assert [batch.settings[job.settings].values["steps"] for job in batch.jobs] == [1, 1, 0, 1]


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE jobs SET error = '{' WHERE error IS NOT NULL",
        "UPDATE jobs SET output = CAST(X'ff' AS TEXT)",
        "UPDATE jobs SET settings = 7",
        "UPDATE settings SET json = '{'",
        "ALTER TABLE jobs RENAME COLUMN host TO hast",
    ],
)
def test_a_damaged_ledger_is_an_error_with_a_way_out(wancli: Wancli, folder: Path, damage: str):
    with sqlite3.connect(folder / "b.ledger") as db:
        db.execute(damage)
    db.close()
    result = wancli("batch", "export", folder)
    assert result.code == 4, result.err
    assert "is damaged" in result.err
    assert "--skip-existing" in result.err
