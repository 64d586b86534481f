"""Valid files of every kind that wancli reads, made once: hostile ones are derived from them."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

from tests.fuzz import warm

PARITY = Path(__file__).parents[1] / "parity"
PROMPT = "a red circle moving right"
SMALL = ("--size", "32x32", "--fps", "8", "--steps", "1", "--seed", "1")
CHUNKED = ("--size", "32x32", "--fps", "8", "--chunk-frames", "2", "--steps-list", "1000,500")

CACHED = ("--use-cachedit", "--cachedit-fn", "1", "--cachedit-max-warmup-steps", "1")

VIDEOS = ("clip.mp4", "made.mp4")
PICTURES = ("image.png", "image.jpg", "image.webp", "image.gif")
MODELS = ("tiny", "tiny-image", "tiny-two")

_PRESET = """description = "for the campaign"
extends = "demo"

[sampling]
steps = 2
guidance_scale = 1.5

[video]
num_frames = 5

[step_cache]
step_cache = "cachedit"

[tuned_for]
model = "demo"
"""
_BENCH = """prompts = ["a red circle", "a blue square"]
seeds = "0"

[variants]
exact = "--no-prompt-kv"
"""
_SCRIPT = """[[at]]
chunk = 1
prompt = "a blue circle"
"""
_LINE = '{"chunk": 1, "prompt": "a blue circle"}\n'


def make(folder: Path) -> Path:
    """Make all of them in `folder` in this process, which also warms up the code they need."""
    folder.mkdir(parents=True)
    os.environ["XDG_CONFIG_HOME"] = str(folder)
    run = partial(warm.run_here, folder=folder)
    _models(folder)
    _texts(folder)
    _pictures(folder)
    _tensors(folder)
    tiny = ("--model", "tiny", "-q")
    frames = ("--num-frames", "5")
    latents = ("--save-latents", "latents.safetensors")
    arguments = (*SMALL, *tiny, *frames, "-o", "made.mp4", *latents)
    run("generate", PROMPT, *arguments, "--preview-every", "1")
    run(
        "generate", PROMPT, *SMALL, *frames, "--model", "tiny-image", "--image", "image.png",
        "-o", "i.mp4", "-q", "--lora", "lora.safetensors", "--steps", "10", *CACHED,
    )  # fmt: skip
    run(
        "rollout", PROMPT, *CHUNKED, *tiny, "--seed", "1", "--chunks", "2", "-o", "roll.mp4",
        "--report", "drift.html",
    )  # fmt: skip
    run("decode", "latents.safetensors", "-o", "decoded.mp4", "-q")
    run("repro", "made.mp4", "-o", "again.mp4", *tiny)
    run("preview", "made.mp4", "--sheet", "s.png", "--gif", "s.gif", "--webp", "s.webp")
    run("compare", "made.mp4", "again.mp4")
    run(
        "bench", "a circle", *tiny, *SMALL, *frames, "--variant", "e: --no-prompt-kv", "-o",
        "benched",
    )  # fmt: skip
    run("model", "convert", "checkpoint.safetensors", "converted", "--config", "heads.json")
    run("preset", "save", "saved", "--steps", "3")
    return folder


def make_lightly(folder: Path) -> Path:
    """Make those that take no time: text files, and a link to the packaged model."""
    from wancli.catalog.specs import DEMO_FOLDER

    folder.mkdir(parents=True)
    _texts(folder)
    (folder / "tiny").symlink_to(DEMO_FOLDER)
    return folder


def _models(folder: Path) -> None:
    from tests.fakes import tiny_folder
    from wancli.catalog.tasks import IMAGE

    tiny_folder(folder / "tiny")
    tiny_folder(folder / "tiny-image", IMAGE)
    tiny_folder(folder / "tiny-two", experts=2)


def _texts(folder: Path) -> None:
    (folder / "good.toml").write_text(_PRESET)
    (folder / "bench.toml").write_text(_BENCH)
    (folder / "script.toml").write_text(_SCRIPT)
    (folder / "script.jsonl").write_text(_LINE)
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    (folder / "heads.json").write_text(json.dumps({"num_heads": 4}))


def _pictures(folder: Path) -> None:
    from PIL import Image

    from tests.fakes import tiny_clip, tiny_image

    tiny_clip(folder / "clip.mp4", 1, size=(32, 32))
    tiny_image(folder / "image.png", 1)
    with Image.open(folder / "image.png") as picture:
        for name in PICTURES[1:]:
            picture.save(folder / name)


def _tensors(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from tests.models.test_gguf import transformer_file

    drawn = torch.Generator().manual_seed(0)
    pair = {
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.randn(4, 24, generator=drawn),
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.randn(24, 4, generator=drawn),
    }
    save_file(pair, folder / "lora.safetensors")
    torch.save(pair, folder / "lora.pt")
    noise = torch.randn(4, 4, 4, 4, generator=drawn)
    save_file({"noise": noise, "renoise": noise.clone()}, folder / "noise.safetensors")
    save_file({"latents": noise[:2]}, folder / "start.safetensors")
    save_file({"prompt_embeds": torch.randn(1, 4, 16, generator=drawn)},
              folder / "embeds.safetensors")  # fmt: skip
    transformer_file(folder / "tiny", folder / "weights.gguf", "Q4_0")
    shutil.copyfile(PARITY / "weights_original_names.safetensors",
                    folder / "checkpoint.safetensors")  # fmt: skip
