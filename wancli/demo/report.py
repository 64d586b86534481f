"""Reports of an evaluation: JSON, a table and contact sheets."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import imageio.v3 as imageio
import torch
from torch import Tensor

from wancli.catalog.local import revision
from wancli.config.settings import Settings
from wancli.demo.judge import Verdict
from wancli.demo.stability import LIMIT, Change, mean_changes
from wancli.demo.world import Combination
from wancli.models.load import Loaded
from wancli.utils.files import write_whole

GOALS = {  # percent correct
    "generate": {"color": 100.0, "background": 100.0, "shape": 97.0, "motion": 97.0},
    "rollout": {"color": 100.0, "background": 100.0, "shape": 95.0, "motion": 97.0},
}
OUTLINE_GOAL = 0.95  # overlap with the ideal outline, for the same uses
PSNR_GOAL = 34.0  # dB
LONG = "long rollout"
WORDS = ("color", "background", "shape", "motion")
SHARES = (*WORDS, "first", "all")  # first: the color in the first video frame alone
SHEET = 8  # prompts on a contact sheet
COLUMNS = 9  # video frames of each

logger = logging.getLogger("wancli.demo")


@dataclass(frozen=True)
class EvaluationCase:
    """A prompt and a seed to render."""

    combination: Combination
    seed: int


@dataclass(frozen=True)
class UseResult:
    """Videos of one use (`generate`, `rollout`, ...) and their verdicts."""

    name: str
    about: str
    cases: Sequence[EvaluationCase]
    verdicts: Sequence[Verdict]
    strips: Sequence[Tensor]  # uint8 [H, COLUMNS * W, 3], one per video
    seconds: float  # per video
    changes: Sequence[Change] = ()  # of long rollouts

    def percent(self) -> dict[str, float]:
        """Percent of videos that match their prompt, by attribute and in all attributes."""
        matches = [v.agrees(c.combination) for v, c in zip(self.verdicts, self.cases, strict=True)]
        right = {name: [match[name] for match in matches] for name in matches[0]}
        right["all"] = [all(match.values()) for match in matches]
        pairs = zip(self.verdicts, self.cases, strict=True)
        right["first"] = [v.first == c.combination.color for v, c in pairs]
        return {name: 100 * fmean(right[name]) for name in SHARES}

    def percent_by_word(self, attribute: str) -> dict[str, float]:
        """Percent of videos with the right attribute, by its word in the prompt."""
        hits: dict[str, list[bool]] = {}
        for verdict, case in zip(self.verdicts, self.cases, strict=True):
            word = getattr(case.combination, attribute)
            hits.setdefault(word, []).append(getattr(verdict, attribute) == word)
        return {word: 100 * fmean(hit) for word, hit in sorted(hits.items())}

    def outline(self) -> float:
        """Median overlap with the ideal outline."""
        return median(verdict.overlap for verdict in self.verdicts)

    def as_json(self) -> dict[str, Any]:
        """Figures, then the verdict of every video."""
        videos = []
        for verdict, case in zip(self.verdicts, self.cases, strict=True):
            entry = {k: v if v != math.inf else None for k, v in asdict(verdict).items()}
            videos.append({"prompt": case.combination.prompt, "seed": case.seed, "seen": entry})
        return {
            "about": self.about,
            "percent": self.percent(),
            "outline": self.outline(),
            "change_percent": mean_changes(self.changes) if self.changes else {},
            "percent_by_word": {a: self.percent_by_word(a) for a in WORDS},
            "seconds_per_video": self.seconds,
            "videos": videos,
        }


def missed_goals(uses: Sequence[UseResult], decibels: Sequence[float]) -> list[str]:
    """Figures that miss their goals, in words."""
    out = [
        f"{use.name}: {name} {use.percent()[name]:.1f} %, goal {goal:g} %"
        for use in uses
        for name, goal in GOALS.get(use.name, {}).items()
        if use.percent()[name] < goal
    ]
    out += [
        f"{use.name}: outline {use.outline():.3f}, goal {OUTLINE_GOAL:g}"
        for use in uses
        if use.name in GOALS and use.outline() < OUTLINE_GOAL
    ]
    out += [
        f"{use.name}: {name} changes by {size:.1f} %, goal {LIMIT:g} %"
        for use in uses
        if use.changes
        for name, size in mean_changes(use.changes).items()
        if size > LIMIT
    ]
    mean = fmean(decibels)
    return out + ([f"VAE: {mean:.1f} dB, goal {PSNR_GOAL:g} dB"] if mean < PSNR_GOAL else [])


def make_report(
    loaded: Loaded,
    settings: Settings,
    uses: Sequence[UseResult],
    decibels: Sequence[float],
    *,
    command: str,
) -> dict[str, Any]:
    """All measurements, as JSON."""
    return {
        "command": command,
        "model": settings.model,
        "model_revision": revision(loaded.spec),
        "parts": _parts(loaded),
        "settings": settings.model_dump(mode="json", include={"sampling", "video"}),
        "psnr_db": {"clips": len(decibels), "mean": fmean(decibels), "worst": min(decibels)},
        "goals": {
            "percent": GOALS,
            "outline": OUTLINE_GOAL,
            "psnr_db": PSNR_GOAL,
            "missed": missed_goals(uses, decibels),
        },
        "uses": {use.name: use.as_json() for use in uses},
    }


def table(report: Mapping[str, Any]) -> str:
    """Table of the percent of correct videos, one line per use."""
    heads = ("% right", "videos", *SHARES, "outline", "s/video")
    lines = ["".join(f"{head:>12}" for head in heads)]
    for name, use in report["uses"].items():
        shares = "".join(f"{use['percent'][a]:12.1f}" for a in SHARES)
        seconds = use["seconds_per_video"]
        measured = f"{use['outline']:12.3f}{seconds:12.1f}  {use['about']}"
        lines.append(f"{name:>12}{len(use['videos']):12}{shares}{measured}")
        if changes := use["change_percent"]:
            listed = ", ".join(f"{name} {size:.1f} %" for name, size in changes.items())
            lines.append(f"{'':>12}  change from start to end: {listed}")
    return "\n".join(lines)


def psnr_line(report: Mapping[str, Any]) -> str:
    """Reconstruction PSNR of the VAE, as a line."""
    return "VAE: {mean:.1f} dB, worst {worst:.1f} dB of {clips} clips".format(**report["psnr_db"])


def log_report(report: Mapping[str, Any]) -> None:
    """Log the table and the missed goals."""
    logger.info("%s\n%s", table(report), psnr_line(report))
    for miss in report["goals"]["missed"]:
        logger.info("missed: %s", miss)


def write_sheets(folder: Path, uses: Sequence[UseResult]) -> None:
    """Write PNGs of `SHEET` videos each, named by use and index of the first video."""
    folder.mkdir(parents=True, exist_ok=True)
    for use in uses:
        for first in range(0, len(use.strips), SHEET):
            sheet = torch.cat([*use.strips[first : first + SHEET]]).numpy()
            imageio.imwrite(folder / f"{use.name}-{first:03}.png", sheet)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OutputError."""
    write_whole(path, text.encode(), hint="choose another place", overwrite=True)


def _parts(loaded: Loaded) -> dict[str, dict[str, Any]]:
    """Class, parameters and bytes on disk of each network."""
    out = {}
    for name in ("transformer", "text_encoder", "vae"):
        network = getattr(loaded.pipeline, name)
        files = (loaded.spec.folder or Path()).glob(f"{name}/*.safetensors")
        out[name] = {
            "class": type(network).__name__,
            "parameters": sum(p.numel() for p in network.parameters()),
            "bytes": sum(file.stat().st_size for file in files),
        }
    return out
