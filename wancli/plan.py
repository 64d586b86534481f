"""What a request comes to, before anything loads. Every rule about combinations is here."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil
from typing import Any

from wancli.errors import PlanError
from wancli.geometry import LatentShape, Span, latent_shape, lay_out
from wancli.lora import find_lora
from wancli.resolve import Resolved, flag
from wancli.settings import Machine, Rollout, RolloutSettings, RopePolicy, Settings
from wancli.specs import ModelSpec
from wancli.step_caches import check_step_cache, step_cache_bytes

WITH_THRESHOLD = ("first-block", "magcache", "seacache")  # --step-cache-threshold is theirs


@dataclass(frozen=True)
class Plan:
    """Derived, never given."""

    model: str
    shape: LatentShape
    tokens: int
    guided: bool
    steps: int
    gate: int | None  # step from which on the uncond branch is not computed
    forwards: int  # transformer calls in all
    step_cache_bytes: int  # at most; 0 without one, or where the model's size is unknown
    duration_s: float


def make_plan(settings: Settings, spec: ModelSpec) -> Plan:
    """Check the combination and derive the rest; PlanError says what does not go together."""
    sampling, video = settings.sampling, settings.video
    shape = latent_shape(
        num_frames=video.num_frames,
        width=video.width,
        height=video.height,
        channels=spec.latent_channels,
        strides=spec.strides,
    )
    _check_experts(settings, spec)
    _check_machine(settings.machine)
    check_step_cache(settings.step_cache, steps=sampling.steps, model=spec.name, layers=spec.layers)
    guided = sampling.guidance_scale > 1
    gate = _gate(settings, guided=guided)
    return Plan(
        model=spec.name,
        shape=shape,
        tokens=shape.tokens,
        guided=guided,
        steps=sampling.steps,
        gate=gate,
        forwards=sampling.steps + ((gate or sampling.steps) if guided else 0),
        step_cache_bytes=_step_cache_bytes(settings, spec, shape.tokens, guided=guided),
        duration_s=video.num_frames / video.fps,
    )


@dataclass(frozen=True)
class RolloutPlan:
    """Derived, never given. Windows and sinks in latent frames."""

    model: str
    shape: LatentShape  # of everything, the context included
    context: tuple[Span, ...]  # given chunks
    spans: tuple[Span, ...]  # chunks to be made
    window: int
    sink: int
    chunk: int  # most latent frames of one chunk
    rope: RopePolicy
    guided: bool
    steps: tuple[int, ...]  # denoising steps of every chunk to be made
    forwards: int  # transformer calls in all
    num_frames: int  # video frames in all
    duration_s: float

    def as_json(self) -> dict[str, Any]:
        """Without the chunks one by one: there may be a million."""
        told = asdict(self)
        spans, context, steps = (told.pop(name) for name in ("spans", "context", "steps"))
        return {"chunks": len(spans), "context_chunks": len(context), "steps": sum(steps), **told}


def make_rollout_plan(
    settings: RolloutSettings, spec: ModelSpec, *, context_frames: int = 0, force: bool = False
) -> RolloutPlan:
    """Lay the chunks out and check the combination; `context_frames` are given latent frames."""
    video, chosen = settings.video, settings.rollout
    if spec.causal is False and not force:
        raise PlanError(
            f"{spec.name} was not trained to go on from its own chunks: they will drift apart.",
            hint="--model self-forcing, or --force to see it",
        )
    _check_machine(settings.machine)
    _check_experts(settings, spec)
    _check_rollout(chosen)
    _check_whole(settings)
    context, spans = lay_out(
        chosen.chunks,
        chunk_frames=chosen.chunk_frames,
        context=context_frames,
        independent_first_frame=chosen.independent_first_frame,
    )
    frames = spans[-1].end
    num_frames = (frames - 1) * spec.strides.temporal + 1
    shape = latent_shape(
        num_frames=num_frames,
        width=video.width,
        height=video.height,
        channels=spec.latent_channels,
        strides=spec.strides,
    )
    guided = chosen.sampler == "unipc" and settings.sampling.guidance_scale > 1
    steps = tuple(_steps(settings, span) for span in spans)
    clean_passes = (len(context) + len(spans) - 1) * spec.experts
    return RolloutPlan(
        model=spec.name,
        shape=shape,
        context=context,
        spans=spans,
        window=min(chosen.rolling_window or frames, frames),
        sink=chosen.sink_frames,
        chunk=chosen.chunk_frames,
        rope=_rope(chosen),
        guided=guided,
        steps=steps,
        forwards=(sum(steps) + clean_passes) * (2 if guided else 1),
        num_frames=num_frames,
        duration_s=num_frames / video.fps,
    )


def timesteps(text: str) -> list[int]:
    """A list of timesteps as settings hold it. Raises PlanError where it does not go down."""
    values = [int(word) for word in text.split(",")]
    falls = all(a > b for a, b in pairwise(values))
    if not falls or not 0 < values[-1] <= values[0] <= 1000:
        raise PlanError(
            f"--steps-list {text} does not fall from at most 1000 to at least 1.",
            hint="--steps-list 1000,750,500,250",
        )
    return values


def _steps(settings: RolloutSettings, span: Span) -> int:
    chosen = settings.rollout
    if chosen.sampler == "unipc":
        return settings.sampling.steps
    return len(timesteps(steps_of(chosen, span)))


def steps_of(chosen: Rollout, span: Span) -> str:
    """The few-step list of a chunk: the first may have one of its own."""
    first = span.index == 0 and chosen.first_chunk_steps
    return chosen.first_chunk_steps if first else chosen.steps_list


def _rope(chosen: Rollout) -> RopePolicy:
    if chosen.rope != "auto":
        return chosen.rope
    return "relative" if chosen.sink_frames else "absolute"


def _check_rollout(chosen: Rollout) -> None:
    least = chosen.sink_frames + chosen.chunk_frames
    if chosen.rolling_window and chosen.rolling_window < least:
        raise PlanError(
            f"--rolling-window {chosen.rolling_window} cannot hold {chosen.sink_frames} sink "
            f"frames and a chunk of {chosen.chunk_frames}.",
            hint=f"--rolling-window {least} or more",
        )
    if chosen.trim == "after" and chosen.sink_frames:
        raise PlanError(
            "--trim after has no sinks; --sink-frames goes with --trim before.",
            hint="drop --sink-frames, or --trim before",
        )
    if chosen.rope == "sink" and not chosen.sink_frames:
        raise PlanError("--rope sink needs --sink-frames.", hint="--sink-frames 3")


def _check_whole(settings: RolloutSettings) -> None:
    """Raise PlanError for a lossy cache: rollouts compute every step whole."""
    chosen, method = settings.rollout, settings.step_cache.step_cache
    if method != "none":
        few = f" of {len(timesteps(chosen.steps_list))} steps" * (chosen.sampler == "few-step")
        raise PlanError(
            f"--step-cache {method} does not go with rollouts: a chunk{few} has too little to "
            "reuse, and later chunks would attend to what was left out.",
            hint="drop it, or wancli generate",
        )
    if settings.step_cache.cfg_gate is not None:
        raise PlanError("--cfg-gate does not go with rollouts.", hint="drop it")
    if settings.machine.attention_backend not in ("auto", "native"):
        raise PlanError(
            "--attention-backend does not reach the attention of rollouts.", hint="drop it"
        )


def _check_experts(settings: Settings, spec: ModelSpec) -> None:
    if settings.sampling.guidance_scale_2 is not None and spec.experts < 2:
        raise PlanError(
            f"--guidance-scale-2 needs a model with two experts; {spec.name} has one.",
            hint="drop --guidance-scale-2",
        )
    if settings.machine.lora and spec.experts > 1:
        raise PlanError(
            f"--lora does not say which of {spec.name}'s two experts it is for.",
            hint="drop --lora, or use a model of one expert",
        )


def check_given(resolved: Resolved[Settings]) -> None:
    """Raise PlanError for a flag of the step cache that nothing would read."""
    method = resolved.settings.step_cache.step_cache
    for key, source in resolved.sources.items():
        table, _, name = key.rpartition(".")
        if table != "step_cache" or name in ("step_cache", "cfg_gate") or source != "flag":
            continue
        wanted = ("cachedit",) if name != "step_cache_threshold" else WITH_THRESHOLD
        if method not in wanted:
            raise PlanError(
                f"{flag(name)} does nothing without --step-cache {' or '.join(wanted)}.",
                hint="--use-cachedit" if wanted == ("cachedit",) else f"--step-cache {wanted[0]}",
            )


def _step_cache_bytes(settings: Settings, spec: ModelSpec, tokens: int, *, guided: bool) -> int:
    chosen = settings.step_cache
    if chosen.step_cache != "cachedit":
        return 0
    return step_cache_bytes(
        tokens=tokens,
        dim=spec.dim,
        branches=2 if guided else 1,
        bytes_per_element=_element_bytes(settings.machine),
        taylorseer_order=chosen.taylorseer_order if chosen.taylorseer else None,
    )


def _element_bytes(machine: Machine) -> int:
    """`auto` is float32 on a CPU, and bfloat16 on what else there may be."""
    wide = machine.dtype == "float32" or (machine.dtype == "auto" and machine.device == "cpu")
    return 4 if wide else 2


def _gate(settings: Settings, *, guided: bool) -> int | None:
    """The first step of which the uncond branch is not computed."""
    gate, sampling = settings.step_cache.cfg_gate, settings.sampling
    if gate is None:
        return None
    if not guided:
        raise PlanError(
            f"--cfg-gate needs guidance; --guidance-scale is {sampling.guidance_scale:g}.",
            hint="drop --cfg-gate",
        )
    part = gate < 1
    step = ceil(gate * sampling.steps) if part else gate
    if step != int(step):
        raise PlanError(f"--cfg-gate {gate:g} is neither a step nor a fraction.", hint="12, or 0.6")
    if step >= sampling.steps:
        raise PlanError(
            f"--cfg-gate {gate:g} is never reached in {sampling.steps} steps.",
            hint=f"--cfg-gate {max(1, round(0.6 * sampling.steps))}, or 0.6",
        )
    return int(step)


def _check_machine(machine: Machine) -> None:
    for lora in machine.lora:
        find_lora(lora)
    if machine.dtype == "float16" and machine.device == "cpu":
        raise PlanError(
            "--dtype float16 does not work with --device cpu.", hint="--dtype bfloat16 or float32"
        )
