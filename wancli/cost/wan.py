"""Resources of one video with a Wan model: transformers, encoders and VAE."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from wancli.catalog.geometry import TILE, LatentShape, Span, WindowConfig
from wancli.catalog.specs import ModelSpec, PackedWeights
from wancli.catalog.tasks import EXPERTS, TASKS
from wancli.catalog.tiny_decoder import TinyDecoderShape
from wancli.catalog.wan import (
    IMAGE_TOKENS,
    TIMESTEP_ROWS,
    Architecture,
    Autoencoder,
    Transformer,
)
from wancli.config.settings import RopePolicy
from wancli.cost.resources import (
    WIDE,
    Precision,
    Usage,
    WeightSizes,
    other_weight_sizes,
    vae_weight_sizes,
)
from wancli.cost.tiny_decoder import (
    tiny_bytes,
    tiny_flops,
    tiny_largest_layer,
    tiny_parameters,
)
from wancli.cost.wan_transformer import (
    NO_FLOPS,
    Flops,
    Forward,
    activation_bytes,
    block_parameters,
    forward_flops,
    image_flops,
    image_parameters,
    memory_traffic,
    quantized_bytes,
    text_flops,
    text_parameters,
    transformer_parameters,
    wide_parameters,
)
from wancli.cost.wan_vae import (
    Grid,
    decode_bytes,
    decode_flops,
    decoder_parameters,
    encode_flops,
    largest_layer,
    tiled_decode_bytes,
    tiles,
    vae_parameters,
)
from wancli.planning.plan import Plan, RolloutPlan, recomputed

# Bytes a weight while diffusers dequantizes a K-quant, whose parts are in half precision.
_GGUF_BUFFER = 6


def generation_usage(spec: ModelSpec, plan: Plan, precision: Precision) -> Usage:
    """Resources of `wancli generate` without step caching."""
    shapes, reuse, rows = spec.wan, plan.prompt_kv, 1
    if TASKS[plan.task].segmented:  # the pipeline decodes, one latent per call
        precision = replace(precision, latents_per_call=1)
    if spec.per_token_time:
        rows = min(plan.tokens, TIMESTEP_ROWS) if reuse else plan.tokens
    forward = Forward(
        plan.tokens, plan.tokens, spec.text_length, image_tokens(shapes), reuse, rows,
        plan.shape.frames,
    )  # fmt: skip
    prompts = 2 if plan.guided else 1
    fresh = min(plan.forwards, prompts * spec.experts) if reuse else plan.forwards
    work = denoise_flops(shapes.transformer, {forward: plan.forwards}, fresh=fresh)
    per_token = spec.per_token_time and not reuse
    return _usage(
        spec, plan.shape, precision, denoise=(plan.tokens, plan.forwards, work, per_token),
        prompts=prompts,
    )  # fmt: skip


def rollout_usage(spec: ModelSpec, plan: RolloutPlan, precision: Precision) -> Usage:
    """Resources of `wancli rollout` without recomputing the context."""
    forwards, prompts = rollout_forwards(spec, plan), 2 if plan.guided else 1
    work = denoise_flops(spec.wan.transformer, forwards, fresh=prompts * spec.experts)
    tokens = plan.window.chunk * plan.shape.tokens_per_frame
    per_token = plan.spans[0].clean_frames > 0
    return _usage(
        spec, plan.shape, precision, denoise=(tokens, plan.forwards, work, per_token),
        prompts=prompts, chunk=plan.window.chunk,
    )  # fmt: skip


def rollout_forwards(spec: ModelSpec, plan: RolloutPlan) -> Mapping[Forward, int]:
    """Count the distinct forwards of a rollout.

    The window includes a chunk's own frames. Trimmed after attention, it lets a chunk's first
    forward attend to frames that are then dropped.
    """
    branches, per_frame = 2 if plan.guided else 1, plan.shape.tokens_per_frame
    window = plan.window.window
    after = plan.window.trim == "after" and not plan.window.recompute
    chunks = [(span, 0) for span in plan.context]
    chunks += list(zip(plan.spans, plan.steps, strict=True))
    last = len(chunks) - 1
    # There may be a hundred thousand chunks; once the window is full they are all alike.
    alike = Counter(
        (
            span.frames,
            min(span.first_frame, window),
            min(span.end, window),
            steps,
            spec.experts if number < last and not plan.window.recompute else 0,
        )
        for number, (span, steps) in enumerate(chunks)
    )
    counts: Counter[Forward] = Counter()
    for (frames, before, later, steps, clean), times in alike.items():
        first = before + frames if after else later
        passes = [(frames, first, min(1, steps + clean)), (frames, later, steps + clean - 1)]
        if plan.window.recompute and steps:
            parts = recomputed(Span(0, before, frames), plan.window)
            ends = [min(start + parts.step, parts.stop) for start in parts]
            passes += [
                (end - start, end, spec.experts) for start, end in zip(parts, ends, strict=True)
            ]
        for length, reach, count in passes:
            forward = Forward(
                length * per_frame, reach * per_frame, spec.text_length, reuses_prompt_kv=True
            )
            counts[forward] += branches * max(0, count) * times
    return counts


def denoise_flops(t: Transformer, forwards: Mapping[Forward, int], *, fresh: int) -> Flops:
    """FLOPs of all forwards, `fresh` of which compute the prompt's K/V."""
    work = NO_FLOPS
    for forward, count in forwards.items():
        new, fresh = min(count, fresh), max(0, fresh - count)
        work += forward_flops(t, replace(forward, reuses_prompt_kv=False)) * new
        work += forward_flops(t, forward) * (count - new)
    return work


def image_tokens(shapes: Architecture) -> int:
    """Tokens of all images that the transformer attends to."""
    if not shapes.transformer.image_dim:
        return 0
    each = shapes.image_encoder.tokens if shapes.image_encoder else IMAGE_TOKENS
    return shapes.transformer.image_positions or each


def prompt_bytes(spec: ModelSpec, *, element_bytes: int) -> int:
    """Bytes of one prompt's K/V and embeddings in one transformer."""
    t, tokens = spec.wan.transformer, spec.text_length + image_tokens(spec.wan)
    return tokens * t.dim * (2 * (t.layers + t.vace_blocks) + 1) * element_bytes


def rolling_bytes(
    t: Transformer, window: WindowConfig, rope: RopePolicy, *, element_bytes: int
) -> int:
    """Bytes of one branch's rolling K/V in one transformer, with the keys of a sink that moves."""
    rows = 2 * window.capacity + (0 if rope == "absolute" else window.sink_tokens)
    return t.layers * rows * t.dim * element_bytes


def part_parameters(
    shapes: Architecture, experts: int, tiny: TinyDecoderShape | None = None
) -> dict[str, int]:
    """Parameters by part, with one transformer per expert, and maybe a `tiny` decoder."""
    transformer = transformer_parameters(shapes.transformer)
    parts = dict.fromkeys(("transformer", "transformer_2")[:experts], transformer)
    parts["text_encoder"] = text_parameters(shapes.text_encoder)
    if shapes.image_encoder:
        parts["image_encoder"] = image_parameters(shapes.image_encoder)
    vae = vae_parameters(shapes.vae)
    if tiny:
        vae += tiny_parameters(tiny) - decoder_parameters(shapes.vae)
    return parts | {"vae": vae}


def _usage(
    spec: ModelSpec, shape: LatentShape, precision: Precision, *,
    denoise: tuple[int, int, Flops, bool], prompts: int, chunk: int = 0,
) -> Usage:  # fmt: skip
    """Resources; `denoise` is tokens, forwards, FLOPs, and whether timesteps are per token."""
    shapes, size = spec.wan, precision.size
    t, e, vae = shapes.transformer, shapes.text_encoder, shapes.vae
    grid = Grid(shape.frames, shape.height, shape.width)
    tokens, forwards, denoising, per_token = denoise
    encode = text_flops(e, spec.text_length) * prompts
    if shapes.image_encoder:
        pictures = image_tokens(shapes) // shapes.image_encoder.tokens
        encode += image_flops(shapes.image_encoder) * pictures
    # Encoder tiles are measured in patches.
    seen = tiles(grid, vae.spatial, pixels=TILE * vae.patch) if precision.tiled else [grid]
    if t.in_channels > t.out_channels or t.vace_blocks:  # conditioned on an encoded video
        encode += _of_tiles(encode_flops, vae, seen)
    shown = tiles(grid, vae.spatial) if precision.tiled else [grid]
    scores = e.heads * spec.text_length**2 * (WIDE + size)
    quantized = quantization_buffer(t, tokens, precision)
    if any(spec.packed_in(part) for part in EXPERTS.values()):
        quantized = t.dim * t.ffn * (_GGUF_BUFFER + size)
    active = activation_bytes(t, tokens, element_bytes=size, per_token_time=per_token)
    return Usage(
        parameters=part_parameters(shapes, spec.experts, spec.tiny_decoder),
        weight_sizes=_weight_sizes(spec, precision),
        tokens=tokens,
        forwards=forwards,
        work={
            "encode": encode,
            "denoise": denoising,
            "decode": tiny_flops(spec.tiny_decoder, grid)
            if spec.tiny_decoder
            else _of_tiles(decode_flops, vae, shown),
        },
        memory_traffic={"denoise": forwards * memory_traffic(t, tokens, element_bytes=size)},
        activations={
            "encode": scores + spec.text_length * (4 * e.dim + 3 * e.ffn) * size,
            "denoise": active + quantized,
            "decode": _decode_bytes(spec, grid, precision, chunk=chunk),
        },
    )


def quantization_buffer(t: Transformer, tokens: int, precision: Precision) -> int:
    """Bytes of one layer's dequantized weights, or of its activations in 8 bits."""
    if precision.fp8_products:
        return tokens * t.ffn
    return t.dim * t.ffn * precision.size if precision.quantized else 0


def _decode_bytes(spec: ModelSpec, latents: Grid, precision: Precision, *, chunk: int) -> int:
    vae, sizes = spec.wan.vae, {"element_bytes": precision.decoder, "video_bytes": precision.vae}
    if spec.tiny_decoder:
        return tiny_bytes(spec.tiny_decoder, latents, chunk=chunk or 1, **sizes)
    if precision.tiled:
        return tiled_decode_bytes(vae, latents, **sizes)
    per_call = precision.latents_per_call
    chunk = chunk or (per_call if per_call > 1 else 0)  # as `generate` decodes
    return decode_bytes(vae, latents, chunk=chunk, latents_per_call=per_call, **sizes)


def _of_tiles(
    flops: Callable[[Autoencoder, Grid], Flops], vae: Autoencoder, tiles: Sequence[Grid]
) -> Flops:
    """FLOPs of all tiles; there may be thousands, of four sizes."""
    return sum((flops(vae, tile) * count for tile, count in Counter(tiles).items()), NO_FLOPS)


def _weight_sizes(spec: ModelSpec, precision: Precision) -> dict[str, WeightSizes]:
    """Weight sizes of every part. The image encoder is in float32."""
    shapes, tiny, size = spec.wan, spec.tiny_decoder, precision.size
    e, i = shapes.text_encoder, shapes.image_encoder
    sizes = {"text_encoder": size, "image_encoder": WIDE}
    largest = {"text_encoder": e.vocabulary * e.dim}
    if i:
        largest["image_encoder"] = i.dim * i.ffn
    parameters = part_parameters(shapes, spec.experts, tiny)
    others = other_weight_sizes(parameters, largest, sizes)
    text = others["text_encoder"]
    spared = sum(_spared(packed, size) for packed in spec.packed_in("text_encoder"))
    others["text_encoder"] = replace(text, whole=text.whole - spared)
    decoder = tiny_parameters(tiny) if tiny else decoder_parameters(shapes.vae)
    others["vae"] = vae_weight_sizes(
        precision,
        encoder=parameters["vae"] - decoder,
        decoder=decoder,
        layer=tiny_largest_layer(tiny) if tiny else largest_layer(shapes.vae),
    )
    return {
        part: others[part]
        if part in others
        else _transformer_sizes(shapes.transformer, precision, spec.packed_in(part))
        for part in parameters
    }


def _transformer_sizes(
    t: Transformer, precision: Precision, packed: Sequence[PackedWeights]
) -> WeightSizes:
    """Weight sizes of one transformer; `packed` weights stay as they are in their GGUF file."""
    size, blocks = precision.size, t.layers + t.vace_blocks
    dynamic = precision.fp8_products
    block_spared, spared = (
        quantized_bytes(t, element_bytes=size, dynamic=dynamic) if precision.quantized else (0, 0)
    )
    by_block = {each.block: _spared(each, size) for each in packed}
    whole = transformer_parameters(t) * size + (WIDE - size) * wide_parameters(t)
    whole -= spared + sum(by_block.values())
    # Layers outside the blocks stay on the device, and then the largest block.
    block = block_parameters(t) * size - block_spared
    in_blocks = [spared for name, spared in by_block.items() if name]
    in_blocks += [0] * (blocks - len(in_blocks))
    others = sum(block - spared for spared in in_blocks) - (block - min(in_blocks))
    return WeightSizes(whole, whole - others, t.dim * max(t.ffn, 6 * t.dim) * size)


def _spared(packed: PackedWeights, size: int) -> int:
    """Bytes that weights and the LoRAs beside them take less than weights of `size` bytes each."""
    return (packed.parameters - packed.beside) * size - packed.bytes
