"""What a request takes: parameters, FLOPs and bytes. Arithmetic on shapes; loads nothing."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from wancli import transformer_cost, vae_cost
from wancli.architectures import IMAGE_TOKENS, Architecture, Transformer
from wancli.geometry import LatentShape
from wancli.machine import vae_dtype
from wancli.offload import OFFLOADS, PHASES, held_weights, pieces
from wancli.plan import Plan, RolloutPlan
from wancli.settings import RolloutSettings, Settings
from wancli.specs import ModelSpec
from wancli.step_caches import step_cache_bytes
from wancli.transformer_cost import (
    NO_WORK,
    Forward,
    Work,
    activation_bytes,
    forward_work,
    image_parameters,
    image_work,
    text_parameters,
    text_work,
    transformer_parameters,
    wide_parameters,
)
from wancli.vae_cost import (
    TILE,
    Grid,
    decode_bytes,
    decode_work,
    encode_work,
    tiles,
    vae_parameters,
)

WIDE, NARROW = 4, 2  # bytes of a number
TIMESTEP_ROWS = 128  # most that are computed where all tokens have one timestep
BITS_PER_PIXEL = 0.2  # of H.264 at CRF 18, about
LOSSLESS_BITS_PER_PIXEL = 10.0


@dataclass(frozen=True)
class Cost:
    """What one video takes; bytes are in the device's memory unless they say otherwise."""

    parameters: Mapping[str, int]  # by part
    tokens: int  # of one forward
    forwards: int
    work: Mapping[str, Work]  # by phase
    moved: Mapping[str, int]  # bytes read and written element by element, by phase, about
    weights: Mapping[str, int]  # bytes by part
    held: Mapping[str, Mapping[str, int]]  # of them on the device, by offload and phase
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
        return max(self.in_phase(phase, offload) for phase in self.activations)

    def in_phase(self, phase: str, offload: str) -> int:
        """The same, in one phase."""
        kept = sum(self.kept.values()) if phase != "encode" else 0
        return self.activations[phase] + kept + self.held[offload][phase]

    def as_json(self) -> dict[str, Any]:
        """Numbers by name, the sums included."""
        work = {phase: asdict(work) | {"flops": work.flops} for phase, work in self.work.items()}
        resident = {offload: self.resident(offload) for offload in OFFLOADS}
        per_forward = self.work["denoise"].flops // self.forwards
        sums = {"flops": self.flops, "flops_per_forward": per_forward, "resident": resident}
        return asdict(self) | {"work": work} | sums


def generation_cost(settings: Settings, spec: ModelSpec, plan: Plan, *, wide: bool) -> Cost | None:
    """Of `wancli generate`, every step computed whole; None where the shape is not known."""
    shapes, shape, reuse = spec.architecture, plan.shape, settings.prompt_kv.prompt_kv
    if shapes is None:
        return None
    rows = 1
    if spec.per_token_time:
        rows = min(plan.tokens, TIMESTEP_ROWS) if reuse else plan.tokens
    given = Forward(
        plan.tokens, plan.tokens, spec.text_length, image_tokens(shapes), reuse, rows, shape.frames
    )
    prompts = 2 if plan.guided else 1
    fresh = min(plan.forwards, prompts * spec.experts) if reuse else plan.forwards
    work = denoise_work(shapes.transformer, {given: plan.forwards}, fresh=fresh)
    branches = prompts * spec.experts
    return _cost(
        settings,
        spec,
        shape,
        wide=wide,
        denoise=(plan.tokens, plan.forwards, work, spec.per_token_time and not reuse),
        kept={
            "step_cache": _step_cache_bytes(
                settings, spec, plan.tokens, guided=plan.guided, wide=wide
            ),
            "prompt_kv": branches * prompt_bytes(shapes, spec, wide=wide) if reuse else 0,
        },
    )


def rollout_cost(
    settings: RolloutSettings, spec: ModelSpec, plan: RolloutPlan, *, wide: bool
) -> Cost | None:
    """Of `wancli rollout`, without reading the past again; None where the shape is not known."""
    shapes = spec.architecture
    if shapes is None:
        return None
    branches = (2 if plan.guided else 1) * spec.experts
    tokens = plan.chunk * plan.shape.tokens_per_frame
    work = denoise_work(shapes.transformer, rollout_forwards(settings, spec, plan), fresh=branches)
    kept = {
        "step_cache": _step_cache_bytes(settings, spec, tokens, guided=plan.guided, wide=wide),
        "rolling_kv": branches * rolling_bytes(shapes.transformer, settings, plan, wide=wide),
        "prompt_kv": branches * prompt_bytes(shapes, spec, wide=wide),
    }
    return _cost(
        settings, spec, plan.shape, wide=wide, kept=kept, chunk=plan.chunk,
        denoise=(tokens, plan.forwards, work, False),
    )  # fmt: skip


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
    return shapes.transformer.image_positions or IMAGE_TOKENS


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


def _step_cache_bytes(
    settings: Settings, spec: ModelSpec, tokens: int, *, guided: bool, wide: bool
) -> int:
    """What the step cache of one transformer holds, once it is full."""
    chosen = settings.step_cache
    if chosen.step_cache != "cachedit":
        return 0
    return step_cache_bytes(
        tokens=tokens,
        dim=spec.dim,
        branches=2 if guided else 1,
        bytes_per_element=WIDE if wide else NARROW,
        taylorseer_order=chosen.taylorseer_order if chosen.taylorseer else None,
    )


def _cost(  # noqa: PLR0913 - what the two kinds of runs differ in
    settings: Settings, spec: ModelSpec, shape: LatentShape, *, wide: bool,
    denoise: tuple[int, int, Work, bool], kept: Mapping[str, int], chunk: int = 0,
) -> Cost:  # fmt: skip
    """`denoise` is tokens, forwards, work, and whether every token has a timestep of its own."""
    shapes, size = spec.architecture, WIDE if wide else NARROW
    if shapes is None:
        raise ValueError(f"{spec.name} has no shape")
    t, grid = shapes.transformer, Grid(shape.frames, shape.height, shape.width)
    tokens, forwards, denoising, per_token = denoise
    parameters = _parameters(shapes, spec.experts)
    wide_extra = (WIDE - size) * wide_parameters(t)
    vae_size = WIDE if vae_dtype(settings.machine) == "float32" else NARROW
    sizes = dict.fromkeys(parameters, size) | {"vae": vae_size, "image_encoder": WIDE}
    weights = {
        part: count * sizes[part] + (wide_extra if part in PHASES["denoise"] else 0)
        for part, count in parameters.items()
    }
    parts = pieces(shapes, weights, sizes)
    texts = 2 if settings.sampling.guidance_scale > 1 else 1
    encode = text_work(shapes.text_encoder, spec.text_length) * texts
    if shapes.image_encoder:
        encode += image_work(shapes.image_encoder)
    tiled = settings.machine.vae_tiling
    # The encoder's tiles are as many pixels after those were put together in patches.
    seen = tiles(shapes.vae, grid, pixels=TILE * shapes.vae.patch) if tiled else [grid]
    if t.in_channels > t.out_channels or t.vace_blocks:  # it is shown a video in latents
        encode += sum((encode_work(shapes.vae, tile) for tile in seen), NO_WORK)
    decoded = tiles(shapes.vae, grid) if tiled else [grid]
    decoding = sum((decode_work(shapes.vae, tile) for tile in decoded), NO_WORK)
    e = shapes.text_encoder
    scores = e.heads * spec.text_length**2 * (WIDE + size)
    shown = replace(grid, frames=chunk or grid.frames)
    pixels = settings.video.width * settings.video.height
    frames = 1 + (shape.frames - 1) * spec.strides.temporal
    bits = LOSSLESS_BITS_PER_PIXEL if settings.output.lossless else BITS_PER_PIXEL
    stored = sum(parameters.values())
    return Cost(
        parameters=parameters,
        tokens=tokens,
        forwards=forwards,
        work={"encode": encode, "denoise": denoising, "decode": decoding},
        moved={
            "encode": 0,
            "denoise": forwards * transformer_cost.moved_bytes(t, tokens, element_bytes=size),
            "decode": sum(
                vae_cost.moved_bytes(shapes.vae, tile, element_bytes=vae_size) for tile in decoded
            ),
        },
        weights=weights,
        held={
            way: {
                phase: held_weights(parts, phase, way, alternating=bool(chunk)) for phase in PHASES
            }
            for way in OFFLOADS
        },
        kept=kept,
        activations={
            "encode": scores + spec.text_length * (4 * e.dim + 3 * e.ffn) * size,
            "denoise": activation_bytes(t, tokens, element_bytes=size, per_token_time=per_token),
            "decode": decode_bytes(shapes.vae, shown, element_bytes=vae_size, tiled=tiled),
        },
        output=int(frames * pixels * bits / 8),
        store=WIDE * shape.channels * shape.frames * shape.height * shape.width if chunk else 0,
        download=(NARROW * stored, WIDE * stored),
    )


def _parameters(shapes: Architecture, experts: int) -> dict[str, int]:
    transformer = transformer_parameters(shapes.transformer)
    parts = dict.fromkeys(("transformer", "transformer_2")[:experts], transformer)
    parts["text_encoder"] = text_parameters(shapes.text_encoder)
    if shapes.image_encoder:
        parts["image_encoder"] = image_parameters(shapes.image_encoder)
    return parts | {"vae": vae_parameters(shapes.vae)}
