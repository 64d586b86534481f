"""The cost of a request on a machine: whether it fits, and how long it takes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wancli.catalog.local import find_spec
from wancli.config.precision import transformer_dtype
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Machine, Settings
from wancli.cost.capacity import check_capacity, check_default_capacity, savings_in_words
from wancli.cost.devices import (
    Device,
    find_cpu,
    find_device,
    find_gpus,
    gpus_seen_once,
    planned_device,
)
from wancli.cost.estimate import (
    FP8,
    Estimate,
    Rates,
    estimate,
    phase_seconds,
    read_rates,
    resolve_device,
    write_rates,
)
from wancli.cost.kernels import AttentionCase, KernelTime
from wancli.cost.totals import Cost, generation_cost
from wancli.errors import CapacityError, OutputError, PlanError
from wancli.planning.plan import make_plan
from wancli.utils import disk
from wancli.utils.disk import free_disk

H200 = Device("cuda", "NVIDIA H200", 139 * 2**30, 138 * 2**30, "570.1")
SMALL = replace(H200, name="NVIDIA RTX 4090", total=24 * 2**30)
RAM = 128 * 2**30
RATES = Rates(
    {"bfloat16": 4e14, "float32": 4e13}, {"bfloat16": 3e14, "float32": 3e13}, 2e13, 1e13, 2e12
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANCLI_CACHE_DIR", str(tmp_path / "cache"))


def cost_of(model: str) -> Cost:
    settings = resolve([Layer("flag", {"model": model})], Settings).settings
    spec = find_spec(model)
    cost = generation_cost(settings, spec, make_plan(settings, spec), wide=False)
    assert cost
    return cost


def test_a_model_fits_one_gpu_and_not_another():
    cost = cost_of("wan2.1-t2v-14b")
    assert all(estimate(cost, Machine(), H200, ram=RAM).fits.values())
    verdict = estimate(cost, Machine(offload="none"), SMALL, ram=RAM)
    with pytest.raises(CapacityError, match="needs .* RTX 4090 has 24") as caught:
        verdict.check("wan2.1-t2v-14b")
    assert caught.value.hint.startswith("`offload group`")


@pytest.mark.parametrize(
    ("total_gib", "offload"), [(139, "none"), (40, "model"), (24, "group"), (8.8, "sequential")]
)
def test_auto_is_the_fastest_offload_that_fits(total_gib: float, offload: str):
    device = replace(H200, total=int(total_gib * 2**30))
    verdict = estimate(cost_of("wan2.1-t2v-14b"), Machine(), device, ram=RAM)
    assert verdict.offload == offload
    verdict.check("wan2.1-t2v-14b")
    least = next(iter([n for n, fits in verdict.fits.items() if fits]))
    assert least == offload


def test_auto_chooses_only_allowed_offloads_and_rejects_what_never_fits():
    cost = cost_of("wan2.1-t2v-14b")
    with pytest.raises(CapacityError, match="24") as caught:
        estimate(cost, Machine(), SMALL, ("none",), ram=RAM).check("x")
    assert "`offload`" not in caught.value.hint
    for total_gib, helps in ((5, True), (1, False)):  # only decoding does not fit, or nothing fits
        device = replace(H200, total=total_gib * 2**30)
        with pytest.raises(CapacityError, match="under `offload sequential`") as caught:
            estimate(cost, Machine(), device, ram=RAM).check("x")
        assert ("a smaller `size`" in caught.value.hint) == helps
        assert "`force`" in caught.value.hint


def test_offloaded_weights_must_fit_in_ram():
    cost = cost_of("wan2.1-t2v-14b")
    verdict = estimate(cost, Machine(offload="group"), SMALL, ram=16 * 2**30)
    with pytest.raises(CapacityError, match="RAM for offloaded weights has 16"):
        verdict.check("x")


def test_on_a_cpu_nothing_is_offloaded():
    verdict = estimate(cost_of("wan2.1-t2v-14b"), Machine(), replace(H200, kind="cpu", total=1))
    assert verdict.offload == "none"
    with pytest.raises(CapacityError) as caught:
        verdict.check("x")
    assert "`offload`" not in caught.value.hint
    with pytest.raises(PlanError, match="has them in RAM already"):
        resolve_device(Machine(device="cpu", offload="group"))


LEAST = "`quantize int8` `vae_tiling`"


@pytest.mark.parametrize(
    ("kind", "total_gib", "machine", "remedy", "less"),
    [
        ("cpu", 80, {}, "`dtype bfloat16`", "`dtype bfloat16`"),
        ("cpu", 30, {}, f"`dtype bfloat16` {LEAST}", "`dtype bfloat16`"),
        ("cpu", 30, {"dtype": "bfloat16"}, f"`dtype bfloat16` {LEAST}", "`vae_tiling`"),
        ("cuda", 100, {}, "", "`offload model`"),
        ("cuda", 5, {}, "`vae_tiling`", "`vae_tiling`"),
        ("cuda", 1, {}, "", "`vae_tiling`"),
    ],
)
def test_a_request_that_does_not_fit_gets_a_remedy_and_one_that_should_have_what_needs_less(
    kind: str, total_gib: int, machine: dict[str, Any], remedy: str, less: str
):
    spec, device = find_spec("wan2.1-t2v-14b"), replace(H200, kind=kind, total=total_gib * 2**30)

    def estimator(settings: Settings) -> Estimate:
        plan = make_plan(settings, spec)
        wide = transformer_dtype(settings.machine, kind) == "float32"
        cost = generation_cost(settings, spec, plan, wide=wide)
        assert cost
        return estimate(cost, settings.machine, device, plan.offloads, ram=RAM)

    settings = resolve([Layer("flag", {"model": spec.name, "machine": machine})], Settings).settings
    check = check_capacity(settings, spec, estimator, force=False)
    assert check.remedy == remedy
    assert savings_in_words(settings, estimator) == f"{less}, `vae_decoder tiny`"
    assert check_capacity(settings, spec, estimator, force=True).remedy == ""
    if check.estimate and not check.estimate.sufficient:
        with pytest.raises(CapacityError) as caught:
            check.check()
        assert caught.value.hint.startswith(remedy)


def test_a_rollout_whose_decoder_does_not_fit_gets_a_tiny_one():
    planned = check_default_capacity("longlive2", find_spec("longlive2"), planned_device("16GB"))
    assert planned.capacity.remedy == "`vae_decoder tiny`"
    roomy = check_default_capacity("longlive2", find_spec("longlive2"), planned_device("80GB"))
    assert roomy.capacity.remedy == ""


def test_the_vae_computes_at_the_rate_of_its_own_dtype():
    cost = cost_of("wan2.1-t2v-14b")
    rates = replace(RATES, attention={"bfloat16": 6e13, "float32": 3e13})
    wide, narrow = (phase_seconds(cost, rates, "bfloat16", vae=n) for n in ("float32", "bfloat16"))
    assert wide
    assert narrow
    assert narrow["decode"] < wide["decode"]
    assert narrow["denoise"] == wide["denoise"]


def test_fast_decoding_is_estimated_at_its_measured_rate():
    cost = cost_of("wan2.1-t2v-14b")
    rates = replace(RATES, fast_convolution=10 * RATES.convolution)
    slow, unmeasured, fast = (
        phase_seconds(cost, measured, "bfloat16", fast=way)
        for measured, way in ((rates, False), (RATES, True), (rates, True))
    )
    assert slow
    assert fast
    assert unmeasured == slow
    assert fast["decode"] < slow["decode"] / 5
    assert fast["denoise"] == slow["denoise"]


def test_a_request_of_exactly_the_available_memory_fits():
    cost = cost_of("demo")
    device = replace(H200, total=cost.resident())
    whole = Machine(offload="none")
    estimate(cost, whole, device).check("demo")
    with pytest.raises(CapacityError):
        estimate(cost, whole, replace(device, total=cost.resident() - 1)).check("demo")


def test_time_is_flops_over_measured_rates():
    cost = cost_of("wan2.1-t2v-1.3b")
    seconds = phase_seconds(cost, RATES, "bfloat16")
    assert seconds
    denoise = cost.work["denoise"]
    assert seconds["denoise"] == pytest.approx(
        denoise.matmul / 4e14 + denoise.attention / 3e14 + cost.memory_traffic["denoise"] / 2e12
    )
    decode = cost.work["decode"]
    assert seconds["decode"] == pytest.approx(
        decode.convolution / 2e13 + decode.small_convolution / 1e13 + decode.attention / 3e13
    )
    assert phase_seconds(cost, RATES, "float16") is None


def test_fp8_products_are_as_fast_as_measured_or_else_twice_as_fast_as_published():
    cost = cost_of("wan2.1-t2v-1.3b")
    measured = replace(RATES, matmul={**RATES.matmul, FP8: 7e14})
    for rates, rate in ((RATES, 8e14), (measured, 7e14)):
        plain = phase_seconds(cost, rates, "bfloat16")
        fast = phase_seconds(cost, rates, "bfloat16", fp8=True)
        assert plain
        assert fast
        products = cost.work["denoise"].matmul
        saved = plain["denoise"] - fast["denoise"]
        assert saved == pytest.approx(products / 4e14 - products / rate)
        assert (fast["encode"], fast["decode"]) == (plain["encode"], plain["decode"])


def test_a_plan_for_a_gpu_knows_whether_it_multiplies_in_fp8():
    machine = Machine(quantize="fp8-dynamic", compile=True)
    resolve_device(machine, planned_device("rtx4090"))
    resolve_device(machine, planned_device("24GB"))  # any
    with pytest.raises(PlanError, match=r"NVIDIA A100-SXM4-80GB has 8\.0"):
        resolve_device(machine, planned_device("a100-80gb"))


def test_rates_are_stored_per_device():
    other = replace(H200, name="NVIDIA A100")
    assert read_rates(H200) is None
    kernels = (KernelTime("native", AttentionCase(12, 4680, 512), 0.001, 0.003),)
    rates = replace(RATES, kernels=kernels, aligned={1: [0.002], 8: [0.001]})
    write_rates(H200, rates)
    write_rates(other, replace(RATES, copy=1.0))
    assert read_rates(H200) == rates
    assert estimate(cost_of("demo"), Machine(), H200).seconds is not None
    assert estimate(cost_of("demo"), Machine(), replace(H200, name="x")).seconds is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 1}'])
def test_broken_rates_count_as_not_measured(text: str):
    path = disk.user_cache() / "rates.json"
    path.parent.mkdir()
    path.write_text(text)
    assert read_rates(H200) is None
    write_rates(H200, RATES)
    assert read_rates(H200) == RATES


def test_rates_that_cannot_be_written_are_an_output_error():
    disk.user_cache().write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        write_rates(H200, RATES)


def test_this_machine_has_memory_and_disk(tmp_path: Path):
    cpu = find_cpu()
    assert 2**28 < cpu.free <= cpu.total
    assert cpu.name
    assert "torch 2" in cpu.key
    assert free_disk(tmp_path / "not" / "made") > 0
    device = find_device(Machine(device="cpu"))
    assert replace(device, free=0) == replace(cpu, free=0)  # free memory changes all the time


def smi(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine without NVML whose nvidia-smi prints `text`."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'X'\n{text}\nX\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)


def test_gpus_are_found_without_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    smi(tmp_path, "NVIDIA A, 1000, 900, 5.1\nNVIDIA B, 2000, 1, 5.1\nN/A", monkeypatch)
    a = Device("cuda", "NVIDIA A", 1000 * 2**20, 900 * 2**20, "5.1")
    b = Device("cuda", "NVIDIA B", 2000 * 2**20, 2**20, "5.1")
    assert find_gpus() == {"0": a, "1": b}
    for visible, gpus in (
        ("1, 0", {"1": b, "0": a}),
        ("1,", {"1": b}),
        ("0,-1,1", {"0": a}),  # CUDA ignores what follows a number of no GPU
        ("2,0", {}),
        ("GPU-x", {"GPU-x": a}),
        ("", {}),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert find_gpus() == gpus


def test_a_system_that_does_not_tell_free_memory_has_it_all(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 8 kB\n")
    monkeypatch.setattr("wancli.cost.devices.MEMORY", tmp_path / "meminfo")
    assert find_cpu().free == find_cpu().total


def test_an_estimate_is_valid_json():
    report = json.loads(json.dumps(estimate(cost_of("demo"), Machine(), H200).as_json()))
    assert report["flops"] == sum(work["flops"] for work in report["work"].values())
    assert report["device"]["name"] == "NVIDIA H200"
    assert report["resident"]["none"] > report["resident"]["model"]


def test_gpus_are_looked_for_once_while_a_batch_is_planned(monkeypatch: pytest.MonkeyPatch):
    first, second = (Device("cuda", name, 1, 1) for name in ("first", "second"))
    looks = iter([[first], [second]])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("wancli.cost.devices._by_nvml", lambda: next(looks))
    with gpus_seen_once():
        assert [find_gpus(), find_gpus()] == [{"0": first}, {"0": first}]
    assert find_gpus() == {"0": second}
