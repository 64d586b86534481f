"""What a request takes: parameters, FLOPs and bytes. Arithmetic on shapes; loads nothing."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from wancli import transformer_cost
from wancli.architectures import IMAGE_TOKENS, Architecture, Transformer
from wancli.geometry import LatentShape
from wancli.hunyuan import HunyuanVideo
from wancli.hunyuan_cost import hunyuan_needs
from wancli.plan import Plan, RolloutPlan
from wancli.settings import RolloutSettings, Settings
from wancli.specs import ModelSpec
from wancli.transformer_cost import (
    NO_WORK,
    Forward,
    Needs,
    Work,
    activation_bytes,
    block_parameters,
    forward_work,
    image_parameters,
    image_work,
    quantized_bytes,
    text_parameters,
    text_work,
    transformer_parameters,
    wide_parameters,
)
from wancli.vae_cost import Grid, decode_bytes, decode_work, encode_work, vae_parameters

WIDE, NARROW = 4, 2  # bytes of a number
TIMESTEP_ROWS = 128  # most that are computed where all tokens have one timestep
BITS_PER_PIXEL = 0.2  # of H.264 at CRF 18, about
LOSSLESS_BITS_PER_PIXEL = 10.0
PHASES = {
    "encode": ("text_encoder", "text_encoder_2", "image_encoder"),
    "denoise": ("transformer", "transformer_2"),
    "decode": ("vae",),
}
OFFLOADS = {
    "none": "all parts",
    "model": "one part after the other",
    "group": "two blocks, then two others",
}


@dataclass(frozen=True)
class Cost:
    """What one video takes; bytes are in the device's memory unless they say otherwise."""

    parameters: Mapping[str, int]  # by part
    tokens: int  # of one forward
    forwards: int
    work: Mapping[str, Work]  # by phase
    moved: Mapping[str, int]  # bytes read and written element by element, about; not the VAE's
    weights: Mapping[str, int]  # bytes by part
    block: int  # bytes of one block's weights
    kept: Mapping[str, int]  # bytes while it denoises and decodes, by cache
    activations: Mapping[str, int]  # bytes at most, by phase
    output: int  # bytes on disk, about
    store: int  # bytes on disk of a rollout's clean chunks
    download: tuple[int, int]  # bytes, of weights stored in 16 and in 32 bits

    @property
    def flops(self) -> int:
        """Of everything."""
        return sum(work.flops for work in self.work.values())

    def resident(self, offload: str = "none") -> int:
        """Bytes that have to be on the device at once; what each word keeps there: OFFLOADS."""
        kept = sum(self.kept.values())
        held = {n: size + kept * (n != "encode") for n, size in self.activations.items()}
        if offload == "none":
            return sum(self.weights.values()) + max(held.values())
        return max(held[phase] + self._largest(phase, offload) for phase in held)

    def _largest(self, phase: str, offload: str) -> int:
        if phase == "denoise" and offload == "group":
            return 2 * self.block
        return max((n for part, n in self.weights.items() if part in PHASES[phase]), default=0)

    def as_json(self) -> dict[str, Any]:
        """Numbers by name, the sums included."""
        work = {phase: asdict(work) | {"flops": work.flops} for phase, work in self.work.items()}
        resident = {offload: self.resident(offload) for offload in OFFLOADS}
        per_forward = self.work["denoise"].flops // self.forwards
        sums = {"flops": self.flops, "flops_per_forward": per_forward, "resident": resident}
        return asdict(self) | {"work": work} | sums


def generation_cost(settings: Settings, spec: ModelSpec, plan: Plan, *, wide: bool) -> Cost | None:
    """Of `wancli generate`, every step computed whole; None where the shape is not known."""
    shapes, shape, reuse = spec.architecture, plan.shape, plan.prompt_kv
    prompts, kept = 2 if plan.guided else 1, {"step_cache": plan.step_cache_bytes}
    if shapes is None:
        return None
    if isinstance(shapes, HunyuanVideo):
        needs = hunyuan_needs(
            shapes,
            latents=_grid(shape),
            tokens=plan.tokens,
            forwards=plan.forwards,
            prompts=prompts,
            size=WIDE if wide else NARROW,
        )
        return _cost(settings, spec, shape, needs, wide=wide, kept=kept)
    rows = 1
    if spec.per_token_time:
        rows = min(plan.tokens, TIMESTEP_ROWS) if reuse else plan.tokens
    given = Forward(
        plan.tokens, plan.tokens, spec.text_length, image_tokens(shapes), reuse, rows, shape.frames
    )
    fresh = min(plan.forwards, prompts * spec.experts) if reuse else plan.forwards
    work = denoise_work(shapes.transformer, {given: plan.forwards}, fresh=fresh)
    branches = prompts * spec.experts
    needs = _wan_needs(
        shapes, spec, shape, wide=wide, prompts=prompts,
        denoise=(plan.tokens, plan.forwards, work, spec.per_token_time and not reuse),
    )  # fmt: skip
    kept["prompt_kv"] = branches * prompt_bytes(shapes, spec, wide=wide) if reuse else 0
    return _cost(settings, spec, shape, needs, wide=wide, kept=kept)


def rollout_cost(
    settings: RolloutSettings, spec: ModelSpec, plan: RolloutPlan, *, wide: bool
) -> Cost | None:
    """Of `wancli rollout`, without reading the past again; None where the shape is not known."""
    shapes = spec.architecture
    if not isinstance(shapes, Architecture):  # rollouts are of Wan
        return None
    branches = (2 if plan.guided else 1) * spec.experts
    tokens = plan.chunk * plan.shape.tokens_per_frame
    work = denoise_work(shapes.transformer, rollout_forwards(settings, spec, plan), fresh=branches)
    kept = {
        "rolling_kv": branches * rolling_bytes(shapes.transformer, settings, plan, wide=wide),
        "prompt_kv": branches * prompt_bytes(shapes, spec, wide=wide),
    }
    texts = 2 if settings.sampling.guidance_scale > 1 else 1
    needs = _wan_needs(
        shapes, spec, plan.shape, wide=wide, prompts=texts, chunk=plan.chunk,
        denoise=(tokens, plan.forwards, work, False),
    )  # fmt: skip
    return _cost(settings, spec, plan.shape, needs, wide=wide, kept=kept, chunk=plan.chunk)


def rollout_forwards(
    settings: RolloutSettings, spec: ModelSpec, plan: RolloutPlan
) -> Mapping[Forward, int]:
    """Every forward of a rollout, and how often it is made.

    The window counts a chunk's own frames. Cut after attention, it lets a chunk's first forward
    see what falls out of it.
    """
    branches, per_frame = 2 if plan.guided else 1, plan.shape.tokens_per_frame
    after = settings.rollout.trim == "after"
    counts: Counter[Forward] = Counter()
    chunks = [(span, 0) for span in plan.context]
    chunks += list(zip(plan.spans, plan.steps, strict=True))
    for number, (span, steps) in enumerate(chunks):
        clean = spec.experts if number < len(chunks) - 1 else 0
        later = min(span.end, plan.window)
        first = min(span.first_frame, plan.window) + span.frames if after else later
        for frames, count in ((first, 1), (later, steps + clean - 1)):
            tokens = span.frames * per_frame
            given = Forward(tokens, frames * per_frame, spec.text_length, known=True)
            counts[given] += branches * count
    return counts


def denoise_work(t: Transformer, forwards: Mapping[Forward, int], *, fresh: int) -> Work:
    """All forwards; in `fresh` of them the prompt is new."""
    work = NO_WORK
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


def prompt_bytes(shapes: Architecture, spec: ModelSpec, *, wide: bool) -> int:
    """Keys, values and embeddings of one prompt in one transformer."""
    t, tokens = shapes.transformer, spec.text_length + image_tokens(shapes)
    return tokens * t.dim * (2 * (t.layers + t.vace_blocks) + 1) * (WIDE if wide else NARROW)


def rolling_bytes(
    t: Transformer, settings: RolloutSettings, plan: RolloutPlan, *, wide: bool
) -> int:
    """Rolling keys and values of one branch of one transformer, and the sink's keys unrotated."""
    frames = plan.window + (plan.chunk if settings.rollout.trim == "after" else 0)
    rows = (2 * frames + plan.sink) * plan.shape.tokens_per_frame
    return t.layers * rows * t.dim * (WIDE if wide else NARROW)


def _wan_needs(  # noqa: PLR0913 - what the two kinds of runs differ in
    shapes: Architecture, spec: ModelSpec, shape: LatentShape, *, wide: bool, prompts: int,
    denoise: tuple[int, int, Work, bool], chunk: int = 0,
) -> Needs:  # fmt: skip
    """`denoise` is tokens, forwards, work, and whether every token has a timestep of its own."""
    t, e, grid = shapes.transformer, shapes.text_encoder, _grid(shape)
    size = WIDE if wide else NARROW
    tokens, forwards, denoising, per_token = denoise
    encode = text_work(e, spec.text_length) * prompts
    if shapes.image_encoder:
        pictures = image_tokens(shapes) // shapes.image_encoder.tokens
        encode += image_work(shapes.image_encoder) * pictures
    if t.in_channels > t.out_channels or t.vace_blocks:  # it is shown a video in latents
        encode += encode_work(shapes.vae, grid)
    scores = e.heads * spec.text_length**2 * (WIDE + size)
    shown = replace(grid, frames=chunk or grid.frames)
    return Needs(
        parameters=part_parameters(shapes, spec.experts),
        wide=wide_parameters(t),
        block=block_parameters(t),
        tokens=tokens,
        forwards=forwards,
        work={"encode": encode, "denoise": denoising, "decode": decode_work(shapes.vae, grid)},
        moved={"denoise": forwards * transformer_cost.moved_bytes(t, tokens, element_bytes=size)},
        activations={
            "encode": scores + spec.text_length * (4 * e.dim + 3 * e.ffn) * size,
            "denoise": activation_bytes(t, tokens, element_bytes=size, per_token_time=per_token)
            + (t.dim * t.ffn * size if quantized else 0),  # a layer's weights, as it computes
            "decode": decode_bytes(shapes.vae, shown),
        },
    )


def _cost(  # noqa: PLR0913 - what the kinds of runs differ in
    settings: Settings, spec: ModelSpec, shape: LatentShape, needs: Needs, *, wide: bool,
    kept: Mapping[str, int], chunk: int = 0,
) -> Cost:  # fmt: skip
    size = WIDE if wide else NARROW
    wide_extra = (WIDE - size) * needs.wide
    weights = {
        part: count * (WIDE if part == "vae" else size)
        + (wide_extra if part in PHASES["denoise"] else 0)
        for part, count in needs.parameters.items()
    }
    pixels = settings.video.width * settings.video.height
    frames = 1 + (shape.frames - 1) * spec.strides.temporal
    bits = LOSSLESS_BITS_PER_PIXEL if settings.output.lossless else BITS_PER_PIXEL
    stored = sum(needs.parameters.values())
    return Cost(
        parameters=needs.parameters,
        tokens=needs.tokens,
        forwards=needs.forwards,
        work=needs.work,
        moved=needs.moved,
        weights=weights,
        block=size * needs.block,
        kept=kept,
        activations=needs.activations,
        output=int(frames * pixels * bits / 8),
        store=WIDE * shape.channels * shape.frames * shape.height * shape.width if chunk else 0,
        download=(NARROW * stored, WIDE * stored),
    )


def _grid(shape: LatentShape) -> Grid:
    return Grid(shape.frames, shape.height, shape.width)


def part_parameters(shapes: Architecture, experts: int) -> dict[str, int]:
    """By part, of one that has so many experts."""
    transformer = transformer_parameters(shapes.transformer)
    parts = dict.fromkeys(("transformer", "transformer_2")[:experts], transformer)
    parts["text_encoder"] = text_parameters(shapes.text_encoder)
    if shapes.image_encoder:
        parts["image_encoder"] = image_parameters(shapes.image_encoder)
    return parts | {"vae": vae_parameters(shapes.vae)}
