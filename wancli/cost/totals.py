"""Parameters, FLOPs and bytes of a request: arithmetic on shapes, nothing is loaded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from wancli.catalog.decoder_files import add_vae_decoder
from wancli.catalog.geometry import LatentShape
from wancli.catalog.hunyuan import HunyuanVideo
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import TASKS, TEXT
from wancli.catalog.wan import Architecture
from wancli.config.settings import Machine, RolloutSettings, Settings
from wancli.cost.hunyuan import hunyuan_usage
from wancli.cost.resources import (
    NARROW,
    PHASES,
    WIDE,
    Precision,
    Usage,
    precision_of,
    resident_weights,
)
from wancli.cost.wan import generation_usage, prompt_bytes, rolling_bytes, rollout_usage
from wancli.cost.wan_transformer import Flops
from wancli.cost.wan_vae import Grid
from wancli.planning.lora import count_beside
from wancli.planning.offload import OFFLOADS
from wancli.planning.plan import Plan, RolloutPlan
from wancli.planning.step_caches import STEP_CACHES, step_cache_bytes

BITS_PER_PIXEL = 0.2  # of H.264 at CRF 18, about
LOSSLESS_BITS_PER_PIXEL = 10.0


@dataclass(frozen=True)
class Cost:
    """Cost of one video; bytes are device memory unless stated otherwise."""

    parameters: Mapping[str, int]  # by part
    tokens: int  # of one forward
    forwards: int
    work: Mapping[str, Flops]  # by phase
    memory_traffic: Mapping[str, int]  # elementwise bytes by phase, about; not the VAE's
    weights: Mapping[str, int]  # bytes by part
    resident_weights: Mapping[str, Mapping[str, int]]  # on the device, by offload and phase
    cache_bytes: Mapping[str, int]  # while denoising and decoding, by cache
    activations: Mapping[str, int]  # peak bytes by phase
    output: int  # bytes on disk, about
    store: int  # bytes on disk of a rollout's clean chunks
    download: tuple[int, int]  # bytes, if weights are stored in 16 or in 32 bits

    @property
    def flops(self) -> int:
        """FLOPs of all phases."""
        return sum(work.flops for work in self.work.values())

    def resident(self, offload: str = "none") -> int:
        """Peak bytes on the device under an offload mode (see OFFLOADS)."""
        return max(self.in_phase(phase, offload) for phase in self.activations)

    def in_phase(self, phase: str, offload: str) -> int:
        """Peak bytes on the device in one phase."""
        caches = sum(self.cache_bytes.values()) if phase != "encode" else 0
        return self.activations[phase] + caches + self.resident_weights[offload][phase]

    def as_json(self) -> dict[str, Any]:
        """All fields and their sums, under the keys of earlier versions."""
        work = {phase: asdict(work) | {"flops": work.flops} for phase, work in self.work.items()}
        resident = {offload: self.resident(offload) for offload in OFFLOADS}
        per_forward = self.work["denoise"].flops // self.forwards
        sums = {"flops": self.flops, "flops_per_forward": per_forward, "resident": resident}
        numbers = {_JSON_KEYS.get(name, name): value for name, value in asdict(self).items()}
        return numbers | {"work": work} | sums


_JSON_KEYS = {"memory_traffic": "moved", "resident_weights": "held", "cache_bytes": "kept"}


def generation_cost(
    settings: Settings, spec: ModelSpec, plan: Plan, *, wide: bool, kind: str = "cpu"
) -> Cost | None:
    """Cost of `wancli generate` without step caching; None if the architecture is unknown."""
    shapes, shape = spec.architecture, plan.shape
    if shapes is None:
        return None
    spec = _with_chosen_parts(spec, settings.machine)
    precision = precision_of(settings.machine, wide=wide, kind=kind)
    prompts = 2 if plan.guided else 1
    if isinstance(shapes, HunyuanVideo):
        grid = Grid(shape.frames, shape.height, shape.width)
        usage = hunyuan_usage(
            shapes, precision, latents=grid, tokens=plan.tokens, forwards=plan.forwards,
            prompts=prompts,
        )  # fmt: skip
    else:
        usage = generation_usage(spec, plan, precision)
    each = prompt_bytes(spec, element_bytes=precision.size) if plan.prompt_kv else 0
    caches = {
        "step_cache": _step_cache_bytes(
            settings, spec, precision, tokens=plan.tokens, branches=prompts, task=plan.task
        ),
        "prompt_kv": prompts * spec.experts * each,
    }
    return _cost(settings, spec, shape, usage, caches)


def _with_chosen_parts(spec: ModelSpec, machine: Machine) -> ModelSpec:
    """The model with LoRAs beside its weights, and with the tiny decoder of these settings."""
    spec = count_beside(spec, machine.lora)
    return spec if spec.tiny_decoder else add_vae_decoder(spec, machine.vae_decoder)


def rollout_cost(
    settings: RolloutSettings, spec: ModelSpec, plan: RolloutPlan, *, wide: bool, kind: str = "cpu"
) -> Cost | None:
    """Cost of `wancli rollout` without recomputing the context; None if the shape is unknown."""
    if not isinstance(spec.architecture, Architecture):  # only Wan rolls out
        return None
    spec = _with_chosen_parts(spec, settings.machine)
    precision = precision_of(settings.machine, wide=wide, kind=kind)
    branches = 2 if plan.guided else 1
    usage = rollout_usage(spec, plan, precision)
    rolling = rolling_bytes(
        spec.wan.transformer, plan.window, plan.rope, element_bytes=precision.size
    )
    caches = {
        "step_cache": _step_cache_bytes(
            settings, spec, precision, tokens=usage.tokens, branches=branches
        ),
        "rolling_kv": branches * spec.experts * rolling,
        "prompt_kv": branches * spec.experts * prompt_bytes(spec, element_bytes=precision.size),
    }
    return _cost(settings, spec, plan.shape, usage, caches, alternating=True)


def _step_cache_bytes(
    settings: Settings, spec: ModelSpec, precision: Precision, *, tokens: int, branches: int,
    task: str = TEXT,
) -> int:  # fmt: skip
    """Bytes of one transformer's step cache once it is full."""
    cache, cache_spec = settings.step_cache, STEP_CACHES[TASKS[task].transformer]
    if cache.step_cache != "cachedit":
        return 0
    return len(cache_spec.blocks) * step_cache_bytes(
        tokens=tokens,
        text=spec.text_length if cache_spec.changes_text else 0,
        dim=spec.dim,
        branches=branches,
        bytes_per_element=precision.size,
        taylorseer_order=cache.taylorseer_order if cache.taylorseer else None,
    )


def _cost(
    settings: Settings, spec: ModelSpec, shape: LatentShape, usage: Usage,
    caches: Mapping[str, int], *, alternating: bool = False,
) -> Cost:  # fmt: skip
    """Sum up; `alternating` is a rollout, which denoises and decodes chunk by chunk."""
    pixels = settings.video.width * settings.video.height
    frames = 1 + (shape.frames - 1) * spec.strides.temporal
    bits = LOSSLESS_BITS_PER_PIXEL if settings.output.lossless else BITS_PER_PIXEL
    stored = sum(n for part, n in usage.parameters.items() if not spec.file_of(part))
    clean = WIDE * shape.channels * shape.frames * shape.height * shape.width
    return Cost(
        parameters=usage.parameters,
        tokens=usage.tokens,
        forwards=usage.forwards,
        work=usage.work,
        memory_traffic=usage.memory_traffic,
        weights={part: sizes.whole for part, sizes in usage.weight_sizes.items()},
        resident_weights={
            offload: {
                phase: resident_weights(usage.weight_sizes, phase, offload, alternating=alternating)
                for phase in PHASES
            }
            for offload in OFFLOADS
        },
        cache_bytes=caches,
        activations=usage.activations,
        output=int(frames * pixels * bits / 8),
        store=clean if alternating else 0,
        download=(NARROW * stored, WIDE * stored),
    )
