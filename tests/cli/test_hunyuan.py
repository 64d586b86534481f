"""HunyuanVideo through `wancli generate`, on a tiny real model: latents equal diffusers' own."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoPipeline, UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cli.test_bad_input import complaint
from tests.conftest import Wancli
from tests.hunyuan import tiny_hunyuan_folder
from wancli.catalog.local import find_spec
from wancli.catalog.tasks import HUNYUAN_TEXT
from wancli.config.settings import Machine
from wancli.models.latent_rgb import fit_rgb
from wancli.models.load import load_vae
from wancli.video.read import read_comment, read_frames

PROMPT = "a red circle moving right"
STEPS = 9
CACHED = ("--use-cachedit", "--cachedit-fn", 1, "--cachedit-max-warmup-steps", 2)
# Our flags, and the same in diffusers' arguments.
CASES: dict[str, tuple[tuple[object, ...], dict[str, Any]]] = {
    "euler": ((), {}),
    "unipc": (("--scheduler", "unipc"), {}),
    "negative": (
        ("--true-cfg-scale", 3, "--negative-prompt", "a blue circle"),
        {"true_cfg_scale": 3.0, "negative_prompt": "a blue circle"},
    ),
    "first block": (("--step-cache", "first-block", "--step-cache-threshold", 1e-9), {}),
    "cachedit, other guidance, negative": (
        (
            *CACHED,
            "--cachedit-residual-threshold",
            1e-9,
            "--guidance-scale",
            2,
            "--true-cfg-scale",
            3,
        ),
        {"guidance_scale": 2.0, "true_cfg_scale": 3.0, "negative_prompt": ""},
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hunyuan_folder(tmp_path_factory.mktemp("hunyuan"))


def arguments(model: Path, *more: object) -> tuple[object, ...]:
    return (
        "generate", PROMPT, "--model", model, "--steps", STEPS, "--frames", 5, "--size", "32x48",
        "--fps", 8, "--seed", 7, "--flow-shift", 7, "--guidance-scale", 6, "--scheduler", "euler",
        "--device", "cpu", "-q", "-o", "a.mp4", *more,
    )  # fmt: skip


@cache
def parts_of(model: Path) -> dict[str, Any]:
    parts: dict[str, Any] = HunyuanVideoPipeline.from_pretrained(model).components
    return parts


@cache
def call_diffusers(model: Path, *, unipc: bool = False, **overrides: Any) -> Any:
    """Output of a plain diffusers call; the folder's scheduler already has the shift."""
    pipeline = HunyuanVideoPipeline(**parts_of(model))
    pipeline.set_progress_bar_config(disable=True)
    if unipc:
        pipeline.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=7.0
        )
    settings = {"guidance_scale": 6.0, "output_type": "latent", **overrides}
    return pipeline(
        PROMPT, num_inference_steps=STEPS, width=32, height=48, num_frames=5,
        generator=torch.Generator().manual_seed(7), **settings,
    ).frames  # fmt: skip


def generate(wancli: Wancli, model: Path, *more: object) -> tuple[dict[str, Any], Tensor]:
    """The record and the latents of one generation."""
    command = arguments(model, "--save-latents", "z.safetensors", "--overwrite", "--json", *more)
    result = wancli(*command)
    assert result.code == 0, result.err
    latents = load_file("z.safetensors")["latents"]  # [F, C, H, W]
    return json.loads(result.out), latents.transpose(0, 1)[None]


@pytest.mark.parametrize("case", CASES)
def test_latents_equal_those_of_a_plain_diffusers_call(wancli: Wancli, model: Path, case: str):
    flags, overrides = CASES[case]
    record, latents = generate(wancli, model, *flags)
    assert torch.equal(latents, call_diffusers(model, unipc=case == "unipc", **overrides))
    assert record["timings"]["forwards"] == [2 if "true_cfg_scale" in overrides else 1] * STEPS
    assert record["memory"]["prompt_kv_gib"] == 0


def test_frames_and_sigmas_equal_those_of_a_plain_diffusers_call(wancli: Wancli, model: Path):
    record, _ = generate(wancli, model, "--lossless")
    plain = call_diffusers(model, output_type="pt")[0].permute(0, 2, 3, 1)
    ours = torch.from_numpy(read_frames(Path("a.mp4")).copy())
    assert torch.equal(ours, (plain * 255).round().to(torch.uint8))
    line = [1 - i / STEPS for i in range(STEPS)]
    expected = [7 * s / (1 + 6 * s) for s in line]
    assert record["timings"]["sigmas"] == pytest.approx(expected, abs=1e-4)
    assert len(record["timings"]["steps_ms"]) == STEPS


@pytest.mark.parametrize(
    ("flags", "least"),
    [((*CACHED, "--cachedit-residual-threshold", 1), 2),  # the first block of each list
     (("--step-cache", "first-block", "--step-cache-threshold", 10), 1)],
)  # fmt: skip
def test_a_step_cache_reuses_steps(wancli: Wancli, model: Path, flags: Any, least: int):
    record, _ = generate(wancli, model, *flags)
    uses = record["timings"]["uses"]
    assert record["cache"]["reused"] > 0
    assert {use["blocks"] for use in uses if use["reused"]} == {least}
    assert {use["blocks"] for use in uses if not use["reused"]} == {5}
    assert {use["blocks_all"] for use in uses} == {5}


def test_uncond_forwards_are_skipped_after_the_gate(wancli: Wancli, model: Path):
    record, _ = generate(wancli, model, "--true-cfg-scale", 3, "--cfg-gate", 4)
    assert record["timings"]["forwards"] == [2] * 4 + [1] * (STEPS - 4)


def test_repro_and_decode_give_the_same_frames(wancli: Wancli, model: Path):
    record, _ = generate(wancli, model)
    again = wancli("repro", "a.json", "-o", "b.mp4")
    assert "identical: every frame equals" in again.err
    assert wancli("decode", "z.safetensors", "-o", "d.mp4", "-q").code == 0
    decoded = json.loads(read_comment(Path("d.mp4")) or "")
    assert decoded["hash"] == record["hash"]
    decoded_record = json.loads(Path("d.json").read_text())
    assert decoded_record["output"]["framemd5"] == record["output"]["framemd5"]


def test_previews_are_drawn_during_denoising(wancli: Wancli, model: Path):
    record, latents = generate(wancli, model, "--preview-every", 4)
    assert record["timings"]["preview_s"] > 0
    vae, _ = load_vae(find_spec(str(model)), Machine(device="cpu"))
    colors = fit_rgb(vae)(latents)
    assert colors.shape == (2, 6, 4, 3)
    assert colors.float().std() > 0


def test_a_plan_counts_the_parameters_in_the_folder(wancli: Wancli, model: Path):
    result = wancli(*arguments(model), "--dry-run", "--json")
    report = json.loads(result.out)
    pipeline = HunyuanVideoPipeline.from_pretrained(model)
    parts = {n: p for n, p in pipeline.components.items() if isinstance(p, torch.nn.Module)}
    assert report["cost"]["parameters"] == {
        name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()
    }
    assert report["plan"]["task"] == HUNYUAN_TEXT
    assert (report["plan"]["prompt_kv"], report["plan"]["guided"]) == (False, False)
    assert report["cost"]["tokens"] == 2 * 3 * 2 + 256


@pytest.mark.parametrize(
    ("flags", "error", "hint"),
    [
        (("--scheduler", "dpm++"), "--scheduler dpm++ does not work with", "--scheduler euler or"),
        (("--sampler", "few-step"), "--scheduler few-step does not work", "--scheduler euler or"),
        (("--steps-list", "1000,500"), "its pipeline sets the sigmas", "--steps-list ''"),
        (("--negative-prompt", "x"), "a negative prompt does nothing", "--true-cfg-scale 6"),
        (("--prompt-kv",), "--prompt-kv does not work with this model", "drop --prompt-kv"),
        (("--free-kv-weights",), "--free-kv-weights does not work with", "drop --free-kv-weights"),
        (("--kv-align", 64), "--kv-align does not work with", "drop --kv-align"),
        (("--cfg-gate", 0.5), "--cfg-gate needs guidance; --true-cfg-scale is 1", "drop"),
        (("--step-cache", "seacache"), "seacache gives wrong results on Hunyuan", "--use-cachedit"),
        (("--use-cachedit", "--cachedit-fn", 20), "none of 20 blocks", "--cachedit-fn 5"),
        (("--strength", 0.5), "--strength does nothing in hunyuan-text", "drop"),
        (("--guidance-scale-2", 3), "needs a model with two experts", "drop"),
        (("--image", "a.png"), "--image does not work with hunyuanvideo", "--model wan2.2-ti2v-5b"),
        (("--num-frames", 80), "--num-frames 80 is not 4k+1", "77 or 81"),
    ],
)
def test_unsupported_options_are_rejected(
    wancli: Wancli, flags: tuple[object, ...], error: str, hint: str
):
    result = wancli("generate", "a cat", "--model", "hunyuanvideo", *flags)
    message, advice = complaint(result)
    assert result.code == 2
    assert error in message
    assert hint in advice


def test_wan_rejects_true_cfg_scale(wancli: Wancli):
    result = wancli("generate", "a cat", "--true-cfg-scale", 3)
    assert complaint(result)[0] == "--true-cfg-scale does nothing in text-to-video."


def test_rollouts_reject_hunyuan_video(wancli: Wancli):
    for flags in ((), ("--force",)):
        result = wancli("rollout", "a cat", "--model", "hunyuanvideo", *flags)
        assert result.code == 2
        assert complaint(result)[0].startswith("hunyuanvideo ")


def test_a_model_without_guidance_embedding_rejects_a_guidance_scale(
    wancli: Wancli, tmp_path: Path
):
    model = tiny_hunyuan_folder(tmp_path / "skyreels", guidance_embeds=False)
    result = wancli(*arguments(model))
    assert "does not support --guidance-scale 6" in complaint(result)[0]
    record, latents = generate(wancli, model, "--guidance-scale", 1, "--true-cfg-scale", 3)
    assert torch.equal(latents, call_diffusers(model, true_cfg_scale=3.0, negative_prompt=""))
    assert record["timings"]["forwards"] == [2] * STEPS


def test_an_image_to_video_hunyuan_is_rejected(wancli: Wancli, tmp_path: Path):
    model = tiny_hunyuan_folder(tmp_path / "i2v", image_condition_type="latent_concat")
    result = wancli(*arguments(model))
    assert result.code == 4
    assert "with latent_concat: it starts from an image" in complaint(result)[0]


def test_a_missing_second_text_encoder_is_reported(wancli: Wancli, tmp_path: Path):
    model = tiny_hunyuan_folder(tmp_path / "cut")
    (model / "text_encoder_2" / "model.safetensors").unlink()
    result = wancli(*arguments(model))
    assert result.code == 4
    assert "text_encoder_2 has no weights" in complaint(result)[0]


def test_a_lora_is_merged(wancli: Wancli, model: Path):
    generator = torch.Generator().manual_seed(0)
    layers = {
        "transformer_blocks.0.attn.add_k_proj": 32,
        "single_transformer_blocks.1.proj_mlp": 64,
    }
    tensors = {}
    for layer, rows in layers.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(2, 32, generator=generator)
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    save_file(tensors, "x.safetensors")
    _, merged = generate(wancli, model, "--lora", "x.safetensors=0.5")
    pipeline = HunyuanVideoPipeline.from_pretrained(model)
    weights = dict(pipeline.transformer.named_parameters())
    with torch.no_grad():
        for layer in layers:
            down, up = (tensors[f"transformer.{layer}.lora_{x}.weight"] for x in "AB")
            weights[f"{layer}.weight"] += 0.5 * up @ down
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPT, num_inference_steps=STEPS, width=32, height=48, num_frames=5, guidance_scale=6.0,
        generator=torch.Generator().manual_seed(7), output_type="latent",
    ).frames  # fmt: skip
    assert torch.allclose(merged, expected, atol=1e-4)
    assert not torch.allclose(merged, call_diffusers(model), atol=1e-2)


def test_a_lora_in_the_original_naming_is_rejected(wancli: Wancli, model: Path):
    layer = "diffusion_model.double_blocks.0.img_attn_qkv"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 32)}
    save_file({**tensors, f"{layer}.lora_B.weight": torch.ones(96, 2)}, "x.safetensors")
    result = wancli(*arguments(model, "--lora", "x.safetensors"))
    assert result.code == 4
    assert "HunyuanVideo's original naming" in result.err


def test_a_bench_measures_a_step_cache(wancli: Wancli, model: Path):
    result = wancli(
        "bench", *arguments(model)[1:-2], "--seed", 1, "-o", "report", "--json", "--variant",
        f"fast: {' '.join(map(str, CACHED))} --cachedit-residual-threshold 1",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert Path("report/report.html").exists()


def test_a_named_attention_backend_gives_the_same_latents(wancli: Wancli, model: Path):
    _, latents = generate(wancli, model, "--attention-backend", "native")
    assert torch.equal(latents, call_diffusers(model))
