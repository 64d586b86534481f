"""The model card. Its numbers are measured, counted or read from the recipe."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from wancli.demo.autoencoder import STAGES
from wancli.demo.dataset import CLIP
from wancli.demo.parts import CHUNK
from wancli.demo.report import GOALS, SHARES
from wancli.demo.world import (
    BACKGROUNDS,
    COLORS,
    FPS,
    FRAMES,
    MOTIONS,
    SHAPES,
    SIDE,
    TEMPLATES,
    combinations,
)

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# The demo model of wancli

A Wan text-to-video model of {millions:.1f} million parameters that draws one moving shape. Its
classes and folder layout are those of the released Wan models, so that `wancli` can be tried and
tested on any machine. It has no other use.

## The world

`{template}`: {frames} video frames of {side}x{side} pixels, {fps} a second.

{words}

## Data

Drawn by `wancli/demo/world.py`; no other data. Training sees {trained} combinations and
{held_out} are held out: each color, shape and motion is learned on three backgrounds and tested on
the fourth. Training prompts also use synonyms and other orders, leave words out, or are empty.

## Parts

| part | class | parameters | bytes |
|---|---|---:|---:|
{parts}
{training}
## Evaluation

Percent of videos that match their prompt. The prompts are held out, with one seed each. The judge,
`wancli/demo/judge.py`, sees the pixels and never the prompt. `reconstruction` is rendered clips
through the VAE: the loss before any sampling. `outline` is the overlap (intersection over union) of
the drawn object with the ideal shape of its size and pose, the median over videos.

{table}

VAE on {clips} of those clips: {mean:.1f} dB, worst {worst:.1f} dB.{tiny}

{goals}

Written by `{command}`, model revision `{revision}`.

## Schedules

The preset `demo` uses {scheduler}, {steps} steps, guidance scale {guidance_scale:g} and shift
{flow_shift:g}: the row `generate`. In the row `rollout` a video is chunks of {chunk} latent frames,
each generated from the clean ones before it with the same solver and guidance. `first` is the color
in the first video frame, where errors are most likely: its chunk has no context.

## Limits

- It knows the words of its world; any other word is `<unk>`. It draws one object.
- It was trained on {frames} video frames of {side}x{side} pixels and on no other size.
{weakest}
- With {videos} videos, the standard error of a share of 90 % is {standard_error:.1f} points.
"""


def make_card(report: Mapping[str, Any], *, work: Path | None) -> str:
    """The card in Markdown; `work` is the training folder, for steps and times."""
    axes = {"color": COLORS, "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS}
    videos = len(report["uses"]["generate"]["videos"])
    return CARD.format(
        millions=sum(part["parameters"] for part in report["parts"].values()) / 1e6,
        template=TEMPLATES[0],
        frames=FRAMES,
        side=SIDE,
        fps=FPS,
        words="\n".join(f"- {name}: {', '.join(words)}" for name, words in axes.items()),
        trained=len(combinations(held_out=False)),
        held_out=len(combinations(held_out=True)),
        parts="\n".join(
            f"| {name} | {part['class']} | {part['parameters']:,} | {part['bytes']:,} |"
            for name, part in report["parts"].items()
        ),
        training=_training(work) if work else "",
        table=_table(report["uses"]),
        goals=_goals(report["goals"]),
        command=report["command"],
        revision=report["model_revision"],
        chunk=CHUNK,
        weakest=_weakest(report["uses"]),
        videos=videos,
        standard_error=100 * math.sqrt(0.9 * 0.1 / videos),
        tiny=_tiny(report.get("tiny_decoder_db")),
        **report["psnr_db"],
        **report["settings"]["sampling"],
    )


def _table(uses: Mapping[str, Any]) -> str:
    heads = ("videos", *SHARES, "outline")
    rows = [f"| | {' | '.join(heads)} | |", "|---|" + "---:|" * len(heads) + "---|"]
    for name, use in uses.items():
        shares = " | ".join(f"{use['percent'][a]:.1f}" for a in SHARES)
        measured = f"{use['outline']:.3f} | {use['about']}"
        rows.append(f"| {name} | {len(use['videos'])} | {shares} | {measured} |")
    return "\n".join(rows)


def _tiny(decibels: float | None) -> str:
    """The tiny decoder's line, if there is one."""
    if decibels is None:
        return ""
    return f" The tiny decoder, on the same latents: {decibels:.1f} dB against the VAE's frames."


def _goals(goals: Mapping[str, Any]) -> str:
    uses = [
        f"`{use}`: " + ", ".join(f"{name} {goal:g} %" for name, goal in percent.items())
        for use, percent in goals["percent"].items()
    ]
    rest = f"outline {goals['outline']:g}; {goals['psnr_db']:g} dB for the VAE"
    verdict = "Missed: " + "; ".join(goals["missed"]) if goals["missed"] else "All are met"
    return f"Goals: {'; '.join([*uses, rest])}. {verdict}."


def _weakest(uses: Mapping[str, Any]) -> str:
    """The shape and the motion that fail most often, for each use with goals."""
    lines = []
    for name in GOALS:
        shares = [uses[name]["percent_by_word"][a] for a in ("shape", "motion")]
        words = [min(share.items(), key=lambda word: word[1]) for share in shares]
        weakest = ", ".join(f"{word} ({share:.0f} %)" for word, share in words)
        lines.append(f"- `{name}` fails most often at: {weakest}.")
    return "\n".join(lines)


def _training(work: Path) -> str:
    """The section on steps and times, from the curves in `work`."""
    clips, steps, distilled, tiny, stages = (
        _read_curve(work / f"{name}.jsonl")
        for name in ("latents", "transformer", "distill", "tiny-decoder", "stages")
    )
    vae = [
        f"{lines[-1]['step']:,} steps of crops of {_alternatives(stage.clips)} video frames, "
        f"{lines[-1]['frames']} per step"
        for stage in STAGES
        if (lines := _read_curve(work / f"{stage.name}.jsonl"))
    ]
    done = (
        vae and f"- VAE: {', then '.join(vae)}",
        clips and f"- latents: {clips[-1]['clips']:,} clips of {CLIP} video frames",
        steps and f"- transformer and text encoder: {_steps(steps)}",
        distilled and f"- four-step LoRA: {_steps(distilled)}",
        tiny and f"- tiny decoder: {_steps(tiny)}",
    )
    minutes = [line["minutes"] for line in stages]
    uninterrupted = len(minutes) == len(done) + 1
    times = [f", {b - a:.0f} minutes" for a, b in pairwise(minutes)]
    times = times if uninterrupted else [""] * len(done)
    rows = [f"{stage}{time}" for stage, time in zip(done, times, strict=True) if stage]
    return "\n".join(["", "## Training", "", "`python -m wancli.demo.train`:", "", *rows, ""])


def _steps(curve: Sequence[Mapping[str, Any]]) -> str:
    last = curve[-1]
    return f"{last['step'] + 1:,} steps of {last['clips']} clips"


def _alternatives(values: Sequence[int]) -> str:
    """13 or 33."""
    return " or ".join(str(value) for value in sorted({*values}))


def _read_curve(path: Path) -> list[dict[str, Any]]:
    """Lines of a curve; empty if it does not exist."""
    return [json.loads(line) for line in path.open()] if path.is_file() else []
