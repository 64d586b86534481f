"""`wancli plan` says what a run would take, and refuses what cannot be."""

import json
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


def test_a_plan_is_the_dry_run_without_the_settings(wancli: Wancli):
    plan = wancli("plan", "a red circle", "--seed", 1, "--json")
    dry = wancli("generate", "a red circle", "--seed", 1, "--dry-run", "--json")
    assert plan.code == dry.code == 0
    told, expected = json.loads(plan.out), json.loads(dry.out)
    for free in ("disk", "ram", "device"):  # what is free changes all the time
        del told["cost"][free], expected["cost"][free]
    assert told == expected
    text = wancli("plan").out
    assert "flow_shift" not in text
    for word in ("transformer", "2,280,096", "denoise", "fits", "wancli doctor --measure"):
        assert word in text
    assert "flow_shift" in wancli("generate", "x", "--dry-run").out


def test_chunks_make_it_a_plan_of_a_rollout(wancli: Wancli):
    said = wancli("plan", "--chunks", 9, "--json")
    told = json.loads(said.out)
    assert told["plan"]["chunks"] == 9
    assert told["cost"]["kept"]["rolling_kv"] > 0
    assert told["cost"]["store"] == 4 * 8 * 27 * 12 * 12


@pytest.mark.parametrize(
    ("args", "hint"),
    [(("--at", "2", "x"), "--chunks N"), (("--chunks", 3, "--frames", 5), "drop --chunks")],
)
def test_a_flag_of_the_other_command_is_rejected(wancli: Wancli, args, hint: str):
    said = wancli("plan", *args)
    assert said.code == 2
    assert hint in said.err


@pytest.mark.parametrize("args", [("plan",), ("generate", "x"), ("generate", "x", "--dry-run")])
def test_a_request_that_cannot_fit_is_rejected_before_it_loads(wancli: Wancli, args):
    said = wancli(*args, *HUGE, "--device", "cpu")
    assert said.code == 5
    assert "at once" in said.err
    assert "--force" in said.err
    assert not list(Path().glob("*.mp4"))


def test_force_plans_a_request_that_cannot_fit(wancli: Wancli):
    said = wancli("plan", *HUGE, "--force")
    assert said.code == 0
    assert "does not fit" in said.out


def test_a_model_of_unknown_shape_has_no_cost(wancli: Wancli):
    said = wancli("plan", "--model", "some-owner/some-model")
    assert said.code == 0
    assert "not known before it is downloaded" in said.out


@pytest.mark.parametrize(
    ("model", "given", "task", "references"),
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
def test_a_plan_needs_no_files(
    wancli: Wancli, model: str, given: tuple[str, ...], task: str, references: int
):
    for name in ("p.png", "q.png"):
        tiny_image(Path(name), 1)
    said = wancli("plan", "--model", model, *given, "--force", "--json")
    assert said.code == 0, said.err
    plan = json.loads(said.out)["plan"]
    assert (plan["task"], plan["references"]) == (task, references)


def test_a_plan_is_the_same_with_and_without_the_files(wancli: Wancli):
    tiny_image(Path("p.png"), 1)
    asked = ("plan", "--model", "wan2.1-i2v-14b-480p", "--force", "--seed", 1, "--json")
    without, with_it = (json.loads(wancli(*asked, *more).out) for more in ((), ("-i", "p.png")))
    assert without["plan"] == with_it["plan"]
    assert without["cost"]["work"] == with_it["cost"]["work"]


def test_a_dry_run_rejects_missing_files(wancli: Wancli):
    said = wancli("generate", "x", "--model", "wan2.1-i2v-14b-480p", "--dry-run")
    assert said.code == 2
    assert "needs --image" in said.err
    assert wancli("plan", "--model", "wan2.1-i2v-14b-480p", "-i", "none.png").code == 4
    said = wancli("plan", "--model", "wan2.1-t2v-1.3b", "-i", "none.png")
    assert said.code == 2
    assert "--image does not work with" in said.err
    assert wancli("plan", "--model", "wan2.2-animate-14b", "--task", "vace").code == 2


def test_a_plan_for_a_gpu_that_is_not_here(wancli: Wancli):
    arguments = ("plan", "--model", "wan2.1-t2v-14b", "--gpu")
    cost = json.loads(wancli(*arguments, "24GB", "--json").out)["cost"]
    assert (cost["device"]["total"], cost["device"]["here"]) == (24 * 2**30, False)
    assert (cost["offload"], cost["fits"]["group"], cost["ram"]) == ("group", True, None)
    assert cost["seconds"] is None
    text = wancli(*arguments, "rtx4090").out
    assert "NVIDIA GeForce RTX 4090" in text
    assert "for offloaded weights" in text
    assert "measure on that GPU" in text
    assert wancli(*arguments, "1GB").code == 5
    said = wancli(*arguments, "24GB", "--device", "cpu")
    assert (said.code, "--gpu plans for" in said.err) == (2, True)
    assert json.loads(wancli("plan", "--chunks", 3, "--gpu", "h200", "--json").out)["cost"][
        "device"
    ]["name"].endswith("H200")


def test_a_gpu_alone_plans_every_model(wancli: Wancli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = wancli("plan", "--gpu", "24GB")
    assert said.code == 0
    fits = {line.split()[0]: line for line in said.out.splitlines()[1:]}
    assert fits["demo"].endswith("yes")
    assert "yes, group offload, " in fits["wan2.1-t2v-14b"]
    assert max(map(len, said.out.splitlines())) <= 80
    entries = [
        json.loads(line) for line in wancli("plan", "--gpu", "6GB", "--json").out.splitlines()
    ]
    assert {entry["model"] for entry in entries} == set(SPECS)
    assert any(not entry["fits"] and entry["remedy"].startswith("--") for entry in entries)
    here = wancli("plan", "--models", "--json")
    assert json.loads(here.out.splitlines()[0])["device"] == find_cpu().name
    said = wancli("plan", "--models", "--steps", 3)
    assert (said.code, "--steps has no effect" in said.err) == (2, True)


def test_times_are_those_of_a_gpu_measured_elsewhere(wancli: Wancli, tmp_path: Path):
    rates = Rates(
        {"bfloat16": 4e14, "float32": 4e13}, {"bfloat16": 3e14, "float32": 3e13}, 2e13, 1e13, 2e12
    )
    here = planned_device("h200")
    write_rates(replace(here, name=here.name), rates)
    said = wancli("plan", "--gpu", "h200")
    assert "time" in said.out.splitlines()[0]
    assert "no times" in wancli("plan", "--gpu", "h100").err
