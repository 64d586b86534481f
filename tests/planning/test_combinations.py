"""Options that were made apart, together: each works, or is refused by the plan with a hint."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cli.test_bad_input import complaint
from tests.conftest import Wancli
from tests.fakes import tiny_clip, tiny_folder, tiny_image
from tests.generation.test_offload import (
    CACHES,
    CPU,
    GIVEN,
    every_way,
    loaded_for,
    same,
    settings_of,
)
from tests.hunyuan import tiny_hunyuan, tiny_hunyuan_folder
from wancli.catalog.specs import SPECS
from wancli.catalog.tasks import ANIMATE, VACE
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Machine, RolloutSettings, Settings
from wancli.config.tuned import tuned_for
from wancli.errors import PlanError, SettingsError, UsageError
from wancli.generation.denoise import clip_frames, denoise
from wancli.generation.prompts import encode_prompt
from wancli.models.load import Loaded, transformers_of
from wancli.models.offload import offload_to
from wancli.models.optimize import speed_up
from wancli.planning.inputs import NO_INPUTS
from wancli.planning.plan import make_plan
from wancli.planning.rules_machine import check_device_kind
from wancli.records.record import Request
from wancli.rollouts.resume import check_same

SMALL = ("--steps", 2, "--frames", 5, "--size", "320x64", "--seed", 1, "-q")
HUNYUAN = ("--model", "hunyuanvideo")
REFUSED: list[tuple[tuple[object, ...], str, str]] = [
    ((*HUNYUAN, "--quantize", "int8"), "--quantize int8 supports only Wan's", "--quantize none"),
    ((*HUNYUAN, "--fuse-qkv"), "--fuse-qkv supports only Wan's blocks", "--no-fuse-qkv"),
    ((*HUNYUAN, "--compile"), "--compile supports only Wan's blocks", "--no-compile"),
    (("--preset", "hunyuanvideo", "--size", "256x256"), "does nothing at 256", "--no-vae-tiling"),
    (("--no-prompt-kv", "--kv-align", 8), "--kv-align needs the prompt's K/V", "drop --no-prompt"),
    (("--vae-tiling", "--chunks", 2), "does not work in rollouts", "--no-vae-tiling"),
    (("--compile", "--chunks", 2), "--compile does not work with rollouts", "--no-compile"),
    (("--compile", "--offload", "group"), "moves weights inside the blocks", "--offload model"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message", "hint"), REFUSED)
def test_what_does_not_go_together_is_refused_with_what_to_type(
    wancli: Wancli, flags: tuple[object, ...], message: str, hint: str
):
    if "--quantize" in flags:
        pytest.importorskip("torchao", reason="pip install 'wancli[quantize]'")
    result = wancli("plan", *flags)
    assert result.code == 2
    error, advice = complaint(result)
    assert message in error
    assert advice.startswith(hint)


@pytest.mark.parametrize("name", ["dtype", "vae_dtype"])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_float16_is_refused_on_a_cpu_however_it_was_picked(device: str, name: str):
    machine = Machine(**{"device": device, name: "float16"})
    with pytest.raises(PlanError, match="float16 does not work") as caught:
        check_device_kind(machine, "cpu")
    assert caught.value.hint == f"`{name}` bfloat16"
    check_device_kind(machine.model_copy(update={"device": "auto"}), "cuda")


def shown(loaded: Loaded, settings: Settings, task: str, *, videos: int = 2) -> list[Tensor]:
    """Latents and frames of some videos of one loaded model."""
    inputs, pictures = GIVEN.get(task, (NO_INPUTS, {}))
    plan, found = make_plan(settings, loaded.spec, inputs, task=task), []
    for seed in range(videos):
        prompt = replace(
            encode_prompt(loaded, "a red circle", settings.sampling), pictures=pictures
        )
        video = denoise(loaded, prompt, settings, plan, seed=seed, on_step=lambda _: None)
        found += [video.latents, torch.from_numpy(clip_frames(loaded, video).copy())]
    return found


@every_way
@pytest.mark.parametrize(("task", "kind"), [(VACE, "int8"), (ANIMATE, "fp8")])
def test_fused_blocks_in_8_bits_are_offloaded_to_the_bit(task: str, kind: Any, way: str):
    pytest.importorskip("torchao", reason="pip install 'wancli[quantize]'")
    machine = Machine(quantize=kind, fuse_qkv=True, attention_backend="native")
    settings, found = settings_of(task), []
    for offload in (None, way):
        loaded = loaded_for(task, None)
        speed_up(transformers_of(loaded.pipeline), machine)
        if offload:
            offload_to(loaded.pipeline, CPU, offload)
        found.append(shown(loaded, settings, task, videos=1))
    assert same(*found)


@every_way
def test_hunyuan_video_in_tiles_under_a_cache_is_offloaded_to_the_bit(way: str):
    spec = replace(SPECS["hunyuanvideo"], latent_channels=4, architecture=None)
    told = {"steps": 9, "scheduler": "euler", "true_cfg_scale": 3.0}
    tables = {"sampling": told, "video": {"num_frames": 5, "width": 272, "height": 32}}
    tables |= {"prompt_kv": {"prompt_kv": False}, "step_cache": CACHES["first-block"]}
    settings = resolve([Layer("flag", tables)], Settings).settings
    found = []
    for offload in (None, way):
        pipeline = tiny_hunyuan()
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.enable_tiling()
        if offload:
            offload_to(pipeline, CPU, offload)
        found.append(shown(Loaded(pipeline, spec, CPU), settings, spec.tasks[0]))
    assert same(*found)


def made(wancli: Wancli, *flags: object) -> dict[str, Any]:
    result = wancli("generate", "a red circle", *SMALL, "--overwrite", "--json", *flags)
    assert result.code == 0, result.err
    told: dict[str, Any] = json.loads(result.out)
    return told


def test_hunyuan_video_in_bfloat16_has_previews(wancli: Wancli):
    model = tiny_hunyuan_folder(Path("model"))
    flags = ("--model", model, "--scheduler", "euler", "--dtype", "bfloat16", "--vae-tiling")
    record = made(wancli, *flags, "--preview-every", 1, "-o", "a.mp4")
    assert record["timings"]["preview_s"] > 0
    assert record["output"]["framemd5"] == made(wancli, *flags, "-o", "b.mp4")["output"]["framemd5"]


def test_segments_are_decoded_in_tiles_and_in_narrow_numbers(wancli: Wancli):
    model, size = tiny_folder(Path("model"), ANIMATE), (320, 64)
    files: tuple[object, ...] = ("--pose-video", tiny_clip(Path("p.mp4"), 1, frames=9, size=size))
    files += ("--face-video", tiny_clip(Path("f.mp4"), 2, frames=9, size=(32, 32)))
    files += ("--ref-image", tiny_image(Path("p.png"), 3, size), "--model", model)
    flags = ("--fps", 8, "--num-frames", 9, "--segment-frames", 5, *files)
    found = {
        made(wancli, *flags, *more, "-o", "a.mp4")["output"]["framemd5"]
        for more in ((), ("--vae-tiling",), ("--vae-dtype", "bfloat16"))
    }
    assert len(found) == 3


EVERYTHING = ("--layers", 2, "--fuse-qkv", "--vae-tiling", "--vae-dtype", "bfloat16", "--dtype",
              "bfloat16", "--attention-backend", "native")  # fmt: skip


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_video_of_many_options_is_made_again_decoded_and_skipped(wancli: Wancli, quantize: str):
    if quantize != "none":
        pytest.importorskip("torchao", reason="pip install 'wancli[quantize]'")
    flags = ("--model", "random:demo", *EVERYTHING, "--quantize", quantize)
    record = made(wancli, *flags, "--save-latents", "z.safetensors", "-o", "a.mp4")
    assert "identical" in wancli("repro", "a.mp4", "-o", "b.mp4").err
    decoding = wancli("decode", "z.safetensors", "-o", "d.mp4", "--json")
    assert json.loads(decoding.out)["output"]["framemd5"] == record["output"]["framemd5"]
    again = ("generate", "a red circle", *SMALL, *flags, "-o", "a.mp4", "--skip-existing")
    assert wancli(*again, "--offload", "none", "--preview-every", 1).code == 0
    for other in (("--no-vae-tiling",), ("--vae-dtype", "auto"), ("--no-fuse-qkv",)):
        assert "comes from another request" in wancli(*again, *other).err


@pytest.mark.parametrize(
    ("changed", "inputs", "goes_on"),
    [
        ({"offload": "group"}, {}, True),
        ({"vae_dtype": "bfloat16"}, {}, True),
        ({"vae_dtype": "bfloat16"}, {"image": {}}, False),
        ({"quantize": "fp8"}, {}, False),
        ({"fuse_qkv": True}, {}, False),
        ({"layers": 2}, {}, False),
    ],
)
def test_a_rollout_goes_on_only_with_what_changes_no_latents(
    changed: dict[str, Any], inputs: dict[str, Any], goes_on: bool
):
    before, now = (
        Request("x", 1, RolloutSettings(machine=Machine(**more)), {}, inputs=inputs).as_json()
        for more in ({}, changed)
    )
    if goes_on:
        check_same(before, now, keep=1)
        return
    with pytest.raises(UsageError, match=f"machine.{next(iter(changed))} was"):
        check_same(before, now, keep=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"quantize": "int8"}, "machine.quantize none, not int8"),
        ({"fuse_qkv": True}, "machine.fuse_qkv False, not True"),
        ({"compile": True}, "machine.compile False, not True"),
        ({"layers": 2}, "machine.layers none, not 2"),
        ({"lora": ("a.safetensors", "b.safetensors=0.5")}, "lora none, not a.safetensors,b.safe"),
    ],
)
def test_a_tuned_cache_is_refused_on_blocks_that_are_others(changed: dict[str, Any], message: str):
    def resolved(machine: dict[str, Any], key: dict[str, Any]) -> Settings:
        tuned = Layer("preset t", {"step_cache": {"step_cache": "cachedit"}}, key)
        return resolve([tuned, Layer("flag", {"machine": machine})], Settings).settings

    here = {"device": "cpu", "dtype": "float32", "attention_backend": "native"}
    key = tuned_for(resolved({}, {}), here)
    resolved({}, key)
    with pytest.raises(SettingsError, match=message):
        resolved(changed, key)
    resolved(changed, tuned_for(resolved(changed, {}), here))
