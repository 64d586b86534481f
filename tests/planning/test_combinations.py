"""Combinations of options: each works, or the plan rejects it with a hint."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.cli.test_bad_input import complaint
from tests.conftest import Wancli
from tests.fakes import tiny_clip, tiny_folder, tiny_image
from tests.generation.test_offload import (
    CACHES,
    CPU,
    every_mode,
    loaded_for,
    same,
    settings_of,
    videos_of,
)
from tests.hunyuan import tiny_hunyuan, tiny_hunyuan_folder
from wancli.catalog.specs import SPECS
from wancli.catalog.tasks import ANIMATE, VACE
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Machine, Rollout, RolloutSettings, Settings
from wancli.config.tuned import tuned_for
from wancli.errors import PlanError, SettingsError, UsageError
from wancli.models.load import Loaded, transformers_of
from wancli.models.offload import place
from wancli.models.optimize import speed_up
from wancli.planning.rules_machine import check_device_kind
from wancli.records.record import Request
from wancli.rollouts.resume import check_same

SMALL = ("--steps", 2, "--frames", 5, "--size", "320x32", "--seed", 1, "-q")
HUNYUAN = ("--model", "hunyuanvideo")
REJECTED: list[tuple[tuple[object, ...], str, str]] = [
    ((*HUNYUAN, "--quantize", "int8"), "--quantize int8 supports only Wan's", "--quantize none"),
    ((*HUNYUAN, "--fuse-qkv"), "--fuse-qkv supports only Wan's blocks", "--no-fuse-qkv"),
    ((*HUNYUAN, "--compile"), "--compile supports only Wan's blocks", "--no-compile"),
    (("--preset", "hunyuanvideo", "--size", "256x256"), "does nothing at 256", "--no-vae-tiling"),
    (("--no-prompt-kv", "--kv-align", 8), "needs the prompt K/V cache", "drop --no-prompt"),
    (("--vae-tiling", "--chunks", 2), "does not work in rollouts", "--no-vae-tiling"),
    (("--compile", "--offload", "group"), "moves weights inside the blocks", "--offload model"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message", "hint"), REJECTED)
def test_incompatible_flags_are_rejected_with_a_hint(
    wancli: Wancli, flags: tuple[object, ...], message: str, hint: str
):
    if "--quantize" in flags:
        pytest.importorskip("torchao", reason="pip install torchao")
    result = wancli("plan", *flags)
    assert result.code == 2
    error, advice = complaint(result)
    assert message in error
    assert advice.startswith(hint)


@pytest.mark.parametrize("name", ["dtype", "vae_dtype"])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_float16_is_rejected_on_a_cpu_named_or_detected(device: str, name: str):
    machine = Machine(**{"device": device, name: "float16"})
    with pytest.raises(PlanError, match="float16 does not work") as caught:
        check_device_kind(machine, "cpu")
    assert caught.value.hint == f"`{name}` bfloat16"
    check_device_kind(machine.model_copy(update={"device": "auto"}), "cuda")


@cache
def fused_output(task: str, kind: Any, offload: str | None) -> list[Tensor]:
    machine = Machine(quantize=kind, fuse_qkv=True, attention_backend="native")
    loaded = loaded_for(task, None)
    speed_up(transformers_of(loaded.pipeline), machine)
    if offload:
        place(loaded.pipeline, CPU, offload)
    return videos_of(loaded, settings_of(task), task, count=1)


@every_mode
@pytest.mark.parametrize(("task", "kind"), [(VACE, "int8"), (ANIMATE, "fp8")])
def test_fused_quantized_blocks_are_bit_identical_when_offloaded(task: str, kind: Any, mode: str):
    pytest.importorskip("torchao", reason="pip install torchao")
    assert same(fused_output(task, kind, mode), fused_output(task, kind, None))


@cache
def hunyuan_output(offload: str | None) -> list[Tensor]:
    """With tiles and a step cache."""
    spec = replace(SPECS["hunyuanvideo"], latent_channels=4, architecture=None)
    sampling = {"steps": 9, "scheduler": "euler", "true_cfg_scale": 3.0}
    tables = {"sampling": sampling, "video": {"num_frames": 5, "width": 272, "height": 32}}
    tables |= {"prompt_kv": {"prompt_kv": False}, "step_cache": CACHES["first-block"]}
    settings = resolve([Layer("flag", tables)], Settings).settings
    pipeline = tiny_hunyuan()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_tiling()
    if offload:
        place(pipeline, CPU, offload)
    return videos_of(Loaded(pipeline, spec, CPU), settings, spec.tasks[0])


@pytest.mark.slow
@every_mode
def test_hunyuan_video_with_tiling_and_a_cache_is_bit_identical_when_offloaded(mode: str):
    assert same(hunyuan_output(mode), hunyuan_output(None))


def generate(wancli: Wancli, *flags: object) -> dict[str, Any]:
    result = wancli("generate", "a red circle", *SMALL, "--overwrite", "--json", *flags)
    assert result.code == 0, result.err
    record: dict[str, Any] = json.loads(result.out)
    return record


def test_hunyuan_video_in_bfloat16_has_previews(wancli: Wancli):
    model = tiny_hunyuan_folder(Path("model"))
    flags = ("--model", model, "--scheduler", "euler", "--dtype", "bfloat16", "--vae-tiling")
    record = generate(wancli, *flags, "--preview-every", 1, "-o", "a.mp4")
    assert record["timings"]["preview_s"] > 0
    assert (
        record["output"]["framemd5"]
        == generate(wancli, *flags, "-o", "b.mp4")["output"]["framemd5"]
    )


@pytest.mark.slow
def test_segments_can_be_decoded_with_tiling_and_in_bfloat16(wancli: Wancli):
    model, size = tiny_folder(Path("model"), ANIMATE), (320, 32)
    files: tuple[object, ...] = ("--pose-video", tiny_clip(Path("p.mp4"), 1, frames=9, size=size))
    files += ("--face-video", tiny_clip(Path("f.mp4"), 2, frames=9, size=(32, 32)))
    files += ("--ref-image", tiny_image(Path("p.png"), 3, size), "--model", model)
    flags = ("--fps", 8, "--num-frames", 9, "--segment-frames", 5, *files)
    digests = {
        generate(wancli, *flags, *more, "-o", "a.mp4")["output"]["framemd5"]
        for more in ((), ("--vae-tiling",), ("--vae-dtype", "bfloat16"))
    }
    assert len(digests) == 3


MANY_OPTIONS = ("--layers", 2, "--fuse-qkv", "--vae-tiling", "--vae-dtype", "bfloat16", "--dtype",
              "bfloat16", "--attention-backend", "native", "--quantize", "int8")  # fmt: skip


def test_repro_decode_and_skip_existing_work_with_many_options(wancli: Wancli):
    pytest.importorskip("torchao", reason="pip install torchao")
    flags = ("--model", "random:demo", *MANY_OPTIONS)
    record = generate(wancli, *flags, "--save-latents", "z.safetensors", "-o", "a.mp4")
    assert "identical" in wancli("repro", "a.mp4", "-o", "b.mp4").err
    decoding = wancli("decode", "z.safetensors", "-o", "d.mp4", "--json")
    assert json.loads(decoding.out)["output"]["framemd5"] == record["output"]["framemd5"]
    again = ("generate", "a red circle", *SMALL, *flags, "-o", "a.mp4", "--skip-existing")
    assert wancli(*again, "--offload", "none", "--preview-every", 1).code == 0
    for other in (("--no-vae-tiling",), ("--vae-dtype", "auto"), ("--no-fuse-qkv",)):
        assert "comes from another request" in wancli(*again, *other).err


# Frames that the VAE decoded are encoded again, and later chunks depend on them.
PLAIN, REENCODING = Rollout(), Rollout(kv_recompute=True, reencode_first=True)


@pytest.mark.parametrize(
    ("changes", "rollout", "inputs", "resumes"),
    [
        ({"offload": "group"}, PLAIN, {}, True),
        ({"vae_dtype": "bfloat16"}, PLAIN, {}, True),
        ({"vae_dtype": "bfloat16"}, PLAIN, {"image": {}}, False),
        ({"vae_dtype": "bfloat16"}, REENCODING, {}, False),
        ({"vae_decoder": "tiny"}, PLAIN, {"image": {}}, True),
        ({"vae_decoder": "tiny"}, REENCODING, {}, False),
        ({"vae_exact": True}, PLAIN, {"image": {}}, True),
        ({"vae_exact": True}, REENCODING, {}, False),
        ({"quantize": "fp8"}, PLAIN, {}, False),
        ({"fuse_qkv": True}, PLAIN, {}, False),
        ({"layers": 2}, PLAIN, {}, False),
    ],
)
def test_a_rollout_resumes_only_with_settings_that_change_no_latents(
    changes: dict[str, Any], rollout: Rollout, inputs: dict[str, Any], resumes: bool
):
    before, now = (
        Request(
            "x", 1, RolloutSettings(machine=Machine(**more), rollout=rollout), {}, inputs=inputs
        ).as_json()
        for more in ({}, changes)
    )
    if resumes:
        check_same(before, now, keep=1)
        return
    with pytest.raises(UsageError, match=f"machine.{next(iter(changes))} was"):
        check_same(before, now, keep=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": "int8"}, "machine.quantize none, not int8"),
        ({"fuse_qkv": True}, "machine.fuse_qkv False, not True"),
        ({"compile": True}, "machine.compile False, not True"),
        ({"layers": 2}, "machine.layers none, not 2"),
        ({"lora": ("a.safetensors", "b.safetensors=0.5")}, "lora none, not a.safetensors,b.safe"),
    ],
)
def test_a_tuned_cache_is_rejected_for_changed_blocks(changes: dict[str, Any], message: str):
    def resolved(machine: dict[str, Any], key: dict[str, Any]) -> Settings:
        tuned = Layer("preset t", {"step_cache": {"step_cache": "cachedit"}}, key)
        return resolve([tuned, Layer("flag", {"machine": machine})], Settings).settings

    machine = {"device": "cpu", "dtype": "float32", "attention_backend": "native"}
    key = tuned_for(resolved({}, {}), machine)
    resolved({}, key)
    with pytest.raises(SettingsError, match=message):
        resolved(changes, key)
    resolved(changes, tuned_for(resolved(changes, {}), machine))
