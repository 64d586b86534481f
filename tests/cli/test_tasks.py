"""Every task through `wancli generate`, on tiny real pipelines: latents equal diffusers' own."""

import json
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import Wancli
from tests.fakes import tiny_clip, tiny_folder, tiny_image
from wancli.catalog.local import find_spec
from wancli.catalog.specs import DEMO_FOLDER, SPECS
from wancli.catalog.tasks import ANIMATE, ENDS, IMAGE, TASKS, TEXT, VACE, VIDEO
from wancli.video.images import fit_image
from wancli.video.read import probe, read_comment, read_frames

PROMPT = "a red circle moving right"
SIZE = (32, 32)
# Model folders: the task, and how the folder differs from the usual one.
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": (TEXT, {}),
    "by-token": (TEXT, {"by_token": True}),
    "image": (IMAGE, {}),
    "ends": (ENDS, {}),
    "two-experts": (IMAGE, {"experts": 2, "image_dim": None, "added_kv_proj_dim": None}),
    "vace": (VACE, {}),
    "animate": (ANIMATE, {}),
}
# Folder, task, and flags with their files: p is a picture, v a video.
CASES: dict[str, tuple[str, str, dict[str, str]]] = {
    "text": ("text", TEXT, {}),
    "text by token": ("by-token", TEXT, {}),
    "video": ("text", VIDEO, {"video": "v1"}),
    "image": ("image", IMAGE, {"image": "p1"}),
    "image by token": ("by-token", IMAGE, {"image": "p1"}),
    "image, two experts": ("two-experts", IMAGE, {"image": "p1"}),
    "ends, two experts": ("two-experts", ENDS, {"image": "p1", "last_image": "p2"}),
    "ends": ("ends", ENDS, {"image": "p1", "last_image": "p2"}),
    "vace of nothing": ("vace", VACE, {}),
    "vace of references": ("vace", VACE, {"ref_image": "p1 p2"}),
    "vace of all": ("vace", VACE, {"video": "v1", "mask": "v2", "ref_image": "p1"}),
    "animate": ("animate", ANIMATE, {"pose_video": "v1", "face_video": "f1", "ref_image": "p1"}),
    "replace": (
        "animate",
        ANIMATE,
        {"pose_video": "v1", "face_video": "f1", "ref_image": "p1", "mask": "v2",
         "background_video": "v3"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("models")
    for name, (task, more) in FOLDERS.items():
        tiny_folder(base / name, task, **more)
    return base


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("files")
    for seed in (1, 2):
        tiny_image(base / f"p{seed}.png", seed)
    for seed in (1, 2, 3):
        tiny_clip(base / f"v{seed}.mp4", seed)
    tiny_clip(base / "f1.mp4", 4, size=(32, 32))
    tiny_clip(base / "f2.mp4", 6, size=(32, 32), frames=9)
    tiny_clip(base / "long.mp4", 5, frames=9)
    return base


def flags(inputs: dict[str, str], files: Path) -> list[object]:
    words: list[object] = []
    for name, stems in inputs.items():
        for stem in stems.split():
            words += [f"--{name.replace('_', '-')}", path_of(stem, files)]
    return words


def path_of(stem: str, files: Path) -> Path:
    return files / f"{stem}.{'png' if stem.startswith('p') else 'mp4'}"


def arguments(model: Path, *more: object) -> tuple[object, ...]:
    return (
        "generate", PROMPT, "--model", model, "--steps", 4, "--frames", 5, "--size", "32x32",
        "--fps", 8, "--seed", 7, "--flow-shift", 1, "--guidance-scale", 3, "-q", *more,
    )  # fmt: skip


# Timesteps 1000, 750, 500 and 250 at shift 5.
SHIFTED = (1.0, 0.9375, 2.5 / 3, 0.625, 0.0)
# rCM's: from sigma_max 80, over TrigFlow's 1.5, 1.4 and 1.0, as sines and cosines.
ANGLES = (math.atan(80), 1.5, 1.4, 1.0, 0.0)
RCM = tuple(math.sin(t) / (math.cos(t) + math.sin(t)) for t in ANGLES)


class ByHand:
    """Walks these noise levels, with every step written out."""

    order, config = 1, FrozenDict(num_train_timesteps=1000)

    def __init__(self, scheduler: str, sigmas: tuple[float, ...] = SHIFTED) -> None:
        self.renoises, self.generator = scheduler == "few-step", torch.Generator().manual_seed(7)
        self.sigmas = sigmas

    def set_timesteps(self, _count: int, **_: Any) -> None:
        self.timesteps = torch.tensor(self.sigmas[:-1]) * 1000

    def set_begin_index(self, _index: int) -> None:
        pass

    def step(self, velocity: Tensor, timestep: Tensor, sample: Tensor, **_: Any) -> tuple[Tensor]:
        index = self.timesteps.tolist().index(float(timestep))
        sigma, after = self.sigmas[index : index + 2]
        if not self.renoises:
            return ((sample.double() + (after - sigma) * velocity.double()).float(),)
        clean = (sample.double() - sigma * velocity.double()).float()
        noise = torch.randn(sample.shape, generator=self.generator) if after else 0.0
        return ((1 - after) * clean + after * noise,)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = float(timesteps[0]) / 1000
        return (1 - sigma) * clean + sigma * noise


@cache
def pipeline_of(model: Path, task: str) -> Any:
    pipeline = getattr(diffusers, TASKS[task].pipeline).from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_diffusers(
    model: Path, task: str, inputs: dict[str, str], files: Path, output_type: str = "latent",
    listed: ByHand | None = None,
) -> Any:  # fmt: skip
    """Output of a plain diffusers call, with `inputs` fitted as a user would fit them."""
    pipeline = pipeline_of(model, task)
    config = UniPCMultistepScheduler.load_config(model, subfolder="scheduler")
    pipeline.scheduler = listed or UniPCMultistepScheduler.from_config(config, flow_shift=1)
    arguments: dict[str, Any] = {}
    for name, stems in inputs.items():
        pictures: list[Image.Image] = []
        for path in (path_of(stem, files) for stem in stems.split()):
            clip = path.suffix == ".mp4"
            frames = [Image.fromarray(f) for f in read_frames(path)] if clip else [Image.open(path)]
            whole = name in ("ref_image", "face_video")
            pictures += frames if whole else [fit_image(frame, SIZE) for frame in frames]
        one = len(pictures) == 1 and TASKS[task].inputs[name] != "reference_images"
        arguments[TASKS[task].inputs[name]] = pictures[0] if one else pictures
    if task == VIDEO:
        arguments["strength"] = 0.5
    elif task == ANIMATE:
        arguments |= {
            "segment_frame_length": 5,
            "mode": "replace" if "mask" in inputs else "animate",
        }
    else:
        arguments["num_frames"] = 5
    if listed and listed.sigmas[0] < 1:
        count = 2 + inputs.get("ref_image", "").count("p")
        side = 32 // pipeline.vae_scale_factor_spatial
        shape = (1, pipeline.vae.config.z_dim, count, side, side)
        noise = torch.randn(shape, generator=listed.generator)
        arguments["latents"] = listed.sigmas[0] * noise
    return pipeline(
        prompt=PROMPT, negative_prompt="", num_inference_steps=4, width=32, height=32,
        guidance_scale=1.0 if listed else 3.0, output_type=output_type,
        generator=listed.generator if listed else torch.Generator().manual_seed(7),
        max_sequence_length=min(512, pipeline.tokenizer.model_max_length), **arguments,
    ).frames  # fmt: skip


def as_pipeline_output(latents: Tensor, model: Path, task: str) -> Tensor:
    """Wan-Animate's pipeline returns latents scaled for its VAE, in its own arithmetic."""
    if task != ANIMATE:
        return latents
    config = diffusers.AutoencoderKLWan.from_pretrained(model, subfolder="vae").config
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return latents / (1.0 / std) + mean


@pytest.mark.parametrize("case", CASES)
def test_latents_equal_those_of_a_plain_diffusers_call(
    wancli: Wancli, models: Path, files: Path, case: str
):
    folder, task, inputs = CASES[case]
    model = models / folder
    plain = call_diffusers(model, task, inputs, files)[:, :, -2:]  # references come first
    strength = ("--strength", 0.5) if task == VIDEO else ()
    result = wancli(
        *arguments(model, *flags(inputs, files), *strength), "--json", "-o", "a.mp4",
        "--save-latents", "z.safetensors",
    )  # fmt: skip
    assert result.code == 0, result.err
    latents = load_file("z.safetensors")["latents"].transpose(0, 1)[None]
    assert torch.equal(as_pipeline_output(latents, model, task), plain)
    record = json.loads(result.out)
    assert record["request"].get("inputs", {}).get("task", TEXT) == task
    assert len(record["timings"]["steps_ms"]) == (2 if task == VIDEO else 4)
    assert sorted(record["timings"]["sigmas"], reverse=True) == record["timings"]["sigmas"]
    info = probe(Path("a.mp4"))
    assert (info.width, info.height, info.frames) == (*SIZE, 5)


@pytest.mark.parametrize(
    ("case", "scheduler"),
    [("text", "few-step"), ("video", "few-step"), ("image, two experts", "euler"),
     ("image by token", "few-step"), ("vace of references", "few-step"), ("animate", "few-step")],
)  # fmt: skip
def test_a_list_of_timesteps_is_walked_as_by_hand_in_one_forward_a_step(
    wancli: Wancli, models: Path, files: Path, case: str, scheduler: str
):
    folder, task, inputs = CASES[case]
    plain = call_diffusers(models / folder, task, inputs, files, listed=ByHand(scheduler))
    strength = ("--strength", 0.5) if task == VIDEO else ()
    guidance = ("--guidance-scale", 1) if scheduler == "euler" else ()  # few-step has none
    result = wancli(
        "generate", PROMPT, "--model", models / folder, "--frames", 5, "--size", "32x32",
        "--fps", 8, "--seed", 7, "--flow-shift", 5, *guidance, "--json", *strength,
        "--sampler", scheduler, "--steps-list", "1000,750,500,250", *flags(inputs, files),
        "-o", "a.mp4", "--save-latents", "z.safetensors", "--preview-every", 1,
    )  # fmt: skip
    assert result.code == 0, result.err
    latents = as_pipeline_output(
        load_file("z.safetensors")["latents"].transpose(0, 1)[None], models / folder, task
    )
    assert torch.allclose(latents, plain[:, :, -2:], rtol=0, atol=2e-5)
    timings = json.loads(result.out)["timings"]
    assert timings["forwards"] == ([1, 1] if task == VIDEO else [1, 1, 1, 1])
    if case == "text":  # of the others, too, the record has the same list
        again = wancli("repro", "a.json", "-o", "b.mp4")
        assert "identical" in again.err, again.err


@pytest.mark.parametrize(
    ("case", "scheduler"),
    [("text", "few-step"), ("image, two experts", "few-step"), ("image by token", "euler"),
     ("vace of references", "few-step")],
)  # fmt: skip
def test_rcms_list_is_walked_from_as_much_noise_as_its_first_level_has(
    wancli: Wancli, models: Path, files: Path, case: str, scheduler: str
):
    folder, task, inputs = CASES[case]
    plain = call_diffusers(models / folder, task, inputs, files, listed=ByHand(scheduler, RCM))
    steps = ",".join(str(1000 * sigma) for sigma in RCM[:-1])
    guidance = ("--guidance-scale", 1) if scheduler == "euler" else ()
    result = wancli(
        "generate", PROMPT, "--model", models / folder, "--frames", 5, "--size", "32x32",
        "--fps", 8, "--seed", 7, "--flow-shift", 1, *guidance, *flags(inputs, files),
        "--sampler", scheduler, "--steps-list", steps, "--save-latents", "z.safetensors",
    )  # fmt: skip
    assert result.code == 0, result.err
    latents = load_file("z.safetensors")["latents"].transpose(0, 1)[None]
    assert torch.allclose(latents, plain[:, :, -2:], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_long_animation_is_generated_in_segments(wancli: Wancli, models: Path, files: Path):
    inputs = {"pose_video": "long", "face_video": "f2", "ref_image": "p1"}
    run = arguments(models / "animate", *flags(inputs, files), "--frames", 9, "--segment-frames", 5)
    result = wancli(*run, "--lossless", "--json", "-o", "a.mp4")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert len(record["timings"]["steps_ms"]) == 8
    assert record["timings"]["sigmas"][:4] == record["timings"]["sigmas"][4:]
    plain = call_diffusers(models / "animate", ANIMATE, inputs, files, output_type="np")
    levels = (plain[0] * 255).round().astype("uint8")
    assert np.array_equal(read_frames(Path("a.mp4")), levels)
    assert wancli(*run, "--overwrite", "--save-latents", "z.safetensors").code == 2
    assert wancli(*run, "--overwrite", "--cfg-gate", 3).code == 2
    assert wancli(*run, "--overwrite", "--segment-frames", 6).code == 2


def test_input_images_are_recorded_and_hashed(wancli: Wancli, models: Path, files: Path):
    def record(picture: str) -> dict[str, Any]:
        image = ("--image", files / f"{picture}.png")
        result = wancli(
            *arguments(models / "image", *image), "--json", "--overwrite", "-o", "a.mp4"
        )
        record: dict[str, Any] = json.loads(result.out)
        return record

    first, second = record("p1"), record("p2")
    inputs = first["request"]["inputs"]
    assert inputs["task"] == IMAGE
    assert inputs["image"]["name"] == "p1.png"
    assert inputs["image"]["path"] == str(files / "p1.png")
    assert first["hash"] != second["hash"]
    assert first["output"]["framemd5"] != second["output"]["framemd5"]
    embedded = read_comment(Path("a.mp4")) or ""
    assert json.loads(embedded)["request"]["inputs"]["image"]["name"] == "p2.png"
    assert str(files) not in embedded
    again = (*arguments(models / "image", "--image", files / "p2.png"), "-o", "a.mp4")
    assert wancli(*again, "--skip-existing").code == 0


def test_repro_finds_input_files_at_their_path_or_beside_the_record(
    wancli: Wancli, models: Path, files: Path
):
    for name in ("p1.png", "p2.png", "v1.mp4"):
        shutil.copy(files / name, name)
    Path("there").mkdir()
    run = (
        *arguments(models / "vace", "--video", "v1.mp4", "--ref-image", "p1.png", "--ref-image"),
        "p2.png",
    )
    assert wancli(*run, "-o", "there/a.mp4").code == 0
    result = wancli("repro", "there/a.json", "-o", "b.mp4")
    assert "identical" in result.err, result.err
    for name in ("p1.png", "p2.png", "v1.mp4"):
        Path(name).rename(f"there/{name}")
    result = wancli("repro", "there/a.json", "-o", "c.mp4")
    assert "identical" in result.err, result.err
    shutil.copy("there/p1.png", "there/p2.png")
    result = wancli("repro", "there/a.json", "-o", "d.mp4")
    assert result.code == 4
    assert "--ref-image p2.png" in result.err


def test_boundary_ratio_moves_steps_between_experts(wancli: Wancli, models: Path, files: Path):
    def frames(*more: object) -> str:
        run = arguments(models / "two-experts", "--image", files / "p1.png", *more)
        result = wancli(*run, "--json", "--overwrite", "-o", "a.mp4")
        assert result.code == 0, result.err
        digest: str = json.loads(result.out)["output"]["framemd5"]
        return digest

    assert frames("--boundary-ratio", 0.5) == frames()
    assert frames("--boundary-ratio", 0.9) != frames()


@pytest.mark.parametrize("case", ["image", "vace of references", "animate"])
def test_uncond_forwards_are_skipped_after_the_gate(
    wancli: Wancli, models: Path, files: Path, case: str
):
    folder, _, inputs = CASES[case]
    result = wancli(*arguments(models / folder, *flags(inputs, files)), "--cfg-gate", 2, "--json")
    assert json.loads(result.out)["timings"]["forwards"] == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("case", "cache"),
    [("image", "cachedit"), ("image", "first-block"), ("vace of references", "cachedit"),
     ("video", "cachedit")],
)  # fmt: skip
def test_a_step_cache_reuses_steps(
    wancli: Wancli, models: Path, files: Path, case: str, cache: str
):
    folder, _, inputs = CASES[case]
    bold = {
        "cachedit": ("--cachedit-fn", 1, "--cachedit-max-warmup-steps", 2,
                     "--cachedit-residual-threshold", 1),
        "first-block": ("--step-cache-threshold", 10),
    }[cache]  # fmt: skip
    run = arguments(models / folder, *flags(inputs, files), "--step-cache", cache, *bold)
    result = wancli(*run, "--steps", 12, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["cache"]["reused"] > 0


def test_tasks_are_read_from_the_model_folder(models: Path):
    specs = {name: find_spec(str(models / name)) for name in FOLDERS}
    assert {name: spec.tasks for name, spec in specs.items()} == {
        "text": (TEXT, VIDEO),
        "by-token": (TEXT, IMAGE),
        "image": (IMAGE,),
        "ends": (ENDS,),
        "two-experts": (IMAGE, ENDS),
        "vace": (VACE,),
        "animate": (ANIMATE,),
    }
    assert {spec.latent_channels for spec in specs.values()} == {4}
    with_image_encoder = {name for name, spec in specs.items() if spec.image_encoder}
    assert with_image_encoder == {"image", "ends", "animate"}
    assert specs["two-experts"].boundary_ratio == 0.5
    assert find_spec(str(DEMO_FOLDER)).tasks == SPECS["demo"].tasks
