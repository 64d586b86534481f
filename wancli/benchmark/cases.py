"""Measurements of a benchmark and their summary, as in `bench.json`. Imports no torch."""

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
    """Settings to measure under a name. The first variant is the baseline."""

    name: str
    flags: str  # as typed
    settings: Settings
    plan: Plan
    lossy: bool

    @property
    def caches(self) -> bool:
        """Whether it has a lossy cache."""
        chosen = self.settings.step_cache
        return chosen.step_cache != "none" or chosen.cfg_gate is not None


@dataclass(frozen=True)
class BenchInputs:
    """Input pictures and videos of all cases, and their entry in the records."""

    inputs: InputFiles = NO_INPUTS
    recorded: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A prompt and a seed that every variant renders."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Run:
    """Measurements of one video: an arm, a prompt and a seed."""

    arm: str
    prompt: str
    seed: int
    video: str  # path relative to the report
    denoise_s: float
    decode_s: float
    total_s: float  # prompt to frames, without loading and writing
    uses: tuple[ForwardStats, ...] = ()  # of every forward, in order; a skipped one has 0 blocks
    peak_gib: float | None = None
    quality: Quality | None = None  # against the baseline; None for the baseline
    latents: LatentQuality | None = None  # likewise
    motion: float = 0.0  # mean change between consecutive video frames, in levels

    @property
    def case(self) -> tuple[str, int]:
        """Prompt and seed."""
        return self.prompt, self.seed


@dataclass(frozen=True)
class SpeedUp:
    """Ratios of the baseline's seconds to an arm's, paired by prompt and seed."""

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
    psnr_db: float | None  # of the mean squared error over runs; None if nothing differs
    temporal_levels: float | None  # mean over runs
    motion: float | None  # of all runs, over the baseline's; None for one that stands still
    equal_video: bool | None  # every pixel of every run
    equal_latents: bool | None  # every value of every run


@dataclass(frozen=True)
class Arm:
    """A variant with its results. The first arm is the baseline."""

    name: str
    flags: str  # as typed
    lossy: bool
    summary: Summary
    caches: bool = True  # whether it has a lossy cache, which may reuse forwards

    @property
    def reused_nothing(self) -> bool:
        """Whether its lossy cache reused no forward."""
        used = self.summary.forwards_reused or not self.summary.forwards
        return self.lossy and self.caches and not used

    @property
    def does_the_same(self) -> bool:
        """Whether it only did the baseline's work: what its times differ by is noise."""
        return self.reused_nothing and bool(self.summary.equal_latents)

    @property
    def time_ratio(self) -> float:
        """Its denoising time over the baseline's."""
        return 1.0 if self.does_the_same else 1 / self.summary.denoise_speed_up.median

    def as_json(self) -> dict[str, Any]:
        """The fields, without speed-ups where it did only the baseline's work."""
        fields = asdict(self)
        if self.does_the_same:
            fields["summary"] |= {"denoise_speed_up": None, "total_speed_up": None}
        return fields


@dataclass(frozen=True)
class NoiseFloor:
    """Similarity of the baseline's videos under different seeds."""

    ssim: float  # mean over pairs
    ssim_worst: float  # over all video frames of all pairs
    pairs: int


@dataclass(frozen=True)
class Bench:
    """Results of a benchmark."""

    created: str  # ISO 8601, UTC
    command: str
    model: str
    machine: Mapping[str, str]  # device, dtype, versions
    settings: Mapping[str, Any]  # size, frames, steps, shift, guidance
    arms: tuple[Arm, ...]
    runs: tuple[Run, ...]
    floor: NoiseFloor | None = None  # None while runs are being measured
    target_ssim: float | None = None  # required minimum over video frames
    chosen: str | None = None  # best arm after tuning

    @property
    def identity(self) -> bool | None:
        """Whether the latents of every exact arm equal the baseline's; None if not measured."""
        exact = [arm.summary.equal_latents for arm in self.arms[1:] if not arm.lossy]
        return all(exact) if exact and None not in exact else None

    def as_json(self) -> dict[str, Any]:
        """The content of `bench.json`."""
        runs = [
            {**asdict(run), "quality": run.quality.as_json() if run.quality else None}
            for run in self.runs
        ]
        arms = [arm.as_json() for arm in self.arms]
        whole = {**asdict(self), "arms": arms, "runs": runs, "identity": self.identity}
        return {"schema": SCHEMA, **whole}


def summarize(runs: Sequence[Run], baseline: Sequence[Run]) -> Summary:
    """Summarize an arm's runs against the baseline's, paired by prompt and seed."""
    reference = {run.case: run for run in baseline}
    moving = sum(reference[run.case].motion for run in runs)
    uses = [use for run in runs for use in run.uses]
    peaks = [run.peak_gib for run in runs if run.peak_gib is not None]
    qualities = [run.quality for run in runs if run.quality]
    latents = [run.latents.equal for run in runs if run.latents]
    flicker = [quality.temporal_levels.mean for quality in qualities if quality.temporal_levels]
    return Summary(
        denoise_s=median(run.denoise_s for run in runs),
        total_s=median(run.total_s for run in runs),
        denoise_speed_up=_speed_up([reference[run.case].denoise_s / run.denoise_s for run in runs]),
        total_speed_up=_speed_up([reference[run.case].total_s / run.total_s for run in runs]),
        blocks=sum(use.blocks for use in uses),
        blocks_all=sum(use.blocks_all for use in uses),
        forwards_reused=sum(use.reused for use in uses),
        forwards=len(uses),
        peak_gib=max(peaks, default=None),
        ssim=fmean(quality.ssim.mean for quality in qualities) if qualities else None,
        ssim_worst=min((quality.ssim.worst for quality in qualities), default=None),
        psnr_db=psnr(fmean(quality.mse.mean for quality in qualities)) if qualities else None,
        temporal_levels=fmean(flicker) if flicker else None,
        motion=sum(run.motion for run in runs) / moving if moving else None,
        equal_video=all(quality.equal for quality in qualities) if qualities else None,
        equal_latents=all(latents) if latents else None,
    )


def noise_floor(qualities: Sequence[Quality]) -> NoiseFloor | None:
    """Noise floor from comparisons of two seeds of a prompt; None without any."""
    if not qualities:
        return None
    return NoiseFloor(
        ssim=fmean(quality.ssim.mean for quality in qualities),
        ssim_worst=min(quality.ssim.worst for quality in qualities),
        pairs=len(qualities),
    )


def _speed_up(ratios: Sequence[float]) -> SpeedUp:
    return SpeedUp(median(ratios), min(ratios), max(ratios))
