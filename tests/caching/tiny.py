"""Tiny transformers with enough blocks to skip some, and loops that denoise with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from diffusers import (
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import Tensor

from tests.fakes import SIZES
from wancli.config.settings import StepCache

LAYERS = 5
STEPS = 10
WAN: dict[str, Any] = {**SIZES, "num_layers": LAYERS}
DBCACHE = StepCache(
    step_cache="cachedit",
    cachedit_fn=2,
    cachedit_max_warmup_steps=3,
    cachedit_residual_threshold=0.15,
)
I2V: dict[str, Any] = {"in_channels": 9, "image_dim": 8, "added_kv_proj_dim": 24}
VACE: dict[str, Any] = {"vace_layers": [0, 2], "vace_in_channels": 6}
HUNYUAN: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": LAYERS,
    "num_single_layers": LAYERS,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def build(kind: Any, *, seed: int = 0, **config: Any) -> Any:
    """A transformer with random weights."""
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)  # diffusers takes no generator
        return kind(**config).eval()


def wan(*, seed: int = 0, **config: Any) -> Any:
    return build(WanTransformer3DModel, seed=seed, **(WAN | config))


def vace() -> Any:
    return build(WanVACETransformer3DModel, **(WAN | VACE))


def hunyuan() -> Any:
    return build(HunyuanVideoTransformer3DModel, **HUNYUAN)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(transformer: Any, branch: str) -> dict[str, Tensor]:
    """Inputs of a forward besides latents and timestep; the branches differ in the text."""
    seed = 1 if branch == "cond" else 2
    inputs = {"encoder_hidden_states": draw(1, 7, 16, seed=seed)}
    if isinstance(transformer, HunyuanVideoTransformer3DModel):
        inputs["encoder_attention_mask"] = torch.ones(1, 7)
        inputs["pooled_projections"] = draw(1, 8, seed=seed)
        inputs["guidance"] = torch.tensor([6000.0])
    if isinstance(transformer, WanVACETransformer3DModel):
        inputs["control_hidden_states"] = draw(1, 6, 2, 8, 8, seed=3)
    if transformer.config.get("image_dim"):
        inputs["encoder_hidden_states_image"] = draw(1, 5, 8, seed=4)
    return inputs


@torch.no_grad()
def denoise(transformer: Any, *, steps: int = STEPS, guided: bool = True, seed: int = 0) -> Tensor:
    """Latents [1, 4, 2, 8, 8], denoised in Euler steps as diffusers' pipelines do."""
    latents = draw(1, 4, 2, 8, 8, seed=seed)
    condition = draw(1, transformer.config.in_channels - 4, 2, 8, 8, seed=5)
    sigmas = torch.linspace(1, 0, steps + 1)
    for index, (sigma, following) in enumerate(pairwise(sigmas)):
        velocity = {}
        for branch in ("cond", "uncond") if guided else ("cond",):
            step = {"step_index": index, "sigma": float(sigma), "num_inference_steps": steps}
            with transformer.cache_context(branch, **step):
                (velocity[branch],) = transformer(
                    hidden_states=torch.cat([latents, condition], 1),
                    timestep=1000 * sigma.expand(1),
                    return_dict=False,
                    **inputs_of(transformer, branch),
                )
        total = velocity["cond"]
        if guided:
            total = velocity["uncond"] + 5.0 * (velocity["cond"] - velocity["uncond"])
        latents = latents + (following - sigma) * total
    return latents


def pipeline(*, experts: int = 1, expand_timesteps: bool = False) -> WanPipeline:
    """diffusers' own pipeline, without text encoder and VAE."""
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=wan(),
        transformer_2=wan(seed=1) if experts == 2 else None,
        boundary_ratio=0.5 if experts == 2 else None,
        expand_timesteps=expand_timesteps,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: WanPipeline, *, steps: int = STEPS, guidance_scale: float = 5.0) -> Tensor:
    """Latents [1, 4, 2, 8, 8]."""
    latents: Tensor = pipe(
        prompt_embeds=draw(1, 7, 16, seed=1),
        negative_prompt_embeds=draw(1, 7, 16, seed=2),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        num_frames=5,
        height=64,
        width=64,
        latents=draw(1, 4, 2, 8, 8),
        output_type="latent",
    ).frames
    return latents


class Blocks:
    """Counts the blocks that really ran, from inside: hooks on a block also see skipped ones."""

    def __init__(self) -> None:
        self.ran = 0
        self.of_forwards: list[int] = []

    @contextmanager
    def counted(self, *transformers: Any) -> Iterator["Blocks"]:
        handles = []
        for transformer in transformers:
            names = ("blocks", "transformer_blocks", "single_transformer_blocks")
            lists = [getattr(transformer, name) for name in names if hasattr(transformer, name)]
            for block in (block for blocks in lists for block in blocks):
                inner = block.attn1 if hasattr(block, "attn1") else block.attn
                handles.append(inner.register_forward_hook(self._one))
            handles.append(transformer.register_forward_hook(self._end))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _one(self, *_: Any) -> None:
        self.ran += 1

    def _end(self, *_: Any) -> None:
        self.of_forwards.append(self.ran)
        self.ran = 0


def traces(transformer: Any) -> list[Any]:
    """Everything a step cache could leave behind on the transformer, its blocks and its classes."""
    modules = list(transformer.modules())
    kinds = {kind for module in modules for kind in type(module).__mro__}
    return [
        [(id(module), list(module._modules), dict(vars(module))) for module in modules],
        [(kind, dict(vars(kind))) for kind in sorted(kinds, key=id)],
    ]
