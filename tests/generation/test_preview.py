import io
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from tests.fakes import tiny_vae
from wancli.catalog.specs import DEMO_FOLDER, SPECS, ModelSpec
from wancli.demo.world import combinations, render, sample_scene
from wancli.generation.denoise import StepResult, decode
from wancli.generation.preview import Previews, frame_decoder, predict_clean, previews
from wancli.models.load import Loaded
from wancli.models.vae import encode
from wancli.records.progress import Event, PreviewEvent
from wancli.utils.outputs import preview_file

NO_DECODER = ModelSpec("a", "", "", latent_channels=4)  # no tiny decoder is for these


def step_result(
    index: int, *, steps: int = 4, clean: float = 2.0, noise: float = -1.0
) -> StepResult:
    """A step of straight flow: sigmas fall evenly from 1 to 0."""
    sigma, after = 1 - index / steps, 1 - (index + 1) / steps
    return StepResult(index, sigma, after, latents(after, clean=clean, noise=noise))


def model(vae: Any = None, spec: ModelSpec = NO_DECODER) -> Loaded:
    return Loaded(SimpleNamespace(vae=vae or tiny_vae()), spec, torch.device("cpu"))


def ignore(event: Event) -> None:
    """Report to nobody."""


def latents(sigma: float, *, clean: float = 2.0, noise: float = -1.0) -> torch.Tensor:
    return torch.full((1, 4, 3, 4, 6), (1 - sigma) * clean + sigma * noise)


def test_clean_latents_of_a_straight_path_are_exact_from_the_second_step():
    for index in range(1, 4):
        predicted = predict_clean(step_result(index), latents(1 - index / 4))
        torch.testing.assert_close(predicted, latents(0))
    first = step_result(0)
    assert predict_clean(first, None) is first.latents


def test_clean_latents_that_a_step_predicted_are_shown_instead():
    step = replace(step_result(0), clean=latents(0))
    assert predict_clean(step, latents(1)) is step.clean


def test_a_preview_is_written_every_few_steps_and_removed_at_the_end(tmp_path: Path):
    video, written = tmp_path / "a.mp4", []
    events: list[Event] = []
    picture = tmp_path / "a.preview.png"
    with previews(video, events.append, every=2) as show:
        for index in range(4):
            show(step_result(index), model())
            written.append(picture.exists())
            picture.unlink(missing_ok=True)
        show(step_result(1), model())
        assert events[-1] == PreviewEvent(picture.read_bytes())
        with Image.open(io.BytesIO(picture.read_bytes())) as image:
            assert image.size == (3 * 6 * 32, 4 * 32)  # three latent frames of 6x4, 32 times
            assert np.asarray(image).dtype == np.uint8
    assert written == [False, True, False, True]
    assert len(events) == 3
    assert list(tmp_path.iterdir()) == []


def test_without_preview_every_nothing_is_written_or_removed(tmp_path: Path):
    other = tmp_path / "a.preview.png"
    other.write_text("mine")
    with previews(tmp_path / "a.mp4", ignore, every=None) as show:
        show(step_result(0), model())
    assert other.read_text() == "mine"


def test_a_preview_is_removed_when_the_run_fails(tmp_path: Path):
    written: list[Path] = []

    def interrupted() -> None:
        with previews(tmp_path / "a.mp4", ignore, every=1) as show:
            show(step_result(0), model())
            written.extend(tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert written == [tmp_path / "a.preview.png"]
    assert list(tmp_path.iterdir()) == []


def test_a_preview_that_cannot_be_written_does_not_end_the_run(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    events: list[Event] = []
    Previews(tmp_path / "file" / "a.mp4", events.append, every=1)(step_result(0), model())
    assert len(events) == 1  # the terminal may still show it


def test_previews_leave_the_latents_unchanged(tmp_path: Path):
    step = step_result(1)
    before = step.latents.clone()
    show = Previews(tmp_path / "a.mp4", ignore, every=1)
    show(step_result(0), model())
    show(step, model())
    assert torch.equal(step.latents, before)


def test_the_name_of_a_preview_is_never_too_long():
    name = preview_file(Path("o") / ("ü" * 125 + ".mp4")).name
    assert len(name.encode()) <= 255
    assert name.endswith("ü.preview.png")


def test_the_tiny_decoder_shows_frames_where_one_is_present():
    vae = AutoencoderKLWan.from_pretrained(DEMO_FOLDER / "vae", torch_dtype=torch.float32)
    scene = sample_scene(random.Random(0), combinations(held_out=True))
    clean = encode(vae, render([scene], frames=9))
    with_decoder, without = SPECS["demo"], replace(NO_DECODER, latent_channels=8)
    frames = frame_decoder(model(vae, with_decoder))(clean, [0, 2])
    assert frames.shape == (2, 96, 96, 3)
    exact = decode(vae, clean)[[0, -1]].astype(float)
    assert np.abs(frames.numpy() - exact).mean() < 10  # levels
    assert frame_decoder(model(vae, without))(clean, [0, 2]).shape == (2, 12, 12, 3)
