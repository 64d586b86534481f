"""`wancli generate`, `repro`, `show` and `decode`, through main(), on a tiny real pipeline."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file

from tests.conftest import Made, Wancli
from tests.fakes import tiny_clip
from wancli.utils import interrupts
from wancli.video.ffmpeg import Encoding
from wancli.video.read import probe, read_comment
from wancli.video.write import framemd5

PROMPT = "a red circle moving right"
SMALL = ("--steps", 2, "--frames", 5, "--size", "32x32", "--fps", 8)


def small(model: Path) -> tuple[object, ...]:
    return ("generate", PROMPT, "--model", model, *SMALL)


def test_generate_writes_a_video_and_its_sidecar_and_prints_the_path(
    wancli: Wancli, tiny_model: Path
):
    result = wancli(*small(tiny_model), "--seed", 1, "-o", "out/a.mp4")
    assert result.code == 0, result.err
    assert result.out == "out/a.mp4\n"
    info = probe(Path("out/a.mp4"))
    assert (info.width, info.height, info.frames, info.fps) == (32, 32, 5, 8)
    assert sorted(p.name for p in Path("out").iterdir()) == ["a.json", "a.mp4"]


@pytest.mark.slow
def test_the_first_step_of_a_compiled_video_is_timed_apart(wancli: Wancli, tiny_model: Path):
    result = wancli(*small(tiny_model), "--compile", "--json", "-q")
    assert result.code == 0, result.err
    timings = json.loads(result.out)["timings"]
    first, second = timings["steps_ms"]
    assert timings["first_step_s"] == pytest.approx(first / 1000, abs=1e-4)  # as rounded
    assert timings["denoise_s"] >= 0.999 * second / 1000
    assert timings["denoise_s"] < timings["first_step_s"]


def test_latents_are_those_of_a_plain_diffusers_call(wancli: Wancli, tiny_model: Path):
    result = wancli(
        *small(tiny_model), "--seed", 7, "--guidance-scale", 3, "--flow-shift", 2.5,
        "--negative-prompt", "blue", "--save-latents", "z.safetensors",
    )  # fmt: skip
    assert result.code == 0, result.err
    pipeline = WanPipeline.from_pretrained(tiny_model)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(
        pipeline.scheduler.config, flow_shift=2.5
    )
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline(
        PROMPT, "blue", num_inference_steps=2, num_frames=5, width=32, height=32,
        guidance_scale=3.0, generator=torch.Generator().manual_seed(7), max_sequence_length=16,
        output_type="latent",
    ).frames  # fmt: skip
    ours = load_file("z.safetensors")["latents"]
    assert torch.equal(ours.transpose(0, 1)[None], plain)


@pytest.mark.parametrize("scheduler", ["unipc", "dpm++", "euler"])
def test_sigmas_decrease_with_every_scheduler(wancli: Wancli, tiny_model: Path, scheduler: str):
    result = wancli(*small(tiny_model), "--steps", 4, "--scheduler", scheduler, "--json", "-q")
    record = json.loads(result.out)
    sigmas = record["timings"]["sigmas"]
    assert len(sigmas) == 4
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[0] == pytest.approx(1.0, abs=1e-3)


def test_json_output_sidecar_and_video_hold_the_same_record(wancli: Wancli, tiny_model: Path):
    result = wancli(*small(tiny_model), "--seed", 3, "--json", "-o", "a.mp4")
    record = json.loads(result.out)
    assert record == json.loads(Path("a.json").read_text())
    required = "schema id status command created request hash output timings memory env error"
    assert set(record) == set(required.split())
    assert record["request"]["seed"] == 3
    assert record["request"]["sources"]["sampling.steps"] == "flag"
    assert record["output"]["framemd5"] == framemd5(Path("a.mp4"))
    assert len(record["timings"]["steps_ms"]) == 2
    embedded = json.loads(read_comment(Path("a.mp4")) or "")
    assert embedded["request"]["prompt"] == PROMPT
    assert str(tiny_model) not in json.dumps(embedded)
    assert embedded["env"] == {}
    times, whole = embedded["timings"], record["timings"]
    assert set(times) == {name for name in whole if name.endswith("_s")}
    assert times["denoise_s"] < times["total_s"] <= whole["total_s"]


def test_previews_change_neither_the_latents_nor_the_request(wancli: Wancli, tiny_model: Path):
    records = []
    for name, extra in (("plain", ()), ("shown", ("--preview-every", 1))):
        result = wancli(
            *small(tiny_model), "--steps", 4, "--seed", 7, "-o", f"out/{name}.mp4", "--json",
            "--save-latents", f"{name}.safetensors", *extra,
        )  # fmt: skip
        assert result.code == 0, result.err
        records.append(json.loads(result.out))
        assert ("preview: out/shown.preview.png" in result.err) == (name == "shown")
    plain, shown = (load_file(f"{name}.safetensors")["latents"] for name in ("plain", "shown"))
    assert torch.equal(plain, shown)
    assert records[0]["hash"] == records[1]["hash"]
    assert ["preview_s" in record["timings"] for record in records] == [False, True]
    assert len(records[1]["timings"]["steps_ms"]) == 4
    assert sorted(p.suffix for p in Path("out").iterdir()) == [".json", ".json", ".mp4", ".mp4"]


def test_show_prints_the_request_of_a_video(wancli: Wancli, made: Made, tiny_model: Path):
    made(*small(tiny_model), "--seed", 3, "-o", "a.mp4")
    shown = wancli("show", "a.mp4")
    assert PROMPT in shown.out
    assert json.loads(wancli("show", "a.mp4", "--json").out)["request"]["seed"] == 3
    assert json.loads(wancli("show", "a.json", "--json").out)["output"]["path"] == "a.mp4"


def test_repro_reproduces_the_frames(wancli: Wancli, made: Made, tiny_model: Path):
    made(*small(tiny_model), "--seed", 3, "-o", "a.mp4")
    result = wancli("repro", "a.json")
    assert result.code == 0, result.err
    assert "identical" in result.err
    assert framemd5(Path("a-repro.mp4")) == framemd5(Path("a.mp4"))


def test_repro_over_the_original_compares_with_the_replaced_frames(
    wancli: Wancli, made: Made, tiny_model: Path
):
    made(*small(tiny_model), "--seed", 3, "-o", "a.mp4")
    over = ("repro", "a.mp4", "-o", "a.mp4", "--overwrite", "--model", tiny_model)
    assert "identical" in wancli(*over).err
    tiny_clip(Path("a.mp4"), 1, size=(32, 32), comment=read_comment(Path("a.mp4")) or "")
    result = wancli(*over)
    assert (result.code, "identical" in result.err) == (0, False)
    assert "the frames differ from those of a.mp4" in result.err


def test_repro_with_an_override_changes_the_video(wancli: Wancli, made: Made, tiny_model: Path):
    made(*small(tiny_model), "--seed", 3, "-o", "a.mp4")
    result = wancli("repro", "a.json", "--steps", 3, "--json", "-o", "b.mp4")
    record = json.loads(result.out)
    assert record["request"]["sampling"]["steps"] == 3
    assert record["request"]["video"]["num_frames"] == 5
    assert "identical" not in result.err


def test_several_seeds_load_the_model_once(wancli: Wancli, tiny_model: Path):
    result = wancli(*small(tiny_model), "--seed", 5, "-N", 3, "--json", "--perf-json", "perf.json")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [r["request"]["seed"] for r in records] == [5, 6, 7]
    assert [r["timings"]["load_s"] > 0 for r in records] == [True, False, False]
    assert len({r["output"]["framemd5"] for r in records}) == 3
    videos = json.loads(Path("perf.json").read_text())["videos"]
    assert [v["path"] for v in videos] == [r["output"]["path"] for r in records]


def test_skip_existing_skips_only_the_same_request(wancli: Wancli, made: Made, tiny_model: Path):
    args = (*small(tiny_model), "--seed", 1, "-o", "a.mp4", "--skip-existing")
    made(*args)
    before = Path("a.mp4").stat().st_mtime_ns
    again = wancli(*args)
    assert (again.code, again.out) == (0, "a.mp4\n")
    assert Path("a.mp4").stat().st_mtime_ns == before
    other = wancli(*args, "--steps", 3)
    assert other.code == 2
    assert "another request" in other.err
    assert wancli(*args, "--steps", 3, "--overwrite").code == 0
    assert Path("a.mp4").stat().st_mtime_ns != before


def test_skip_existing_regenerates_a_damaged_video(wancli: Wancli, made: Made, tiny_model: Path):
    args = (*small(tiny_model), "--seed", 1, "-o", "a.mp4", "--skip-existing")
    made(*args)
    path, whole = Path("a.mp4"), Path("a.mp4").read_bytes()
    md5 = framemd5(path)
    path.write_bytes(whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:])
    result = wancli(*args)
    assert (result.code, result.out) == (0, "a.mp4\n"), result.err
    assert "a.mp4 is damaged: its packets are not those" in result.err
    assert framemd5(path) == md5


def test_show_check_reports_the_state_of_each_file(wancli: Wancli, made: Made, tiny_model: Path):
    made(*small(tiny_model), "--seed", 3, "-o", "a.mp4")
    result = wancli("show", "--check", "a.mp4", "a.json")
    assert (result.code, result.out) == (0, "whole      a.mp4\nwhole      a.json\n"), result.err
    content = Path("a.mp4").read_bytes()
    Path("b.mp4").write_bytes(content[:-9])
    Path("c.mp4").write_bytes(bytes(100))
    result = wancli("show", "--check", "a.mp4", "b.mp4", "c.mp4", "d.mp4", "--json")
    assert result.code == 4
    assert "3 of 4 files" in result.err
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [(f["path"], f["status"]) for f in rows] == [
        ("a.mp4", "whole"), ("b.mp4", "damaged"), ("c.mp4", "no record"), ("d.mp4", "missing"),
    ]  # fmt: skip


def test_a_failed_save_keeps_latents_that_decode_to_the_same_frames(
    wancli: Wancli, made: Made, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    made(*small(tiny_model), "--seed", 3, "-o", "a.mp4")
    Path("a.mp4").rename("whole.mp4")
    Path("a.json").unlink()
    Path("a.latents.safetensors").write_text("mine")
    with monkeypatch.context() as patch:
        for module in ("batch", "runner"):  # ffmpeg breaks later
            patch.setattr(f"wancli.generation.{module}.choose_encoding", lambda *_: Encoding())
        patch.setattr("wancli.video.ffmpeg.ffmpeg_exe", lambda: "/bin/false")
        failed = wancli(*small(tiny_model), "--seed", 3, "-o", "a.mp4", "--json")
    assert failed.code == 6
    assert "cannot write a.mp4" in failed.err
    assert "wancli decode a.latents-1.safetensors" in failed.err
    assert Path("a.latents.safetensors").read_text() == "mine"
    assert json.loads(failed.out)["error"]["exit_code"] == 6
    assert not Path("a.mp4").exists()
    assert wancli("decode", "a.latents-1.safetensors", "-o", "a.mp4").code == 0
    assert framemd5(Path("a.mp4")) == framemd5(Path("whole.mp4"))


def test_decode_turns_saved_latents_into_the_same_frames(wancli: Wancli, tiny_model: Path):
    wancli(*small(tiny_model), "--seed", 1, "-o", "a.mp4", "--save-latents", "z.safetensors")
    result = wancli("decode", "z.safetensors", "-o", "b.mp4")
    assert result.code == 0, result.err
    assert framemd5(Path("a.mp4")) == framemd5(Path("b.mp4"))
    assert json.loads(wancli("show", "b.mp4", "--json").out)["request"]["seed"] == 1


def test_non_finite_latents_abort_the_run(wancli: Wancli, tiny_model: Path, tmp_path: Path):
    pipeline = WanPipeline.from_pretrained(tiny_model)
    torch.nn.init.constant_(pipeline.transformer.proj_out.bias, float("nan"))
    pipeline.save_pretrained(tmp_path / "nan")
    result = wancli(*small(tmp_path / "nan"), "-o", "a.mp4")
    assert result.code == 1
    assert "the latents are not finite" in result.err  # before they are decoded
    assert not Path("a.mp4").exists()


def test_non_finite_video_aborts_the_run_and_keeps_the_latents(
    wancli: Wancli, tiny_model: Path, tmp_path: Path
):
    pipeline = WanPipeline.from_pretrained(tiny_model)
    torch.nn.init.constant_(pipeline.vae.decoder.conv_out.bias, float("nan"))
    pipeline.save_pretrained(tmp_path / "nan")
    result = wancli(*small(tmp_path / "nan"), "-o", "a.mp4")
    assert (result.code, "video frames are not finite" in result.err) == (1, True)
    hint = "wancli decode a.latents.safetensors -o NAME.mp4 --vae-dtype float32"
    assert result.err.strip().endswith(hint)
    again = wancli("decode", "a.latents.safetensors", "-o", "a.mp4")
    rolled = wancli("rollout", PROMPT, "--model", "nan", "--size", "32x32", "-o", "a.mp4")
    assert rolled.err.strip().endswith("hint:  --resume with --vae-dtype float32")
    resumed = wancli("rollout", "--resume", "--vae-dtype", "float32", "-o", "a.mp4")
    for result in (again, rolled, resumed):
        assert (result.code, "video frames are not finite" in result.err) == (1, True)
    assert not Path("a.mp4").exists()


@pytest.mark.parametrize(
    "where", ["diffusers.AutoencoderKLWan._decode", "wancli.video.write.VideoWriter.write"]
)
def test_running_out_of_memory_after_denoising_keeps_the_latents(
    where: str, wancli: Wancli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(where, run_out)
        failed = wancli(*small(tiny_model), "-o", "a.mp4")
        again = wancli("decode", "a.latents.safetensors", "-o", "a.mp4")
    for result in (failed, again):
        assert (result.code, "does not fit in the memory" in result.err) == (5, True)
        assert "--vae-tiling, or --vae-decoder tiny" in result.err
    assert "wancli decode a.latents.safetensors -o NAME.mp4 --vae-tiling" in failed.err
    assert wancli("decode", "a.latents.safetensors", "-o", "a.mp4").code == 0


def test_two_experts_take_two_guidance_scales(wancli: Wancli, tmp_path: Path):
    from tests.fakes import tiny_folder

    folder = tiny_folder(tmp_path / "two", experts=2)
    for scale in (1.5, 9):
        result = wancli(
            *small(folder), "--steps", 4, "--flow-shift", 1, "--seed", 1, "--guidance-scale-2",
            scale, "-o", f"{scale}.mp4", "--save-latents", f"{scale}.safetensors",
        )  # fmt: skip
        assert result.code == 0, result.err
    low, high = (load_file(f"{scale}.safetensors")["latents"] for scale in (1.5, 9))
    assert not torch.equal(low, high)


def test_a_dry_run_prints_the_source_of_each_value_and_writes_nothing(
    wancli: Wancli, tiny_model: Path
):
    result = wancli(*small(tiny_model), "--dry-run", "--seed", 1)
    assert result.code == 0
    assert any(line.split()[-3:] == ["steps", "2", "flag"] for line in result.out.splitlines())
    plan = json.loads(wancli(*small(tiny_model), "--dry-run", "--json").out)["plan"]
    assert plan["tokens"] == 2 * 2 * 2
    assert plan["forwards"] == 4
    assert list(Path().iterdir()) == []


def test_quiet_prints_only_the_result(wancli: Wancli, tiny_model: Path):
    result = wancli(*small(tiny_model), "-q", "-o", "a.mp4")
    assert (result.out, result.err) == ("a.mp4\n", "")


def test_verbose_prints_a_row_per_step(wancli: Wancli, tiny_model: Path):
    result = wancli(*small(tiny_model), "-v", "-o", "a.mp4")
    head, *steps = [
        line.split() for line in result.err.splitlines() if "%" in line or "sigma" in line
    ]
    assert head == ["step", "sigma", "forwards", "ms", "share"]
    assert [row[0] for row in steps] == ["1", "2"]
    assert [row[2] for row in steps] == ["2", "2"]
    assert "peak RAM" in result.err


@pytest.fixture
def _handled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Signals do here what they do in a process of wancli."""
    monkeypatch.setattr(interrupts, "_state", interrupts._State())
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = {n: signal.getsignal(n) for n in (*interrupts.SIGNALS, signal.SIGALRM)}
    for number in before:  # a shell's background jobs ignore SIGINT, and so would we
        signal.signal(number, signal.SIG_DFL)
    interrupts.handle()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handled")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_signal_stops_it_and_leaves_no_files(
    wancli: Wancli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
):
    steps = []

    def step(*_: object, **__: object) -> None:
        steps.append(number)
        signal.raise_signal(number)

    monkeypatch.setattr(UniPCMultistepScheduler, "step", step)
    result = wancli(*small(tiny_model), "-o", "a.mp4")
    assert (result.code, len(steps)) == (128 + number, 1)
    assert result.err.splitlines()[-2] == f"error: interrupted by {number.name}."
    assert "Traceback" not in result.err
    assert list(Path().iterdir()) == []


@pytest.mark.slow
def test_a_signal_stops_a_process_soon(tiny_model: Path, tmp_path: Path):
    command = [sys.executable, "-m", "wancli", *map(str, small(tiny_model)), "--steps", "900"]
    process = subprocess.Popen(
        [*command, "-o", "a.mp4"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while "denoise" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert err.splitlines()[-2].startswith("error: interrupted by")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
