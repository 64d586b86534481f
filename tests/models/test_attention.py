"""The attention kernel of a run: as set, or the fastest that was measured right on this GPU."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch.nn.attention import SDPBackend

from tests.caching.tiny import wan
from tests.conftest import Wancli
from wancli import Video, generate
from wancli.catalog.local import find_spec
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Machine, PromptKV, Settings
from wancli.cost.devices import Device
from wancli.cost.estimate import FP8, Rates, write_rates
from wancli.cost.kernels import AttentionCase, KernelTime, rank_kernels
from wancli.errors import SetupError
from wancli.generation.caches import prompt_alignment
from wancli.models import attention
from wancli.models.attention import AttentionKernel, choose_kernel, kernels_to_try
from wancli.planning.plan import make_plan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
H100 = Device("cuda", "NVIDIA H100 80GB HBM3", 80 * 2**30, 79 * 2**30, "580.1")
CASE = AttentionCase(12, 4680, 18_720)
RATES = Rates(
    {}, {}, 1.0, 1.0, 1.0,
    kernels=(
        KernelTime("_native_cudnn", CASE, 2.0, 0.003),
        KernelTime("_flash_3_hub", CASE, 1.0, 0.003),
        KernelTime("sage", CASE, 0.5, 0.04),
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANCLI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DIFFUSERS_ATTN_BACKEND", raising=False)


def tried(device: Device = H100, **config: Any) -> list[str]:
    """What auto tries on a GPU for a 1.3B in bfloat16, or another model."""
    sizes = {"num_attention_heads": 12, "ffn_dim": 8960} | config
    model = SimpleNamespace(
        config=SimpleNamespace(**sizes), dtype=sizes.get("dtype", torch.bfloat16)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wancli.cost.estimate.find_device", lambda _: device)
        return kernels_to_try(model, Machine(), CUDA, 4680)


def test_auto_tries_what_was_measured_right_and_then_cudnn():
    assert tried() == ["_native_cudnn"]
    write_rates(H100, RATES)
    assert tried() == ["_flash_3_hub", "_native_cudnn", "_native_cudnn"]


def test_auto_uses_no_table_of_another_gpu_torch_or_dtype(monkeypatch: pytest.MonkeyPatch):
    write_rates(H100, RATES)
    assert tried(replace(H100, name="NVIDIA H200")) == ["_native_cudnn"]
    assert tried(dtype=torch.float32) == ["_native_cudnn"]
    monkeypatch.setattr("wancli.cost.devices.package_version", lambda _: "2.99.0")
    assert tried() == ["_native_cudnn"]


def test_auto_pads_the_prompt_where_that_was_measured_faster(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wancli.cost.estimate.find_device", lambda _: H100)
    off = Settings(prompt_kv=PromptKV(kv_align="off"))
    assert prompt_alignment(CUDA, Settings()) == 1
    write_rates(H100, replace(RATES, aligned={1: [2.0, 2.1], 8: [2.0, 2.2], 64: [1.0, 1.9]}))
    assert prompt_alignment(CUDA, Settings()) == 64
    assert prompt_alignment(CUDA, off) == prompt_alignment(CPU, Settings()) == 1


def test_auto_leaves_the_choice_to_torch_on_a_cpu_and_for_masked_attention():
    assert kernels_to_try(wan(), Machine(), CPU, 4680) == ["native"]
    model = SimpleNamespace(config=SimpleNamespace(num_attention_heads=24), dtype=torch.bfloat16)
    assert kernels_to_try(model, Machine(), CUDA, 4680) == ["native"]


def test_auto_is_what_diffusers_environment_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "_native_flash")
    assert tried() == ["_native_flash"]


def test_a_measured_kernel_that_is_gone_is_passed_over(monkeypatch: pytest.MonkeyPatch):
    names = ["sage", "nosuch", "_native_math", "native"]
    monkeypatch.setattr(attention, "kernels_to_try", lambda *_: names)
    assert choose_kernel([wan()], Machine(), CPU, tokens=16) == AttentionKernel(
        "_native_math", "_native_math"
    )
    with pytest.raises(SetupError, match="`attention_backend sage") as caught:
        choose_kernel([wan()], Machine(attention_backend="sage"), CPU, tokens=16)
    assert caught.value.exit_code == 4


def test_the_kernel_that_torch_takes_is_named():
    assert choose_kernel([wan()], Machine(), CPU, tokens=16) == AttentionKernel("_native_flash")


def test_a_preferred_kernel_is_first_only_in_the_block():
    def order() -> list[SDPBackend]:
        return [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]

    before, first = order(), [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    tags: Any = torch.compiler.config
    with AttentionKernel("_native_cudnn", "_native_cudnn", first).preferred():
        assert order()[:2] == first
        assert tags.cache_key_tag == " _native_cudnn"  # graphs on disk are of this kernel
    assert tags.cache_key_tag == ""
    with AttentionKernel().preferred():
        assert order() == before
    assert order() == before


def ranked(times: Sequence[KernelTime]) -> dict[str, float]:
    """Kernels for the demo model's video of 5 frames, the fastest first."""
    spec = find_spec("demo")
    settings = resolve([Layer("flag", {"video": {"num_frames": 5}})], Settings).settings
    heads, tokens = spec.wan.transformer.heads, make_plan(settings, spec).tokens
    return rank_kernels(times, heads=heads, tokens=tokens)


def generated(**machine: Any) -> Video:
    return generate("a red circle", seed=1, num_frames=5, steps=2, **machine)


@pytest.mark.gpu
def test_a_measured_gpu_uses_the_kernel_that_was_fastest(wancli: Wancli, tmp_path: Path):
    since = perf_counter()
    result = wancli("doctor", "--measure", "--json", "--output-dir", tmp_path)
    assert perf_counter() - since < 60  # measuring is 40 of it at most
    assert result.code == 0, result.err
    rates = TypeAdapter(Rates).validate_python(json.loads(result.out)["rates"])
    assert {"_native_cudnn", "_native_flash"} <= {time.backend for time in rates.kernels}
    assert {1, 8, 64, 128, 256} == {*rates.aligned}
    assert rates.matmul[FP8] > rates.matmul["bfloat16"]
    ran, best = generated().record["env"]["attention"], next(iter(ranked(rates.kernels)))
    assert ran == best or best == "native"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["_native_cudnn", "_native_flash", "_native_efficient", "native"])
def test_every_kernel_of_torch_gives_nearly_the_same_video(name: str):
    auto, other = generated(), generated(attention_backend=name)
    assert name == "native" or other.record["env"]["attention"] == name
    first, second = (torch.from_numpy(clip.frames).float() for clip in (auto, other))
    assert (first - second).abs().mean() < 4  # of 255
