"""`wancli bench`, as a shell calls it, on a tiny random model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_bad_input import complaint
from tests.conftest import Said, Wancli
from tests.fakes import tiny_clip, tiny_folder, tiny_image
from wancli.benchmark.cases import BenchInputs
from wancli.benchmark.measure import Measurer
from wancli.benchmark.session import BenchRequest, BenchSession, Goals, VariantFlags
from wancli.catalog.tasks import ANIMATE, IMAGE
from wancli.cli.bench_variants import flags_layers
from wancli.cli.messages import flag
from wancli.config.resolve import Layer
from wancli.planning.inputs import InputFiles
from wancli.video.read import read_comment

VIDEO = ("--size", "32x32", "--num-frames", 5, "--steps", 10, "--guidance-scale", 2)
FAST = "--use-cachedit --cachedit-fn 1 --cachedit-max-warmup-steps 2"
SMALL = ("--device", "cpu", *VIDEO)


def bench(wancli: Wancli, model: Path, *args: object) -> Said:
    return wancli("bench", "a red circle", "--model", model, *SMALL, *args)


def test_variants_are_measured_beside_the_baseline(wancli: Wancli, tiny_model: Path):
    fast = f"fast: {FAST} --cachedit-residual-threshold 1"
    named = (fast, "no kv: --no-prompt-kv", "gate: --cfg-gate 0.5")
    variants = [word for text in named for word in ("--variant", text)]
    said = bench(wancli, tiny_model, *variants, "--json", "-q")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert told == json.loads(Path("bench/bench.json").read_text()) | {
        "report": "bench/report.html"
    }
    usual, fast, exact, gate = told["arms"]
    assert usual["summary"]["blocks"] == usual["summary"]["blocks_all"] == 2 * 2 * 10
    assert fast["lossy"] is True
    assert fast["summary"]["forwards_reused"] > 0
    assert fast["summary"]["ssim_worst"] < 1
    assert exact["lossy"] is False
    assert exact["summary"]["equal_latents"] is True
    assert told["identity"] is True
    assert gate["summary"]["blocks"] == 2 * (10 + 5)
    assert told["floor"]["pairs"] == 1
    assert [Path("bench", run["video"]).is_file() for run in told["runs"]] == [True] * 4
    assert "fast" in Path("bench/report.html").read_text()


def test_the_table_goes_to_stdout_and_the_talk_to_stderr(wancli: Wancli, tiny_model: Path):
    said = bench(wancli, tiny_model, "--variant", "exact: --no-prompt-kv")
    assert said.code == 0, said.err
    header, usual, exact = said.out.strip().splitlines()
    assert header.split()[:3] == ["variant", "denoise", "speed-up"]
    assert usual.split()[0] == "baseline"
    assert "equal" in exact
    assert "report: bench/report.html" in said.err
    assert "another seed of the baseline" in said.err


def test_a_toml_file_holds_all_of_it(wancli: Wancli, tiny_model: Path):
    Path("all.toml").write_text(
        'prompts = ["a red circle", "a blue circle"]\nseeds = "3-4"\n'
        '[variants]\nexact = "--no-prompt-kv"\n'
    )
    said = wancli("bench", "all.toml", "--model", tiny_model, *SMALL, "--json", "-q")
    assert said.code == 0, said.err
    runs = json.loads(said.out)["runs"]
    assert {(run["prompt"], run["seed"]) for run in runs} == {
        (prompt, seed) for prompt in ("a red circle", "a blue circle") for seed in (3, 4)
    }
    assert len(runs) == 2 * 4


def test_a_goal_that_is_missed_is_exit_7_and_the_report_stays(wancli: Wancli, tiny_model: Path):
    Path("bench.part").mkdir()
    Path("bench.part/mine").write_text("mine")
    fast = ("--variant", f"fast: {FAST} --cachedit-residual-threshold 1")
    said = bench(wancli, tiny_model, *fast, "--fail-under-ssim", 1)
    assert said.code == 7
    assert "fast: a video frame has SSIM" in said.err
    assert Path("bench/report.html").is_file()
    said = bench(wancli, tiny_model, *fast, "--overwrite", "--fail-over-ratio", 0.01)
    assert said.code == 7
    assert "of the time, over 0.01" in said.err
    assert Path("bench.part/mine").read_text() == "mine"
    assert sorted(path.name for path in Path().iterdir()) == ["bench", "bench.part"]


def test_tuning_saves_a_preset_that_holds_only_where_it_was_found(wancli: Wancli, tiny_model: Path):
    tuning = ("--tune", "--target-ssim", 0.5, "--save-preset", "mine")
    said = bench(wancli, tiny_model, "--variant", f"fast: {FAST}", *tuning)
    assert said.code == 0, said.err
    assert "--cachedit-preset mine" in said.err
    made = ("generate", "a red circle", "--model", tiny_model, "--cachedit-preset", "mine")
    said = wancli(*made, *SMALL, "--seed", 1, "-o", "a.mp4", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["cache"]["reused"] > 0
    said = wancli(*made, *SMALL, "--steps", 12, "-o", "b.mp4")
    assert said.code == 2
    error, hint = complaint(said)
    assert error == "this step cache was tuned for sampling.steps 10, not 12."
    assert "--tune" in hint


def test_a_target_that_nothing_reaches_is_exit_7_and_nothing_is_saved(
    wancli: Wancli, tiny_model: Path
):
    tuning = ("--tune", "--target-ssim", 1, "--save-preset", "mine")
    said = bench(wancli, tiny_model, "--variant", f"fast: {FAST}", *tuning)
    assert said.code == 7
    assert "no threshold keeps every video frame at SSIM 1" in said.err
    assert wancli("preset", "show", "mine").code == 2


@pytest.mark.parametrize(
    ("task", "given"),
    [
        (IMAGE, {"image": "p.png"}),
        (ANIMATE, {"pose_video": "v.mp4", "face_video": "f.mp4", "ref_image": "p.png"}),
    ],
)
def test_pictures_go_into_a_bench_as_into_a_video(
    wancli: Wancli, tmp_path: Path, task: str, given: dict[str, str]
):
    model = tiny_folder(tmp_path / "model", task)
    tiny_image(Path("p.png"), 1)
    tiny_clip(Path("v.mp4"), 2)
    tiny_clip(Path("f.mp4"), 3, size=(32, 32))
    files = [w for name, file in given.items() for w in (f"--{name.replace('_', '-')}", file)]
    asked = ("a red circle", "--model", model, *SMALL, "--fps", 8, "--steps", 4, *files)
    said = wancli("bench", *asked, "--variant", "exact: --no-prompt-kv", "--json", "-q")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert told["arms"][1]["summary"]["equal_latents"] is True
    video = Path("bench", told["runs"][0]["video"])
    recorded = json.loads(read_comment(video) or "")["request"]["inputs"]
    assert recorded["task"] == task
    assert {name for name in recorded if name != "task"} == set(given)

    flags = {"model": str(model), "machine": {"device": "cpu"}}
    flags["video"] = {"width": 32, "height": 32, "num_frames": 5, "fps": 8}
    flags["sampling"] = {"steps": 4, "guidance_scale": 2}
    paths: dict[str, Any] = {
        n: (Path(f),) if n == "ref_image" else Path(f) for n, f in given.items()
    }
    inputs = InputFiles(**paths)
    exact = VariantFlags("exact", "--no-prompt-kv", flags_layers("exact", "--no-prompt-kv"))
    asking = BenchRequest(["a red circle"], "7", [exact], flag, inputs)
    benching = BenchSession(asking, [Layer("flag", flags)], Goals())
    here = (benching.spec, benching.baseline, tmp_path, lambda event: None, BenchInputs(inputs))
    ours = Measurer(*here).baseline_run(benching.cases[0]).latents
    said = wancli("generate", *asked, "--seed", 7, "-o", "a.mp4", "--save-latents", "z.safetensors")
    assert said.code == 0, said.err
    made = load_file("z.safetensors")["latents"].transpose(0, 1)[None]
    assert torch.equal(ours.float(), made)


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        ((), "there is no variant", "--variant"),
        (("--variant", "--use-cachedit"), "has no name", "fast:"),
        (("--variant", "empty:"), "'empty' has no flags", "--use-cachedit"),
        (("--variant", "a: --cfg-gate 3", "--target-ssim", 0.9), "need --tune", "--tune"),
        (("--variant", "a: --cfg-gate 3", "--save-preset", "x"), "need --tune", "--tune"),
        (("--variant", "same: --steps 20"), "'same' is the baseline", "--use-cachedit"),
        (("--variant", "a: --step 12"), "variant 'a': No such option", "generate --help"),
        (("--variant", "a: --taylorseer"), "does nothing without", "--use-cachedit"),
        (("--variant", "a: --size 32x32"), "changes the video", "wancli bench itself"),
        (("--variant", "a: --model x"), "changes the model", "wancli bench itself"),
        (("--variant", "a: --dtype bfloat16"), "changes the machine", "wancli bench itself"),
        (("--variant", "a: 'x"), "variant 'a': No closing quotation", "quote"),
        (("--variant", "a: --cfg-gate 3", "--variant", "a: --cfg-gate 4"), "named 'a'", "another"),
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
def test_bad_input_is_said_before_anything_loads(
    wancli: Wancli, args: tuple[object, ...], error: str, hint: str
):
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    Path("bad.toml").write_text('prompt = "a"\n')
    said = wancli("bench", "a red circle", *args)
    assert said.code in (2, 4)
    message, advice = complaint(said)
    assert error in message
    assert hint in advice
    assert Path("full/mine.txt").read_text() == "mine"
    assert not Path("bench").exists()
