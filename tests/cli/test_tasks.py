"""Every task through `wancli generate`, on tiny real pipelines: the latents are diffusers' own."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
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
# As they are saved: a task, and what makes the folder another.
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


def flags(given: dict[str, str], files: Path) -> list[object]:
    told: list[object] = []
    for name, stems in given.items():
        for stem in stems.split():
            told += [f"--{name.replace('_', '-')}", path_of(stem, files)]
    return told


def path_of(stem: str, files: Path) -> Path:
    return files / f"{stem}.{'png' if stem.startswith('p') else 'mp4'}"


def asked(model: Path, *more: object) -> tuple[object, ...]:
    return (
        "generate", PROMPT, "--model", model, "--steps", 4, "--frames", 5, "--size", "32x32",
        "--fps", 8, "--seed", 7, "--flow-shift", 1, "--guidance-scale", 3, "-q", *more,
    )  # fmt: skip


def by_hand(
    model: Path, task: str, given: dict[str, str], files: Path, output_type: str = "latent"
) -> Any:
    """What a plain call of diffusers gives, with `given` as a user would fit it."""
    pipeline = getattr(diffusers, TASKS[task].pipeline).from_pretrained(model)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(
        pipeline.scheduler.config, flow_shift=1
    )
    pipeline.set_progress_bar_config(disable=True)
    told: dict[str, Any] = {}
    for name, stems in given.items():
        pictures: list[Image.Image] = []
        for path in (path_of(stem, files) for stem in stems.split()):
            clip = path.suffix == ".mp4"
            frames = [Image.fromarray(f) for f in read_frames(path)] if clip else [Image.open(path)]
            whole = name in ("ref_image", "face_video")
            pictures += frames if whole else [fit_image(frame, SIZE) for frame in frames]
        one = len(pictures) == 1 and TASKS[task].inputs[name] != "reference_images"
        told[TASKS[task].inputs[name]] = pictures[0] if one else pictures
    if task == VIDEO:
        told["strength"] = 0.5
    elif task == ANIMATE:
        told |= {"segment_frame_length": 5, "mode": "replace" if "mask" in given else "animate"}
    else:
        told["num_frames"] = 5
    return pipeline(
        prompt=PROMPT, negative_prompt="", num_inference_steps=4, width=32, height=32,
        guidance_scale=3.0, generator=torch.Generator().manual_seed(7), output_type=output_type,
        max_sequence_length=min(512, pipeline.tokenizer.model_max_length), **told,
    ).frames  # fmt: skip


def as_the_pipeline_gives(latents: Tensor, model: Path, task: str) -> Tensor:
    """Wan-Animate's pipeline gives latents as its VAE takes them, in its own arithmetic."""
    if task != ANIMATE:
        return latents
    config = diffusers.AutoencoderKLWan.from_pretrained(model, subfolder="vae").config
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return latents / (1.0 / std) + mean


@pytest.mark.parametrize("case", CASES)
def test_latents_are_those_of_a_plain_diffusers_call(
    wancli: Wancli, models: Path, files: Path, case: str
):
    folder, task, given = CASES[case]
    model = models / folder
    plain = by_hand(model, task, given, files)[:, :, -2:]  # the references stand first
    strength = ("--strength", 0.5) if task == VIDEO else ()
    for more in ((), ("--no-prompt-kv",)):
        said = wancli(
            *asked(model, *flags(given, files), *strength, *more), "--json", "--overwrite",
            "-o", "a.mp4", "--save-latents", "z.safetensors",
        )  # fmt: skip
        assert said.code == 0, said.err
        ours = load_file("z.safetensors")["latents"].transpose(0, 1)[None]
        assert torch.equal(as_the_pipeline_gives(ours, model, task), plain)
    record = json.loads(said.out)
    assert record["request"].get("inputs", {}).get("task", TEXT) == task
    assert len(record["timings"]["steps_ms"]) == (2 if task == VIDEO else 4)
    assert sorted(record["timings"]["sigmas"], reverse=True) == record["timings"]["sigmas"]
    info = probe(Path("a.mp4"))
    assert (info.width, info.height, info.frames) == (*SIZE, 5)


def test_a_long_animation_is_made_in_segments(wancli: Wancli, models: Path, files: Path):
    given = {"pose_video": "long", "face_video": "f2", "ref_image": "p1"}
    run = asked(models / "animate", *flags(given, files), "--frames", 9, "--segment-frames", 5)
    said = wancli(*run, "--lossless", "--json", "-o", "a.mp4")
    assert said.code == 0, said.err
    record = json.loads(said.out)
    assert len(record["timings"]["steps_ms"]) == 8
    assert record["timings"]["sigmas"][:4] == record["timings"]["sigmas"][4:]
    plain = by_hand(models / "animate", ANIMATE, given, files, output_type="np")
    levels = (plain[0] * 255).round().astype("uint8")
    assert np.array_equal(read_frames(Path("a.mp4")), levels)
    assert wancli(*run, "--overwrite", "--save-latents", "z.safetensors").code == 2
    assert wancli(*run, "--overwrite", "--cfg-gate", 3).code == 2
    assert wancli(*run, "--overwrite", "--segment-frames", 6).code == 2


def test_pictures_are_recorded_and_part_of_the_hash(wancli: Wancli, models: Path, files: Path):
    def record(picture: str) -> dict[str, Any]:
        image = ("--image", files / f"{picture}.png")
        said = wancli(*asked(models / "image", *image), "--json", "--overwrite", "-o", "a.mp4")
        told: dict[str, Any] = json.loads(said.out)
        return told

    first, second = record("p1"), record("p2")
    known = first["request"]["inputs"]
    assert known["task"] == IMAGE
    assert known["image"]["name"] == "p1.png"
    assert known["image"]["path"] == str(files / "p1.png")
    assert first["hash"] != second["hash"]
    assert first["output"]["framemd5"] != second["output"]["framemd5"]
    embedded = read_comment(Path("a.mp4")) or ""
    assert json.loads(embedded)["request"]["inputs"]["image"]["name"] == "p2.png"
    assert str(files) not in embedded
    again = (*asked(models / "image", "--image", files / "p2.png"), "-o", "a.mp4")
    assert wancli(*again, "--skip-existing").code == 0


def test_repro_takes_the_files_where_they_were_or_beside_the_record(
    wancli: Wancli, models: Path, files: Path
):
    for name in ("p1.png", "p2.png", "v1.mp4"):
        shutil.copy(files / name, name)
    Path("there").mkdir()
    run = (
        *asked(models / "vace", "--video", "v1.mp4", "--ref-image", "p1.png", "--ref-image"),
        "p2.png",
    )
    assert wancli(*run, "-o", "there/a.mp4").code == 0
    said = wancli("repro", "there/a.json", "-o", "b.mp4")
    assert "identical" in said.err, said.err
    for name in ("p1.png", "p2.png", "v1.mp4"):
        Path(name).rename(f"there/{name}")
    said = wancli("repro", "there/a.json", "-o", "c.mp4")
    assert "identical" in said.err, said.err
    shutil.copy("there/p1.png", "there/p2.png")
    said = wancli("repro", "there/a.json", "-o", "d.mp4")
    assert said.code == 4
    assert "--ref-image p2.png" in said.err


def test_another_boundary_moves_steps_from_one_expert_to_the_other(
    wancli: Wancli, models: Path, files: Path
):
    def frames(*more: object) -> str:
        run = asked(models / "two-experts", "--image", files / "p1.png", *more)
        said = wancli(*run, "--json", "--overwrite", "-o", "a.mp4")
        assert said.code == 0, said.err
        told: str = json.loads(said.out)["output"]["framemd5"]
        return told

    assert frames("--boundary-ratio", 0.5) == frames()
    assert frames("--boundary-ratio", 0.9) != frames()


@pytest.mark.parametrize("case", ["image", "vace of references", "animate"])
def test_a_gate_leaves_uncond_forwards_out(wancli: Wancli, models: Path, files: Path, case: str):
    folder, _, given = CASES[case]
    said = wancli(*asked(models / folder, *flags(given, files)), "--cfg-gate", 2, "--json")
    assert json.loads(said.out)["timings"]["forwards"] == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("case", "cache"),
    [("image", "cachedit"), ("image", "first-block"), ("vace of references", "cachedit"),
     ("video", "cachedit")],
)  # fmt: skip
def test_a_step_cache_reuses_steps(
    wancli: Wancli, models: Path, files: Path, case: str, cache: str
):
    folder, _, given = CASES[case]
    bold = {
        "cachedit": ("--cachedit-fn", 1, "--cachedit-max-warmup-steps", 2,
                     "--cachedit-residual-threshold", 1),
        "first-block": ("--step-cache-threshold", 10),
    }[cache]  # fmt: skip
    run = asked(models / folder, *flags(given, files), "--step-cache", cache, *bold)
    said = wancli(*run, "--steps", 12, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["cache"]["reused"] > 0


def test_a_folder_says_what_it_can_do(models: Path):
    told = {name: find_spec(str(models / name)) for name in FOLDERS}
    assert {name: spec.tasks for name, spec in told.items()} == {
        "text": (TEXT, VIDEO),
        "by-token": (TEXT, IMAGE),
        "image": (IMAGE,),
        "ends": (ENDS,),
        "two-experts": (IMAGE, ENDS),
        "vace": (VACE,),
        "animate": (ANIMATE,),
    }
    assert {spec.latent_channels for spec in told.values()} == {4}
    pictured = {name for name, spec in told.items() if spec.image_encoder}
    assert pictured == {"image", "ends", "animate"}
    assert told["two-experts"].boundary_ratio == 0.5
    assert find_spec(str(DEMO_FOLDER)).tasks == SPECS["demo"].tasks
