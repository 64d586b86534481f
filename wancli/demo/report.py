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
from wancli.demo.steady import LIMIT, Change, mean_sizes
from wancli.demo.world import Combination
from wancli.models.load import Loaded
from wancli.utils.files import write_whole

GOALS = {  # percent right, of the uses that the model is trained for
    "generate": {"color": 100.0, "background": 100.0, "shape": 97.0, "motion": 97.0},
    "rollout": {"color": 100.0, "background": 100.0, "shape": 95.0, "motion": 97.0},
}
OUTLINE_GOAL = 0.95  # overlap with the ideal outline, in the same uses
PSNR_GOAL = 34.0  # dB
LONG = "long rollout"
WORDS = ("color", "background", "shape", "motion")
SHARES = (*WORDS, "first", "all")  # first: the colour in the first video frame by itself
SHEET = 8  # prompts on a contact sheet
COLUMNS = 9  # video frames of each

say = logging.getLogger("wancli.demo").info


@dataclass(frozen=True)
class EvaluationCase:
    """One video that was asked for."""

    what: Combination
    seed: int


@dataclass(frozen=True)
class Use:
    """One way to make videos, and what the examiner saw in them."""

    name: str
    about: str
    cases: Sequence[EvaluationCase]
    verdicts: Sequence[Verdict]
    strips: Sequence[Tensor]  # uint8 [H, COLUMNS * W, 3], one a video
    seconds: float  # per video
    changes: Sequence[Change] = ()  # of long rollouts

    def percent(self) -> dict[str, float]:
        """Videos that show what was asked, by attribute and in all of them at once."""
        agreed = [v.agrees(c.what) for v, c in zip(self.verdicts, self.cases, strict=True)]
        right = {name: [a[name] for a in agreed] for name in agreed[0]}
        right["all"] = [all(a.values()) for a in agreed]
        pairs = zip(self.verdicts, self.cases, strict=True)
        right["first"] = [v.first == c.what.color for v, c in pairs]
        return {name: 100 * fmean(right[name]) for name in SHARES}

    def percent_by_word(self, attribute: str) -> dict[str, float]:
        """Videos where this attribute is right, by the word that was asked for."""
        hits: dict[str, list[bool]] = {}
        for verdict, case in zip(self.verdicts, self.cases, strict=True):
            word = getattr(case.what, attribute)
            hits.setdefault(word, []).append(getattr(verdict, attribute) == word)
        return {word: 100 * fmean(hit) for word, hit in sorted(hits.items())}

    def outline(self) -> float:
        """Overlap with the ideal outline, the median over videos."""
        return median(verdict.overlap for verdict in self.verdicts)

    def as_json(self) -> dict[str, Any]:
        """The numbers, then every video's verdict."""
        videos = []
        for verdict, case in zip(self.verdicts, self.cases, strict=True):
            seen = {k: v if v != math.inf else None for k, v in asdict(verdict).items()}
            videos.append({"prompt": case.what.prompt, "seed": case.seed, "seen": seen})
        return {
            "about": self.about,
            "percent": self.percent(),
            "outline": self.outline(),
            "change_percent": mean_sizes(self.changes) if self.changes else {},
            "percent_by_word": {a: self.percent_by_word(a) for a in WORDS},
            "seconds_per_video": self.seconds,
            "videos": videos,
        }


def missed_goals(uses: Sequence[Use], decibels: Sequence[float]) -> list[str]:
    """The figures below their goals, in words."""
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
        for name, size in mean_sizes(use.changes).items()
        if size > LIMIT
    ]
    mean = fmean(decibels)
    return out + ([f"VAE: {mean:.1f} dB, goal {PSNR_GOAL:g} dB"] if mean < PSNR_GOAL else [])


def make_report(
    loaded: Loaded,
    settings: Settings,
    uses: Sequence[Use],
    decibels: Sequence[float],
    *,
    command: str,
) -> dict[str, Any]:
    """Everything measured, as JSON."""
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
    """The shares of right videos, a line a use."""
    heads = ("% right", "videos", *SHARES, "outline", "s/video")
    lines = ["".join(f"{head:>12}" for head in heads)]
    for name, use in report["uses"].items():
        shares = "".join(f"{use['percent'][a]:12.1f}" for a in SHARES)
        seconds = use["seconds_per_video"]
        measured = f"{use['outline']:12.3f}{seconds:12.1f}  {use['about']}"
        lines.append(f"{name:>12}{len(use['videos']):12}{shares}{measured}")
        if changes := use["change_percent"]:
            told = ", ".join(f"{what} {size:.1f} %" for what, size in changes.items())
            lines.append(f"{'':>12}  changes from its start to its end: {told}")
    return "\n".join(lines)


def psnr_line(report: Mapping[str, Any]) -> str:
    """How well the VAE alone does."""
    return "VAE: {mean:.1f} dB, worst {worst:.1f} dB of {clips} clips".format(**report["psnr_db"])


def tell(report: Mapping[str, Any]) -> None:
    """Log the table and what was missed."""
    say("%s\n%s", table(report), psnr_line(report))
    for miss in report["goals"]["missed"]:
        say("missed: %s", miss)


def write_sheets(folder: Path, uses: Sequence[Use]) -> None:
    """PNGs of `SHEET` videos each, named by use and by the first row's place in the report."""
    folder.mkdir(parents=True, exist_ok=True)
    for use in uses:
        for first in range(0, len(use.strips), SHEET):
            sheet = torch.cat([*use.strips[first : first + SHEET]]).numpy()
            imageio.imwrite(folder / f"{use.name}-{first:03}.png", sheet)


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all. Raises OutputError."""
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
