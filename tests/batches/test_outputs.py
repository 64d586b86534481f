"""Outputs of a batch: named as those of single commands, and checked before anything loads."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import tiny_clip, tiny_image
from wancli.api.requests import Listener
from wancli.batches.jobs import JOB_KEYS, plan_job
from wancli.batches.outputs import check_new, kept_videos
from wancli.batches.plan import PlannedBatch, plan_batch
from wancli.errors import WancliError
from wancli.planning.jobs import read_jobs

ROOT = Path(__file__).parents[2]
Plan = Callable[..., PlannedBatch]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Plan and check jobs in an empty working folder, with their videos in `out`."""
    monkeypatch.chdir(tmp_path)

    def planned(
        *jobs: dict[str, Any], skip_existing: bool = False, elsewhere: bool = False
    ) -> PlannedBatch:
        small = {"steps": 1, "num_frames": 5, "prompt": "a circle", "seed": 1}
        lines = [{**small, **job} for job in jobs]
        for line in lines:
            if line.get("command") == "rollout":
                del line["num_frames"]
        Path("j.jsonl").write_text("\n".join(map(json.dumps, lines)))
        read = read_jobs(Path("j.jsonl"), JOB_KEYS)
        result = plan_batch(read, Path("out"), Listener(None), elsewhere=elsewhere)
        check_new(read, result.settings, result.jobs, skip_existing=skip_existing)
        if skip_existing:
            kept_videos(read, result.settings, result.jobs)
        return result

    return planned


@pytest.mark.parametrize(
    ("output", "path"),
    [
        ("x.mp4", "out/x.mp4"),
        ("sub/x.mp4", "sub/x.mp4"),
        ("./x.mp4", "out/x.mp4"),
        ("../{seed}-{prompt:3}.mp4", "../1-a-c.mp4"),
    ],
)
def test_an_output_with_a_folder_is_used_as_it_is(plan: Plan, output: str, path: str):
    (job,) = plan({"output": output}).jobs
    assert job.output == str(Path.cwd() / path)


@pytest.mark.parametrize(
    "values",
    [
        {"output": "link.mp4", "overwrite": True},
        {"output": "folder.mp4", "overwrite": True},
        {"output": "file/x.mp4"},
        {"output": f"{'x' * 252}.mp4"},
        {"output": f"{'é' * 130}.mp4"},
        {"output": f"{'x' * 249}.mp4", "command": "rollout"},
        {"output": "x.mov"},
        {"output": ".mp4"},
        {"output": "a\nb.mp4"},
        {"output": "{prompts}.mp4"},
        {"output": "json.mp4"},
        {"output": "~/.."},
        {"save_latents": "z.safetensors"},
        {"save_latents": "latents/{seed}.safetensors", "output": "y.mp4"},
        {"video": "in.mp4", "output": "in.mp4", "overwrite": True},
    ],
    ids=lambda values: str(values)[:60],
)
def test_an_output_that_cannot_be_written_is_named_with_its_line(plan: Plan, values: Any):
    out = Path("out")
    out.mkdir()
    out.joinpath("folder.mp4").mkdir()
    out.joinpath("file").touch()
    out.joinpath("json.json").write_text("{}")
    out.joinpath("link.mp4").symlink_to("elsewhere.mp4")
    tiny_clip(out / "in.mp4", 1)
    for name in ("output", "video"):
        if not (values.get(name, ".") + ".").startswith((".", "~")):
            values = {**values, name: f"out/{values[name]}"}
    first = {"output": "taken.mp4", "save_latents": "z.safetensors"}
    Path("latents").touch()
    with pytest.raises(WancliError, match=r"^j\.jsonl:2: "):
        plan(first, values)


@pytest.mark.parametrize(
    "values",
    [
        {"model": 5}, {"preset": 5}, {"size": 5}, {"output": "\0.mp4"}, {"save_latents": "\0"},
        {"lora": 5}, {"overwrite": "perhaps"}, {"image": {"a": 1}}, {"id": {"a": 1}},
        {"command": "rollout", "at": {"x": "a square"}}, {"command": "repro", "file": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_named_with_its_line(plan: Plan, values: Any):
    with pytest.raises(WancliError, match=r"^j\.jsonl:1: "):
        plan(values)


def test_one_file_under_two_names_is_seen(plan: Plan):
    Path("real").mkdir()
    Path("link").symlink_to("real")
    with pytest.raises(WancliError, match=r"^j\.jsonl:2: .*X.mp4 is the output of line 1, too"):
        plan({"output": "real/x.mp4"}, {"output": "link/X.mp4"})


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"guidance_scale": [1.0, 2.0]}, "into the name: {prompt:40}-{guidance_scale}-{seed}.mp4"),
        ({"seed": [1, 2]}, "into the name: {prompt:40}-{seed}.mp4"),
        ({"prompt": ["a" * 50 + "b", "a" * 50 + "c"]}, "a name of its own"),
    ],
)
def test_jobs_of_one_name_are_answered_by_what_parts_them(plan: Plan, values: Any, hint: str):
    with pytest.raises(WancliError) as caught:
        plan({"output": "x.mp4", **values})
    assert caught.value.hint.endswith(hint)


def test_a_video_that_exists_is_replaced_or_kept_only_where_that_is_wanted(plan: Plan):
    Path("out").mkdir()
    Path("out/x.mp4").touch()
    with pytest.raises(WancliError, match=r"x.mp4 exists"):
        plan({"output": "x.mp4"})
    plan({"output": "x.mp4", "overwrite": "true"})
    with pytest.raises(WancliError, match=r"^j\.jsonl:1: .*x.mp4 exists and comes from another"):
        plan({"output": "x.mp4"}, skip_existing=True)
    plan({"output": "x.mp4", "overwrite": "true"}, skip_existing=True)


@pytest.mark.parametrize("setting", ["output", "save_latents"])
def test_each_file_of_each_job_is_looked_for(plan: Plan, setting: str):
    Path("out").mkdir()
    Path("out/2.mp4").touch()
    job = {"seed": "1-2", setting: "out/{seed}.mp4"}
    with pytest.raises(WancliError, match=r"^j\.jsonl:1: .*out/2\.mp4 exists"):
        plan(job)
    plan({**job, "overwrite": True})


def test_inputs_may_be_in_the_home_folder(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    Path("home").mkdir()
    tiny_image(Path("home/a.png"), 1)
    Path("home/p.toml").write_text("[sampling]\nguidance_scale = 1.0\n")
    job = {"command": "rollout", "image": "~/a.png", "preset": "~/p.toml"}
    (settings,) = plan(job).settings
    assert settings.values["image"] == str(Path("home/a.png").absolute())
    assert settings.values["preset"] == str(Path("home/p.toml").absolute())


def test_a_rollout_that_exists_is_for_the_worker_to_decide_about(plan: Plan):
    Path("out/x.rollout").mkdir(parents=True)
    Path("out/x.rollout/rollout.json").write_text("{}")
    Path("z.html").touch()
    plan({"command": "rollout", "output": "x.mp4", "report": "z.html"}, skip_existing=True)


def test_files_are_from_the_working_folder_and_absolute_in_the_ledger(plan: Plan, tiny_model: Path):
    tiny_image(Path("a.png"), 1)
    Path("m").symlink_to(tiny_model)
    rollout = {"command": "rollout", "image": "a.png", "at": {"1": "a square"}, "chunks": 2}
    chunks, clip = plan({**rollout, "model": "demo"}, {"model": "m", "seed": 2}).settings
    first = chunks.values
    assert first["image"] == str(Path.cwd() / "a.png")
    assert (first["model"], first["at"]) == ("demo", {1: "a square"})
    assert clip.values["model"] == str(Path.cwd() / "m")


def test_jobs_that_differ_in_words_alone_are_planned_once(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
):
    planned: list[str] = []

    def counted(command: str, *arguments: Any) -> Any:
        planned.append(command)
        return plan_job(command, *arguments)

    monkeypatch.setattr("wancli.batches.plan.plan_job", counted)
    negatives = [{"negative_prompt": word, "seed": n} for n, word in enumerate("abc")]
    result = plan(*negatives, {"negative_prompt": "", "seed": 9})
    assert len(planned) == 2
    assert [one.values["negative_prompt"] for one in result.settings] == ["a", "b", "c", ""]


def test_offload_is_chosen_where_the_videos_are_made(plan: Plan):
    (here,) = plan({}).settings
    assert here.values["offload"] in ("none", "model", "group", "sequential")
    (there,) = plan({}, elsewhere=True).settings
    assert "offload" not in there.values


@pytest.mark.slow
def test_a_hundred_thousand_lines_are_planned_in_seconds():
    command = [sys.executable, "-m", "benchmarks.batch", "plan"]
    printed = subprocess.check_output(command, cwd=ROOT, encoding="utf-8")
    seconds = re.search(r"ledger written .* ([\d.]+) CPU s", printed)
    memory = re.search(r"memory +([\d.]+) MiB", printed)
    assert seconds, printed
    assert memory, printed
    assert float(seconds[1]) < 5
    assert float(memory[1]) < 500
