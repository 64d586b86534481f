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
from wancli.config.presets import find_preset, layers
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Rollout, RolloutSettings, Sampling
from wancli.generation.flow import few_step, few_step_levels, solve
from wancli.generation.noise import StreamNoise
from wancli.models.optimize import compile_blocks
from wancli.planning.plan import chunk_steps, in_shots
from wancli.planning.prompts import PromptChange, PromptSchedule
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
    given = len(context) % case["num_frame_per_block"]
    context_spans, spans = lay_out(
        case["noise_frames"] // case["num_frame_per_block"],
        chunk_frames=case["num_frame_per_block"],
        context=len(context) - given,
        given=given,
    )
    timesteps, scale = case.get("denoising_step_list", [0]), case.get("guidance_scale", 1.0)
    noise = StreamNoise(
        spans,
        [len(timesteps)] * len(spans),
        tuple(inputs["noise"].shape[1:]),
        start=inputs["noise"][: case["noise_frames"]],
        renoise=inputs["renoise"],
    )
    total_frames = case["initial_latent_frames"] - given + case["noise_frames"]
    local = case["local_attn_size_frames"]
    cond, uncond = (
        padded(inputs[f"{name}_embeds"], model_json["text_len"]) for name in ("prompt", "negative")
    )
    prompts = PromptPair(cond, uncond if scale > 1 else None)
    cuts = tuple(PromptChange(int(chunk), name) for chunk, name in case.get("cuts", {}).items())
    schedule, of_shot = PromptSchedule("one", cuts), {"one": prompts, "other": PromptPair(uncond)}
    shots = Rollout(shot_offset=case.get("multi_shot_rope_offset", 0), shot_sink=True)
    spans = in_shots(spans, shots, {cut.chunk for cut in cuts})

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
        prompts=lambda span: ChunkPrompt(of_shot[schedule.at(span.index).new]),
        finished=lambda _span: None,
        denoise=denoise,
        given=context.transpose(0, 1)[None] if given else None,
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


@pytest.mark.parametrize("name", ["t2v", "i2v", "shots"])
def test_latents_equal_those_of_longlive_2(either, model_json, inputs, name):
    case, original = expected_of(f"longlive2_{name}")
    latents = roll(either, model_json, inputs, case)
    first, last = original["first_chunk"], original["last_chunk"]
    errors = [latents[: len(first)] - first, latents[-len(last) :] - last]
    error = max(chunk.abs().max().item() for chunk in errors)
    assert len(latents) == case["noise_frames"]
    assert error < 2e-5, f"{name}: {error:.1e} off"


AUTHORS = json.loads((PARITY / "authors.json").read_text())


@pytest.mark.parametrize("name", AUTHORS)
def test_a_preset_gives_the_latents_of_its_authors_loop(name, transformer, model_json, inputs):
    case = AUTHORS[name]
    expected = load_file(PARITY / f"authors_{case['model']}.safetensors")[name]
    latents = roll_preset(transformer, model_json, inputs, case)
    error = (latents[-len(expected) :] - expected).abs().max().item()
    assert error < 5e-6, f"{name}: {error:.1e} off"


def roll_preset(transformer, model_json, inputs, case):
    """Latents [F, C, H, W] of our loop with a preset's settings, context first."""
    overrides = Layer("test", {"rollout": case.get("overrides", {})})
    preset = layers(find_preset(case["preset"]))
    settings = resolve([*preset, overrides], RolloutSettings).settings
    chosen, sampling = settings.rollout, settings.sampling
    context, frames = case.get("context_frames", 0), case["frames"]
    context_spans, spans = lay_out(
        frames // chosen.chunk_frames, chunk_frames=chosen.chunk_frames, context=context
    )
    steps = {span: chunk_steps(settings, span) for span in spans}
    noise = StreamNoise(
        spans,
        [len(steps[span]) for span in spans],
        tuple(inputs["noise"].shape[1:]),
        start=inputs["noise"][:frames],
        renoise=inputs["renoise"],
    )
    encoded = {
        name: PromptPair(padded(inputs[name], model_json["text_len"]))
        for name in ("prompt_embeds", "negative_embeds")
    }
    changes = {int(frame): name for frame, name in case.get("prompts", {}).items()}

    def prompts(span):
        begun = [name for frame, name in changes.items() if frame <= span.first_frame]
        name = begun[-1] if begun else "prompt_embeds"
        changed = span.first_frame in changes
        return ChunkPrompt(encoded[name], recache=changed and chosen.recache)

    def denoise(span, velocity):
        levels = few_step_levels(steps[span], shift=sampling.flow_shift, warp=sampling.warp_steps)
        return few_step(velocity, partial(noise, span), levels)

    rollout_inputs = RolloutInputs(
        context=[
            (span, inputs["initial_latent"][span.first_frame : span.end].transpose(0, 1)[None])
            for span in context_spans
        ],
        spans=spans,
        prompts=prompts,
        finished=lambda _span: None,
        denoise=denoise,
        context_timestep=chosen.context_noise,
    )
    window = WindowConfig(
        window=min(chosen.rolling_window, context + frames),
        sink=chosen.sink_frames,
        chunk=chosen.chunk_frames,
        tokens_per_frame=model_json["tokens_per_frame"],
        trim=chosen.trim,
        recache_by=chosen.recache_by,
    )
    rope = "absolute" if chosen.rope == "auto" else chosen.rope
    with causal(transformer, window, rope=rope) as model:
        events = list(rollout(model, rollout_inputs))
    chunks = [event.latents for event in events if isinstance(event, Chunk)]
    return torch.cat(chunks, 2)[0].transpose(0, 1)
