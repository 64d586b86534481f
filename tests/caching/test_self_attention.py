"""Wan's self-attention with any kernel: diffusers' bits, in whole graphs."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from tests.caching.tiny import denoise, vace, wan
from tests.rollouts.test_compiled import roll, window
from wancli.caching.prompt_kv import PromptKVCache, prompt_kv
from wancli.caching.self_attention import self_attention
from wancli.models.attention import AttentionKernel, set_backend
from wancli.models.optimize import compile_blocks, fuse_qkv
from wancli.rollouts.denoiser import causal

MATH = AttentionBackendName._NATIVE_MATH
CPU = torch.device("cpu")


@pytest.mark.parametrize("make", [wan, vace])
@pytest.mark.parametrize("fused", [False, True])
def test_it_computes_the_bits_of_diffusers(make: Any, fused: bool):
    model = make()
    if fused:
        fuse_qkv(model)
    set_backend([model], "_native_math", CPU)
    expected = denoise(model, steps=2)
    before = dict(model.attn_processors)
    with self_attention(model, "_native_math"):
        assert torch.equal(denoise(model, steps=2), expected)
    assert model.attn_processors == before


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of keys that another library's kernel, which breaks graphs, has attended to."""
    seen: list[int] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append(key.shape[1])
        torch._dynamo.graph_break()
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v).transpose(1, 2)

    names = {"query", "key", "value"}
    monkeypatch.setitem(_AttentionBackendRegistry._backends, MATH, kernel)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, MATH, names)
    return seen


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rollouts_attend_with_a_kernel_of_another_library(foreign: list[int], compiled: bool):
    torch._dynamo.reset()
    model, kernel = wan(), AttentionKernel("_native_math", "_native_math")
    with torch.no_grad():
        with causal(model, window(4)) as denoiser:
            expected = roll(denoiser, chunks=3)
        assert not foreign
        set_backend([model], kernel.backend, CPU)
        if compiled:
            compile_blocks(model, "default")
        with causal(model, window(4), kernel=kernel) as denoiser:
            output = roll(denoiser, chunks=3)
    assert float((output - expected).norm() / expected.norm()) < 1e-5
    assert set(foreign) == {7, 32, 64}  # the prompt, and chunks in a window of two


@pytest.mark.slow
def test_a_kernel_of_another_library_does_not_break_graphs(foreign: list[int]):
    torch._dynamo.reset()
    model = wan()
    with torch.no_grad():
        expected = denoise(model, steps=2)
        set_backend([model], "_native_math", CPU)
        compile_blocks(model, "default")
        with prompt_kv(model, PromptKVCache()), self_attention(model, "_native_math"):
            output = denoise(model, steps=2)
    assert float((output - expected).norm() / expected.norm()) < 1e-5
    assert set(foreign) == {7, 32}  # the prompt, and the video's tokens
