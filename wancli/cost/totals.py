"""What a request takes: parameters, FLOPs and bytes. Arithmetic on shapes; loads nothing."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from wancli.catalog.geometry import LatentShape
from wancli.catalog.hunyuan import HunyuanVideo
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import TASKS, TEXT
from wancli.catalog.wan import Architecture
from wancli.config.settings import RolloutSettings, Settings
from wancli.cost.hunyuan import hunyuan_needs
from wancli.cost.resources import NARROW, PHASES, WIDE, Precision, Usage, held_weights, precision_of
from wancli.cost.wan import generation_needs, prompt_bytes, rolling_bytes, rollout_needs
from wancli.cost.wan_transformer import Flops
from wancli.cost.wan_vae import Grid
from wancli.planning.offload import OFFLOADS
from wancli.planning.plan import Plan, RolloutPlan
from wancli.planning.step_caches import STEP_CACHES, step_cache_bytes

BITS_PER_PIXEL = 0.2  # of H.264 at CRF 18, about
LOSSLESS_BITS_PER_PIXEL = 10.0


@dataclass(frozen=True)
class Cost:
    """What one video takes; bytes are in the device's memory unless they say otherwise."""

    parameters: Mapping[str, int]  # by part
    tokens: int  # of one forward
    forwards: int
    work: Mapping[str, Flops]  # by phase
    moved: Mapping[str, int]  # bytes read and written element by element, about; not the VAE's
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
    shapes, shape = spec.architecture, plan.shape
    if shapes is None:
        return None
    numbers, prompts = precision_of(settings.machine, wide=wide), 2 if plan.guided else 1
    if isinstance(shapes, HunyuanVideo):
        grid = Grid(shape.frames, shape.height, shape.width)
        needs = hunyuan_needs(
            shapes, numbers, latents=grid, tokens=plan.tokens, forwards=plan.forwards,
            prompts=prompts,
        )  # fmt: skip
    else:
        needs = generation_needs(spec, plan, numbers)
    each = prompt_bytes(spec, element_bytes=numbers.size) if plan.prompt_kv else 0
    kept = {
        "step_cache": _step_cache_bytes(
            settings, spec, numbers, tokens=plan.tokens, branches=prompts, task=plan.task
        ),
        "prompt_kv": prompts * spec.experts * each,
    }
    return _cost(settings, spec, shape, needs, kept)


def rollout_cost(
    settings: RolloutSettings, spec: ModelSpec, plan: RolloutPlan, *, wide: bool
) -> Cost | None:
    """Of `wancli rollout`, without reading the past again; None where the shape is not known."""
    if not isinstance(spec.architecture, Architecture):  # rollouts are of Wan
        return None
    numbers, branches = precision_of(settings.machine, wide=wide), 2 if plan.guided else 1
    needs = rollout_needs(settings, spec, plan, numbers)
    rolling = rolling_bytes(spec.wan.transformer, plan.window, element_bytes=numbers.size)
    kept = {
        "step_cache": _step_cache_bytes(
            settings, spec, numbers, tokens=needs.tokens, branches=branches
        ),
        "rolling_kv": branches * spec.experts * rolling,
        "prompt_kv": branches * spec.experts * prompt_bytes(spec, element_bytes=numbers.size),
    }
    return _cost(settings, spec, plan.shape, needs, kept, alternating=True)


def _step_cache_bytes(
    settings: Settings, spec: ModelSpec, numbers: Precision, *, tokens: int, branches: int,
    task: str = TEXT,
) -> int:  # fmt: skip
    """What the step cache of one transformer holds, once it is full."""
    chosen, known = settings.step_cache, STEP_CACHES[TASKS[task].transformer]
    if chosen.step_cache != "cachedit":
        return 0
    return len(known.blocks) * step_cache_bytes(
        tokens=tokens,
        text=spec.text_length if known.changes_text else 0,
        dim=spec.dim,
        branches=branches,
        bytes_per_element=numbers.size,
        taylorseer_order=chosen.taylorseer_order if chosen.taylorseer else None,
    )


def _cost(
    settings: Settings, spec: ModelSpec, shape: LatentShape, needs: Usage,
    kept: Mapping[str, int], *, alternating: bool = False,
) -> Cost:  # fmt: skip
    """`alternating` is a rollout, where each chunk is denoised and decoded."""
    pixels = settings.video.width * settings.video.height
    frames = 1 + (shape.frames - 1) * spec.strides.temporal
    bits = LOSSLESS_BITS_PER_PIXEL if settings.output.lossless else BITS_PER_PIXEL
    stored = sum(needs.parameters.values())
    clean = WIDE * shape.channels * shape.frames * shape.height * shape.width
    return Cost(
        parameters=needs.parameters,
        tokens=needs.tokens,
        forwards=needs.forwards,
        work=needs.work,
        moved=needs.moved,
        weights={part: pieces.whole for part, pieces in needs.pieces.items()},
        held={
            way: {
                phase: held_weights(needs.pieces, phase, way, alternating=alternating)
                for phase in PHASES
            }
            for way in OFFLOADS
        },
        kept=kept,
        activations=needs.activations,
        output=int(frames * pixels * bits / 8),
        store=clean if alternating else 0,
        download=(NARROW * stored, WIDE * stored),
    )
