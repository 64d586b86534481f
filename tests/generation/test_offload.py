"""Offloaded models give bit-identical videos, and their weights are where they should be."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.fakes import tiny_pipeline
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import ANIMATE, ENDS, IMAGE, TEXT, VACE, VIDEO
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Settings
from wancli.generation.caches import caches
from wancli.generation.denoise import clip_frames, denoise
from wancli.generation.prompts import encode_prompt
from wancli.models.load import Loaded
from wancli.models.offload import place
from wancli.models.vae import encode
from wancli.planning.inputs import NO_INPUTS, InputFiles
from wancli.planning.plan import make_plan

CPU = torch.device("cpu")
MODES = ("model", "group", "sequential")
every_mode = pytest.mark.parametrize("mode", MODES)


def images(seed: int, count: int = 1, size: tuple[int, int] = (48, 32)) -> list[Image.Image]:
    width, height = size
    levels = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3))
    return [Image.fromarray(frame) for frame in levels.astype(np.uint8)]


FILE = Path("file")
INPUTS: Mapping[str, tuple[InputFiles, dict[str, Any]]] = {
    TEXT: (NO_INPUTS, {}),
    IMAGE: (InputFiles(image=FILE), {"image": images(1)[0]}),
    ENDS: (
        InputFiles(image=FILE, last_image=FILE),
        {"image": images(1)[0], "last_image": images(2)[0]},
    ),
    VIDEO: (InputFiles(video=FILE), {"video": images(3, 5)}),
    VACE: (
        InputFiles(video=FILE, ref_image=(FILE,)),
        {"video": images(3, 5), "reference_images": images(4)},
    ),
    ANIMATE: (
        InputFiles(pose_video=FILE, face_video=FILE, ref_image=(FILE,)),
        {
            "pose_video": images(5, 9),
            "face_video": images(6, 9, (16, 16)),
            "image": images(1)[0],
        },
    ),
}


def settings_of(task: str, **tables: Any) -> Settings:
    video = {"num_frames": 9 if task == ANIMATE else 5, "width": 48, "height": 32}
    tables.setdefault("sampling", {"steps": 2, "guidance_scale": 3.0})
    return resolve(
        [Layer("flag", {"video": {**video, "segment_frames": 5}, **tables})], Settings
    ).settings


def loaded_for(task: str, mode: str | None, **kind: Any) -> Loaded:
    pipeline = tiny_pipeline(task, num_layers=4, **kind)
    pipeline.set_progress_bar_config(disable=True)
    if mode:
        place(pipeline, CPU, mode)
    experts = kind.get("experts", 1)
    text = 512 if pipeline.transformer.config.get("image_dim") else 16
    spec = ModelSpec(
        "tiny", "", "", tasks=(task,), latent_channels=4, text_length=text, experts=experts
    )
    return Loaded(pipeline, spec, CPU)


def generate(
    task: str, mode: str | None, settings: Settings, *, videos: int = 1, **kind: Any
) -> list[Tensor]:
    return videos_of(loaded_for(task, mode, **kind), settings, task, count=videos)


def videos_of(loaded: Loaded, settings: Settings, task: str, *, count: int = 2) -> list[Tensor]:
    """Latents and frames of several videos, generated in turn by one loaded model."""
    inputs, images = INPUTS.get(task, (NO_INPUTS, {}))
    plan = make_plan(settings, loaded.spec, inputs, task=task)
    tensors = []
    for seed in range(count):
        prompt = encode_prompt(loaded, "a red circle", settings.sampling)
        denoised = denoise(
            loaded,
            replace(prompt, pictures=images),
            settings,
            plan,
            seed=seed,
            on_step=lambda _: None,
        )
        tensors += [denoised.latents, torch.from_numpy(clip_frames(loaded, denoised).copy())]
    return tensors


@cache
def resident_output(task: str, **kind: Any) -> list[Tensor]:
    return generate(task, None, settings_of(task), **kind)


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@every_mode
@pytest.mark.parametrize("task", INPUTS)
def test_every_task_gives_the_same_frames_when_offloaded(task: str, mode: str):
    assert same(generate(task, mode, settings_of(task)), resident_output(task))


@every_mode
@pytest.mark.parametrize("kind", [{"experts": 2}, {"by_token": True}], ids=str)
def test_two_experts_and_per_token_timesteps_give_the_same_frames(kind: dict[str, Any], mode: str):
    assert same(generate(TEXT, mode, settings_of(TEXT), **kind), resident_output(TEXT, **kind))


@every_mode
def test_an_uncached_prompt_gives_the_same_frames(mode: str):
    assert same(
        generate(TEXT, mode, settings_of(TEXT, prompt_kv={"prompt_kv": False})),
        resident_output(TEXT),
    )


CACHES: Mapping[str, dict[str, Any]] = {
    "cachedit": {
        "step_cache": "cachedit", "cachedit_fn": 1, "cachedit_bn": 1,
        "cachedit_max_warmup_steps": 3, "cachedit_residual_threshold": 0.5,
    },
    "first-block": {"step_cache": "first-block", "step_cache_threshold": 0.5},
    "seacache": {"step_cache": "seacache", "step_cache_threshold": 0.5},
    "gate": {"cfg_gate": 0.5},
}  # fmt: skip


@cache
def two_videos(name: str, mode: str | None) -> list[Tensor]:
    settings = settings_of(
        TEXT,
        sampling={"steps": 9, "guidance_scale": 3.0},
        step_cache=CACHES[name],
        prompt_kv={"kv_align": "8"},
    )
    return generate(TEXT, mode, settings, videos=2)


@pytest.mark.parametrize(
    "mode",
    ["group", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("model", "sequential"))],
)
@pytest.mark.parametrize("name", CACHES)
def test_caches_reuse_the_same_steps_in_a_second_video(name: str, mode: str):
    resident = two_videos(name, None)
    assert not same(resident[:1], resident[2:3])
    assert same(two_videos(name, mode), resident)


@every_mode
def test_an_offloaded_vae_encodes_the_same_latents(mode: str):
    one, other = (loaded_for(TEXT, chosen).pipeline.vae for chosen in (None, mode))
    video = torch.linspace(-1, 1, 3 * 5 * 32 * 48).view(1, 3, 5, 32, 48)
    assert torch.equal(encode(one, video), encode(other, video))


def test_diffusers_finds_the_device_under_a_cfg_gate():
    settings = settings_of(TEXT, sampling={"steps": 9}, step_cache=CACHES["gate"])
    loaded = loaded_for(TEXT, None)
    gpu = torch.device("cuda:0")
    place(loaded.pipeline, gpu, "model")  # moves nothing until a component is called
    plan = make_plan(settings, loaded.spec)
    prompt = encode_prompt(loaded_for(TEXT, None), "a red circle", settings.sampling)
    assert loaded.pipeline._execution_device == gpu
    with caches(loaded, prompt.memory, settings, plan, [1.0] * 9):
        assert loaded.pipeline._execution_device == gpu


@pytest.mark.parametrize("task", INPUTS)
def test_a_bfloat16_vae_gives_nearly_the_same_frames(task: str):
    loaded, (inputs, images) = loaded_for(task, None), INPUTS[task]
    loaded.pipeline.vae.to(torch.bfloat16)
    settings = settings_of(task)
    prompt = encode_prompt(loaded, "a red circle", settings.sampling)
    denoised = denoise(
        loaded, replace(prompt, pictures=images), settings,
        make_plan(settings, loaded.spec, inputs, task=task), seed=0, on_step=lambda _: None,
    )  # fmt: skip
    frames = clip_frames(loaded, denoised).astype(float)
    assert denoised.latents.dtype == torch.float32
    difference = np.abs(frames - resident_output(task)[1].numpy().astype(float)).mean()
    assert 0 < difference < 2.0  # of 255 levels, with random weights
