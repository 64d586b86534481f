"""Parity of rollouts with the loops of Self-Forcing and others (see tests/parity/README.md)."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import load_file

from wancli.catalog.geometry import Span, WindowConfig, lay_out
from wancli.catalog.specs import SPECS
from wancli.config.presets import find_preset, layers
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import RolloutSettings, Sampling
from wancli.generation.flow import few_step, few_step_levels, solve
from wancli.generation.noise import StreamNoise
from wancli.models.optimize import compile_blocks
from wancli.planning.plan import chunk_steps, make_rollout_plan
from wancli.rollouts.denoiser import PromptPair, causal
from wancli.rollouts.loop import Chunk, ChunkPrompt, RolloutInputs, rollout
from wancli.rollouts.sampler import make_solver

PARITY = Path(__file__).parents[1] / "parity"


@pytest.fixture(scope="module")
def model_json():
    return json.loads((PARITY / "model.json").read_text())


@pytest.fixture(scope="module")
def inputs():
    return {k: v.float() for k, v in load_file(PARITY / "inputs.safetensors").items()}


@pytest.fixture(scope="module")
def transformer(model_json):
    model = WanTransformer3DModel(**model_json["diffusers_WanTransformer3DModel_config"])
    original = load_file(PARITY / "weights_original_names.safetensors")
    renamed = {
        model_json["key_map_original_to_diffusers"][k]: v.float() for k, v in original.items()
    }
    model.load_state_dict(renamed, strict=True)
    return model.eval()


def padded(embeddings, length):
    return torch.nn.functional.pad(embeddings, (0, 0, 0, length - embeddings.shape[1]))


def roll(transformer, model_json, inputs, case):
    """Latents [F, C, H, W] of our loop, context first."""
    context = inputs["initial_latent"][: case["initial_latent_frames"]]
    context_spans, spans = lay_out(
        case["noise_frames"] // case["num_frame_per_block"],
        chunk_frames=case["num_frame_per_block"],
        context=len(context),
    )
    timesteps, scale = case.get("denoising_step_list", [0]), case.get("guidance_scale", 1.0)
    noise = StreamNoise(
        spans,
        [len(timesteps)] * len(spans),
        tuple(inputs["noise"].shape[1:]),
        start=inputs["noise"][: case["noise_frames"]],
        renoise=inputs["renoise"],
    )
    total_frames = case["initial_latent_frames"] + case["noise_frames"]
    local = case["local_attn_size_frames"]
    cond, uncond = (
        padded(inputs[f"{name}_embeds"], model_json["text_len"]) for name in ("prompt", "negative")
    )
    prompts = PromptPair(cond, uncond if scale > 1 else None)

    def of(span: Span) -> torch.Tensor:
        chunk: torch.Tensor = context[span.first_frame : span.end]
        return chunk.transpose(0, 1)[None]

    def denoise(span, velocity):
        drawn, shift = partial(noise, span), case["timestep_shift"]
        if "sampling_steps" not in case:
            levels = few_step_levels(timesteps, shift=shift, warp=case["warp_denoising_step"])
            return few_step(velocity, drawn, levels)
        sampling = Sampling(steps=case["sampling_steps"], flow_shift=shift)
        solver = make_solver(UniPCMultistepScheduler().config, sampling, device=torch.device("cpu"))
        return solve(velocity, drawn(0), solver)

    rollout_inputs = RolloutInputs(
        context=[(span, of(span)) for span in context_spans],
        spans=spans,
        prompts=lambda _span: ChunkPrompt(prompts),
        finished=lambda _span: None,
        denoise=denoise,
        context_timestep=case["context_noise"],
    )
    window = WindowConfig(
        window=local if local > 0 else total_frames,
        sink=case["sink_size_frames"],
        chunk=case["num_frame_per_block"],
        tokens_per_frame=model_json["tokens_per_frame"],
    )
    with causal(transformer, window, guidance_scale=scale) as model:
        events = list(rollout(model, rollout_inputs))
    chunks = [event.latents for event in events if isinstance(event, Chunk)]
    latents = torch.cat(chunks, 2)[0]
    return latents.transpose(0, 1)


def expected_of(name):
    """Settings of a case, and the latents that the original had."""
    case = json.loads((PARITY / f"case_{name}.json").read_text())
    return case, load_file(PARITY / f"case_{name}.safetensors")


@pytest.fixture(params=["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def either(request, transformer):
    """The transformer as it is, or with compiled blocks."""
    if request.param == "eager":
        return transformer
    model = copy.deepcopy(transformer)
    compile_blocks(model, "default")
    return model


@pytest.mark.parametrize("name", ["t2v_full", "t2v_win6", "init_full", "init_win6"])
def test_latents_equal_those_of_the_original(either, model_json, inputs, name):
    case, original = expected_of(name)
    expected = original["latents"]
    latents = roll(either, model_json, inputs, case)
    error = (latents - expected).abs().max().item()
    assert latents.shape == expected.shape
    assert error < 5e-6, f"{name}: {error:.1e} off"


def test_guided_latents_equal_those_of_the_original(either, model_json, inputs):
    case, original = expected_of("cfg_init_win6")
    expected = original["last_chunk"]
    latents = roll(either, model_json, inputs, case)
    error = (latents[-len(expected) :] - expected).abs().max().item()
    assert len(latents) == case["initial_latent_frames"] + case["noise_frames"]
    assert error < 2e-5, f"{error:.1e} off"


AUTHORS = json.loads((PARITY / "authors.json").read_text())


@pytest.mark.parametrize("name", AUTHORS)
def test_a_preset_gives_the_latents_of_its_authors_loop(name, transformer, model_json, inputs):
    assert roll_preset(name, transformer, model_json, inputs) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["longlive2_from_image", "longlive2_shots"])
def test_compiled_a_preset_gives_the_same(name, transformer, model_json, inputs):
    model = copy.deepcopy(transformer)
    compile_blocks(model, "default")
    assert roll_preset(name, model, model_json, inputs) < 1e-5


def roll_preset(name, transformer, model_json, inputs):
    """Largest difference in the last chunk between our loop, with a preset, and its authors'."""
    case, text_length = AUTHORS[name], model_json["text_len"]
    count, context = (
        case["frames"] // case["config"]["num_frame_per_block"],
        case.get("context_frames", 0),
    )
    changes = {int(frame): embeddings for frame, embeddings in case.get("prompts", {}).items()}
    settings, plan = planned(case, chunks=count, context=context, changes=changes)
    noise = StreamNoise(
        plan.spans,
        plan.steps,
        tuple(inputs["noise"].shape[1:]),
        start=inputs["noise"][: case["frames"]],
        renoise=inputs["renoise"],
    )
    start = inputs["initial_latent"][:context].transpose(0, 1)[None]
    encoded = {
        name: PromptPair(padded(inputs[name], text_length))
        for name in ("prompt_embeds", "negative_embeds")
    }

    def prompts(span):
        begun = [name for frame, name in changes.items() if frame <= span.first_frame]
        changed = span.first_frame in changes
        return ChunkPrompt(
            encoded[begun[-1] if begun else "prompt_embeds"],
            recache=changed and settings.rollout.recache,
        )

    def denoise(span, velocity):
        sampling, steps = settings.sampling, chunk_steps(settings, span)
        if not steps:
            config = UniPCMultistepScheduler().config
            solver = make_solver(config, sampling, device=torch.device("cpu"))
            return solve(velocity, noise(span, 0), solver)
        levels = few_step_levels(steps, shift=sampling.flow_shift, warp=sampling.warp_steps)
        return few_step(velocity, partial(noise, span), levels)

    rollout_inputs = RolloutInputs(
        context=[(span, start[:, :, span.first_frame : span.end]) for span in plan.context],
        spans=plan.spans,
        prompts=prompts,
        finished=lambda _span: None,
        denoise=denoise,
        start=start if plan.spans[0].clean_frames else None,
        context_timestep=settings.rollout.context_noise,
    )
    with causal(transformer, plan.window, rope=plan.rope) as model:
        chunks: list[torch.Tensor] = []
        if settings.rollout.reencode_first:  # by the VAE of `authors.py`
            model.encode_first = lambda following: (
                chunks[-1][:, :, [-1 - following]].half().float().flip(1)
            )
        for event in rollout(model, rollout_inputs):
            if isinstance(event, Chunk):
                chunks.append(event.latents)
    chunk = chunks[-1]
    expected = load_file(PARITY / f"authors_{case['model']}.safetensors")[name]
    assert chunk[0].transpose(0, 1).shape == expected.shape
    return (chunk[0].transpose(0, 1) - expected).abs().max().item()


def planned(case, *, chunks, context, changes):
    """The settings of a case's preset, and the plan of them for the tiny model."""
    small = {"width": 64, "height": 64}  # 8x8 latents
    tables = {"rollout": {**case.get("overrides", {}), "chunks": chunks}, "video": small}
    preset = layers(find_preset(case["preset"]))
    settings = resolve([*preset, Layer("test", tables)], RolloutSettings).settings
    frames = case["config"]["num_frame_per_block"]
    cuts = {frame // frames for frame in changes}
    plan = make_rollout_plan(
        settings, SPECS["wan2.1-t2v-1.3b"], context_frames=context, changes=cuts, force=True
    )
    return settings, plan
