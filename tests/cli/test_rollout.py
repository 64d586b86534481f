"""`wancli rollout` through main(), on a tiny real pipeline."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Made, Wancli
from tests.forked import Run
from wancli.cli.screen import Screen
from wancli.models.vae import StreamingDecoder
from wancli.records.progress import Step
from wancli.video.read import probe, read_comment
from wancli.video.write import framemd5

PROMPT = "a red circle moving right"
SMALL = ("--size", "32x32", "--fps", 8, "--chunk-frames", 2, "--steps-list", "1000,500", "-q")


SHOTS = ("--rope", "absolute", "--sink-frames", 1, "--shot-sink")


def small(model: Path, *more: object) -> tuple[object, ...]:
    return ("rollout", PROMPT, "--model", model, *SMALL, "--seed", 1, *more)


def digest(video: str = "a.mp4") -> str:
    return framemd5(Path(video))


def test_a_rollout_writes_one_video_and_its_record(wancli: Wancli, tiny_model: Path):
    result = wancli(*small(tiny_model, "--chunks", 3, "-o", "a.mp4", "--json"))
    assert result.code == 0, result.err
    record = json.loads(result.out)
    info = probe(Path("a.mp4"))
    assert (info.width, info.height, info.fps, info.frames) == (32, 32, 8, 1 + 4 * 5)
    assert record == json.loads(Path("a.json").read_text())
    assert record["request"]["video"]["num_frames"] == 21
    rows = record["timings"]["chunks"]
    assert [row["video_frames"] for row in rows] == [5, 8, 8]
    assert [len(row["steps_ms"]) for row in rows] == [2, 2, 2]
    assert [row["kv_tokens"] for row in rows] == [8, 16, 24]
    assert set(record["timings"]["fps"]) == {"transformer", "with_vae", "wall"}
    assert len(record["drift"]["chunks"]) == 3
    assert record["output"]["encoder"] == "x264 veryfast"
    assert json.loads(read_comment(Path("a.mp4")) or "")["request"]["prompt"] == PROMPT
    assert not list(Path().glob("*.part*"))


def test_the_video_holds_the_decoded_latents(wancli: Wancli, tiny_model: Path):
    result = wancli(
        *small(tiny_model, "--chunks", 3, "-o", "a.mp4", "--lossless", "--save-latents", "z.st")
    )
    assert result.code == 0, result.err
    from diffusers import AutoencoderKLWan

    from wancli.video.read import read_frames

    latents = load_file("z.st")["latents"].transpose(0, 1)[None]
    vae = AutoencoderKLWan.from_pretrained(tiny_model, subfolder="vae").eval()
    assert np.array_equal(read_frames(Path("a.mp4")), StreamingDecoder(vae)(latents))


def test_a_rolling_window_limits_attention(wancli: Wancli, tiny_model: Path):
    whole = ("--chunks", 4, "--no-video", "--save-latents")
    wancli(*small(tiny_model, *whole, "all.st"))
    result = wancli(*small(tiny_model, *whole, "windowed.st", "--rolling-window", 4, "--json"))
    rows = json.loads(result.out)["timings"]["chunks"]
    assert [row["kv_tokens"] for row in rows] == [8, 16, 16, 16]
    everything, windowed = (load_file(name)["latents"] for name in ("all.st", "windowed.st"))
    assert torch.equal(everything[:4], windowed[:4])
    assert not torch.equal(everything[4:], windowed[4:])


def test_a_rollout_without_video_reports_its_frame_rate(wancli: Wancli, tiny_model: Path):
    result = wancli(
        *small(tiny_model, "--chunks", 3, "--no-video", "--save-latents", "z.st", "--json")
    )
    timings = json.loads(result.out)["timings"]
    assert [row["video_frames"] for row in timings["chunks"]] == [5, 8, 8]
    assert timings["fps"]["wall"] == pytest.approx(21 / timings["rollout_s"], rel=0.01)
    assert set(timings["fps"]) == {"transformer", "wall"}  # no VAE ran


def test_more_sink_frames_than_frames_are_harmless(wancli: Wancli, tiny_model: Path):
    for chunks, sinks in ((2, 2), (2, 10), (1, 1)):
        result = wancli(
            *small(tiny_model, "--chunks", chunks, "--sink-frames", sinks, "-o", f"{sinks}.mp4")
        )
        assert result.code == 0, result.err
    assert digest("2.mp4") == digest("10.mp4")


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("after", [0, 3, 4])  # steps; each chunk has two
def test_a_killed_rollout_resumes_to_the_same_frames(
    wancli: Wancli, made: Made, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, after: int
):
    arguments = small(tiny_model, "--chunks", 3, "--rolling-window", 4)
    made(*arguments, "-o", "whole.mp4")
    from contextlib import contextmanager

    @contextmanager
    def killing(_screen: Screen):
        steps = count()

        def report(event: object) -> None:
            if isinstance(event, Step) and next(steps) == after:
                raise Killed

        yield report

    with monkeypatch.context() as patch:
        patch.setattr(Screen, "progress", killing)
        with pytest.raises(Killed):
            wancli(*arguments, "-o", "a.mp4")
    assert not Path("a.mp4").exists()
    assert len(list(Path("a.rollout").glob("chunk-*"))) == after // 2
    if after:
        hint = "watch a.part.mp4, or finish it: wancli rollout --resume -o a.mp4"
        assert hint in " ".join(wancli("show", "a.mp4").err.split())
        text, frames = wancli("show", "a.part.mp4").out, {3: 5, 4: 13}[after]
        assert (f"{frames} of 21 frames" in text, "unfinished" in text) == (True, True)
        why = f"it is unfinished; {frames} video frames decode"
        assert why in wancli("show", "--check", "a.part.mp4").out
    result = wancli(*arguments, "-o", "a.mp4", "--resume")
    assert result.code == 0, result.err
    assert digest() == digest("whole.mp4")


@pytest.mark.slow
def test_sigkill_loses_at_most_one_chunk(wancli: Wancli, tiny_model: Path):
    arguments = [*map(str, small(tiny_model, "--chunks", 60, "--rolling-window", 4))]
    command = [sys.executable, "-m", "wancli", *arguments, "-o", "a.mp4"]
    for chunks in (1, 20, 40):
        again = ["--resume"] if chunks > 1 else []
        process = subprocess.Popen([*command, *again], stderr=subprocess.DEVNULL)
        while len(list(Path("a.rollout").glob("chunk-*"))) < chunks:
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if chunks > 1:  # latents are saved before their video frames are written
            assert probe(Path("a.part.mp4")).frames > 0  # the part plays
    assert wancli(*arguments, "-o", "a.mp4", "--resume").code == 0
    assert wancli(*arguments, "-o", "whole.mp4").code == 0
    assert digest() == digest("whole.mp4")


@pytest.mark.slow
def test_a_compiled_rollout_is_timed_apart_and_resumes_to_the_same_frames(
    wancli: Wancli, tiny_model: Path
):
    arguments = small(tiny_model, "--chunks", 4, "--rolling-window", 4, "--compile", "-o", "a.mp4")
    result = wancli(*arguments, "--json")
    assert result.code == 0, result.err
    timings, whole = json.loads(result.out)["timings"], digest()
    assert timings["compile_s"] > 1  # which no step contains
    assert max(max(row["steps_ms"]) for row in timings["chunks"]) < 1000
    for number in (2, 3):
        Path(f"a.rollout/chunk-{number:06}.safetensors").unlink()
    result = wancli("rollout", "--resume", "-o", "a.mp4", "-q")
    assert result.code == 0, result.err
    assert digest() == whole


def test_resume_extends_a_finished_rollout_without_repeating_its_settings(
    wancli: Wancli, tiny_model: Path
):
    at = ("--at", 1, "a blue circle")
    wancli(*small(tiny_model, "--chunks", 2, *at, "-o", "a.mp4", "--no-metadata"))
    video = Path("a.mp4").read_bytes()
    Path("a.mp4").write_text("mine")
    result = wancli("rollout", "--resume", "--chunks", 4, "-o", "a.mp4", "-q")
    assert (result.code, "a.mp4 exists." in result.err) == (2, True)
    assert Path("a.mp4").read_text() == "mine"
    Path("a.mp4").write_bytes(video)  # it has no metadata, but the sidecar has the record
    result = wancli("rollout", "--resume", "--chunks", 4, "-o", "a.mp4", "-q")
    assert result.code == 0, result.err
    before = Path("a.mp4").stat().st_mtime_ns
    result = wancli("rollout", "--resume", "-o", "a.mp4")
    assert (result.code, result.out) == (0, "a.mp4\n"), result.err
    assert "nothing is left: a.mp4 and its chunks are there" in result.err
    assert Path("a.mp4").stat().st_mtime_ns == before
    for chunks, *flag in ((3,), (1, "--dry-run")):  # nothing is imported for it
        result = wancli("rollout", "--resume", "--chunks", chunks, "-o", "a.mp4", *flag)
        assert result.code == 2
        assert f"--chunks {chunks}: 4 are already finished" in result.err
        assert f"hint:  --chunks 4 or more, or --rerender {chunks - 1}\n" in result.err
    wancli(*small(tiny_model, "--chunks", 4, *at, "-o", "whole.mp4"))
    assert digest() == digest("whole.mp4")


def test_rerendering_a_chunk_changes_nothing_before_it(wancli: Wancli, tiny_model: Path):
    wancli(*small(tiny_model, "--chunks", 4, "-o", "a.mp4", "--save-latents", "one.st"))
    result = wancli(
        "rollout", "--rerender", 2, "--seed", 9, "-o", "a.mp4", "-q", "--save-latents", "two.st"
    )
    assert result.code == 0, result.err
    one, two = (load_file(name)["latents"] for name in ("one.st", "two.st"))
    assert torch.equal(one[:4], two[:4])
    assert all(not torch.equal(one[i], two[i]) for i in range(4, 8))
    assert sorted(p.name for p in Path("a.rollout/replaced-0").iterdir()) == [
        "chunk-000002.safetensors",
        "chunk-000003.safetensors",
    ]
    again = wancli("rollout", "--rerender", 1, "--seed", 5, "-o", "a.mp4", "--dry-run", "--json")
    assert json.loads(again.out)["request"]["inputs"]["seeds"] == [[0, 1], [1, 5]]  # no more 9


def test_a_chunk_behind_the_last_is_not_rerendered(wancli: Wancli, made: Made, tiny_model: Path):
    made(*small(tiny_model, "--chunks", 2, "-o", "a.mp4"))
    result = wancli("rollout", "--rerender", 2, "--seed", 9, "-o", "a.mp4")
    assert (result.code, "the last chunk is 1" in result.err) == (2, True)


def test_a_chunk_of_the_wrong_shape_without_a_digest_is_rerendered(
    wancli: Wancli, made: Made, tiny_model: Path
):
    made(*small(tiny_model, "--chunks", 3, "-o", "a.mp4"))
    whole = digest()
    shutil.rmtree("a.rollout")
    made(*small(tiny_model, "--chunks", 2, "-o", "a.mp4"))
    chunk = Path("a.rollout/chunk-000000.safetensors")
    save_file({"latents": load_file(chunk)["latents"].reshape(2, 4, 2, 8)}, chunk)
    Path("a.rollout/chunks.jsonl").write_bytes(b'\xff\n{"name": [], "sha256": 1}\n')
    result = wancli("rollout", "--resume", "--chunks", 3, "-o", "a.mp4", "-q")
    assert result.code == 0, result.err
    assert digest() == whole


@pytest.mark.parametrize("damage", ["cut", "exchanged"])
def test_a_damaged_chunk_and_all_later_ones_are_rerendered(
    wancli: Wancli, made: Made, tiny_model: Path, damage: str
):
    made(*small(tiny_model, "--chunks", 3, "-o", "a.mp4"))
    before = digest()
    chunk = Path("a.rollout/chunk-000001.safetensors")
    if damage == "cut":
        chunk.write_bytes(chunk.read_bytes()[:-5])
    else:
        shutil.copy("a.rollout/chunk-000002.safetensors", chunk)
    Path("target").write_text("mine")
    Path("a.rollout/lock").symlink_to("../target")
    result = wancli("rollout", "--rerender", 2, "--seed", 9, "-o", "a.mp4")
    assert (result.code, "only 1 chunks are finished" in result.err) == (2, True)
    result = wancli(
        "rollout", "--resume", "-o", "a.mp4", "--overwrite"
    )  # overwrites the video only
    assert result.code == 0
    assert Path("target").read_text() == "mine"
    assert "damaged or replaced chunks were moved to a.rollout/replaced-0" in result.err
    assert "1 of 3 chunks are kept" in result.err
    assert digest() == before


def test_deleting_the_folder_during_a_run_is_reported_and_the_video_is_complete(
    wancli: Wancli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    from contextlib import contextmanager

    @contextmanager
    def deleting(_screen: Screen):
        def report(event: object) -> None:
            if isinstance(event, Step) and event.chunk == 1:  # the first chunk is saved by then
                for folder in Path().glob("*.rollout"):
                    shutil.rmtree(folder)

        yield report

    monkeypatch.setattr(Screen, "progress", deleting)
    run = small(tiny_model, "--chunks", 2)
    result = wancli(*run, "-o", "a.mp4", "--save-latents", "a.st")
    assert (result.code, result.out) == (6, ""), result.err
    assert "chunks were deleted from a.rollout during the run" in result.err
    assert "a.mp4 is complete; it cannot be resumed" in result.err
    assert probe(Path("a.mp4")).frames == 13
    assert sorted(path.name for path in Path().iterdir()) == ["a.json", "a.mp4"]
    result = wancli(*run, "--no-video", "--save-latents", "b.st")
    assert (result.code, "it cannot be resumed: its folder was deleted" in result.err) == (6, True)
    assert not Path("b.st").exists()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ((PROMPT,), "a.rollout already holds a rollout"),
        (("--rerender", 9), "only 1 chunks are finished"),
        (("--rerender", 1), "the last chunk is 0"),
    ],
    ids=str,
)
def test_finished_chunks_that_forbid_a_rollout_do_so_before_torch_is_imported(
    made: Made, tiny_model: Path, forked: Run, flags: tuple[object, ...], error: str
):
    made(*small(tiny_model, "--chunks", 1, "-o", "a.mp4"))
    Path("a.mp4").unlink()
    Path("a.json").unlink()
    code, heavy, _, text = forked("rollout", *map(str, flags), "-o", "a.mp4", folder=Path.cwd())
    assert (code, heavy, error in text) == (2, [], True), text


def test_resuming_with_changed_settings_names_them_and_loses_nothing(
    wancli: Wancli, made: Made, tiny_model: Path
):
    made(*small(tiny_model, "--chunks", 2, "-o", "a.mp4"))
    before = digest()
    result = wancli(*small(tiny_model, "--resume", "-o", "a.mp4", "--flow-shift", 3))
    assert result.code == 2
    assert "sampling.flow_shift was 5.0, is 3.0" in result.err
    assert digest() == before
    Path("own.toml").write_text("[sampling]\nflow_shift = 3.0\n")
    again = ("rollout", "--resume", "-o", "a.mp4", "--dry-run")
    result = wancli(*again, "--preset", "own.toml")
    assert (result.code, "sampling.flow_shift was 5.0, is 3.0" in result.err) == (2, True)
    result = wancli(*again, "--preset", "no.toml")
    assert (result.code, "preset file 'no.toml' not found" in result.err) == (2, True)
    result = wancli(*again, "--preset", "own.toml", "--flow-shift", 5)
    assert result.code == 0, result.err
    result = wancli(*small(tiny_model, "--chunks", 2, "-o", "a.mp4"))
    assert (result.code, "exists" in result.err) == (2, True)
    Path("a.rollout/chunks.jsonl").unlink()  # as of an earlier version: they are read to be judged
    result = wancli(*small(tiny_model, "--resume", "-o", "a.mp4", "--at", 1, "a blue circle"))
    assert (result.code, "inputs.changes was" in result.err) == (2, True)
    assert digest() == before


def test_a_rollout_that_fails_to_load_leaves_no_folder(wancli: Wancli, tiny_model: Path):
    shutil.copytree(tiny_model, "model")
    weights = Path("model/transformer/diffusion_pytorch_model.safetensors")
    tensors = load_file(weights)
    tensors.pop("proj_out.bias")
    save_file(tensors, weights)
    for _ in range(2):
        result = wancli(*small(Path("model"), "-o", "a.mp4"))
        assert (result.code, "missing keys" in result.err) == (4, True)
        assert not Path("a.rollout").exists()


def test_an_earlier_rollout_stays_until_its_replacement_has_loaded(
    wancli: Wancli, tiny_model: Path
):
    shutil.copytree(tiny_model, "model")
    run = small(Path("model"), "--chunks", 3, "-o", "a.mp4")
    assert wancli(*run).code == 0
    before = {path: path.read_bytes() for path in Path("a.rollout").iterdir()}
    weights = Path("model/transformer/diffusion_pytorch_model.safetensors")
    whole = load_file(weights)
    save_file({name: whole[name] for name in whole if name != "proj_out.bias"}, weights)
    Path("a.rollout/mine.safetensors").write_text("mine")
    before[Path("a.rollout/mine.safetensors")] = b"mine"
    again = small(Path("model"), "--chunks", 2, "-o", "a.mp4", "--overwrite")
    assert wancli(*again).code == 4
    assert {path: path.read_bytes() for path in Path("a.rollout").iterdir()} == before
    save_file(whole, weights)
    assert wancli(*again).code == 0
    assert sorted(path.name for path in Path("a.rollout").glob("chunk-*")) == [
        "chunk-000000.safetensors", "chunk-000001.safetensors",
    ]  # fmt: skip
    assert json.loads(Path("a.rollout/rollout.json").read_text())["rollout"]["chunks"] == 2
    assert Path("a.rollout/mine.safetensors").read_text() == "mine"


def test_timings_are_kept_in_the_rollout_folder(wancli: Wancli, made: Made, tiny_model: Path):
    made(*small(tiny_model, "--chunks", 3, "-o", "a.mp4"))
    file = Path("a.rollout/times.jsonl")
    assert [json.loads(line)["made"] for line in file.read_text().splitlines()] == [True] * 3
    file.write_bytes(file.read_bytes()[:-40])  # a kill -9 in the middle of a line
    result = wancli("rollout", "--resume", "--chunks", 4, "-o", "a.mp4", "-q", "--json")
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["made"] for line in lines] == [False, False, False, True]
    assert [row["chunk"] for row in json.loads(result.out)["timings"]["chunks"]] == [0, 1, 2, 3]


def test_a_prompt_change_starts_at_its_chunk(wancli: Wancli, tiny_model: Path):
    run = small(tiny_model, "--chunks", 3, "--no-video", "--save-latents")
    wancli(*run, "plain.st")
    result = wancli(*run, "at.st", "--at", 1, "a blue circle")
    assert result.code == 0, result.err
    plain, changed = (load_file(name)["latents"] for name in ("plain.st", "at.st"))
    assert torch.equal(plain[:2], changed[:2])
    assert not torch.equal(plain[2:4], changed[2:4])
    Path("s.toml").write_text('[[at]]\nchunk = 1\nprompt = "a blue circle"\n')
    wancli(*run, "script.st", "--script", "s.toml")
    assert torch.equal(load_file("script.st")["latents"], changed)
    for flags in (("--recache",), ("--blend", 2)):
        wancli(*run, "other.st", "--at", 1, "a blue circle", *flags, "--overwrite")
        other = load_file("other.st")["latents"]
        assert torch.equal(other[:2], plain[:2])
        assert not torch.equal(other, changed)


@pytest.mark.parametrize(
    "flags",
    [
        ("--recache",),
        ("--recache", "--recache-by", "window"),
        ("--kv-recompute", "--rolling-window", 4, "--sink-frames", 1),
    ],
    ids=lambda flags: flags[-1],
)
def test_a_recached_prompt_resumes_to_the_same_latents(wancli: Wancli, tiny_model: Path, flags):
    run = small(tiny_model, "--no-video", "--at", 1, "a blue circle", *flags, "--save-latents")
    wancli(*run, "whole.st", "--chunks", 4)
    wancli(*run, "a.st", "--chunks", 2)
    result = wancli("rollout", "--resume", "--no-video", "--save-latents", "a.st", "--chunks", 4)
    assert result.code == 0, result.err
    assert torch.equal(load_file("a.st")["latents"], load_file("whole.st")["latents"])


def test_a_rollout_from_before_a_setting_existed_resumes_at_its_default(
    wancli: Wancli, tiny_model: Path
):
    wancli(*small(tiny_model, "--chunks", 1, "-o", "a.mp4"))
    file = Path("a.rollout/rollout.json")
    request = json.loads(file.read_text())
    del request["rollout"]["shot_sink"], request["rollout"]["image_start"]
    file.write_text(json.dumps(request))
    resume = ("rollout", "--resume", "--chunks", 2, "-o", "a.mp4", "-q")
    result = wancli(*resume, "--image-start", "first-frame")
    assert (result.code, "image_start was 'context'" in result.err) == (2, True)
    result = wancli(*resume)
    assert result.code == 0, result.err


def test_the_first_frame_of_a_context_can_be_encoded_anew(wancli: Wancli, tiny_model: Path):
    recompute = ("--kv-recompute", "--rolling-window", 4)
    latents = {}
    for name, flags in {"plain": (), "whole": ("--reencode-first",)}.items():
        run = small(tiny_model, *recompute, *flags, "--save-latents", f"{name}.st")
        result = wancli(*run, "-o", f"{name}.mp4", "--chunks", 4)
        assert result.code == 0, result.err
        latents[name] = load_file(f"{name}.st")["latents"]
    same = 4  # the context of the first two chunks begins with the video
    assert torch.equal(latents["plain"][:same], latents["whole"][:same])
    assert not torch.equal(latents["plain"][same : same + 2], latents["whole"][same : same + 2])
    run = small(tiny_model, *recompute, "--reencode-first", "--save-latents", "a.st")
    wancli(*run, "-o", "a.mp4", "--chunks", 3)
    resume = ("rollout", "--resume", "--chunks", 4, "--save-latents", "a.st", "-o", "a.mp4")
    result = wancli(*resume, "--overwrite")
    assert result.code == 0, result.err
    assert torch.equal(load_file("a.st")["latents"], latents["whole"])
    assert digest() == digest("whole.mp4")


def test_a_new_prompt_can_begin_a_shot(wancli: Wancli, tiny_model: Path):
    run = small(tiny_model, *SHOTS, "--rolling-window", 4, "--no-video", "--at", 1, "a blue circle")
    latents = {}
    for name, flags in {
        "whole": (),
        "prefix": ("--shot-prefix", "A new scene."),
        "offset": ("--shot-offset", 2),
        "no sink": ("--no-shot-sink",),
    }.items():
        result = wancli(*run, *flags, "--chunks", 5, "--save-latents", f"{name}.st")
        assert result.code == 0, result.err
        latents[name] = load_file(f"{name}.st")["latents"]
    first = {"prefix": 2, "offset": 2, "no sink": 4}  # frames that are the same
    for name, same in first.items():
        assert torch.equal(latents[name][:same], latents["whole"][:same])
        assert not torch.equal(latents[name][same : same + 2], latents["whole"][same : same + 2])
    wancli(*run, "--chunks", 3, "--save-latents", "a.st")
    result = wancli("rollout", "--resume", "--chunks", 5, "--no-video", "--save-latents", "a.st")
    assert result.code == 0, result.err
    assert torch.equal(load_file("a.st")["latents"], latents["whole"])


def test_guidance_doubles_the_rolling_cache(wancli: Wancli, tiny_model: Path):
    run = small(
        tiny_model, "--chunks", 2, "--steps-list", "", "--sampler", "unipc", "--steps", 3,
        "--no-video", "--json", "--save-latents",
    )  # fmt: skip
    guided = json.loads(wancli(*run, "a.st", "--guidance-scale", 3).out)
    plain = json.loads(wancli(*run, "b.st", "--guidance-scale", 1).out)
    assert guided["timings"]["kv_bytes"] == 2 * plain["timings"]["kv_bytes"]
    assert [len(row["sigmas"]) for row in guided["timings"]["chunks"]] == [3, 3]


def test_a_rollout_goes_straight_down_a_list(wancli: Wancli, tiny_model: Path):
    run = small(tiny_model, "--chunks", 2, "--flow-shift", 5, "--no-video", "--json")
    result = wancli(*run, "--sampler", "euler", "--guidance-scale", 1, "--save-latents", "a.st")
    assert result.code == 0, result.err
    for row in json.loads(result.out)["timings"]["chunks"]:
        assert row["sigmas"] == pytest.approx([1, 5 / 6], abs=1e-4)


@pytest.mark.parametrize("flag", ["--image", "--extend"])
def test_a_rollout_continues_an_image_or_a_clip(
    wancli: Wancli, made: Made, tiny_model: Path, flag: str
):
    rng = np.random.default_rng(0)
    if flag == "--image":
        imageio.imwrite("start.png", rng.integers(0, 255, (50, 40, 3), np.uint8))
        start = Path("start.png")
    else:
        made(*small(tiny_model, "--chunks", 2, "-o", "start.mp4"))
        start = Path("start.mp4")
    initial_frames = probe(start).frames if flag == "--extend" else 5
    run = small(tiny_model, "--chunks", 2, flag, start)
    result = wancli(*run, "-o", "a.mp4", "--json")
    assert result.code == 0, result.err
    assert probe(Path("a.mp4")).frames == initial_frames + 16
    assert json.loads(result.out)["request"]["inputs"][flag[2:]]["name"] == start.name
    wancli(*run, "-o", "new.mp4", "--only-new")
    assert probe(Path("new.mp4")).frames == 16
    start.unlink()  # its encoded latents are kept
    result = wancli("rollout", "--resume", "--chunks", 3, "-o", "a.mp4", "-q")
    assert result.code == 0, result.err
    assert probe(Path("a.mp4")).frames == initial_frames + 24


def test_a_picture_can_be_the_first_latent_frame_of_the_first_chunk(
    wancli: Wancli, tiny_model: Path
):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    imageio.imwrite("start.png", pixels)
    run = small(tiny_model, "--chunks", 2, "-i", "start.png", "--image-start", "first-frame")
    run = (*run, "--steps-list", "", "--sampler", "unipc", "--steps", 2, "--guidance-scale", 1)
    result = wancli(*run, "-o", "a.mp4", "--save-latents", "a.st")
    assert result.code == 0, result.err
    assert probe(Path("a.mp4")).frames == 1 + 4 * 3  # the picture's frame is one of the first chunk
    from diffusers import AutoencoderKLWan

    from wancli.models.vae import encode_image

    vae = AutoencoderKLWan.from_pretrained(tiny_model, subfolder="vae").eval()
    latents = load_file("a.st")["latents"]
    assert torch.equal(latents[0], encode_image(vae, pixels)[0, :, 0])
    Path("start.png").unlink()  # its encoded latents are kept
    result = wancli("rollout", "--rerender", 0, "-o", "a.mp4", "--save-latents", "b.st", "-q")
    assert result.code == 0, result.err
    assert torch.equal(load_file("b.st")["latents"], latents)


def test_repro_reproduces_a_rollout(wancli: Wancli, tiny_model: Path):
    run = small(tiny_model, "--chunks", 3, "--at", 1, "a blue circle", "--rolling-window", 4)
    wancli(*run, "-o", "a.mp4")
    result = wancli("repro", "a.json", "-o", "b.mp4")
    assert result.code == 0, result.err
    assert "identical" in result.err
    assert digest("b.mp4") == digest("a.mp4")
    wancli(
        *small(tiny_model, "--chunks", 1, "--extend", "a.mp4", "-o", "c.mp4", "--chunk-frames", 1)
    )
    result = wancli("repro", "c.json", "-o", "d.mp4")
    assert (result.code, "--extend" in result.err) == (4, True)


def test_the_first_latent_frame_can_be_its_own_chunk(wancli: Wancli, tiny_model: Path):
    result = wancli(
        *small(tiny_model, "--chunks", 3, "--independent-first-frame", "-o", "a.mp4", "--json"),
        *("--first-chunk-steps", "1000,750,500,250"),
    )
    rows = json.loads(result.out)["timings"]["chunks"]
    assert [row["video_frames"] for row in rows] == [1, 8, 8]
    assert [len(row["steps_ms"]) for row in rows] == [4, 2, 2]


def test_a_transformer_alone_rolls_out_from_tensors(wancli: Wancli, tiny_model: Path):
    shutil.copytree(tiny_model / "transformer", "alone/transformer")
    save_file({"prompt_embeds": torch.randn(1, 3, 16)}, "embeds.st")
    result = wancli(
        "rollout", "--model", "alone", "--chunks", 2, "--size", "32x32", "--no-video", "-q",
        "--prompt-embeds", "embeds.st", "--text-length", 8, "--save-latents", "z.st",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert load_file("z.st")["latents"].shape == (6, 4, 4, 4)
    result = wancli("rollout", PROMPT, "--model", "alone", "--chunks", 2, "--size", "32x32")
    assert result.code == 4
    assert "text_encoder has no weights" in result.err


def test_decoding_in_parallel_gives_the_same_frames(
    wancli: Wancli, made: Made, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    from wancli.rollouts import runner as roll

    made(*small(tiny_model, "--chunks", 3, "-o", "a.mp4"))
    plain = roll.roll
    monkeypatch.setattr(roll, "roll", lambda job, *rest: plain(replace(job, beside=True), *rest))
    wancli(*small(tiny_model, "--chunks", 3, "-o", "b.mp4"))
    assert digest("a.mp4") == digest("b.mp4")


CUDA = ("rollout", PROMPT, "--chunks", 6, "--seed", 1, "--device", "cuda", "--lossless", "-q")


@pytest.mark.gpu
def test_stages_on_cuda_give_the_frames_of_a_rollout_without_them(
    wancli: Wancli, monkeypatch: pytest.MonkeyPatch
):
    from wancli.rollouts import runner as roll

    quick = (*CUDA, "--steps", 2)
    record = json.loads(wancli(*quick, "-o", "a.mp4", "--json").out)
    plain = roll.roll
    monkeypatch.setattr(roll, "roll", lambda job, *rest: plain(replace(job, beside=False), *rest))
    assert wancli(*quick, "-o", "b.mp4").code == 0
    assert digest("a.mp4") == digest("b.mp4")
    rates = record["timings"]["fps"]
    assert rates["transformer"] >= rates["with_vae"] >= rates["wall"]


@pytest.mark.gpu
def test_no_chunk_of_a_rollout_waits_for_the_device(
    wancli: Wancli, monkeypatch: pytest.MonkeyPatch
):
    from wancli.rollouts import loop
    from wancli.rollouts import runner as roll

    def watched(*arguments: Any) -> Iterator[Any]:
        try:
            for event in loop.rollout(*arguments):
                yield event
                if event.span.index == 3:  # kernels are chosen by then
                    torch.cuda.set_sync_debug_mode("error")
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(roll, "rollout", watched)
    few = ("--sampler", "few-step", "--steps-list", "1000,500")  # diffusers' solvers wait
    for more in (("-o", "a.mp4"), ("--no-video", "--save-latents", "a.safetensors")):
        result = wancli(*CUDA, *few, *more)
        assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("flags", "code", "error", "hint"),
    [
        (
            ("--rolling-window", 3, "--sink-frames", 2),
            2,
            "too small for --sink-frames 2",
            "--rolling-window 5",
        ),
        (("--chunks", 0), 2, "--chunks", "1 to 100000"),
        (("--at", 7, "blue"), 2, "the last is 6", "--chunks 8"),
        (("--at", "blue"), 2, "--at 'blue' is not the number of a chunk", "--at 5"),
        (("--at", "x", "blue"), 2, "--at 'x' is not the number of a chunk", "--at 5"),
        (("--at", 3), 2, "--at 3 has no prompt", "--at 3"),
        (("--at", 3, "--dry-run"), 2, "--at 3 has no prompt", "--at 3"),
        (("--steps-list", "250,500"), 2, "must decrease", "1000,750"),
        (("--trim", "after", "--sink-frames", 1), 2, "has no sinks", "--trim before"),
        (("--rope", "sink"), 2, "needs --sink-frames", "--sink-frames 3"),
        (("--shot-sink", "--rope", "absolute"), 2, "needs --sink-frames", "--sink-frames 3"),
        (("--shot-sink", "--sink-frames", 1), 2, "needs absolute positions", "--rope absolute"),
        (("--shot-offset", 8, "--sink-frames", 1), 2, "--shot-offset 8", "--rope absolute"),
        (("--shot-prefix", "Cut.", "--blend", 2), 2, "fades in", "drop one"),
        ((*SHOTS, "--recache"), 2, "--recache replaces", "drop --recache"),
        (
            ("--shot-offset", 8, "--recache", "--recache-by", "window"),
            2,
            "parts the window",
            "--recache-by chunk",
        ),
        (("--kv-recompute", "--recache"), 2, "before every chunk; --recache", "drop --recache"),
        (
            ("--kv-recompute", "--sink-frames", 1, "--rope", "absolute"),
            2,
            "moves the sink",
            "--rope relative",
        ),
        *(
            ((*flags, "--rope", "absolute"), 2, f"{flags[0]} does nothing without", "--at 1")
            for flags in (
                ("--recache",),
                ("--blend", 2),
                ("--shot-prefix", "Cut."),
                ("--shot-offset", 2),
                ("--shot-sink", "--sink-frames", 1),
            )
        ),
        (("--recache-by", "window"), 2, "does nothing without --recache", "--recache"),
        (("--reencode-first",), 2, "computed before every chunk", "--kv-recompute"),
        (
            ("--reencode-first", "--kv-recompute", "--sink-frames", 1),
            2,
            "--sink-frames 1 keeps",
            "--sink-frames 0",
        ),
        (
            ("--reencode-first", "--kv-recompute", "--no-video", "--save-latents", "x.st"),
            2,
            "frames of the video",
            "drop --no-video",
        ),
        ((*SHOTS, "--rolling-window", 4), 2, "two sinks", "--rolling-window 5"),
        (
            ("--image-start", "first-frame", "--chunk-frames", 1),
            2,
            "nothing to generate",
            "--image-start context",
        ),
        (("--resume", "-o", "no.mp4"), 4, "no rollout to resume", "without --resume"),
        (("--seed", "1,2"), 2, "one seed", "--seed 7"),
        (("--no-video",), 2, "--save-latents", "x.safetensors"),
        (("--only-new",), 2, "needs frames to leave out", "--image or --extend"),
        (
            ("--no-video", "--save-latents", "x.st", "--report", "x.html"),
            2,
            "--report measures frames",
            "drop --report",
        ),
        (("--image", "cat.png"), 4, "'cat.png' not found", "check the path"),
        (("--model", "wan2.1-t2v-1.3b"), 2, "was not trained", "--force"),
        (("--report", "x.pdf"), 2, "not an .html", "drift.html"),
        (("--script", "no.toml"), 4, "not found", "check the path"),
        (("--size", "40x32"), 2, "multiple of 16", "--size"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_invalid_input_is_rejected_in_two_lines(
    wancli: Wancli, tiny_model: Path, flags: tuple[object, ...], code: int, error: str, hint: str
):
    result = wancli("rollout", PROMPT, "--model", tiny_model, "--size", "32x32", *flags)
    first, second = result.err.splitlines()
    assert result.code == code
    assert first.startswith("error: ")
    assert error in first
    assert second.startswith("hint: ")
    assert hint in second
    assert not list(Path().glob("*.mp4"))


def test_a_picture_inside_the_first_chunk_cannot_be_left_out(wancli: Wancli, tiny_model: Path):
    imageio.imwrite("start.png", np.zeros((32, 32, 3), np.uint8))
    result = wancli(
        *small(tiny_model, "-i", "start.png", "--image-start", "first-frame", "--only-new")
    )
    assert result.code == 2
    assert "part of the first" in result.err


def test_a_clip_that_does_not_match_is_rejected_before_anything_loads(
    wancli: Wancli, made: Made, tiny_model: Path
):
    made(*small(tiny_model, "--chunks", 2, "-o", "start.mp4"))  # 13 video frames, 4 latents
    run = ("rollout", PROMPT, "--model", tiny_model, "--extend", "start.mp4", "-o", "a.mp4")
    for flags, hint in (
        (("--size", "48x32", "--fps", 8), "--size 32x32"),
        (("--size", "32x32", "--fps", 16), "--fps 8"),
        (("--size", "32x32", "--fps", 8, "--chunk-frames", 3), "cut it to 9"),
    ):
        result = wancli(*run, *flags)
        assert result.code == 2
        assert hint in result.err


def test_a_rollout_uses_both_experts(wancli: Wancli, tmp_path: Path):
    from tests.fakes import tiny_folder

    model = tiny_folder(tmp_path / "two", experts=2)
    run = small(
        model, "--chunks", 2, "--steps-list", "", "--sampler", "unipc", "--steps", 4,
        "--flow-shift", 1, "--no-video", "--guidance-scale", 3, "--save-latents",
    )  # fmt: skip
    result = wancli(*run, "a.st")
    assert result.code == 0, result.err
    wancli(*run, "b.st", "--guidance-scale-2", 1.5)
    one, other = (load_file(name)["latents"] for name in ("a.st", "b.st"))
    assert torch.isfinite(one).all()
    assert not torch.equal(one, other)


def test_a_step_cache_follows_the_boundary_between_two_experts(wancli: Wancli, tmp_path: Path):
    from tests.fakes import tiny_folder

    model = tiny_folder(tmp_path / "two", experts=2)
    run = small(
        model, "--chunks", 1, "--steps-list", "", "--sampler", "unipc", "--steps", 9,
        "--flow-shift", 1, "--no-video", "--use-cachedit", "--cachedit-fn", 1, "--json",
        "--cachedit-max-warmup-steps", 2, "--cachedit-residual-threshold", 1,
    )  # fmt: skip
    for number, (boundary, reused) in enumerate([(0.9, 10), (0.1, 12)]):
        result = wancli(*run, "--save-latents", f"{number}.st", "--boundary-ratio", boundary)
        assert result.code == 0, result.err
        assert json.loads(result.out)["cache"]["reused"] == reused


def test_a_lora_that_names_neither_of_two_experts_is_rejected(wancli: Wancli, tmp_path: Path):
    from tests.fakes import tiny_folder

    model = tiny_folder(tmp_path / "two", experts=2)
    Path("x.safetensors").write_bytes(b"")
    result = wancli(*small(model, "-o", "a.mp4", "--lora", "x.safetensors"))
    first, hint = result.err.splitlines()
    assert (result.code, "two experts" in first, "x.safetensors@high" in hint) == (2, True, True)
