"""`wancli plan` predicts the cost of a run and rejects impossible requests."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Wancli
from tests.fakes import tiny_image
from wancli.catalog.specs import SPECS
from wancli.cost.devices import find_cpu, planned_device
from wancli.cost.estimate import Rates, write_rates

HUGE = ("--size", "16384x16384", "--num-frames", 4001)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANCLI_CACHE_DIR", str(tmp_path / "cache"))


def test_a_plan_equals_a_dry_run_without_the_settings(wancli: Wancli):
    planned = wancli("plan", "a red circle", "--seed", 1, "--json")
    dry = wancli("generate", "a red circle", "--seed", 1, "--dry-run", "--json")
    assert planned.code == dry.code == 0
    report, expected = json.loads(planned.out), json.loads(dry.out)
    for free in ("disk", "ram", "device"):  # free memory changes all the time
        del report["cost"][free], expected["cost"][free]
    assert report == expected
    plan = wancli("plan")
    assert "flow_shift" not in plan.out
    for word in ("weights: transformer", "2,280,096", "denoise", "fits"):
        assert word in plan.out
    assert "wancli doctor --measure" in plan.err
    out = wancli("generate", "x", "--dry-run").out
    assert "flow_shift" in out
    assert out.count("segment_frames") == 1  # the setting, not the plan's too


def test_chunks_turn_it_into_the_plan_of_a_rollout(wancli: Wancli):
    result = wancli("plan", "--chunks", 9, "--json")
    report = json.loads(result.out)
    assert report["plan"]["chunks"] == 9
    assert report["cost"]["kept"]["rolling_kv"] > 0
    assert report["cost"]["store"] == 4 * 8 * 27 * 12 * 12


def test_a_whole_video_by_a_model_for_rollouts_is_warned_of(wancli: Wancli):
    args = ("plan", "--model", "longlive2", "--size", "64x64", "--force")
    text = "longlive2 was trained to generate chunk by chunk"
    assert text in wancli(*args).err
    assert text not in wancli(*args, "--chunks", 1).err


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (("--at", "2", "x"), "--chunks N"),
        (("--chunks", 3, "--frames", 5), "drop --chunks"),
        (("--blend", 0), "--chunks N"),
    ],
)
def test_a_flag_of_the_other_command_is_rejected(wancli: Wancli, args, hint: str):
    result = wancli("plan", *args)
    assert result.code == 2
    assert hint in result.err


def test_as_many_steps_as_are_listed_may_be_stated_too(wancli: Wancli):
    listed = ("generate", "x", "--sampler", "few-step", "--steps-list", "1000,500", "--dry-run")
    assert wancli(*listed, "--steps", 2).code == 0
    rows, hunyuan = (
        re.findall(r"^  (\w+) +.*\(unused: (.*?)\)", wancli(*line).out, re.M)
        for line in (listed, ("generate", "x", "--model", "hunyuanvideo", "--dry-run", "--force"))
    )
    assert "true_cfg_scale" in dict(rows)
    assert "true_cfg_scale" not in dict(hunyuan)
    assert ("steps", "the list has 2") in rows
    assert ("guidance_scale", "few-step runs without guidance") in rows
    assert "warp_steps" not in dict(rows)
    assert wancli(*listed, "--steps", 3).code == 2


def test_a_dry_run_cuts_a_long_text_and_json_has_it_all(wancli: Wancli):
    words = "blurry " * 50
    line = ("generate", "x", "--negative-prompt", words, "--dry-run")
    assert max(map(len, wancli(*line).out.splitlines())) < 120
    assert (
        json.loads(wancli(*line, "--json").out)["request"]["sampling"]["negative_prompt"] == words
    )


def test_steps_of_a_first_chunk_need_a_list(wancli: Wancli):
    line = ("rollout", "x", "--first-chunk-steps", "1000,500", "--dry-run")
    assert "--first-chunk-steps does nothing without --steps-list" in wancli(*line).err
    assert wancli(*line, "--sampler", "few-step").code == 0


def test_a_dry_run_of_many_videos_prints_a_few_and_counts_the_rest(wancli: Wancli):
    out = wancli("generate", "x", "--seed", "0-149", "--dry-run").out
    assert out.count(".mp4") == 100
    assert "and 50 more: --json prints them all" in out


@pytest.mark.parametrize(
    "args",
    [
        ("plan",),
        ("generate", "x"),
        ("generate", "x", "--dry-run"),
        ("bench", "x", "--variant", "exact: --no-prompt-kv"),
    ],
)
def test_a_request_that_does_not_fit_is_rejected_before_anything_loads(wancli: Wancli, args):
    result = wancli(*args, *HUGE, "--device", "cpu")
    assert result.code == 5
    assert "this size needs" in result.err
    assert "--force" in result.err
    assert not list(Path().iterdir())


def test_force_plans_a_request_that_does_not_fit(wancli: Wancli):
    result = wancli("plan", *HUGE, "--force")
    assert result.code == 0
    assert "does not fit" in result.out


def test_a_repository_in_wans_own_format_is_answered_by_its_twin(wancli: Wancli):
    result = wancli("plan", "--model", "Wan-AI/Wan2.1-T2V-14B")
    assert result.code == 4
    assert "hint:  --model wan2.1-t2v-14b, or" in result.err


def test_a_model_of_unknown_shape_has_no_cost(wancli: Wancli):
    result = wancli("plan", "--model", "some-owner/some-model")
    assert result.code == 0
    assert "not known before it is downloaded" in result.out


@pytest.mark.parametrize(
    ("model", "flags", "task", "references"),
    [
        ("wan2.1-i2v-14b-480p", (), "image-to-video", 0),
        ("wan2.1-flf2v-14b", (), "first-last-frame", 0),
        ("wan2.2-i2v-a14b", (), "image-to-video", 0),
        ("wan2.2-i2v-a14b", ("--task", "first-last-frame"), "first-last-frame", 0),
        ("wan2.2-i2v-a14b", ("--last-image", "p.png"), "first-last-frame", 0),
        ("wan2.2-ti2v-5b", (), "text-to-video", 0),
        ("wan2.1-vace-1.3b", (), "vace", 0),
        ("wan2.1-vace-1.3b", ("--ref-image", "p.png", "--ref-image", "q.png"), "vace", 2),
        ("wan2.2-animate-14b", (), "animate", 1),
    ],
)
def test_a_plan_needs_no_input_files(
    wancli: Wancli, model: str, flags: tuple[str, ...], task: str, references: int
):
    for name in ("p.png", "q.png"):
        tiny_image(Path(name), 1)
    result = wancli("plan", "--model", model, *flags, "--force", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)["plan"]
    assert (plan["task"], plan["references"]) == (task, references)


def test_a_plan_does_not_depend_on_the_input_files(wancli: Wancli):
    tiny_image(Path("p.png"), 1)
    request = ("plan", "--model", "wan2.1-i2v-14b-480p", "--force", "--seed", 1, "--json")
    without, with_image = (
        json.loads(wancli(*request, *more).out) for more in ((), ("-i", "p.png"))
    )
    assert without["plan"] == with_image["plan"]
    assert without["cost"]["work"] == with_image["cost"]["work"]


@pytest.mark.parametrize("command", ["generate", "rollout"])
def test_a_dry_run_rejects_outputs_as_the_run_does(wancli: Wancli, command: str):
    Path("a.mp4").touch()
    Path("b.rollout").mkdir()
    Path("b.rollout/mine.txt").touch()
    names = {"generate": ["a.mp4", "a.avi"], "rollout": ["a.mp4", "a.avi", "b.mp4"]}
    for name in names[command]:
        request = (command, "a red circle", "--seed", 1, "-o", name)
        dry, run = wancli(*request, "--dry-run"), wancli(*request)
        assert dry.code == run.code == 2
        assert dry.err.endswith(run.err)  # after a note on times
    assert wancli(command, "a red circle", "-o", "a.mp4", "--overwrite", "--dry-run").code == 0


def test_a_long_path_is_printed_whole(wancli: Wancli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = f"{'long-' * 12}/{'name-' * 12}.mp4"
    out = wancli("generate", "x", "--seed", 1, "-o", path, "--dry-run").out
    assert f"seed 1: {path}" in out.splitlines()


def test_a_dry_run_rejects_missing_files(wancli: Wancli):
    result = wancli("generate", "x", "--model", "wan2.1-i2v-14b-480p", "--dry-run")
    assert result.code == 2
    assert "needs --image" in result.err
    assert wancli("plan", "--model", "wan2.1-i2v-14b-480p", "-i", "none.png").code == 4
    result = wancli("plan", "--model", "wan2.1-t2v-1.3b", "-i", "none.png")
    assert result.code == 2
    assert "--image does not work with" in result.err
    assert wancli("plan", "--model", "wan2.2-animate-14b", "--task", "vace").code == 2


def test_a_plan_for_the_gpu_of_another_machine(wancli: Wancli):
    arguments = ("plan", "--model", "wan2.1-t2v-14b", "--gpu")
    cost = json.loads(wancli(*arguments, "24GB", "--json").out)["cost"]
    assert (cost["device"]["total"], cost["device"]["here"]) == (24 * 2**30, False)
    assert (cost["offload"], cost["fits"]["group"], cost["ram"]) == ("group", True, None)
    assert cost["seconds"] is None
    result = wancli(*arguments, "rtx4090")
    text = result.out
    assert "NVIDIA GeForce RTX 4090" in text
    assert "for offloaded weights" in text
    assert "measure on that GPU" in result.err
    assert wancli(*arguments, "1GB").code == 5
    result = wancli(*arguments, "24GB", "--device", "cpu")
    assert (result.code, "--gpu plans for" in result.err) == (2, True)
    assert json.loads(wancli("plan", "--chunks", 3, "--gpu", "h200", "--json").out)["cost"][
        "device"
    ]["name"].endswith("H200")


def test_a_gpu_alone_plans_every_model(wancli: Wancli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = wancli("plan", "--gpu", "24GB")
    assert result.code == 0
    fits = {line.split()[0]: line for line in result.out.splitlines()[1:]}
    assert fits["demo"].endswith("yes")
    assert "yes, group offload, " in fits["wan2.1-t2v-14b"]
    rollout = ("plan", "--model", "krea-realtime-14b", "--chunks", 9, "--gpu", "24GB", "--json")
    resident = json.loads(wancli(*rollout).out)["cost"]["resident"]["group"]
    assert f" {resident / 2**30:.1f} GiB  yes, group" in fits["krea-realtime-14b"]
    assert max(map(len, result.out.splitlines())) <= 80
    entries = [
        json.loads(line) for line in wancli("plan", "--gpu", "6GB", "--json").out.splitlines()
    ]
    assert {entry["model"] for entry in entries} == set(SPECS)
    assert any(not entry["fits"] and entry["remedy"].startswith("--") for entry in entries)
    result = wancli("plan", "--models", "--steps", 3)
    assert (result.code, "--steps has no effect" in result.err) == (2, True)


def test_times_are_those_of_a_gpu_measured_elsewhere(wancli: Wancli, tmp_path: Path):
    rates = Rates(
        {"bfloat16": 4e14, "float32": 4e13}, {"bfloat16": 3e14, "float32": 3e13}, 2e13, 1e13, 2e12
    )
    here = planned_device("h200")
    write_rates(replace(here, name=here.name), rates)
    result = wancli("plan", "--gpu", "h200")
    assert "time" in result.out.splitlines()[0]
    assert "no times" in wancli("plan", "--gpu", "h100").err


def test_a_broken_preset_hides_no_other_model(wancli: Wancli):
    Path("presets").mkdir()
    Path("presets/wan2.1-t2v-1.3b.toml").write_text("[sampling]\nstep = 3\n")
    Path("presets/demo.toml").write_text("[video]\nnum_frames = 6\n")
    rows = wancli("plan", "--models").out.splitlines()[1:]
    assert len(rows) == len(SPECS)
    assert "presets/wan2.1-t2v-1.3b.toml: [sampling] unknown key 'step'" in rows[1]
    assert "not known: --num-frames 6" in rows[0]
    entries = [json.loads(line) for line in wancli("plan", "--models", "--json").out.splitlines()]
    assert [entry["fits"] for entry in entries[:2]] == [None, None]
    assert entries[2]["device"] == find_cpu().name


@pytest.mark.parametrize("command", [("generate",), ("rollout", "--chunks", 1)])
def test_a_size_far_from_the_training_is_warned_of(wancli: Wancli, command: tuple[object, ...]):
    err = wancli(*command, "a red circle", "--size", "192x128", "--dry-run").err
    assert "demo was made for 96x96: at 192x128 things may repeat or break." in err
    assert "hint:  --size 96x96\n" in err
