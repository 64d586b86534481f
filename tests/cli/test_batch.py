"""`wancli batch`: everything is checked before anything loads, and nothing is lost."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Wancli
from wancli.api.requests import Listener
from wancli.batches.jobs import JOB_KEYS
from wancli.batches.plan import plan_batch
from wancli.planning.jobs import read_jobs
from wancli.records.ledger import create_ledger

JOBS = (
    '{"defaults": {"steps": 1, "num-frames": 5}}\n'
    '{"prompt": "a red circle", "seed": "0-1"}\n'
    '{"prompt": "a blue circle", "seed": 2, "output": "x.mp4"}\n'
)


def test_a_dry_run_loads_and_writes_nothing(forked, tmp_path):
    unknown = '{"prompt": "a", "model": "owner/model", "seed": 3}\n'  # before its download
    (tmp_path / "j.jsonl").write_text(JOBS + unknown)
    code, heavy, out, _ = forked("batch", "j.jsonl", "--dry-run", "--json", folder=tmp_path)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert "torch" not in heavy
    assert [(row["line"], row["seed"]) for row in rows] == [(2, 0), (2, 1), (3, 2), (4, 3)]
    assert rows[2]["output"]["path"] == str(tmp_path / "x.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["j.jsonl"]


def test_shards_are_disjoint_and_complete(forked, tmp_path):
    (tmp_path / "j.jsonl").write_text(JOBS)
    seeds = []
    for task in ("3", "4"):
        array = {f"SLURM_ARRAY_TASK_{name}": n for name, n in (("COUNT", "2"), ("MIN", "3"))}
        array |= {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MAX": "4"}
        flags = "--shard", "auto", "--dry-run", "--json"
        code, _, out, err = forked("batch", "j.jsonl", *flags, folder=tmp_path, **array)
        assert code == 0, err
        seeds.append([json.loads(line)["seed"] for line in out.splitlines()])
    assert seeds == [[0, 2], [1]]


def test_a_dry_run_says_where_the_batch_stands(forked, tmp_path, monkeypatch):
    (tmp_path / "j.jsonl").write_text(JOBS)
    new = forked("batch", "j.jsonl", "--dry-run", folder=tmp_path)
    assert (new[0], "ledger   j.ledger (new)" in new[2]) == (0, True), new
    monkeypatch.chdir(tmp_path)
    create_ledger(Path("j.ledger"), **_planned(Path("j.jsonl"))).close()
    code, heavy, out, _ = forked("batch", "j.jsonl", "--dry-run", folder=tmp_path)
    assert (code, "torch" in heavy) == (0, False)
    assert "3: 3 pending" in out
    Path("v").mkdir()
    Path("link").symlink_to(".")
    for place, warns in (("v", True), (".", False), ("v/..", False), ("link", False)):
        flags = "--ledger", "j.ledger", "--output-dir", place, "--dry-run"
        _, _, _, err = forked("batch", "j.jsonl", *flags, folder=tmp_path)
        assert (f"none is in --output-dir {place}" in err) == warns, err
    _, _, out, _ = forked("batch", "j.jsonl", "--dry-run", "--json", folder=tmp_path)
    assert [json.loads(line)["state"] for line in out.splitlines()] == ["pending"] * 3
    forked("batch", "cancel", "j.ledger", folder=tmp_path)
    assert "nothing is left" in forked("batch", "j.jsonl", "--dry-run", folder=tmp_path)[2]


def test_a_batch_keeps_the_preset_of_the_environment_and_another_is_another_batch(
    forked, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANCLI_PRESET", "demo")
    Path("j.jsonl").write_text(JOBS)
    planned = _planned(Path("j.jsonl"))
    assert [one.values["preset"] for one in planned["settings"]] == ["demo"]
    create_ledger(Path("j.ledger"), **planned).close()
    command = ("batch", "j.jsonl", "--dry-run")
    codes = [
        forked(*command, folder=tmp_path, WANCLI_PRESET=preset)[0]
        for preset in ("demo", "demo-4step", "")
    ]
    assert codes == [0, 2, 2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "stepz": 4}', "j.jsonl:4: unknown key 'stepz'"),
        ('{"prompt": "a", "steps": 0}', "j.jsonl:4: --steps 0: must be greater"),
        ('{"prompt": "a", "output": "X.mp4"}', "is the output of line 3, too"),
        ('{"prompt": "a", "model": "nonne"}', "j.jsonl:4: "),
        ('{"seed": 9}', "j.jsonl:4: "),
        ('{"prompt": "a", "image": "none.png"}', "j.jsonl:4: "),
    ],
)
def test_a_wrong_job_is_named_before_anything_loads(forked, tmp_path, line, words):
    (tmp_path / "j.jsonl").write_text(JOBS + line)
    code, heavy, _, err = forked("batch", "j.jsonl", folder=tmp_path)
    assert code in (2, 4)
    assert words in err
    assert "torch" not in heavy
    assert [path.name for path in tmp_path.iterdir()] == ["j.jsonl"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"prompt": "a", "steps": 0}\n{"seed": 1}', ":1: --steps 0: .* Wrong, too: line 2"),
        ('{"defaults": {"steps": [2, 0]}}\n{"prompt": "a"}', ":1: 'defaults': --steps 0: "),
        ('{"defaults": {"steps": 0}}\n{"prompt": "a", "steps": -1}', ":2: --steps -1: "),
    ],
)
def test_wrong_values_are_blamed_on_whose_they_are(wancli, lines, words):
    Path("j.jsonl").write_text(lines)
    result = wancli("batch", "j.jsonl", "--dry-run")
    assert result.code == 2
    assert re.search(words, result.err)


def test_an_existing_file_stops_a_new_batch(forked, tmp_path):
    (tmp_path / "j.jsonl").write_text(JOBS)
    (tmp_path / "x.mp4").write_text("mine")
    code, _, _, err = forked("batch", "j.jsonl", folder=tmp_path)
    assert code == 2
    assert "j.jsonl:3: " in err
    assert "--skip-existing keeps videos" in err
    assert "the key overwrite of a job" in err


def test_a_dry_run_warns_of_prompts(forked, tmp_path):
    more = (
        '{"prompt": "a zorg", "seed": [3, 4]}',
        '{"prompt": "# blarg", "seed": 5}',
        '{"command": "rollout", "prompt": "a circle", "num_frames": null, "chunks": 2, '
        '"at": {"1": "a quux"}}',
    )
    (tmp_path / "j.jsonl").write_text(JOBS + "\n".join(more))
    code, _, out, err = forked("batch", "j.jsonl", "--dry-run", folder=tmp_path)
    assert (code, "videos   7, on 1 model" in out) == (0, True), out
    assert err.count("demo does not know") == err.count("'zorg', 'blarg', 'quux'.") == 1
    assert "j.jsonl: line 5: a prompt that begins with '#'" in err


@pytest.mark.slow
def test_a_batch_goes_on_where_it_stopped(forked, tmp_path):
    (tmp_path / "j.jsonl").write_text(JOBS)
    code, _, out, err = forked("batch", "j.jsonl", "--json", folder=tmp_path)
    assert code == 0, err
    assert [json.loads(line)["status"] for line in out.splitlines()] == ["ok"] * 3
    code, _, out, _ = forked("batch", "j.jsonl", folder=tmp_path)
    assert (code, out) == (0, "")
    code, _, out, _ = forked("batch", "status", "j.ledger", folder=tmp_path)
    assert out.startswith("3 done\n")
    code, _, _, err = forked("batch", "retry", "j.ledger", folder=tmp_path)
    assert code == 2
    assert "no such job has failed" in err


def test_failed_jobs_end_the_batch_with_3_and_are_tried_by_the_same_command(
    wancli: Wancli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANCLI_MODEL", str(tiny_model))
    small = {"steps": 1, "num-frames": 5, "size": "32x32", "prompt": "a circle", "seed": 1}
    jobs = [json.dumps({**small, "output": f"{name}.mp4"}) for name in "ab"]
    Path("j.jsonl").write_text("\n".join(jobs))
    with create_ledger(Path("j.ledger"), **_planned(Path("j.jsonl"))):
        Path("a.mp4").write_text("mine")  # after the check that a new batch begins with
    result = wancli("batch", "j.jsonl")
    assert (result.code, result.out) == (3, f"{Path('b.mp4').absolute()}\n")
    assert "1 of 2 jobs failed" in result.err
    assert "--overwrite" not in result.err
    assert Path("a.mp4").read_text() == "mine"
    Path("a.mp4").unlink()
    result = wancli("batch", "j.jsonl")
    assert (result.code, result.out) == (0, f"{Path('a.mp4').absolute()}\n")


def test_skip_existing_keeps_the_same_videos_and_finds_others_before_the_batch_begins(
    wancli: Wancli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANCLI_MODEL", str(tiny_model))

    def write(steps: int, **more: bool) -> None:
        small = {"num-frames": 5, "size": "32x32", "prompt": "a circle", "seed": 1, **more}
        jobs = [{"output": "a.mp4", "steps": steps}, {"output": "b.mp4", "steps": 1}]
        Path("j.jsonl").write_text("\n".join(json.dumps({**small, **job}) for job in jobs))

    write(1)
    assert wancli("batch", "j.jsonl").code == 0
    write(2)
    again = ("batch", "j.jsonl", "--ledger", "2.ledger", "--skip-existing")
    for flags in (("--dry-run",), ()):
        refused = wancli(*again, *flags)
        assert refused.code == 2
        assert re.search(r"j.jsonl:1: .*a.mp4 exists and comes from another request", refused.err)
        assert "the key overwrite of a job in JSON, CSV or TOML replaces it; or" in refused.err
    write(2, overwrite=True)
    assert "videos   1 of 2, on 1 model; the rest exists" in wancli(*again, "--dry-run").out
    made = [json.loads(line)["status"] for line in wancli(*again, "--json").out.splitlines()]
    assert made == ["ok", "skipped"]


def _planned(path: Path) -> dict[str, Any]:
    batch = read_jobs(path, JOB_KEYS)
    planned = plan_batch(batch, Path(), Listener(None))
    jobs = {"settings": planned.settings, "jobs": planned.jobs}
    return {"digest": batch.digest, "version": "1", **jobs}
