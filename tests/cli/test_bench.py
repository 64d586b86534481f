"""`wancli bench` as a shell runs it, on a tiny random model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.test_bad_input import complaint
from tests.conftest import Result, Wancli
from tests.fakes import tiny_clip, tiny_folder, tiny_image
from wancli.benchmark.cases import BenchInputs
from wancli.benchmark.measure import Measurer
from wancli.benchmark.session import BenchRequest, BenchSession, Goals
from wancli.catalog.tasks import ANIMATE, IMAGE
from wancli.catalog.tiny_decoder import TinyDecoderShape
from wancli.cli.bench_variants import read_bench_request, read_variant
from wancli.cli.messages import flag
from wancli.config.layers import settings_layers
from wancli.config.resolve import Layer
from wancli.planning.inputs import InputFiles
from wancli.video.read import read_comment

VIDEO = ("--size", "32x32", "--num-frames", 5, "--steps", 10, "--guidance-scale", 2)
FAST = "--use-cachedit --cachedit-fn 1 --cachedit-max-warmup-steps 2"
SMALL = ("--device", "cpu", *VIDEO)


def bench(wancli: Wancli, model: Path, *args: object) -> Result:
    return wancli("bench", "a red circle", "--model", model, *SMALL, *args)


def test_variants_are_measured_beside_the_baseline(wancli: Wancli, tiny_model: Path):
    fast = f"fast: {FAST} --cachedit-residual-threshold 1"
    named = (fast, "no kv: --no-prompt-kv", "gate: --cfg-gate 0.5")
    variants = [word for text in named for word in ("--variant", text)]
    result = bench(wancli, tiny_model, *variants)
    assert result.code == 0, result.err
    header, *rows = result.out.strip().splitlines()
    assert header.split()[:3] == ["variant", "denoise", "speed-up"]
    assert [row.split()[0] for row in rows] == ["baseline", "fast", "no", "gate"]
    assert ["equal" in row for row in rows] == [False, False, True, False]
    assert "report: bench/report.html" in result.err
    assert "another seed of the baseline" in result.err
    report = json.loads(Path("bench/bench.json").read_text())
    baseline, fast, exact, gate = report["arms"]
    assert baseline["summary"]["blocks"] == baseline["summary"]["blocks_all"] == 2 * 2 * 10
    assert fast["lossy"] is True
    assert fast["summary"]["forwards_reused"] > 0
    assert fast["summary"]["ssim_worst"] < 1
    assert exact["lossy"] is False
    assert exact["summary"]["equal_latents"] is True
    assert report["identity"] is True
    assert gate["summary"]["blocks"] == 2 * (10 + 5)
    assert report["floor"]["pairs"] == 1
    assert [Path("bench", run["video"]).is_file() for run in report["runs"]] == [True] * 4
    assert "fast" in Path("bench/report.html").read_text()


def test_variants_with_other_speedups_have_their_own_transformer(wancli: Wancli, tiny_model: Path):
    pytest.importorskip("torchao", reason="pip install torchao")
    variants = ("--variant", "small: --quantize int8", "--variant", "math: --attention-backend "
                "_native_math", "--variant", "fused: --fuse-qkv")  # fmt: skip
    result = bench(wancli, tiny_model, *variants, "--json", "-q")
    assert result.code == 0, result.err
    baseline, small, math, fused = json.loads(result.out)["arms"]
    assert baseline["summary"]["ssim_worst"] is None
    assert small["lossy"] is math["lossy"] is fused["lossy"] is True
    assert small["summary"]["ssim_worst"] < min(
        arm["summary"]["ssim_worst"] for arm in (math, fused)
    )


def test_few_steps_are_measured_beside_many_with_their_motion(wancli: Wancli, tiny_model: Path):
    few = "few: --sampler few-step --steps-list 1000,500"
    straight = "straight: --sampler euler --steps-list 1000,500 --guidance-scale 1"
    result = bench(wancli, tiny_model, "--variant", few, "--variant", straight)
    assert result.code == 0, result.err
    assert "nothing was reused" not in result.err
    header, *rows = result.out.strip().splitlines()
    assert header.split()[-1] == "motion"
    report = json.loads(Path("bench/bench.json").read_text())
    many, few, straight = (arm["summary"] for arm in report["arms"])
    assert (many["forwards"], few["forwards"], straight["forwards"]) == (20, 2, 2)
    levels = [run["motion"] for run in report["runs"]]
    assert [few["motion"], straight["motion"]] == pytest.approx([n / levels[0] for n in levels[1:]])
    assert rows[0].split()[-1] == "100%"
    result = bench(wancli, tiny_model, "--variant", "few: --sampler few-step --steps 3")
    assert "--steps does nothing with --steps-list" in result.err


def test_ways_to_decode_are_compared_on_the_same_latents(wancli: Wancli, tiny_model: Path):
    shape = TinyDecoderShape(4, widths=(4, 4, 4, 4), blocks=1)
    save_file({key: torch.zeros(size) for key, size in shape.parameters.items()}, "own.safetensors")
    few = ("--steps", 1, "--num-frames", 5, "--vae-decoder", "own.safetensors")
    result = bench(wancli, tiny_model, *few, "--decoders")
    assert result.code == 0, result.err
    header, *rows = result.out.strip().splitlines()
    assert header.split()[0] == "decoder"
    report = json.loads(Path("bench/bench.json").read_text())
    exact, fast, *_, own = report["decoders"]
    assert [row.split()[0] for row in rows] == [
        "exact",
        "fast",
        "bfloat16",
        "fast",
        "own.safetensors",
    ]
    assert (exact["ssim"], exact["speed_up"]) == (None, 1.0)
    assert fast["ssim"] > 0.999
    assert own["ssim"] < 0.9
    assert own["settings"]["vae_decoder"] == "own.safetensors"
    again = bench(wancli, tiny_model, *few, "--decoders", "--overwrite", "--json")
    assert again.code == 0, again.err
    assert len(json.loads(again.out)["decoders"]) == len(rows)
    for flags, error in (
        (("--variant", "a: --cfg-gate 0.5"), "has no --variant"),
        (("--tune",), "no goals and no --tune"),
        (("--compile-mode", "default"), "--compile-mode does nothing"),
    ):
        assert error in bench(wancli, tiny_model, "--decoders", *flags).err


def test_a_toml_file_defines_prompts_seeds_and_variants(wancli: Wancli, tiny_model: Path):
    Path("all.toml").write_text(
        'prompts = ["a red circle", "a blue circle"]\nseeds = "3-4"\n'
        '[variants]\nexact = "--no-prompt-kv"\n'
    )
    small = (*SMALL, "--steps", 2)
    result = wancli("bench", "all.toml", "--model", tiny_model, *small, "--json", "-q")
    assert result.code == 0, result.err
    report, written = json.loads(result.out), json.loads(Path("bench/bench.json").read_text())
    assert report == written | {"report": "bench/report.html"}
    runs = report["runs"]
    assert {(run["prompt"], run["seed"]) for run in runs} == {
        (prompt, seed) for prompt in ("a red circle", "a blue circle") for seed in (3, 4)
    }
    assert len(runs) == 2 * 4


def test_a_missed_goal_exits_with_7_and_keeps_the_report(wancli: Wancli, tiny_model: Path):
    Path("bench.part").mkdir()
    Path("bench.part/mine").write_text("mine")
    fast = ("--variant", f"fast: {FAST} --cachedit-residual-threshold 1")
    result = bench(wancli, tiny_model, *fast, "--fail-under-ssim", 1)
    assert result.code == 7
    assert "fast: a video frame has SSIM" in result.err
    assert Path("bench/report.html").is_file()
    result = bench(wancli, tiny_model, *fast, "--overwrite", "--fail-over-ratio", 0.01)
    assert result.code == 7
    assert "of the time, over 0.01" in result.err
    assert Path("bench.part/mine").read_text() == "mine"
    assert sorted(path.name for path in Path().iterdir()) == ["bench", "bench.part"]


def test_a_tuned_preset_is_valid_only_for_the_settings_it_was_tuned_for(
    wancli: Wancli, tiny_model: Path
):
    tuning = ("--tune", "--target-ssim", 0.5, "--save-preset", "mine")
    result = bench(wancli, tiny_model, "--variant", f"fast: {FAST}", *tuning)
    assert result.code == 0, result.err
    assert "--cachedit-preset mine" in result.err
    command = ("generate", "a red circle", "--model", tiny_model, "--cachedit-preset", "mine")
    result = wancli(*command, *SMALL, "--seed", 1, "-o", "a.mp4", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["cache"]["reused"] > 0
    result = wancli(*command, *SMALL, "--steps", 12, "-o", "b.mp4")
    assert result.code == 2
    error, hint = complaint(result)
    assert error == "this step cache was tuned for sampling.steps 10, not 12."
    assert "--tune" in hint


def test_an_unreachable_target_exits_with_7_and_saves_nothing(wancli: Wancli, tiny_model: Path):
    tuning = ("--tune", "--target-ssim", 1, "--save-preset", "mine")
    result = bench(wancli, tiny_model, "--variant", f"fast: {FAST}", *tuning)
    assert result.code == 7
    assert "no threshold keeps every video frame at SSIM 1" in result.err
    assert wancli("preset", "show", "mine").code == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "files"),
    [
        pytest.param(IMAGE, {"image": "p.png"}, marks=pytest.mark.slow),
        (ANIMATE, {"pose_video": "v.mp4", "face_video": "f.mp4", "ref_image": "p.png"}),
    ],
)
def test_a_bench_uses_input_files_as_generate_does(
    wancli: Wancli, tmp_path: Path, task: str, files: dict[str, str]
):
    model = tiny_folder(tmp_path / "model", task)
    tiny_image(Path("p.png"), 1)
    tiny_clip(Path("v.mp4"), 2)
    tiny_clip(Path("f.mp4"), 3, size=(32, 32))
    file_flags = [w for name, file in files.items() for w in (f"--{name.replace('_', '-')}", file)]
    request = ("a red circle", "--model", model, *SMALL, "--fps", 8, "--steps", 4, *file_flags)
    result = wancli("bench", *request, "--variant", "exact: --no-prompt-kv", "--json", "-q")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["arms"][1]["summary"]["equal_latents"] is True
    video = Path("bench", report["runs"][0]["video"])
    recorded = json.loads(read_comment(video) or "")["request"]["inputs"]
    assert recorded["task"] == task
    assert {name for name in recorded if name != "task"} == set(files)

    flags = {"model": str(model), "machine": {"device": "cpu"}}
    flags["video"] = {"width": 32, "height": 32, "num_frames": 5, "fps": 8}
    flags["sampling"] = {"steps": 4, "guidance_scale": 2}
    paths: dict[str, Any] = {
        n: (Path(f),) if n == "ref_image" else Path(f) for n, f in files.items()
    }
    inputs = InputFiles(**paths)
    exact = read_variant("exact", "--no-prompt-kv")
    bench_request = BenchRequest(["a red circle"], "7", [exact], flag, inputs)
    session = BenchSession(bench_request, [Layer("flag", flags)], Goals())
    arguments = (session.spec, session.baseline, tmp_path, lambda event: None, BenchInputs(inputs))
    measured = Measurer(*arguments).baseline_run(session.cases[0]).latents
    result = wancli(
        "generate", *request, "--seed", 7, "-o", "a.mp4", "--save-latents", "z.safetensors"
    )
    assert result.code == 0, result.err
    generated = load_file("z.safetensors")["latents"].transpose(0, 1)[None]
    assert torch.equal(measured.float(), generated)


def unwarned(text: str, *, hint: str) -> None:
    pytest.fail(f"{text} {hint}")


def test_a_variant_may_be_a_preset_below_the_flags_of_the_bench():
    texts = ["p: --preset demo-cached", "q: --preset demo-cached --cfg-gate 0.5"]
    request = read_bench_request(["a red circle"], None, texts)
    layers = settings_layers(unwarned, Layer("flag", {"step_cache": {"cfg_gate": 0.8}}), None)
    caches = [it.settings.step_cache for it in BenchSession(request, layers, Goals()).variants]
    assert [cache.step_cache for cache in caches] == ["seacache", "seacache"]
    assert [cache.cfg_gate for cache in caches] == [0.8, 0.5]


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        ((), "no variant to compare", "--variant"),
        (("--variant", "--use-cachedit"), "has no name", "fast:"),
        (("--variant", "empty:"), "'empty' has no flags", "--use-cachedit"),
        (("--variant", "a: --cfg-gate 3", "--target-ssim", 0.9), "need --tune", "--tune"),
        (("--variant", "a: --cfg-gate 3", "--save-preset", "x"), "need --tune", "--tune"),
        (("--variant", "same: --steps 20"), "'same' is the baseline", "--use-cachedit"),
        (("--variant", "a: --step 12"), "variant 'a': No such option: --step", "--steps"),
        (("--variant", "a: --steps x"), "variant 'a': Invalid value", "generate --help"),
        (("--variant", "a: --taylorseer"), "does nothing without", "--use-cachedit"),
        (("--variant", "a: --size 32x32"), "changes the video", "wancli bench itself"),
        (("--variant", "a: --model x"), "changes the model", "wancli bench itself"),
        (("--variant", "a: --preset wan2.1-t2v-14b"), "changes the model", "wancli bench itself"),
        (("--variant", "a: --dtype bfloat16"), "changes the machine", "wancli bench itself"),
        (("--variant", "a: 'x"), "variant 'a': No closing quotation", "quote"),
        (("--variant", "a: --cfg-gate 3", "--variant", "a: --cfg-gate 4"), "named 'a'", "rename"),
        (("--variant", "a: --cfg-gate 3", "-i", "x.png"), "does not work with demo", "--model"),
        (("--variant", "a: --cfg-gate 3", "--task", "vace"), "does not work with demo", "--model"),
        (("--variant", "a: --cfg-gate 3", "--strength", 0.5), "does nothing in", "--strength"),
        (("--variant", "a: --strength 0.5"), "does nothing in", "--strength"),
        (("--variant", "a: --cfg-gate 3", "--tune"), "no threshold to tune", "--use-cachedit"),
        (("--variant", "a: --cfg-gate 3", "-o", "full"), "full exists", "--overwrite"),
        (
            ("--variant", "a: --cfg-gate 3", "-o", "full", "--overwrite"),
            "is not a bench report",
            "another",
        ),
        (("nothing-such.toml",), "file 'nothing-such.toml' not found", "check the path"),
        (("nothing.txt",), "file of prompts 'nothing.txt' not found", "check the path"),
        (("bad.toml",), "bad.toml is not a bench", "prompts ="),
    ],
)
def test_invalid_input_is_rejected_before_anything_loads(
    wancli: Wancli, args: tuple[object, ...], error: str, hint: str
):
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    Path("bad.toml").write_text('prompt = "a"\n')
    result = wancli("bench", "a red circle", *args)
    assert result.code in (2, 4)
    message, advice = complaint(result)
    assert error in message
    assert hint in advice
    assert Path("full/mine.txt").read_text() == "mine"
    assert not Path("bench").exists()
