"""Fused and compiled transformers: their output, and the number of compiled graphs."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.caching.tiny import DBCACHE, STEPS, denoise, draw, vace, wan
from tests.fakes import tiny_folder, tiny_transformer
from tests.shapes import parameters
from wancli.caching.prompt_kv import PromptKVCache, prompt_kv
from wancli.caching.step_cache import step_cache
from wancli.catalog.geometry import Span, WindowConfig
from wancli.catalog.local import find_spec
from wancli.catalog.tasks import ANIMATE, IMAGE, TEXT, VACE
from wancli.config.settings import Machine
from wancli.errors import PlanError
from wancli.models.load import load_pipeline
from wancli.models.optimize import check_speed, compile_blocks, fuse_qkv, speed_up
from wancli.rollouts.denoiser import PromptPair, causal

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """No gradients, and no graphs of earlier tests."""
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def inputs(task: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of one forward of the tiny transformer of a task."""
    tensors = {"hidden_states": draw(1, 4, 2, 4, 4), "timestep": torch.tensor([500.0])}
    tensors["encoder_hidden_states"] = draw(1, 512, 16, seed=1)
    if task in (IMAGE, ANIMATE):
        tensors["hidden_states"] = draw(1, 12, 2, 4, 4)
        tensors["encoder_hidden_states_image"] = draw(1, 5, 8, seed=2)
    if task == VACE:
        tensors["control_hidden_states"] = draw(1, 72, 2, 4, 4, seed=3)
    if task == ANIMATE:
        tensors["pose_hidden_states"] = draw(1, 4, 1, 4, 4, seed=4)
        tensors["face_pixel_values"] = draw(1, 3, 1, 16, 16, seed=5)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("task", [TEXT, IMAGE, VACE, ANIMATE])
def test_fused_projections_differ_by_rounding_only(task: str, reused: bool):
    for dtype, most in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
        velocities = []
        for fused in (False, True):
            model, arguments = tiny_transformer(task=task).to(dtype), inputs(task, dtype)
            if fused:
                fuse_qkv(model)
            with prompt_kv(model, PromptKVCache()) if reused else nullcontext():
                outputs = [model(**arguments, return_dict=False)[0] for _ in range(2)]
            assert torch.equal(*outputs)
            velocities.append(outputs[1])
        error = relative(velocities[1], velocities[0])
        assert error < most, f"{task} {dtype}: relative error {error:.1e}"


@pytest.mark.parametrize("task", [TEXT, IMAGE, VACE, ANIMATE])
def test_fused_projections_replace_the_separate_ones(task: str):
    model = tiny_transformer(task=task)
    before = parameters(model)
    fuse_qkv(model)
    assert parameters(model) == before
    names = {name.split(".")[-2] for name, _ in model.named_parameters() if ".attn" in name}
    assert {"to_qkv", "to_kv", "to_q"} <= names
    assert not names & {"to_k", "to_v", "add_k_proj", "add_v_proj"}
    assert not hasattr(model.blocks[0].attn1, "to_q")


def test_fused_projections_can_be_offloaded():
    model = wan()
    fuse_qkv(model)
    plain = denoise(model)
    with prompt_kv(model, PromptKVCache(), offload_to=CPU) as offloaders:
        assert torch.equal(denoise(model), plain)
        freed = sum(offloader.nbytes for offloader in offloaders)
    assert freed == sum(
        w.numel() * w.element_size() for b in model.blocks for w in b.attn2.to_kv.parameters()
    )
    assert torch.equal(denoise(model), plain)


def roll(model: Any) -> Tensor:
    """Velocities of three chunks over a window of two."""
    velocities = []
    with causal(model, WindowConfig(4, 1, 2, 16), rope="sink", guidance_scale=3.0) as denoiser:
        denoiser.set_prompt(PromptPair(draw(1, 7, 16, seed=1), draw(1, 7, 16, seed=2)))
        for index in range(3):
            denoiser.begin(Span(index, 2 * index, 2))
            chunk = draw(1, 4, 2, 8, 8, seed=index).to(model.dtype)
            velocities.append(denoiser.velocity(chunk, 500.0))
            denoiser.commit(chunk, 0.0)
    return torch.cat(velocities)


def test_a_rollout_runs_with_fused_projections():
    model, fused = wan().double(), wan().double()
    fuse_qkv(fused)
    assert relative(roll(fused), roll(model)) < 1e-14


def test_the_next_model_is_neither_fused_nor_compiled(tiny_model: Path):
    spec, fast = find_spec(str(tiny_model)), Machine(device="cpu", fuse_qkv=True)
    first, second = (
        load_pipeline(spec, machine).pipeline.transformer
        for machine in (fast, Machine(device="cpu"))
    )
    assert first.blocks[0].attn1.fused_projections
    assert not second.blocks[0].attn1.fused_projections
    assert all(block._compiled_call_impl is None for block in second.blocks)


def test_cuda_graphs_are_rejected_on_other_devices():
    with pytest.raises(PlanError, match="none on cpu"):
        check_speed(Machine(compile=True, compile_mode="reduce-overhead"), CPU)


def denoise_with_prompt_kv(model: Any) -> Tensor:
    with prompt_kv(model, PromptKVCache()):
        return denoise(model)


def denoise_with_freed_weights(model: Any) -> Tensor:
    with prompt_kv(model, PromptKVCache(), offload_to=CPU):
        return denoise(model)


def denoise_with_padding(model: Any) -> Tensor:
    with prompt_kv(model, PromptKVCache(), align=16):
        return denoise(model)


def denoise_with_step_cache(model: Any) -> Tensor:
    with (
        prompt_kv(model, PromptKVCache()),
        step_cache(model, DBCACHE, steps=STEPS, guided=True) as session,
    ):
        latents = denoise(model)
    assert any(use.reused for use in session.stats())
    return latents


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_model", "run", "graphs"),
    [
        (wan, denoise, 1),
        (wan, denoise_with_prompt_kv, 1),
        (wan, denoise_with_freed_weights, 1),
        (wan, denoise_with_padding, 1),
        (wan, denoise_with_step_cache, 1),
        (vace, denoise, 3),  # two classes of blocks; VACE's first has an extra layer
        (vace, denoise_with_prompt_kv, 3),
    ],
)
def test_each_class_of_block_is_compiled_once(
    make_model: Callable[[], Any], run: Callable[[Any], Tensor], graphs: int
):
    model = make_model()
    plain = run(model)
    compile_blocks(model, "default")
    compiled = run(model)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert torch.equal(run(model), compiled)
    assert counters["stats"]["unique_graphs"] == graphs
    error = relative(compiled, plain)
    assert error < 1e-5, f"relative error {error:.1e}"


@pytest.mark.slow
def test_two_experts_share_compiled_graphs():
    for seed in (0, 1):
        model = wan(seed=seed)
        plain = denoise_with_prompt_kv(model)
        compile_blocks(model, "default")
        assert relative(denoise_with_prompt_kv(model), plain) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode"),
    [("whole", "max-autotune"), ("fused", "default"), ("int8", "default"), ("fp8", "default")],
)
@pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching")
def test_fused_and_quantized_blocks_are_compiled(kind: str, mode: str):
    model = wan()
    if kind == "fused":
        fuse_qkv(model)
    elif kind != "whole":
        pytest.importorskip("torchao", reason="pip install torchao")
        from wancli.models.optimize import quantize

        quantize(model, kind)
    plain = denoise_with_prompt_kv(model)
    compile_blocks(model, mode)
    assert relative(denoise_with_prompt_kv(model), plain) < 1e-5


@pytest.mark.slow
def test_recompilation_limits_do_not_accumulate_over_models():
    for number in range(5):  # torch's limit is 8 graphs of a kind of block
        model = wan()
        speed_up([model], Machine(compile=True, fuse_qkv=bool(number % 2)))
        denoise_with_prompt_kv(model)
        assert counters["stats"]["unique_graphs"] == number + 1


@pytest.mark.slow
def test_a_missing_compiler_is_a_one_line_error(tmp_path: Path):
    folder = tiny_folder(tmp_path / "model")
    flags = ["--model", folder, "--steps", "2", "--frames", "5", "--size", "32x32", "--compile"]
    process = subprocess.run(
        [sys.executable, "-m", "wancli", "generate", "a", "--device", "cpu", *map(str, flags)],
        env={**os.environ, "CXX": "/no/compiler"}, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert process.returncode == 4
    error, hint = process.stderr.strip().splitlines()[-2:]
    assert error.startswith("error: --compile needs a working C++ compiler")
    assert hint == "hint:  --no-compile"


@pytest.mark.gpu
def test_cuda_graphs_match_the_blocks():
    model = wan().cuda()
    arguments = {name: tensor.cuda() for name, tensor in inputs(TEXT, torch.float32).items()}
    plain = [model(**arguments, return_dict=False)[0].clone() for _ in range(3)]
    compile_blocks(model, "reduce-overhead")
    for expected in plain:
        assert relative(model(**arguments, return_dict=False)[0], expected) < 1e-3
