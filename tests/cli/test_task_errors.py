"""Inputs that conflict with each other or with the model: rejected before anything loads."""

import shutil
from pathlib import Path

import pytest

from tests.cli.test_bad_input import complaint
from tests.conftest import Wancli
from tests.fakes import tiny_clip, tiny_image
from wancli.video.ffmpeg import run_ffmpeg

T2V, I2V, ENDS = "wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.1-flf2v-14b"
VACE, ANIMATE, A14B = "wan2.1-vace-1.3b", "wan2.2-animate-14b", "wan2.2-i2v-a14b"
IMAGE, LAST = ("--image", "p.png"), ("--last-image", "p.png")
CLIP, MASK, REF = ("--video", "v.mp4"), ("--mask", "v.mp4"), ("--ref-image", "p.png")
POSED = ("--pose-video", "v.mp4", "--face-video", "v.mp4")
SHORT = ("--frames", 5, "--fps", 8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny_image(folder / "p.png", 1)
    tiny_clip(folder / "v.mp4", 1)
    tiny_clip(folder / "long.mp4", 2, frames=9)
    tiny_clip(folder / "4.mp4", 3, frames=4)
    run_ffmpeg("-r", "30000/1001", "-i", str(folder / "v.mp4"), str(folder / "ntsc.mp4"))
    return folder


@pytest.fixture(autouse=True)
def _copies(wancli: Wancli, files: Path) -> None:
    """Copies of the files in the current folder."""
    shutil.copytree(files, ".", dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("model", "args", "error", "hint"),
    [
        (T2V, IMAGE, "--image does not work with wan2.1-t2v-1.3b: it is text-to-video", I2V),
        ("demo", CLIP, "--video does not work with demo", T2V),
        (I2V, (*IMAGE, *LAST), "--last-image does not work with wan2.1-i2v", ENDS),
        (T2V, POSED, "--pose-video does not work with", ANIMATE),
        (I2V, (), "needs --image: it is image-to-video", "--image FILE, or --model demo"),
        (ENDS, IMAGE, "needs --last-image", "--last-image FILE"),
        (ENDS, (), "needs --image and --last-image", "--image FILE"),
        (A14B, LAST, "needs --image", "--image FILE"),
        (ANIMATE, REF, "needs --pose-video and --face-video", "--pose-video FILE"),
        (ANIMATE, (*REF, *POSED, *MASK), "--background-video needs --mask", "both"),
        (ANIMATE, (*REF, *REF, *POSED), "one --ref-image, not 2", "FILE once"),
        (VACE, MASK, "--mask marks the areas of a --video", "--video FILE"),
        ("owner/model", (*IMAGE, *POSED), "belong to different tasks", "drop the files"),
        (T2V, ("--task", "image-to-video", *IMAGE), "--task image-to-video does not work", I2V),
        (T2V, ("--task", "text-to-video", *CLIP), "--video does not work with --task", "drop"),
        (T2V, ("--task", "video-to-video"), "--task video-to-video needs --video", "--video FILE"),
        (T2V, ("--task", "image-to"), "--task 'image-to' is not a task", "'image-to-video'"),
        (T2V, ("--strength", 0.5), "--strength does nothing in text-to-video", "drop"),
        (I2V, (*IMAGE, "--segment-frames", 5), "does nothing in image-to-video", "drop"),
        (ANIMATE, (*REF, *POSED, "--frames", 1), "more than one video frame", "--num-frames"),
        (T2V, (*CLIP, "--strength", 0), "--strength 0", "above 0"),
        (T2V, (*CLIP, "--strength", 0.01), "leaves none of 50 steps", "--strength 0.8"),
        (T2V, (*CLIP, "--cfg-gate", 0.5), "--cfg-gate does not work with video-to-video", "drop"),
        (
            T2V,
            (*CLIP, "--step-cache", "first-block"),
            "not report the branch",
            "--use-cachedit",
        ),
        (I2V, (*IMAGE, "--step-cache", "seacache"), "does not report the step", "--use-cachedit"),
        (
            VACE,
            ("--step-cache", "first-block"),
            "wrong results on WanVACE",
            "--use-cachedit",
        ),
        (VACE, ("--use-cachedit", "--cachedit-bn", 2), "adds control hints", "--cachedit-bn 1"),
        (ANIMATE, (*REF, *POSED, "--use-cachedit"), "face adapter", "--step-cache none"),
        (ANIMATE, (*REF, *POSED, "--cfg-gate", 3, "--segment-frames", 5), "19 segments", "drop"),
        (T2V, ("--boundary-ratio", 0.5), "--boundary-ratio needs a model with two", "drop"),
        (A14B, (*IMAGE, "--boundary-ratio", 1), "--boundary-ratio 1", "low-noise"),
        (
            T2V,
            (*CLIP, *SHORT, "--frames", 9),
            "has 5 video frames; the output has 9",
            "--num-frames 5",
        ),
        (VACE, (*CLIP, "--mask", "long.mp4", *SHORT), "--mask long.mp4 has 9", "-frames:v 5 NEW"),
        (T2V, ("--video", "4.mp4", "--fps", 8), "4.mp4 has 4 video", "--num-frames 1, and cut it"),
        (T2V, (*CLIP, "--frames", 5), "has 8 frames per second; the output has 16", "--fps 8, or"),
        (T2V, ("--video", "ntsc.mp4", "--frames", 5), "has 29.97 frames", "convert it: ffmpeg"),
    ],
)
def test_incompatible_inputs_are_rejected(
    wancli: Wancli, model: str, args: tuple[object, ...], error: str, hint: str
):
    result = wancli("generate", "a cat", "--model", model, *args)
    message, advice = complaint(result)
    assert result.code == 2
    assert error in message
    assert hint in advice


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (("--model", I2V, "--image", "none.png"), "image 'none.png' not found"),
        (("--model", I2V, "--image", "v.mp4"), "v.mp4 is no"),
        (("--model", I2V, "--image", "cut.png"), "cannot read cut.png"),
        (("--model", T2V, "--video", "p.mp4"), "video 'p.mp4' not found"),
        (("--model", T2V, "--video", "cut.mp4"), "cut.mp4"),
    ],
)
def test_an_unreadable_file_is_named(wancli: Wancli, args: tuple[object, ...], error: str):
    Path("cut.png").write_bytes(Path("p.png").read_bytes()[:60])
    Path("cut.mp4").write_bytes(Path("v.mp4").read_bytes()[:400])
    result = wancli("generate", "a cat", *args)
    assert result.code == 4
    assert error in complaint(result)[0]


@pytest.mark.parametrize(
    ("command", "size", "cut"),
    [
        (("generate", "--model", I2V, "--image", "p.png"), "832x480", "13%"),
        (("generate", "--model", I2V, "--image", "p.png"), "768x512", ""),
        (("generate", "--model", VACE, "--ref-image", "p.png"), "832x480", ""),
        (("generate", "--model", VACE, *CLIP, "--frames", 5, "--fps", 8), "480x832", "62%"),
        (("rollout", "--model", "self-forcing", "--image", "p.png"), "832x480", "13%"),
        (("rollout", "--model", "self-forcing", "--image", "p.png"), "32x16", ""),  # none is better
    ],
)
def test_a_picture_of_other_proportions_is_said_to_be_cut(
    wancli: Wancli, command: tuple[object, ...], size: str, cut: str
):
    err = wancli(command[0], "a cat", *command[1:], "--size", size, "--dry-run", "--force").err
    assert ("cut off" in err) == bool(cut)
    if cut:
        assert f"is 48x32: {cut} of it is cut off to fit {size}.\nhint:  --size 768x512" in err


def test_a_rollout_of_an_image_model_is_rejected(wancli: Wancli):
    result = wancli("rollout", "a cat", "--model", I2V, "--force")
    assert result.code == 2
    assert "rollouts take text-to-video models" in complaint(result)[0]


def test_a_bench_without_the_image_its_model_needs_is_rejected(wancli: Wancli):
    result = wancli("bench", "a cat", "--model", I2V, "--variant", "fast: --use-cachedit")
    assert result.code == 2
    assert "needs --image" in complaint(result)[0]
