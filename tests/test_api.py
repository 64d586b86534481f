"""The door for Python: what `wancli` gives to those who import it."""

import doctest
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import diffusers
import numpy as np
import pytest
import torch
import transformers

import wancli
from tests.conftest import Wancli
from wancli import api
from wancli.api.keywords import with_keywords
from wancli.config import keywords
from wancli.config.resolve import fields_of
from wancli.config.settings import RolloutSettings, Settings
from wancli.models.offload import place
from wancli.video.latents import keep_latents
from wancli.video.read import read_frames

PROMPT = "a red circle moving right"
SMALL: dict[str, Any] = {"steps": 2, "num_frames": 5, "size": (32, 32), "fps": 8}
CHUNKS: dict[str, Any] = {
    "size": "32x32", "fps": 8, "chunks": 3, "chunk_frames": 2, "scheduler": "unipc", "steps": 2
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run_wancli(wancli: Wancli) -> Wancli:
    """The command line; its usual fixture has the name of the package."""
    return wancli


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> Iterator[wancli.Model]:
    with wancli.load(str(tiny_model), **SMALL) as model:
        yield model


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_importing_wancli_imports_nothing_else():
    program = "import sys; before = {*sys.modules}; import wancli; print({*sys.modules} - before)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    assert out.decode().strip() == "{'wancli'}"


def test_every_public_name_exists_and_is_documented():
    for name in wancli.__all__:
        assert getattr(wancli, name).__doc__, name
    assert set(wancli.__all__) <= set(dir(wancli))
    with pytest.raises(AttributeError, match="genrate"):
        getattr(wancli, "genrate")  # noqa: B009 - mypy knows that there is none


@pytest.mark.parametrize(
    ("kind", "tables"),
    [
        (keywords.SharedSettings, ("sampling", "video", "step_cache", "output")),
        (keywords.ClipSettings, ("sampling", "video", "prompt_kv")),
        (keywords.ChunkSettings, ("rollout",)),
        (keywords.MachineSettings, ("machine",)),
    ],
)
def test_keywords_have_the_types_of_the_settings(kind: Any, tables: tuple[str, ...]):
    settings = {
        name: info.annotation for t, name, info in fields_of(RolloutSettings) if t in tables
    }
    hints = {n: h for n, h in get_type_hints(kind).items() if n not in ("size", "use_cachedit")}
    one_or_several = {(name, hints[name]) for name in ("lora", "transformer") if name in hints}
    assert hints.items() - settings.items() == one_or_several


def test_every_setting_has_a_keyword():
    clip = {name for _, name, _ in fields_of(Settings)}
    rollout = {name for table, name, _ in fields_of(RolloutSettings) if table == "rollout"}
    assert clip - {"model"} <= api.GenerateKeywords.__optional_keys__
    assert rollout <= api.RolloutKeywords.__optional_keys__
    assert not rollout & api.GenerateKeywords.__optional_keys__
    assert clip | rollout == {"model"} | {
        name for name in api.LoadKeywords.__optional_keys__ if keywords.is_setting(name)
    } - {"size", "use_cachedit"}


def test_a_video_without_an_output_has_frames_and_a_record_and_writes_nothing(
    small: wancli.Model, capfd: pytest.CaptureFixture[str]
):
    events: list[object] = []
    video = small.generate(
        PROMPT, seed=1, save_latents="z.st", preview_every=1, progress=events.append
    )
    assert (video.path, video.seed, video.fps) == (None, 1, 8)
    assert video.frames.shape == (5, 32, 32, 3)
    assert video.frames.dtype == np.uint8
    assert video.record["output"] == {"frames": 5, "duration_s": 0.625}
    assert video.record["request"]["sources"]["sampling.steps"] == "argument"
    assert names() == ["z.st"]
    kinds = [type(event).__name__ for event in events]
    assert kinds == [*["Phase"] * 2, *["Step", "PreviewEvent"] * 2, "Phase", *["Decoded"] * 2]
    assert events[-2:] == [wancli.Decoded(1, 5), wancli.Decoded(5, 5)]
    assert capfd.readouterr() == ("", "")


def test_the_command_line_makes_the_same_video(tiny_model: Path, run_wancli: Wancli):
    video = wancli.generate(PROMPT, model=str(tiny_model), seed=1, output="door.mp4", **SMALL)
    assert repr(video) == "Video(32x32, 5 frames, path=PosixPath('door.mp4'))"
    flags = ("--steps", 2, "--frames", 5, "--size", "32x32", "--fps", 8)
    result = run_wancli(
        "generate", PROMPT, "--model", tiny_model, "--seed", 1, *flags, "-o", "cli.mp4", "--json"
    )
    record = json.loads(result.out)
    assert video.path == Path("door.mp4")
    assert json.loads(Path("door.json").read_text()) == video.record
    for key in ("hash", "command"):
        assert video.record[key] == record[key]
    assert video.record["output"]["framemd5"] == record["output"]["framemd5"]


@pytest.fixture(scope="module")
def lora(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise for the first attention of the tiny transformer."""
    from safetensors.torch import save_file

    path, generator = tmp_path_factory.mktemp("lora") / "a.safetensors", torch.Generator()
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 24), (24, 2)))
    layer = "transformer.blocks.0.attn1.to_q"
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, path)
    return path


STEP_CACHE: dict[str, Any] = {
    "steps": 9, "use_cachedit": True, "cachedit_fn": 1, "cachedit_max_warmup_steps": 2,
    "cachedit_residual_threshold": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        STEP_CACHE,
        {"steps": 9, "step_cache": "first-block", "step_cache_threshold": 1.0},
        {"steps": 9, "cfg_gate": 0.5},
        {"scheduler": "euler", "flow_shift": 2},
    ],
    ids=lambda settings: settings.get("step_cache", " ".join(settings)) or "plain",
)
def test_a_loaded_model_gives_the_same_videos_as_fresh_ones(
    tiny_model: Path, small: wancli.Model, settings: Any
):
    small.generate("a blue circle", seed=2, scheduler="dpm++")
    small.generate(PROMPT, seed=2, **settings)
    again = small.generate(PROMPT, seed=1, **settings)
    fresh = wancli.generate(PROMPT, model=str(tiny_model), seed=1, **(SMALL | settings))
    assert fresh.latents is not None
    assert again.latents is not None
    assert torch.equal(fresh.latents, again.latents)
    assert np.array_equal(fresh.frames, again.frames)
    assert fresh.record["hash"] == again.record["hash"]


def test_a_lora_is_merged_once(tiny_model: Path, lora: Path):
    plain, merged = (
        wancli.generate(PROMPT, model=str(tiny_model), seed=1, lora=file, **SMALL).frames
        for file in ((), str(lora))
    )
    assert not np.array_equal(plain, merged)
    with wancli.load(str(tiny_model), lora=[str(lora)], **SMALL) as model:
        for _ in range(2):
            assert np.array_equal(model.generate(PROMPT, seed=1).frames, merged)


@pytest.mark.parametrize("way", ["model", "group", "sequential"])
def test_an_offloaded_model_is_reproducible(
    tiny_model: Path, small: wancli.Model, way: str, monkeypatch: pytest.MonkeyPatch
):
    def offloaded(pipeline: Any, device: torch.device, _offload: str, *, stays: Any) -> None:
        place(pipeline, device, way, stays=stays)

    monkeypatch.setattr("wancli.models.load.place", offloaded)  # the settings refuse it on a CPU
    expected = small.generate(PROMPT, seed=1, **STEP_CACHE)
    with wancli.load(str(tiny_model), **SMALL) as model:
        for _ in range(2):
            again = model.generate(PROMPT, seed=1, **STEP_CACHE)
            assert np.array_equal(again.frames, expected.frames)


def test_a_loaded_model_can_change_its_task(tiny_model: Path, small: wancli.Model):
    small.generate(PROMPT, seed=1, output="a.mp4", lossless=True)
    from_clip: dict[str, Any] = {"video": "a.mp4", "strength": 0.5}
    fresh = wancli.generate(PROMPT, model=str(tiny_model), seed=2, **(SMALL | from_clip))
    again = small.generate(PROMPT, seed=2, video="a.mp4", strength=0.5)
    assert fresh.record["request"]["inputs"]["task"] == "video-to-video"
    assert np.array_equal(fresh.frames, again.frames)
    assert "inputs" not in small.generate(PROMPT, seed=1).record["request"]


def test_closing_a_model_frees_its_memory(tiny_model: Path):
    with wancli.load(str(tiny_model), **SMALL) as model:
        model.generate(PROMPT, seed=1)
        stream = model.rollout(PROMPT, **CHUNKS)
        next(stream)
        stream.close()
        loaded = model._pipeline._loaded
        assert loaded is not None
        parts = [weakref.ref(loaded.pipeline.transformer), weakref.ref(loaded.pipeline.vae)]
        del loaded
    assert [part() for part in parts] == [None, None]
    with pytest.raises(wancli.UsageError, match="closed"):
        model.generate(PROMPT)


def process() -> Mapping[str, object]:
    """What a library must leave as it finds it."""
    return {
        "signals": {n: signal.getsignal(n) for n in signal.valid_signals()},
        "environment": dict(os.environ),
        "hooks": (sys.excepthook, sys.unraisablehook, sys.stdout, sys.stderr),
        "verbosity": [m.utils.logging.get_verbosity() for m in (diffusers, transformers)],
        "bars": [m.utils.logging.is_progress_bar_enabled() for m in (diffusers, transformers)],
        "warnings": list(warnings.filters),
        "random": torch.get_rng_state().tolist(),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        "threads": threading.active_count(),
        "folder": Path.cwd(),
    }


def changed(before: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in process().items() if value != before[name]}


def test_the_state_of_the_calling_process_is_unchanged(
    tiny_model: Path, capfd: pytest.CaptureFixture[str]
):
    import cache_dit  # noqa: F401 - imports set variables of the environment

    before = process()
    with wancli.load(str(tiny_model), **SMALL) as model:
        assert changed(before) == {}
        model.generate(PROMPT, seed=1, output="a.mp4", **STEP_CACHE)
        for _ in model.rollout(PROMPT, output="b.mp4", **CHUNKS):
            assert changed(before) == {}
    assert changed(before) == {}
    assert capfd.readouterr() == ("", "")


def test_chunks_add_up_to_the_frames_of_the_video(tiny_model: Path, small: wancli.Model):
    stream = wancli.rollout(PROMPT, model=str(tiny_model), seed=1, **CHUNKS)
    chunks = list(stream)
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert [len(chunk.frames) for chunk in chunks] == [5, 8, 8]
    assert chunks[0].latents.shape == (1, 4, 2, 4, 4)
    assert stream.record is not None
    assert stream.record["output"] == {"frames": 21, "duration_s": 2.625}
    assert names() == []
    loaded = small.rollout(PROMPT, seed=1, output="a.mp4", lossless=True, **CHUNKS)
    frames = np.concatenate([chunk.frames for chunk in loaded])
    assert np.array_equal(frames, np.concatenate([chunk.frames for chunk in chunks]))
    assert np.array_equal(frames, read_frames(Path("a.mp4")))
    assert loaded.path == Path("a.mp4")
    assert loaded.record == json.loads(Path("a.json").read_text())


@pytest.mark.parametrize("files", [False, True])
def test_an_abandoned_rollout_cleans_up(small: wancli.Model, files: bool):
    output: Any = {"output": "a.mp4"} if files else {}
    for chunk in small.rollout(PROMPT, seed=1, **CHUNKS, **output):
        assert chunk.index == 0
        break
    gc.collect()
    left = ["a.part.mp4", "a.rollout"] if files else []
    assert names() == left
    expected = [chunk.frames for chunk in small.rollout(PROMPT, seed=1, **CHUNKS)]
    if files:
        again = list(small.rollout(resume=True, output="a.mp4"))
        assert [chunk.generated for chunk in again] == [False, True, True]
        assert names() == ["a.json", "a.mp4", "a.rollout"]
        assert np.array_equal(np.concatenate([c.frames for c in again]), np.concatenate(expected))


def test_a_rollout_that_never_starts_writes_nothing(small: wancli.Model):
    small.rollout(PROMPT, output="a.mp4", **CHUNKS).close()
    assert names() == []


def test_a_rollout_that_runs_out_of_memory_says_what_needs_less(
    small: wancli.Model, monkeypatch: pytest.MonkeyPatch
):
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24 GiB.")

    monkeypatch.setattr("wancli.rollouts.sampler.ChunkSampler.__call__", run_out)
    with pytest.raises(wancli.CapacityError) as caught:
        next(small.rollout(PROMPT, **CHUNKS))
    smaller = "or a smaller `rolling_window` or `size`"
    assert caught.value.hint == f'`dtype="bfloat16"`, {smaller}'


def test_a_model_makes_one_video_at_a_time(small: wancli.Model):
    with small.rollout(PROMPT, **CHUNKS) as stream:
        next(stream)
        with pytest.raises(wancli.UsageError, match="one video at a time"):
            small.generate(PROMPT)
        next(stream)
    assert small.generate(PROMPT).path is None


def test_two_rollouts_may_share_a_folder_but_not_a_name(tiny_model: Path, small: wancli.Model):
    whole: dict[str, Any] = {"model": str(tiny_model), **CHUNKS}
    with small.rollout(PROMPT, output="a.mp4", **CHUNKS) as first:
        next(first)
        with wancli.rollout(PROMPT, output="b.mp4", **whole) as second:
            next(second)
        with pytest.raises(wancli.UsageError, match="being written by this process"):
            next(wancli.rollout(PROMPT, output="a.mp4", overwrite=True, **whole))
        assert len(list(first)) == 2
    assert ".wancli.lock" not in names()


def test_prompts_can_change_during_a_rollout(small: wancli.Model):
    stream = small.rollout(PROMPT, at={1: "a blue circle"}, **CHUNKS)
    assert len(list(stream)) == 3
    assert stream.record is not None
    assert stream.record["request"]["inputs"]["changes"] == [[1, "a blue circle"]]


def test_skip_existing_reads_the_existing_video(small: wancli.Model):
    generated = small.generate(PROMPT, seed=1, output="a.mp4", lossless=True)
    existing = small.generate(PROMPT, seed=1, output="a.mp4", lossless=True, skip_existing=True)
    assert np.array_equal(generated.frames, existing.frames)
    assert existing.record["id"] == generated.record["id"]
    with pytest.raises(wancli.UsageError, match="exists"):
        small.generate(PROMPT, seed=1, output="a.mp4")


def test_latents_kept_of_a_failed_video_go_once_it_is_there(small: wancli.Model):
    video = small.generate(PROMPT, seed=1, output="a.mp4")
    assert keep_latents(torch.zeros(1, 1, 1, 1, 1), Path("a.mp4"), video.record)
    small.generate(PROMPT, seed=1, output="a.mp4", overwrite=True)
    assert names() == ["a.json", "a.mp4"]


def test_a_plan_checks_capacity_without_loading():
    fits = wancli.plan(PROMPT, model="demo")
    assert fits.fits
    assert fits.plan["steps"] == 20
    assert fits.needed == fits.cost["resident"]["none"]
    huge = wancli.plan(model="demo", size=(16384, 16384), num_frames=4001, device="cpu")
    assert not huge.fits
    assert "size" in huge.hint
    assert wancli.plan(model="demo", chunks=9).plan["chunks"] == 9
    assert wancli.plan(model="some-owner/some-model").fits is None


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("drop `cfg_gate`, or `cfg_gate 0.6`", "drop `cfg_gate`, or `cfg_gate=0.6`"),
        ("`use_cachedit`, or `no_compile`", "`use_cachedit=True`, or `compile=False`"),
        ("drop `free_kv_weights`", "drop `free_kv_weights`"),
        ("drop `no_prompt_kv`", "drop `prompt_kv=False`"),
        ("`size 832x480`, `chunks N`", '`size="832x480"`, `chunks=N`'),
        ("`negative_prompt ''`", "`negative_prompt=''`"),
        ("did you mean `steps`?", "did you mean `steps`?"),
    ],
)
def test_hints_can_be_typed_in_python(text: str, python: str):
    assert with_keywords(text, hint=True) == python
    assert with_keywords(python, hint=True) == python


# mypy sees what is wrong, too: an `ignore` without need would be an error.
def test_errors_name_keyword_arguments_not_flags(tiny_model: Path):
    with pytest.raises(wancli.SettingsError, match="`stepz` is not a setting") as unknown:
        wancli.generate(PROMPT, stepz=3)  # type: ignore[call-arg]
    assert unknown.value.hint == "did you mean `steps`?"
    with pytest.raises(wancli.SettingsError, match="`chunks` is not a setting of generate"):
        wancli.generate(PROMPT, chunks=3)  # type: ignore[call-arg]
    with pytest.raises(wancli.SettingsError, match="`steps` 'many'"):
        wancli.generate(PROMPT, steps="many")  # type: ignore[arg-type]
    with pytest.raises(wancli.SettingsError, match="`scheduler` 'best'"):
        wancli.plan(PROMPT, scheduler="best")  # type: ignore[arg-type]
    for prompt, words in ((" ", "prompt is empty"), ("a\udcff", "is not UTF-8 text")):
        with pytest.raises(wancli.UsageError, match=words):
            wancli.rollout(prompt)
    with pytest.raises(wancli.UsageError, match="`width` is set twice"):
        wancli.plan(size="32x32", width=48)
    with pytest.raises(wancli.PlanError, match="`rolling_window=3`") as error:
        wancli.plan(chunks=3, rolling_window=3, sink_frames=2)
    assert error.value.hint == "`rolling_window=5` or more"
    with pytest.raises(wancli.PlanError) as off:
        wancli.plan(PROMPT, compile=True, step_cache="seacache")
    assert "`compile=False`" in off.value.hint
    with pytest.raises(wancli.UsageError, match="`resume` needs"):
        wancli.rollout(resume=True)
    with pytest.raises(wancli.ModelError, match="^model 'nope' not found"):
        wancli.load("nope")
    with pytest.raises(wancli.SettingsError) as frames:
        wancli.rollout(PROMPT, num_frames=9)  # type: ignore[call-arg]
    assert frames.value.hint.startswith("`chunks=N`")
    Path("a.mp4").touch()
    with pytest.raises(wancli.UsageError, match="a.mp4 exists"):
        wancli.rollout(PROMPT, output="a.mp4")
    with wancli.load(str(tiny_model)) as model, pytest.raises(wancli.SettingsError):
        model.generate(PROMPT, dtype="bfloat16")  # type: ignore[call-arg]


@pytest.mark.slow
def test_the_examples_of_the_docstrings_run():
    result = doctest.testmod(api, extraglobs={"wancli": wancli})
    assert result.attempted == 5
    assert result.failed == 0
