"""Parameters of Wan's VAEs: names and shapes in diffusers' AutoencoderKLWan (0.42.1)."""

from collections.abc import Iterator
from itertools import count, pairwise

from wancli.catalog.wan import Autoencoder
from wancli.catalog.wan_layers import Shape, affine

_CUBE = (3, 3, 3)


def vae_parameters(vae: Autoencoder) -> dict[str, Shape]:
    """Shapes of all parameters."""
    z = vae.latent_channels
    ends = affine("quant_conv", 2 * z, 2 * z, 1, 1, 1) | affine("post_quant_conv", z, z, 1, 1, 1)
    return _encoder(vae) | ends | _decoder(vae)


def _encoder(vae: Autoencoder) -> dict[str, Shape]:
    dims = [vae.encoder_dim * m for m in (1, *vae.multipliers)]
    shapes = affine("encoder.conv_in", dims[0], vae.pixel_channels, *_CUBE)
    levels = len(vae.multipliers)
    flat = _numbered("encoder.down_blocks")  # of Wan 2.1, whose levels are in one list
    for level, (inp, out) in enumerate(pairwise(dims)):
        place = f"encoder.down_blocks.{level}"
        inner = _numbered(f"{place}.resnets") if vae.residual else flat
        for _ in range(vae.res_blocks):
            shapes |= _res_block(next(inner), inp, out)
            inp = out
        if level < levels - 1:
            name = f"{place}.downsampler" if vae.residual else next(flat)
            shapes |= affine(f"{name}.resample.1", out, out, 3, 3)
            if vae.temporal[level]:
                shapes |= affine(f"{name}.time_conv", out, out, 3, 1, 1)
    return shapes | _end("encoder", dims[-1], dims[-1], 2 * vae.latent_channels)


def _decoder(vae: Autoencoder) -> dict[str, Shape]:
    dims = [vae.decoder_dim * m for m in (vae.multipliers[-1], *reversed(vae.multipliers))]
    shapes = affine("decoder.conv_in", dims[0], vae.latent_channels, *_CUBE)
    last = len(vae.multipliers) - 1
    for level, (inp, out) in enumerate(pairwise(dims)):
        place = f"decoder.up_blocks.{level}"
        width = inp // 2 if level and not vae.residual else inp
        for index in range(vae.res_blocks + 1):
            shapes |= _res_block(f"{place}.resnets.{index}", width, out)
            width = out
        if level < last:
            name = f"{place}.{'upsampler' if vae.residual else 'upsamplers.0'}"
            shapes |= affine(f"{name}.resample.1", out if vae.residual else out // 2, out, 3, 3)
            if vae.temporal[last - 1 - level]:
                shapes |= affine(f"{name}.time_conv", 2 * out, out, 3, 1, 1)
    return shapes | _end("decoder", dims[0], dims[-1], vae.pixel_channels)


def _end(half: str, middle: int, dim: int, channels: int) -> dict[str, Shape]:
    """The middle block and the output of the encoder or decoder."""
    attention = f"{half}.mid_block.attentions.0"
    return {
        **_res_block(f"{half}.mid_block.resnets.0", middle, middle),
        **_res_block(f"{half}.mid_block.resnets.1", middle, middle),
        f"{attention}.norm.gamma": (middle, 1, 1),
        **affine(f"{attention}.to_qkv", 3 * middle, middle, 1, 1),
        **affine(f"{attention}.proj", middle, middle, 1, 1),
        f"{half}.norm_out.gamma": (dim, 1, 1, 1),
        **affine(f"{half}.conv_out", channels, dim, *_CUBE),
    }


def _res_block(name: str, inp: int, out: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.norm1.gamma": (inp, 1, 1, 1)}
    shapes |= affine(f"{name}.conv1", out, inp, *_CUBE)
    shapes[f"{name}.norm2.gamma"] = (out, 1, 1, 1)
    shapes |= affine(f"{name}.conv2", out, out, *_CUBE)
    return shapes | (affine(f"{name}.conv_shortcut", out, inp, 1, 1, 1) if inp != out else {})


def _numbered(name: str) -> Iterator[str]:
    return (f"{name}.{index}" for index in count())
