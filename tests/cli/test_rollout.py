"""`wancli rollout` through main(), on a tiny real pipeline."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Wancli
from wancli.cli.screen import Screen
from wancli.models.vae import StreamingDecoder
from wancli.video.read import probe, read_comment
from wancli.video.write import framemd5

PROMPT = "a red circle moving right"
SMALL = ("--size", "32x32", "--fps", 8, "--chunk-frames", 2, "--steps-list", "1000,500", "-q")


def small(model: Path, *more: object) -> tuple[object, ...]:
    return ("rollout", PROMPT, "--model", model, *SMALL, "--seed", 1, *more)


def made(video: str = "a.mp4") -> str:
    return framemd5(Path(video))


def test_chunks_become_one_video_with_its_record(wancli: Wancli, tiny_model: Path):
    said = wancli(*small(tiny_model, "--chunks", 3, "-o", "a.mp4", "--json"))
    assert said.code == 0, said.err
    record = json.loads(said.out)
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
    assert json.loads(read_comment(Path("a.mp4")) or "")["request"]["prompt"] == PROMPT
    assert not list(Path().glob("*.part*"))


def test_what_is_written_is_the_decoded_latents(wancli: Wancli, tiny_model: Path):
    said = wancli(
        *small(tiny_model, "--chunks", 3, "-o", "a.mp4", "--lossless", "--save-latents", "z.st")
    )
    assert said.code == 0, said.err
    from diffusers import AutoencoderKLWan

    from wancli.video.read import read_frames

    latents = load_file("z.st")["latents"].transpose(0, 1)[None]
    vae = AutoencoderKLWan.from_pretrained(tiny_model, subfolder="vae").eval()
    assert np.array_equal(read_frames(Path("a.mp4")), StreamingDecoder(vae)(latents))


def test_a_rolling_window_limits_what_is_attended_to(wancli: Wancli, tiny_model: Path):
    whole = ("--chunks", 4, "--no-video", "--save-latents")
    wancli(*small(tiny_model, *whole, "all.st"))
    said = wancli(*small(tiny_model, *whole, "windowed.st", "--rolling-window", 4, "--json"))
    rows = json.loads(said.out)["timings"]["chunks"]
    assert [row["kv_tokens"] for row in rows] == [8, 16, 16, 16]
    everything, windowed = (load_file(name)["latents"] for name in ("all.st", "windowed.st"))
    assert torch.equal(everything[:4], windowed[:4])
    assert not torch.equal(everything[4:], windowed[4:])


def test_latents_alone_are_made_at_so_many_frames_a_second_too(wancli: Wancli, tiny_model: Path):
    said = wancli(
        *small(tiny_model, "--chunks", 3, "--no-video", "--save-latents", "z.st", "--json")
    )
    timings = json.loads(said.out)["timings"]
    assert [row["video_frames"] for row in timings["chunks"]] == [5, 8, 8]
    assert timings["fps"]["wall"] == pytest.approx(21 / timings["rollout_s"], rel=0.01)
    assert set(timings["fps"]) == {"transformer", "wall"}  # no VAE was there


def test_more_sinks_than_there_are_frames_are_all_of_them(wancli: Wancli, tiny_model: Path):
    for sinks in (2, 10):
        said = wancli(
            *small(tiny_model, "--chunks", 2, "--sink-frames", sinks, "-o", f"{sinks}.mp4")
        )
        assert said.code == 0, said.err
    assert made("2.mp4") == made("10.mp4")


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5])
def test_a_killed_rollout_goes_on_to_the_same_frames(
    wancli: Wancli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, after: int
):
    arguments = small(tiny_model, "--chunks", 3, "--rolling-window", 4)
    wancli(*arguments, "-o", "whole.mp4")
    from contextlib import contextmanager

    @contextmanager
    def killing(_screen: Screen):
        yield lambda event: stop() if getattr(event, "index", -1) == after else None

    def stop():
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Screen, "progress", killing)
        with pytest.raises(Killed):
            wancli(*arguments, "-o", "a.mp4")
    assert not Path("a.mp4").exists()
    assert len(list(Path("a.rollout").glob("chunk-*"))) == after // 2
    said = wancli(*arguments, "-o", "a.mp4", "--resume")
    assert said.code == 0, said.err
    assert made() == made("whole.mp4")


@pytest.mark.slow
def test_kill_9_loses_one_chunk_at_most(wancli: Wancli, tiny_model: Path):
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
        if chunks > 1:  # latents are kept before their video frames are written
            assert probe(Path("a.part.mp4")).frames > 0  # what was written plays
    assert wancli(*arguments, "-o", "a.mp4", "--resume").code == 0
    assert wancli(*arguments, "-o", "whole.mp4").code == 0
    assert made() == made("whole.mp4")


def test_a_finished_rollout_can_be_extended_without_saying_it_all_again(
    wancli: Wancli, tiny_model: Path
):
    wancli(*small(tiny_model, "--chunks", 2, "-o", "a.mp4", "--no-metadata"))
    video = Path("a.mp4").read_bytes()
    Path("a.mp4").write_text("mine")
    said = wancli("rollout", "--resume", "--chunks", 4, "-o", "a.mp4", "-q")
    assert (said.code, "a.mp4 exists." in said.err) == (2, True)
    assert Path("a.mp4").read_text() == "mine"
    Path("a.mp4").write_bytes(video)  # which says nothing of itself, but the record beside does
    said = wancli("rollout", "--resume", "--chunks", 4, "-o", "a.mp4", "-q")
    assert said.code == 0, said.err
    wancli(*small(tiny_model, "--chunks", 4, "-o", "whole.mp4"))
    assert made() == made("whole.mp4")


def test_a_chunk_made_again_changes_what_follows_and_nothing_before(
    wancli: Wancli, tiny_model: Path
):
    wancli(*small(tiny_model, "--chunks", 4, "-o", "a.mp4", "--save-latents", "one.st"))
    said = wancli(
        "rollout", "--rerender", 2, "--seed", 9, "-o", "a.mp4", "-q", "--save-latents", "two.st"
    )
    assert said.code == 0, said.err
    one, two = (load_file(name)["latents"] for name in ("one.st", "two.st"))
    assert torch.equal(one[:4], two[:4])
    assert all(not torch.equal(one[i], two[i]) for i in range(4, 8))
    assert sorted(p.name for p in Path("a.rollout/replaced-0").iterdir()) == [
        "chunk-000002.safetensors",
        "chunk-000003.safetensors",
    ]


def test_a_chunk_of_another_shape_that_no_digest_vouches_for_is_made_again(
    wancli: Wancli, tiny_model: Path
):
    wancli(*small(tiny_model, "--chunks", 3, "-o", "whole.mp4"))
    wancli(*small(tiny_model, "--chunks", 2, "-o", "a.mp4"))
    chunk = Path("a.rollout/chunk-000000.safetensors")
    save_file({"latents": load_file(chunk)["latents"].reshape(2, 4, 2, 8)}, chunk)
    Path("a.rollout/chunks.jsonl").write_bytes(b'\xff\n{"name": [], "sha256": 1}\n')
    said = wancli("rollout", "--resume", "--chunks", 3, "-o", "a.mp4", "-q")
    assert said.code == 0, said.err
    assert made("a.mp4") == made("whole.mp4")


@pytest.mark.parametrize("damage", ["cut", "exchanged"])
def test_a_damaged_chunk_and_what_follows_is_made_again(
    wancli: Wancli, tiny_model: Path, damage: str
):
    wancli(*small(tiny_model, "--chunks", 3, "-o", "a.mp4"))
    before = made()
    chunk = Path("a.rollout/chunk-000001.safetensors")
    if damage == "cut":
        chunk.write_bytes(chunk.read_bytes()[:-5])
    else:
        shutil.copy("a.rollout/chunk-000002.safetensors", chunk)
    Path("target").write_text("mine")
    Path("a.rollout/lock").symlink_to("../target")
    said = wancli("rollout", "--rerender", 2, "--seed", 9, "-o", "a.mp4")
    assert (said.code, "only 1 chunks are finished" in said.err) == (2, True)
    said = wancli("rollout", "--resume", "-o", "a.mp4", "--overwrite")  # of the video alone
    assert said.code == 0
    assert Path("target").read_text() == "mine"
    assert "damaged or exchanged chunks were moved to a.rollout/replaced-0" in said.err
    assert "1 of 3 chunks are kept" in said.err
    assert made() == before


def test_a_folder_that_is_deleted_meanwhile_is_told_and_the_video_is_whole(
    wancli: Wancli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    from contextlib import contextmanager

    @contextmanager
    def deleting(_screen: Screen):
        def heard(event: object) -> None:
            if getattr(event, "index", -1) == 2:  # the first chunk is kept by then
                for folder in Path().glob("*.rollout"):
                    shutil.rmtree(folder)

        yield heard

    monkeypatch.setattr(Screen, "progress", deleting)
    run = small(tiny_model, "--chunks", 2)
    said = wancli(*run, "-o", "a.mp4", "--save-latents", "a.st")
    assert (said.code, said.out) == (6, ""), said.err
    assert "chunks were deleted from a.rollout during the run" in said.err
    assert "a.mp4 is complete; it cannot be resumed" in said.err
    assert probe(Path("a.mp4")).frames == 13
    assert sorted(path.name for path in Path().iterdir()) == ["a.json", "a.mp4"]
    said = wancli(*run, "--no-video", "--save-latents", "b.st")
    assert (said.code, "it cannot be resumed: its folder was deleted" in said.err) == (6, True)
    assert not Path("b.st").exists()


def test_changed_settings_are_named_and_nothing_is_lost(wancli: Wancli, tiny_model: Path):
    wancli(*small(tiny_model, "--chunks", 2, "-o", "a.mp4"))
    before = made()
    said = wancli(*small(tiny_model, "--resume", "-o", "a.mp4", "--flow-shift", 3))
    assert said.code == 2
    assert "sampling.flow_shift was 5.0, is 3.0" in said.err
    assert made() == before
    said = wancli(*small(tiny_model, "--chunks", 2, "-o", "a.mp4"))
    assert (said.code, "exists" in said.err) == (2, True)


def test_a_rollout_that_made_nothing_leaves_nothing(wancli: Wancli, tiny_model: Path):
    shutil.copytree(tiny_model, "model")
    weights = Path("model/transformer/diffusion_pytorch_model.safetensors")
    tensors = load_file(weights)
    tensors.pop("proj_out.bias")
    save_file(tensors, weights)
    for _ in range(2):
        said = wancli(*small(Path("model"), "-o", "a.mp4"))
        assert (said.code, "missing keys" in said.err) == (4, True)
        assert not Path("a.rollout").exists()


def test_an_earlier_rollout_is_there_until_the_one_that_replaces_it_has_loaded(
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


def test_the_times_of_a_run_are_in_the_rollouts_folder(wancli: Wancli, tiny_model: Path):
    run = small(tiny_model, "--chunks", 3, "-o", "a.mp4")
    wancli(*run)
    file = Path("a.rollout/times.jsonl")
    assert [json.loads(line)["made"] for line in file.read_text().splitlines()] == [True] * 3
    file.write_bytes(file.read_bytes()[:-40])  # a kill -9 in the middle of a line
    said = wancli("rollout", "--resume", "--chunks", 4, "-o", "a.mp4", "-q", "--json")
    assert said.code == 0, said.err
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["made"] for line in lines] == [False, False, False, True]
    assert [row["chunk"] for row in json.loads(said.out)["timings"]["chunks"]] == [0, 1, 2, 3]


def test_a_change_of_prompt_begins_where_it_was_asked_for(wancli: Wancli, tiny_model: Path):
    run = small(tiny_model, "--chunks", 3, "--no-video", "--save-latents")
    wancli(*run, "plain.st")
    said = wancli(*run, "at.st", "--at", 1, "a blue circle")
    assert said.code == 0, said.err
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


def test_a_prompt_read_again_still_resumes_to_the_same_latents(wancli: Wancli, tiny_model: Path):
    run = small(tiny_model, "--no-video", "--at", 1, "a blue circle", "--recache", "--save-latents")
    wancli(*run, "whole.st", "--chunks", 4)
    wancli(*run, "a.st", "--chunks", 2)
    said = wancli("rollout", "--resume", "--no-video", "--save-latents", "a.st", "--chunks", 4)
    assert said.code == 0, said.err
    assert torch.equal(load_file("a.st")["latents"], load_file("whole.st")["latents"])


def test_many_steps_with_guidance_have_two_memories(wancli: Wancli, tiny_model: Path):
    run = small(
        tiny_model, "--chunks", 2, "--sampler", "unipc", "--steps", 3, "--no-video", "--json",
        "--save-latents",
    )  # fmt: skip
    guided = json.loads(wancli(*run, "a.st", "--guidance-scale", 3).out)
    plain = json.loads(wancli(*run, "b.st", "--guidance-scale", 1).out)
    assert guided["timings"]["kv_bytes"] == 2 * plain["timings"]["kv_bytes"]
    assert [len(row["sigmas"]) for row in guided["timings"]["chunks"]] == [3, 3]


@pytest.mark.parametrize("flag", ["--image", "--extend"])
def test_a_rollout_goes_on_from_what_is_given(wancli: Wancli, tiny_model: Path, flag: str):
    rng = np.random.default_rng(0)
    if flag == "--image":
        imageio.imwrite("start.png", rng.integers(0, 255, (50, 40, 3), np.uint8))
        start = Path("start.png")
    else:
        wancli(*small(tiny_model, "--chunks", 2, "-o", "start.mp4"))
        start = Path("start.mp4")
    given = probe(start).frames if flag == "--extend" else 5
    run = small(tiny_model, "--chunks", 2, flag, start)
    said = wancli(*run, "-o", "a.mp4", "--json")
    assert said.code == 0, said.err
    assert probe(Path("a.mp4")).frames == given + 16
    assert json.loads(said.out)["request"]["inputs"][flag[2:]]["name"] == start.name
    wancli(*run, "-o", "new.mp4", "--only-new")
    assert probe(Path("new.mp4")).frames == 16
    start.unlink()  # what was encoded is kept
    said = wancli("rollout", "--resume", "--chunks", 3, "-o", "a.mp4", "-q")
    assert said.code == 0, said.err
    assert probe(Path("a.mp4")).frames == given + 24


def test_a_rollout_is_made_again_from_its_video(wancli: Wancli, tiny_model: Path):
    run = small(tiny_model, "--chunks", 3, "--at", 1, "a blue circle", "--rolling-window", 4)
    wancli(*run, "-o", "a.mp4")
    said = wancli("repro", "a.json", "-o", "b.mp4")
    assert said.code == 0, said.err
    assert "identical" in said.err
    assert made("b.mp4") == made("a.mp4")
    wancli(
        *small(tiny_model, "--chunks", 1, "--extend", "a.mp4", "-o", "c.mp4", "--chunk-frames", 1)
    )
    said = wancli("repro", "c.json", "-o", "d.mp4")
    assert (said.code, "--extend" in said.err) == (4, True)


def test_the_first_latent_frame_may_be_a_chunk_by_itself(wancli: Wancli, tiny_model: Path):
    said = wancli(
        *small(tiny_model, "--chunks", 3, "--independent-first-frame", "-o", "a.mp4", "--json"),
        *("--first-chunk-steps", "1000,750,500,250"),
    )
    rows = json.loads(said.out)["timings"]["chunks"]
    assert [row["video_frames"] for row in rows] == [1, 8, 8]
    assert [len(row["steps_ms"]) for row in rows] == [4, 2, 2]


def test_a_transformer_alone_rolls_out_from_tensors(wancli: Wancli, tiny_model: Path):
    shutil.copytree(tiny_model / "transformer", "alone/transformer")
    save_file({"prompt_embeds": torch.randn(1, 3, 16)}, "embeds.st")
    said = wancli(
        "rollout", "--model", "alone", "--chunks", 2, "--size", "32x32", "--no-video", "-q",
        "--prompt-embeds", "embeds.st", "--text-length", 8, "--save-latents", "z.st",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert load_file("z.st")["latents"].shape == (6, 4, 4, 4)
    said = wancli("rollout", PROMPT, "--model", "alone", "--chunks", 2, "--size", "32x32")
    assert said.code == 4
    assert "text_encoder has no weights" in said.err


def test_decoding_beside_the_next_chunk_gives_the_same_frames(
    wancli: Wancli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    from wancli.rollouts import runner as roll

    wancli(*small(tiny_model, "--chunks", 3, "-o", "a.mp4"))
    plain = roll.roll
    monkeypatch.setattr(roll, "roll", lambda *a, **k: plain(*a, **k, beside=True))
    wancli(*small(tiny_model, "--chunks", 3, "-o", "b.mp4"))
    assert made("a.mp4") == made("b.mp4")


@pytest.mark.parametrize(
    ("flags", "code", "error", "hint"),
    [
        (
            ("--rolling-window", 3, "--sink-frames", 2),
            2,
            "cannot hold 2 sink",
            "--rolling-window 5",
        ),
        (("--chunks", 0), 2, "--chunks", "at least 1"),
        (("--at", 7, "blue"), 2, "chunks 0 to 6", "--chunks 8"),
        (("--at", "blue"), 2, "is not a chunk and a prompt", "--at 5"),
        (("--steps-list", "250,500"), 2, "does not fall", "1000,750"),
        (("--trim", "after", "--sink-frames", 1), 2, "has no sinks", "--trim before"),
        (("--rope", "sink"), 2, "needs --sink-frames", "--sink-frames 3"),
        (("--resume", "-o", "no.mp4"), 4, "no rollout to resume", "without --resume"),
        (("--seed", "1,2"), 2, "one seed", "--seed 7"),
        (("--no-video",), 2, "--save-latents", "x.safetensors"),
        (("--image", "cat.png"), 4, "'cat.png' not found", "check the path"),
        (("--model", "wan2.1-t2v-1.3b"), 2, "was not trained", "--force"),
        (("--report", "x.pdf"), 2, "not an .html", "drift.html"),
        (("--script", "no.toml"), 4, "not found", "check the path"),
        (("--size", "40x32"), 2, "multiple of 16", "--size"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_bad_input_is_told_in_two_lines(
    wancli: Wancli, tiny_model: Path, flags: tuple[object, ...], code: int, error: str, hint: str
):
    said = wancli("rollout", PROMPT, "--model", tiny_model, "--size", "32x32", *flags)
    first, second = said.err.splitlines()
    assert said.code == code
    assert first.startswith("error: ")
    assert error in first
    assert second.startswith("hint: ")
    assert hint in second
    assert not list(Path().glob("*.mp4"))


def test_a_clip_that_does_not_fit_is_told_before_anything_loads(wancli: Wancli, tiny_model: Path):
    wancli(*small(tiny_model, "--chunks", 2, "-o", "start.mp4"))  # 13 video frames, 4 latents
    run = ("rollout", PROMPT, "--model", tiny_model, "--extend", "start.mp4", "-o", "a.mp4")
    for flags, hint in (
        (("--size", "48x32", "--fps", 8), "--size 32x32"),
        (("--size", "32x32", "--fps", 16), "--fps 8"),
        (("--size", "32x32", "--fps", 8, "--chunk-frames", 3), "cut it to 9"),
    ):
        said = wancli(*run, *flags)
        assert said.code == 2
        assert hint in said.err


def test_a_model_of_two_experts_rolls_out_with_both(wancli: Wancli, tmp_path: Path):
    from tests.fakes import tiny_folder

    model = tiny_folder(tmp_path / "two", experts=2)
    run = small(
        model, "--chunks", 2, "--sampler", "unipc", "--steps", 4, "--flow-shift", 1, "--no-video",
        "--guidance-scale", 3, "--save-latents",
    )  # fmt: skip
    said = wancli(*run, "a.st")
    assert said.code == 0, said.err
    wancli(*run, "b.st", "--guidance-scale-2", 1.5)
    one, other = (load_file(name)["latents"] for name in ("a.st", "b.st"))
    assert torch.isfinite(one).all()
    assert not torch.equal(one, other)


def test_a_lora_for_neither_of_two_experts_is_refused(wancli: Wancli, tmp_path: Path):
    from tests.fakes import tiny_folder

    model = tiny_folder(tmp_path / "two", experts=2)
    Path("x.safetensors").write_bytes(b"")
    said = wancli(*small(model, "-o", "a.mp4", "--lora", "x.safetensors"))
    first, hint = said.err.splitlines()
    assert (said.code, "two experts" in first, "x.safetensors@high" in hint) == (2, True, True)
