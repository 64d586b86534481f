"""`wancli plan` says what a run would take, and refuses what cannot be."""

import json
from pathlib import Path

import pytest

from tests.conftest import Wancli

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
def test_a_flag_of_the_other_command_is_refused(wancli: Wancli, args, hint: str):
    said = wancli("plan", *args)
    assert said.code == 2
    assert hint in said.err


@pytest.mark.parametrize("args", [("plan",), ("generate", "x"), ("generate", "x", "--dry-run")])
def test_what_cannot_fit_is_refused_before_it_loads(wancli: Wancli, args):
    said = wancli(*args, *HUGE, "--device", "cpu")
    assert said.code == 5
    assert "at once" in said.err
    assert "--force" in said.err
    assert not list(Path().glob("*.mp4"))


def test_what_cannot_fit_is_planned_where_it_is_forced(wancli: Wancli):
    said = wancli("plan", *HUGE, "--force")
    assert said.code == 0
    assert "does not fit" in said.out


def test_a_model_of_unknown_shape_is_said_to_be_unknown(wancli: Wancli):
    said = wancli("plan", "--model", "some-owner/some-model")
    assert said.code == 0
    assert "not known before it is downloaded" in said.out
