"""The measurements of a bench and their summary, as in `bench.json`. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from wancli.config.settings import Settings
from wancli.planning.inputs import NO_INPUTS, InputFiles
from wancli.planning.plan import Plan
from wancli.records.record import ForwardStats
from wancli.video.compare import LatentQuality, Quality, psnr

SCHEMA = "wancli.bench/1"


@dataclass(frozen=True)
class Variant:
    """One way to make the videos. The first of several is the baseline."""

    name: str
    flags: str  # as typed
    settings: Settings
    plan: Plan
    lossy: bool


@dataclass(frozen=True)
class BenchInputs:
    """Pictures and videos that all cases begin with, and what records say of them."""

    inputs: InputFiles = NO_INPUTS
    recorded: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A prompt and a seed that every variant renders."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Run:
    """One video: an arm, a prompt and a seed. Seconds are the median where it was repeated."""

    arm: str
    prompt: str
    seed: int
    video: str  # path from the folder of the report
    denoise_s: float
    decode_s: float
    total_s: float  # prompt to frames; no loading, no writing
    uses: tuple[
        ForwardStats, ...
    ] = ()  # of every forward, in order; one that is skipped has 0 blocks
    peak_gib: float | None = None
    quality: Quality | None = None  # against the baseline's; None for its own
    latents: LatentQuality | None = None  # the same

    @property
    def case(self) -> tuple[str, int]:
        """The prompt and seed that every arm renders once."""
        return self.prompt, self.seed


@dataclass(frozen=True)
class SpeedUp:
    """Seconds of the baseline over those of an arm, paired by prompt and seed."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Summary:
    """Summary of the runs of one arm. Quality is None for the baseline."""

    denoise_s: float  # median
    total_s: float  # median
    denoise_speed_up: SpeedUp
    total_speed_up: SpeedUp
    blocks: int
    blocks_all: int
    forwards_reused: int
    forwards: int
    peak_gib: float | None  # highest
    ssim: float | None  # mean over runs
    ssim_worst: float | None  # over all video frames of all runs
    psnr_db: float | None  # of the squared error of all runs; None where nothing differs
    temporal_levels: float | None  # mean over runs
    equal_video: bool | None  # every pixel of every run
    equal_latents: bool | None  # every value of every run


@dataclass(frozen=True)
class Arm:
    """One way to make the videos. The first of a bench is the baseline."""

    name: str
    flags: str  # as typed
    lossy: bool
    summary: Summary


@dataclass(frozen=True)
class NoiseFloor:
    """The baseline against itself with another seed: how far apart two samples are anyway."""

    ssim: float  # mean over pairs
    ssim_worst: float  # over all video frames of all pairs
    pairs: int


@dataclass(frozen=True)
class Bench:
    """A whole bench."""

    created: str  # ISO 8601, UTC
    command: str
    model: str
    machine: Mapping[str, str]  # device, dtype, versions
    settings: Mapping[str, Any]  # size, frames, steps, shift, guidance
    arms: tuple[Arm, ...]
    runs: tuple[Run, ...]
    floor: NoiseFloor | None = None  # None for a single seed
    target_ssim: float | None = None  # least SSIM of the worst video frame that was asked for
    chosen: str | None = None  # arm that --tune settled on

    @property
    def identity(self) -> bool | None:
        """Whether the latents of every exact arm equal the baseline's; None where none was seen."""
        exact = [arm.summary.equal_latents for arm in self.arms[1:] if not arm.lossy]
        return all(exact) if exact and None not in exact else None

    def as_json(self) -> dict[str, Any]:
        """For `bench.json` and the report."""
        runs = [
            {**asdict(run), "quality": run.quality.as_json() if run.quality else None}
            for run in self.runs
        ]
        return {"schema": SCHEMA, **asdict(self), "runs": runs, "identity": self.identity}


def summarize(runs: Sequence[Run], baseline: Sequence[Run]) -> Summary:
    """Summarize runs of one arm against those of the baseline, by prompt and seed."""
    usual = {run.case: run for run in baseline}
    uses = [use for run in runs for use in run.uses]
    peaks = [run.peak_gib for run in runs if run.peak_gib is not None]
    found = [run.quality for run in runs if run.quality]
    latents = [run.latents.equal for run in runs if run.latents]
    flicker = [quality.temporal_levels.mean for quality in found if quality.temporal_levels]
    return Summary(
        denoise_s=median(run.denoise_s for run in runs),
        total_s=median(run.total_s for run in runs),
        denoise_speed_up=_speed_up([usual[run.case].denoise_s / run.denoise_s for run in runs]),
        total_speed_up=_speed_up([usual[run.case].total_s / run.total_s for run in runs]),
        blocks=sum(use.blocks for use in uses),
        blocks_all=sum(use.blocks_all for use in uses),
        forwards_reused=sum(use.reused for use in uses),
        forwards=len(uses),
        peak_gib=max(peaks, default=None),
        ssim=fmean(quality.ssim.mean for quality in found) if found else None,
        ssim_worst=min((quality.ssim.worst for quality in found), default=None),
        psnr_db=psnr(fmean(quality.mse.mean for quality in found)) if found else None,
        temporal_levels=fmean(flicker) if flicker else None,
        equal_video=all(quality.equal for quality in found) if found else None,
        equal_latents=all(latents) if latents else None,
    )


def floor_of(qualities: Sequence[Quality]) -> NoiseFloor | None:
    """The floor of the baseline's videos of one prompt against each other; None for no pair."""
    if not qualities:
        return None
    return NoiseFloor(
        ssim=fmean(quality.ssim.mean for quality in qualities),
        ssim_worst=min(quality.ssim.worst for quality in qualities),
        pairs=len(qualities),
    )


def _speed_up(ratios: Sequence[float]) -> SpeedUp:
    return SpeedUp(median(ratios), min(ratios), max(ratios))
