import pytest
import torch

from wancli.catalog.local import find_spec
from wancli.config.settings import Machine
from wancli.demo.world import COLORS
from wancli.models.latent_rgb import LatentRgb, fit_rgb
from wancli.models.load import load_vae
from wancli.models.vae import encode


@pytest.fixture(scope="module")
def demo_vae():
    return load_vae(find_spec("demo"), Machine(device="cpu"))[0]


@pytest.mark.parametrize("name", ["red", "green", "blue"])
def test_a_coloured_square_keeps_its_colour_and_place(demo_vae, name):
    clip = torch.full((1, 3, 9, 64, 64), -1.0)
    color = torch.tensor(COLORS[name]) / 127.5 - 1
    clip[:, :, :, 16:48, 8:40] = color.view(3, 1, 1, 1)
    frames = fit_rgb(demo_vae)(encode(demo_vae, clip))
    assert frames.shape == (3, 8, 8, 3)
    assert frames.dtype == torch.uint8
    channel = ("red", "green", "blue").index(name)
    for frame in frames.float():
        inside, outside = frame[3:5, 2:4].mean((0, 1)), frame[:, 6:].mean((0, 1))
        others = [inside[other] for other in range(3) if other != channel]
        assert inside[channel] > 60 + max(others)
        assert outside.max() < 60


def test_fitting_is_reproducible_and_has_no_side_effects(demo_vae):
    before = torch.random.get_rng_state()
    one, other = fit_rgb(demo_vae), fit_rgb(demo_vae)
    torch.testing.assert_close(one.weight, other.weight)  # LAPACK may differ in the last bit
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_map_is_linear_with_a_bias():
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.5], [0.0, 1.0, 0.0]])
    latents = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1, 1)
    # [1, -1, and 1 for the shift] @ weight = [1, 1, -0.5]
    assert LatentRgb(weight)(latents).tolist() == [[[[255, 255, 64]]]]
