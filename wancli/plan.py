"""What a request comes to, before anything loads. Every rule about combinations is here."""

from dataclasses import dataclass

from wancli.errors import PlanError
from wancli.geometry import LatentShape, latent_shape
from wancli.settings import Settings
from wancli.specs import ModelSpec


@dataclass(frozen=True)
class Plan:
    """Derived, never given."""

    model: str
    shape: LatentShape
    tokens: int
    guided: bool
    steps: int
    forwards: int  # transformer calls in all
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
    if sampling.guidance_scale_2 is not None and spec.experts < 2:
        raise PlanError(
            f"--guidance-scale-2 needs a model with two experts; {spec.name} has one.",
            hint="drop --guidance-scale-2",
        )
    if settings.machine.dtype == "float16" and settings.machine.device == "cpu":
        raise PlanError(
            "--dtype float16 does not work with --device cpu.", hint="--dtype bfloat16 or float32"
        )
    guided = sampling.guidance_scale > 1
    return Plan(
        model=spec.name,
        shape=shape,
        tokens=shape.tokens,
        guided=guided,
        steps=sampling.steps,
        forwards=sampling.steps * (2 if guided else 1),
        duration_s=video.num_frames / video.fps,
    )
