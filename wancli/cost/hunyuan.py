"""Parameters, FLOPs and memory of HunyuanVideo, in closed form; counted as for Wan."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise, product

from wancli.catalog.hunyuan import (
    TEMPLATE_TOKENS,
    TEXT_TOKENS,
    CausalVae,
    ClipText,
    HunyuanVideo,
    JointTransformer,
    Llama,
)
from wancli.cost.resources import (
    Precision,
    Usage,
    WeightSizes,
    other_weight_sizes,
    vae_weight_sizes,
)
from wancli.cost.wan_transformer import NO_FLOPS, Flops, linear
from wancli.cost.wan_vae import Grid, VaeLayer
from wancli.cost.wan_vae import tiles as tiles_of_space

FREQUENCIES = 256  # of the timestep embedding
# Counted on the meta device at two sizes, which agree within 3 %; by bytes per element.
LIVE_TENSORS = {4: 16.1, 2: 18.2}  # [tokens, dim] tensors alive at the peak
BLOCK_TRAFFIC = {4: 300, 2: 256}  # bytes read and written per [tokens, dim] element and block
PEAK_COPIES = 4.6  # of the largest convolution input while decoding; more for a single frame
PEAK_COPIES_SINGLE = 5.8
PEAK_MASKS = 2.25  # float32 attention masks alive at once in the VAE's middle block


def hunyuan_usage(
    shapes: HunyuanVideo, precision: Precision, *, latents: Grid, tokens: int, forwards: int,
    prompts: int,
) -> Usage:  # fmt: skip
    """Resources of one video with `tokens` video tokens per forward."""
    t, vae, llama, size = shapes.transformer, shapes.vae, shapes.text_encoder, precision.size
    rows, prompt, tiled = tokens + TEXT_TOKENS, TEXT_TOKENS + TEMPLATE_TOKENS, precision.tiled
    parameters = {
        "transformer": joint_parameters(t),
        "text_encoder": llama_parameters(llama),
        "text_encoder_2": clip_text_parameters(shapes.text_encoder_2),
        "vae": causal_vae_parameters(vae),
    }
    return Usage(
        parameters=parameters,
        weight_sizes=_weight_sizes(shapes, parameters, precision),
        tokens=rows,
        forwards=forwards,
        work={
            "encode": (llama_flops(llama, prompt) + clip_text_flops(shapes.text_encoder_2))
            * prompts,
            "denoise": joint_flops(t, tokens) * forwards,
            "decode": causal_decode_flops(vae, latents, tiled=tiled),
        },
        memory_traffic={"denoise": forwards * joint_memory_traffic(t, rows, element_bytes=size)},
        activations={
            "encode": llama_activation_bytes(llama, prompt, element_bytes=size),
            "denoise": joint_activation_bytes(t, rows, element_bytes=size),
            "decode": causal_decode_bytes(
                vae,
                latents,
                element_bytes=precision.decoder,
                video_bytes=precision.vae,
                tiled=tiled,
            ),
        },
    )


def _weight_sizes(
    shapes: HunyuanVideo, parameters: Mapping[str, int], precision: Precision
) -> dict[str, WeightSizes]:
    """Weight sizes of every part."""
    t, size = shapes.transformer, precision.size
    largest = {
        "text_encoder": shapes.text_encoder.vocabulary * shapes.text_encoder.dim,
        "text_encoder_2": shapes.text_encoder_2.vocabulary * shapes.text_encoder_2.dim,
    }
    others = other_weight_sizes(parameters, largest, dict.fromkeys(largest, size))
    widest = max(shapes.vae.channels)
    decoder = causal_decoder_parameters(shapes.vae)
    others["vae"] = vae_weight_sizes(
        precision,
        encoder=parameters["vae"] - decoder,
        decoder=decoder,
        layer=linear(27 * widest, widest),
    )
    # Layers outside the blocks stay on the device.
    dual, single = joint_block_parameters(t), single_block_parameters(t)
    group = parameters["transformer"] - (t.dual - 1) * dual - t.single * single
    d = t.dim
    inner = (linear(d, 6 * d), linear(d + t.ffn, d))
    layer = max(*inner, *(linear(n, d) for n in (FREQUENCIES, t.text_dim, t.pooled_dim)))
    whole = parameters["transformer"] * size
    return others | {"transformer": WeightSizes(whole, group * size, layer * size)}


def joint_block_parameters(t: JointTransformer) -> int:
    """Parameters of one dual-stream block, the larger kind."""
    d = t.dim
    modulation = 2 * linear(d, 6 * d)
    feed_forwards = 2 * (linear(d, t.ffn) + linear(t.ffn, d))
    return modulation + 8 * linear(d, d) + 4 * t.head_dim + feed_forwards


def single_block_parameters(t: JointTransformer) -> int:
    """Parameters of one single-stream block."""
    d = t.dim
    attention = linear(d, 3 * d) + 3 * linear(d, d) + 2 * t.head_dim
    return attention + linear(d, t.ffn) + linear(d + t.ffn, d)


def joint_parameters(t: JointTransformer) -> int:
    """All parameters of the transformer."""
    d = t.dim
    refiner = 4 * linear(d, d) + linear(d, 4 * d) + linear(4 * d, d) + linear(d, 2 * d) + 4 * d
    scalars = linear(FREQUENCIES, d) + linear(d, d)  # embeds a timestep or a guidance scale
    text = scalars + linear(t.text_dim, d) + linear(d, d) + linear(t.text_dim, d)
    conditioning = (2 if t.guidance else 1) * scalars + linear(t.pooled_dim, d) + linear(d, d)
    ends = linear(t.patch * t.in_channels, d) + linear(d, 2 * d)
    ends += linear(d, t.patch * t.out_channels)
    blocks = t.dual * joint_block_parameters(t) + t.single * single_block_parameters(t)
    blocks += t.refiner * refiner
    return blocks + text + conditioning + ends


def joint_flops(t: JointTransformer, tokens: int) -> Flops:
    """FLOPs of one forward of `tokens` video tokens and the text's."""
    d, text = t.dim, TEXT_TOKENS
    rows = tokens + text
    blocks = t.dual * (4 * rows * d * d + 2 * rows * d * t.ffn + 12 * d * d)
    blocks += t.single * (rows * (4 * d * d + 2 * d * t.ffn) + 3 * d * d)
    blocks += t.refiner * (text * 12 * d * d + 2 * d * d)
    scalars = FREQUENCIES * d + d * d
    conditioning = (3 if t.guidance else 2) * scalars + (t.text_dim + t.pooled_dim + 2 * d) * d
    ends = text * t.text_dim * d + tokens * t.patch * (t.in_channels + t.out_channels) * d
    products = blocks + conditioning + ends + 2 * d * d
    attention = (t.dual + t.single) * rows**2 + t.refiner * text**2
    return Flops(2 * products, 4 * attention * d)


def joint_activation_bytes(t: JointTransformer, rows: int, *, element_bytes: int) -> int:
    """Approximate peak activation bytes of one forward of `rows` tokens, text included.

    Attention is assumed to be a fused kernel that never materializes its scores.
    """
    return int(LIVE_TENSORS[element_bytes] * element_bytes * rows * t.dim)


def joint_memory_traffic(t: JointTransformer, rows: int, *, element_bytes: int) -> int:
    """Approximate bytes of elementwise memory traffic in one forward: norms, gates, RoPE, GELU."""
    return (t.dual + t.single) * rows * BLOCK_TRAFFIC[element_bytes] * t.dim


def llama_parameters(e: Llama) -> int:
    """Parameters of LLaMA without its head."""
    attention = 2 * e.dim * (e.heads + e.kv_heads) * e.head_dim
    return e.vocabulary * e.dim + e.layers * (attention + 3 * e.dim * e.ffn + 2 * e.dim) + e.dim


def llama_flops(e: Llama, tokens: int) -> Flops:
    """FLOPs of one prompt with its template."""
    products = 2 * e.dim * (e.heads + e.kv_heads) * e.head_dim + 3 * e.dim * e.ffn
    attention = 4 * tokens**2 * e.heads * e.head_dim
    return Flops(e.layers * 2 * tokens * products, e.layers * attention)


def llama_activation_bytes(e: Llama, tokens: int, *, element_bytes: int) -> int:
    """Peak activation bytes: every layer's output, all keys and values, and one feed-forward."""
    outputs = (e.layers + 1) * e.dim + 2 * e.layers * e.kv_heads * e.head_dim
    return tokens * element_bytes * (outputs + 3 * e.ffn + e.dim)


def clip_text_parameters(e: ClipText) -> int:
    """Parameters of CLIP's text encoder, without a projection."""
    layer = 4 * linear(e.dim, e.dim) + linear(e.dim, e.ffn) + linear(e.ffn, e.dim) + 4 * e.dim
    return (e.vocabulary + e.positions) * e.dim + e.layers * layer + 2 * e.dim


def clip_text_flops(e: ClipText) -> Flops:
    """FLOPs of one prompt, padded to all positions."""
    matmul = 2 * e.positions * (4 * e.dim**2 + 2 * e.dim * e.ffn)
    return Flops(e.layers * matmul, e.layers * 4 * e.positions**2 * e.dim)


def causal_vae_parameters(vae: CausalVae) -> int:
    """Parameters of the whole VAE."""
    z, one = vae.latent_channels, Grid(1, 1, 1)
    walks = (_encoder(vae, one), _decoder(vae, one))
    ends = (4 * z * z + 2 * z) + (z * z + z)  # 1x1 convolutions
    return sum(layer.parameters for walk in walks for layer in walk) + ends


def causal_decoder_parameters(vae: CausalVae) -> int:
    """Parameters of the decoder alone."""
    return sum(layer.parameters for layer in _decoder(vae, Grid(1, 1, 1)))


def causal_decode_flops(vae: CausalVae, latents: Grid, *, tiled: bool = False) -> Flops:
    """FLOPs of decoding all latents in overlapping temporal tiles; `tiled` adds spatial ones."""
    work = NO_FLOPS
    in_space = tiles_of_space(latents, vae.spatial) if tiled else [latents]
    shapes = Counter(product(tiles(vae, latents.frames), in_space))  # of few sizes
    for (frames, cut), count in shapes.items():
        tile = replace(cut, frames=frames)
        work += sum((layer.work for layer in _decoder(vae, tile)), NO_FLOPS) * count
        work += Flops(convolution=2 * tile.cells * vae.latent_channels**2) * count
    return work


def causal_decode_bytes(
    vae: CausalVae, latents: Grid, *, element_bytes: int = 4, video_bytes: int = 4,
    tiled: bool = False,
) -> int:  # fmt: skip
    """Approximate peak bytes of decoding, video included, excluding weights.

    The peak is at a tile's largest convolution or its middle block's attention masks, plus the
    tiles decoded before; or at the end, with all tiles and the joined video.
    """
    in_space = tiles_of_space(latents, vae.spatial) if tiled else [latents]
    in_time = [replace(latents, frames=frames) for frames in tiles(vae, latents.frames)]
    tile = replace(in_space[0], frames=in_time[0].frames)
    largest = max(layer.input for layer in _decoder(vae, tile))
    copies = PEAK_COPIES_SINGLE if tile.frames == 1 else PEAK_COPIES
    masks = PEAK_MASKS * tile.cells**2 if vae.attention else 0
    decoded = [_video(vae, grid) for grid in in_time]
    before = sum(decoded[:-1])
    before += sum(_video(vae, replace(cut, frames=tile.frames)) for cut in in_space[1:])
    working = element_bytes * max(copies * largest, masks) + video_bytes * before
    return int(max(working, video_bytes * (sum(decoded) + _video(vae, latents))))


def _video(vae: CausalVae, latents: Grid) -> int:
    """Elements of the decoded video."""
    frames = 1 + vae.temporal * (latents.frames - 1)
    return 3 * frames * latents.height * latents.width * vae.spatial**2


def tiles(vae: CausalVae, frames: int) -> list[int]:
    """Latent frames of every temporal tile; a short video is one tile."""
    if frames <= vae.tile_frames:
        return [frames]
    return [min(vae.tile_frames + 1, frames - first) for first in range(0, frames, vae.tile_stride)]


def _decoder(vae: CausalVae, grid: Grid) -> Iterator[VaeLayer]:
    """Layers of the decoder, on the latents of one tile."""
    dims = [vae.channels[-1], *reversed(vae.channels)]
    yield _convolution(vae.latent_channels, dims[0], grid)
    yield from _middle(vae, dims[0], grid)
    for level, (inp, out) in enumerate(pairwise(dims)):
        yield from _blocks(inp, out, vae.res_blocks + 1, grid)
        space, time = _strides(vae, level)
        if space * time > 1:
            frames = 1 + (grid.frames - 1) * time
            grid = Grid(frames, grid.height * space, grid.width * space)
            yield _convolution(out, out, grid)
    yield VaeLayer(parameters=2 * dims[-1])
    yield _convolution(dims[-1], 3, grid)


def _encoder(vae: CausalVae, grid: Grid) -> Iterator[VaeLayer]:
    """Layers of the encoder; only for its parameters, because no task encodes."""
    dims = [vae.channels[0], *vae.channels]
    yield _convolution(3, dims[0], grid)
    for level, (inp, out) in enumerate(pairwise(dims)):
        yield from _blocks(inp, out, vae.res_blocks, grid)
        space, time = _strides(vae, level)
        if space * time > 1:
            yield _convolution(out, out, grid)
    yield from _middle(vae, dims[-1], grid)
    yield VaeLayer(parameters=2 * dims[-1])
    yield _convolution(dims[-1], 2 * vae.latent_channels, grid)


def _strides(vae: CausalVae, level: int) -> tuple[int, int]:
    """Spatial and temporal stride after a level: space in the first, time in the last ones."""
    last = len(vae.channels) - 1
    halvings = vae.temporal.bit_length() - 1
    space = 2 if level < vae.spatial.bit_length() - 1 else 1
    return space, 2 if last - halvings <= level < last else 1


def _convolution(inp: int, out: int, grid: Grid, *, taps: int = 27) -> VaeLayer:
    return VaeLayer(
        parameters=taps * inp * out + out,
        work=Flops(convolution=2 * taps * inp * out * grid.cells),
        input=inp * grid.cells,
    )


def _blocks(inp: int, out: int, count: int, grid: Grid) -> Iterator[VaeLayer]:
    """Residual blocks: norm, convolution, norm, convolution, and a shortcut."""
    for _ in range(count):
        yield VaeLayer(parameters=2 * inp + 2 * out)
        yield _convolution(inp, out, grid)
        yield _convolution(out, out, grid)
        if inp != out:
            yield _convolution(inp, out, grid, taps=1)
        inp = out


def _middle(vae: CausalVae, dim: int, grid: Grid) -> Iterator[VaeLayer]:
    """Two residual blocks around attention over all positions."""
    yield from _blocks(dim, dim, 2, grid)
    if vae.attention:
        products = Flops(2 * 4 * dim * dim * grid.cells, 4 * dim * grid.cells**2)
        yield VaeLayer(parameters=4 * linear(dim, dim) + 2 * dim, work=products)
