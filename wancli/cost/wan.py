"""What one video takes of a Wan: all of its transformers and encoders, and its VAE."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from wancli.catalog.geometry import TILE, LatentShape, WindowConfig
from wancli.catalog.specs import ModelSpec
from wancli.catalog.wan import IMAGE_TOKENS, Architecture, Autoencoder, Transformer
from wancli.config.settings import RolloutSettings
from wancli.cost.resources import WIDE, Precision, Usage, WeightSizes, other_pieces
from wancli.cost.wan_transformer import (
    NO_FLOPS,
    Flops,
    Forward,
    activation_bytes,
    block_parameters,
    forward_work,
    image_parameters,
    image_work,
    moved_bytes,
    quantized_bytes,
    text_parameters,
    text_work,
    transformer_parameters,
    wide_parameters,
)
from wancli.cost.wan_vae import (
    Grid,
    decode_bytes,
    decode_work,
    encode_work,
    largest_layer,
    tiles,
    vae_parameters,
)
from wancli.planning.plan import Plan, RolloutPlan

TIMESTEP_ROWS = 128  # most that are computed where all tokens have one timestep


def generation_needs(spec: ModelSpec, plan: Plan, numbers: Precision) -> Usage:
    """Of `wancli generate`, every step computed whole."""
    shapes, reuse, rows = spec.wan, plan.prompt_kv, 1
    if spec.per_token_time:
        rows = min(plan.tokens, TIMESTEP_ROWS) if reuse else plan.tokens
    given = Forward(
        plan.tokens, plan.tokens, spec.text_length, image_tokens(shapes), reuse, rows,
        plan.shape.frames,
    )  # fmt: skip
    prompts = 2 if plan.guided else 1
    fresh = min(plan.forwards, prompts * spec.experts) if reuse else plan.forwards
    work = denoise_work(shapes.transformer, {given: plan.forwards}, fresh=fresh)
    per_token = spec.per_token_time and not reuse
    return _needs(
        spec, plan.shape, numbers, denoise=(plan.tokens, plan.forwards, work, per_token),
        prompts=prompts,
    )  # fmt: skip


def rollout_needs(
    settings: RolloutSettings, spec: ModelSpec, plan: RolloutPlan, numbers: Precision
) -> Usage:
    """Of `wancli rollout`, without reading the past again."""
    forwards = rollout_forwards(spec, plan)
    fresh = (2 if plan.guided else 1) * spec.experts
    work = denoise_work(spec.wan.transformer, forwards, fresh=fresh)
    tokens = plan.window.chunk * plan.shape.tokens_per_frame
    return _needs(
        spec, plan.shape, numbers, denoise=(tokens, plan.forwards, work, False),
        prompts=2 if settings.sampling.guidance_scale > 1 else 1, chunk=plan.window.chunk,
    )  # fmt: skip


def rollout_forwards(spec: ModelSpec, plan: RolloutPlan) -> Mapping[Forward, int]:
    """Every forward of a rollout, and how often it is made.

    The window counts a chunk's own frames. Cut after attention, it lets a chunk's first forward
    see what falls out of it.
    """
    branches, per_frame = 2 if plan.guided else 1, plan.shape.tokens_per_frame
    window, after = plan.window.window, plan.window.trim == "after"
    counts: Counter[Forward] = Counter()
    chunks = [(span, 0) for span in plan.context]
    chunks += list(zip(plan.spans, plan.steps, strict=True))
    for number, (span, steps) in enumerate(chunks):
        clean = spec.experts if number < len(chunks) - 1 else 0
        later = min(span.end, window)
        first = min(span.first_frame, window) + span.frames if after else later
        for frames, count in ((first, 1), (later, steps + clean - 1)):
            tokens = span.frames * per_frame
            given = Forward(tokens, frames * per_frame, spec.text_length, known=True)
            counts[given] += branches * count
    return counts


def denoise_work(t: Transformer, forwards: Mapping[Forward, int], *, fresh: int) -> Flops:
    """All forwards; in `fresh` of them the prompt is new."""
    work = NO_FLOPS
    for given, count in forwards.items():
        new, fresh = min(count, fresh), max(0, fresh - count)
        work += forward_work(t, replace(given, known=False)) * new
        work += forward_work(t, given) * (count - new)
    return work


def image_tokens(shapes: Architecture) -> int:
    """Of all images that the transformer attends to."""
    if not shapes.transformer.image_dim:
        return 0
    each = shapes.image_encoder.tokens if shapes.image_encoder else IMAGE_TOKENS
    return shapes.transformer.image_positions or each


def prompt_bytes(spec: ModelSpec, *, element_bytes: int) -> int:
    """Keys, values and embeddings of one prompt in one transformer."""
    t, tokens = spec.wan.transformer, spec.text_length + image_tokens(spec.wan)
    return tokens * t.dim * (2 * (t.layers + t.vace_blocks) + 1) * element_bytes


def rolling_bytes(t: Transformer, window: WindowConfig, *, element_bytes: int) -> int:
    """Rolling keys and values of one branch of one transformer, and the sink's keys unrotated."""
    rows = 2 * window.capacity + window.sink_tokens
    return t.layers * rows * t.dim * element_bytes


def part_parameters(shapes: Architecture, experts: int) -> dict[str, int]:
    """By part, of one that has so many experts."""
    transformer = transformer_parameters(shapes.transformer)
    parts = dict.fromkeys(("transformer", "transformer_2")[:experts], transformer)
    parts["text_encoder"] = text_parameters(shapes.text_encoder)
    if shapes.image_encoder:
        parts["image_encoder"] = image_parameters(shapes.image_encoder)
    return parts | {"vae": vae_parameters(shapes.vae)}


def _needs(
    spec: ModelSpec, shape: LatentShape, numbers: Precision, *,
    denoise: tuple[int, int, Flops, bool], prompts: int, chunk: int = 0,
) -> Usage:  # fmt: skip
    """`denoise` is tokens, forwards, work, and whether every token has a timestep of its own."""
    shapes, size = spec.wan, numbers.size
    t, e, vae = shapes.transformer, shapes.text_encoder, shapes.vae
    grid = Grid(shape.frames, shape.height, shape.width)
    tokens, forwards, denoising, per_token = denoise
    encode = text_work(e, spec.text_length) * prompts
    if shapes.image_encoder:
        pictures = image_tokens(shapes) // shapes.image_encoder.tokens
        encode += image_work(shapes.image_encoder) * pictures
    # The encoder's tiles are as many pixels after those were put together in patches.
    seen = tiles(grid, vae.spatial, pixels=TILE * vae.patch) if numbers.tiled else [grid]
    if t.in_channels > t.out_channels or t.vace_blocks:  # it is shown a video in latents
        encode += _of_tiles(encode_work, vae, seen)
    shown = tiles(grid, vae.spatial) if numbers.tiled else [grid]
    at_once = replace(grid, frames=chunk or grid.frames)
    scores = e.heads * spec.text_length**2 * (WIDE + size)
    widened = t.dim * t.ffn * size if numbers.quantized else 0  # a layer's weights, as it computes
    active = activation_bytes(t, tokens, element_bytes=size, per_token_time=per_token)
    return Usage(
        parameters=part_parameters(shapes, spec.experts),
        pieces=_pieces(shapes, spec.experts, numbers),
        tokens=tokens,
        forwards=forwards,
        work={
            "encode": encode,
            "denoise": denoising,
            "decode": _of_tiles(decode_work, vae, shown),
        },
        moved={"denoise": forwards * moved_bytes(t, tokens, element_bytes=size)},
        activations={
            "encode": scores + spec.text_length * (4 * e.dim + 3 * e.ffn) * size,
            "denoise": active + widened,
            "decode": decode_bytes(vae, at_once, element_bytes=numbers.vae, tiled=numbers.tiled),
        },
    )


def _of_tiles(
    work: Callable[[Autoencoder, Grid], Flops], vae: Autoencoder, tiles: Sequence[Grid]
) -> Flops:
    """Of all of them; there may be thousands, of four sizes."""
    return sum((work(vae, tile) * count for tile, count in Counter(tiles).items()), NO_FLOPS)


def _pieces(shapes: Architecture, experts: int, numbers: Precision) -> dict[str, WeightSizes]:
    """Weights of every part in bytes. The image encoder is in float32."""
    t, e, i, size = shapes.transformer, shapes.text_encoder, shapes.image_encoder, numbers.size
    spared = quantized_bytes(t, element_bytes=size) if numbers.quantized else (0, 0)
    sizes = {"text_encoder": size, "image_encoder": WIDE, "vae": numbers.vae}
    largest = {"text_encoder": e.vocabulary * e.dim, "vae": largest_layer(shapes.vae)}
    if i:
        largest["image_encoder"] = i.dim * i.ffn
    parameters = part_parameters(shapes, experts)
    others = other_pieces(parameters, largest, sizes)
    whole = transformer_parameters(t) * size + (WIDE - size) * wide_parameters(t) - spared[1]
    # Beside a block there is what stands before and after them all.
    block = block_parameters(t) * size - spared[0]
    group = whole - (t.layers + t.vace_blocks - 1) * block
    transformer = WeightSizes(whole, group, t.dim * max(t.ffn, 6 * t.dim) * size)
    return {part: others.get(part, transformer) for part in parameters}
