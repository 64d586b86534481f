"""Rules about devices, dtypes, quantization and compilation."""

from itertools import product
from typing import Any

import pytest

from tests.cli.test_bad_input import complaint
from tests.conftest import Wancli
from wancli.catalog.local import find_spec
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Machine, RolloutSettings, Settings
from wancli.errors import PlanError, SetupError
from wancli.models.warm import WarmPipeline
from wancli.planning.plan import make_plan, make_rollout_plan
from wancli.planning.rules_machine import (
    TORCHAO,
    check_capability,
    check_compile_mode,
    check_quantizer,
)
from wancli.utils.packages import check_package

INSTALLED = "wancli.utils.packages.package_version"  # of a package
FP8 = {"quantize": "fp8-dynamic", "compile": True}
GRAPHS = {"compile": True, "compile_mode": "reduce-overhead"}


def plan(model: str = "demo", **tables: Any) -> None:
    settings = resolve([Layer("flag", {"model": model, **tables})], Settings).settings
    make_plan(settings, find_spec(model))


REJECTED: list[tuple[str, dict[str, Any], str]] = [
    ("demo", {"machine": {"quantize": "int8"}, "prompt_kv": {"free_kv_weights": True}}, "emptied"),
    ("demo", {"machine": {"quantize": "fp8", "device": "mps"}}, "does not work on mps"),
    ("demo", {"machine": {**FP8, "device": "cpu"}}, "fp8, which `device cpu` does not"),
    ("demo", {"machine": {**FP8, "dtype": "float16"}}, "bfloat16, not with `dtype float16`"),
    ("demo", {"machine": {**FP8, "compile": False}}, "slower than bfloat16 without `compile`"),
    ("demo", {"machine": {"compile": True}, "step_cache": {"step_cache": "first-block"}}, "hooks"),
    ("demo", {"machine": {"compile": True}, "step_cache": {"step_cache": "seacache"}}, "hooks"),
    ("demo", {"machine": {"compile": True}, "step_cache": {"step_cache": "magcache"}}, "hooks"),
    ("wan2.1-vace-1.3b", {"machine": {"compile": True}, "step_cache": {"step_cache": "cachedit"}},
     "numbers the blocks of VACE"),
    ("demo", {"machine": {"compile": True, "attention_backend": "sage"},
              "prompt_kv": {"prompt_kv": False}}, "breaks its graphs"),
    ("demo", {"machine": {**GRAPHS, "device": "cpu"}}, "none on cpu"),
    ("demo", {"machine": GRAPHS}, "prompt K/V keep"),
    ("demo", {"machine": GRAPHS, "prompt_kv": {"prompt_kv": False},
              "step_cache": {"step_cache": "cachedit", "cachedit_fn": 1}}, "a step cache keeps"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "tables", "message"), REJECTED)
def test_incompatible_settings_are_rejected_by_the_plan(
    model: str, tables: dict[str, Any], message: str
):
    with pytest.raises(PlanError, match=message) as caught:
        plan(model, **tables)
    assert caught.value.hint


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"prompt_kv": {"prompt_kv": False}},
        {"prompt_kv": {"kv_align": "128"}, "machine": {"attention_backend": "sage"}},
        {"step_cache": {"step_cache": "cachedit", "cachedit_fn": 1}},
        {"step_cache": {"cfg_gate": 0.5}},
    ],
)
def test_compatible_settings_are_accepted(other: dict[str, Any]):
    for quantize, compiled, fuse in product(("none", "int8", "fp8"), (False, True), (False, True)):
        machine = {"quantize": quantize, "compile": compiled, "fuse_qkv": fuse}
        machine |= other.get("machine", {})
        tables = {**other, "machine": machine}
        plan(**tables)
        plan(**{**tables, "machine": {**machine, "compile_mode": "max-autotune"}})


def test_rollouts_support_fused_quantized_and_compiled_blocks_but_no_cuda_graphs():
    def rollout(**machine: Any) -> None:
        settings = resolve([Layer("flag", {"machine": machine})], RolloutSettings).settings
        make_rollout_plan(settings, find_spec("demo"))

    rollout(quantize="fp8", fuse_qkv=True, compile=True, compile_mode="max-autotune")
    with pytest.raises(PlanError, match="does not work with rollouts"):
        rollout(compile=True, compile_mode="reduce-overhead")


def test_fp8_products_need_a_card_that_has_them():
    machine = Machine(quantize="fp8-dynamic", compile=True)
    for capability in ((8, 9), (9, 0), (12, 0), None):
        check_capability(machine, "a card", capability)
    with pytest.raises(PlanError, match=r"8\.9 or newer .*; NVIDIA A10 has 8\.6") as caught:
        check_capability(machine, "NVIDIA A10", (8, 6))
    assert caught.value.exit_code == 2
    check_capability(Machine(quantize="fp8"), "NVIDIA A10", (8, 6))


def test_an_unused_compile_mode_is_rejected():
    def check(source: str, **machine: Any) -> None:
        check_compile_mode(resolve([Layer(source, {"machine": machine})], Settings))

    for mode in ("default", "max-autotune"):
        with pytest.raises(PlanError, match="without `compile`"):
            check("flag", compile_mode=mode)
        check("preset x", compile_mode=mode)
        check("flag", compile_mode=mode, compile=True)


@pytest.mark.parametrize("command", ["generate", "rollout", "bench", "plan"])
def test_every_command_rejects_an_unused_compile_mode(wancli: Wancli, command: str):
    more = ("--variant", "fast: --use-cachedit") if command == "bench" else ()
    result = wancli(command, "a red circle", "--compile-mode", "default", *more)
    assert result.code == 2
    assert complaint(result) == (
        "--compile-mode does nothing without --compile.",
        "--compile",
    )


def test_a_missing_or_old_torchao_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    for installed in ("0.17.0", "0.9"):
        monkeypatch.setattr(INSTALLED, lambda _, installed=installed: installed)
        with pytest.raises(SetupError, match=f"not {installed}"):
            check_quantizer(Machine(quantize="int8"))
    for installed in ("0.18.0", "0.18.0+git1", "1.0"):
        monkeypatch.setattr(INSTALLED, lambda _, installed=installed: installed)
        check_package("torchao", TORCHAO, needed_by="--quantize")
    monkeypatch.setattr(INSTALLED, lambda _: "")
    check_quantizer(Machine())
    plan("demo", machine={"quantize": "fp8"})  # computes bytes, for which nothing is installed
    with pytest.raises(SetupError) as caught:
        WarmPipeline(find_spec("demo"), Machine(quantize="fp8"))
    assert caught.value.hint == "pip install 'torchao>=0.18'"
    assert caught.value.exit_code == 4
