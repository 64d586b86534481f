"""Parameters of VAEs are those of diffusers' class, for every known model."""

from math import prod

import pytest
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from diffusers import AutoencoderKLWan

from wancli.catalog import wan
from wancli.catalog.hf_configs import autoencoder_config
from wancli.catalog.wan_vae_layers import vae_parameters
from wancli.cost import wan_vae


@pytest.mark.parametrize("vae", [wan.Autoencoder(), wan.VAE_2_2, wan.DEMO.vae])
def test_names_and_shapes_are_those_of_diffusers(vae: wan.Autoencoder):
    scales = {name: [1.0] * vae.latent_channels for name in ("latents_mean", "latents_std")}
    with init_empty_weights():
        model = AutoencoderKLWan(**autoencoder_config(vae), **scales)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert vae_parameters(vae) == shapes
    assert sum(map(prod, shapes.values())) == wan_vae.vae_parameters(vae)
