"""Evaluate the demo model from pixels alone: `python -m wancli.demo.evaluate`.

The prompts are held-out combinations with one seed each, rendered by `generate` and by `rollout`.
The exit code is 1 if a goal is missed.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from wancli.api import Model, load
from wancli.catalog.decoder_files import find_tiny_decoder
from wancli.catalog.local import find_spec
from wancli.catalog.specs import DEMO_FOLDER
from wancli.config.presets import find_preset, layers
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import RolloutSettings
from wancli.demo import stability
from wancli.demo.card import make_card
from wancli.demo.judge import judge
from wancli.demo.report import (
    COLUMNS,
    LONG,
    EvaluationCase,
    UseResult,
    log_report,
    make_report,
    write_sheets,
    write_text,
)
from wancli.demo.world import Scene, combinations, render, sample_scene
from wancli.errors import WancliError
from wancli.generation.denoise import decode
from wancli.models.load import Loaded, load_pipeline
from wancli.models.tiny_decoder import load_tiny_decoder
from wancli.models.vae import encode, to_pixels
from wancli.planning.listed_steps import listed_steps
from wancli.video.compare import compare_videos, psnr

PROMPTS = 208  # every held-out combination once
PART = 16  # clips per task of a process
CHUNKS = 3  # 33 video frames, as for `generate`
CLIPS = 48  # reconstructed by the VAE

logger = logging.getLogger("wancli.demo")


def make_cases(count: int, seed: int) -> list[EvaluationCase]:
    """Held-out combinations in random order, each with its own seed."""
    shuffled = combinations(held_out=True)
    random.Random(0).shuffle(shuffled)
    return [EvaluationCase(shuffled[i % len(shuffled)], seed + i) for i in range(count)]


def generate_all(model: Model, cases: Sequence[EvaluationCase]) -> Iterator[Tensor]:
    """Yield uint8 [T, H, W, 3] of each case, as `wancli generate` renders it."""
    for case in cases:
        yield torch.from_numpy(model.generate(case.combination.prompt, seed=case.seed).frames)


def roll_out_all(model: Model, cases: Sequence[EvaluationCase], *, chunks: int) -> Iterator[Tensor]:
    """Yield uint8 [T, H, W, 3] of each case, as `wancli rollout` renders it."""
    for case in cases:
        stream = model.rollout(case.combination.prompt, seed=case.seed, chunks=chunks)
        yield torch.cat([torch.from_numpy(chunk.frames) for chunk in stream])


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, scene: Scene) -> tuple[Tensor, float]:
    """Encode and decode a clip: uint8 [T, H, W, 3], and its PSNR in dB."""
    video = render([scene]).to(vae.device)
    decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (decoded - video).square().mean())
    return to_pixels(decoded)[0], float(psnr)


@dataclass(frozen=True)
class EvaluationTask:
    """Some cases of one use, as a unit of work for a process."""

    use: str
    about: str
    cases: Sequence[EvaluationCase]


@cache
def load_demo(model: str, preset: str) -> tuple[Loaded, RolloutSettings]:
    """Load the model and the settings of a preset, once per process."""
    chosen = [*layers(find_preset(preset)), Layer("--model", {"model": model})]
    settings = resolve(chosen, RolloutSettings).settings
    return load_pipeline(find_spec(settings.model), settings.machine), settings


@cache
def load_model(model: str, preset: str) -> Model:
    """Load the model for rendering with the settings of a preset, once per process."""
    return load(model, preset=preset)


def evaluate_task(model: str, preset: str, task: EvaluationTask) -> UseResult:
    """Render and judge a task's videos."""
    loaded = load_model(model, preset)
    if task.use == LONG:
        return evaluate_long(loaded, task)
    videos = (
        generate_all(loaded, task.cases)
        if task.use == "generate"
        else roll_out_all(loaded, task.cases, chunks=CHUNKS)
    )
    return judge_all(task.use, task.about, task.cases, videos)


def evaluate_long(model: Model, task: EvaluationTask) -> UseResult:
    """Render long rollouts, judge their last part, and compare it with the first."""
    videos, changes = roll_out_all(model, task.cases, chunks=stability.CHUNKS), []

    def ends() -> Iterator[Tensor]:
        for case, video in zip(task.cases, videos, strict=True):
            changes.append(stability.change(video, case.combination.color))
            yield stability.last_part(video)

    return replace(judge_all(task.use, task.about, task.cases, ends()), changes=changes)


def judge_all(
    name: str, about: str, cases: Sequence[EvaluationCase], videos: Iterator[Tensor]
) -> UseResult:
    """Judge the videos of the cases, uint8 [T, H, W, 3] each."""
    started, verdicts, strips = time.monotonic(), [], []
    for video in videos:
        verdicts.append(judge(video))
        columns = torch.linspace(0, len(video) - 1, COLUMNS).round().long()
        strips.append(torch.cat([*video[columns]], 1))
    seconds = (time.monotonic() - started) / len(cases)
    return UseResult(name, about, cases, verdicts, strips, seconds)


def evaluate_all(model: str, preset: str, tasks: Sequence[EvaluationTask]) -> list[UseResult]:
    """Evaluate all tasks, on a CPU in one process per core; returns one result per use."""
    count = 1 if load_demo(model, preset)[0].device.type != "cpu" else os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    parts: dict[str, list[UseResult]] = {}
    with ProcessPoolExecutor(count, spawn, torch.set_num_threads, (1,)) as pool:
        for done in pool.map(partial(evaluate_task, model, preset), tasks):
            parts.setdefault(done.name, []).append(done)
            videos = sum(len(part.cases) for part in parts[done.name])
            logger.info("%s: %d videos", done.name, videos)
    return [_merged(uses) for uses in parts.values()]


def _merged(uses: Sequence[UseResult]) -> UseResult:
    def flat(name: str) -> list[Any]:
        return [item for use in uses for item in getattr(use, name)]

    seconds = fmean(use.seconds for use in uses)
    cases, verdicts, strips, changes = map(flat, ("cases", "verdicts", "strips", "changes"))
    return UseResult(
        uses[0].name, uses[0].about, cases, verdicts, strips, seconds=seconds, changes=changes
    )


def make_tasks(
    settings: RolloutSettings, cases: Sequence[EvaluationCase], *, long: int
) -> list[EvaluationTask]:
    """Split the cases of each use into tasks; the first `long` cases are also long rollouts."""
    sampling, chunked = settings.sampling, settings.rollout
    parts = [cases[i : i + PART] for i in range(0, len(cases), PART)]
    listed = f"at {sampling.steps_list}" if listed_steps(sampling) else ""
    solver = f"{sampling.scheduler}, {listed or f'{sampling.steps} steps'}"
    about = {
        "generate": f"{solver}, shift {sampling.flow_shift:g}",
        "rollout": f"chunks of {chunked.chunk_frames}, {solver}, shift {sampling.flow_shift:g}",
    }
    ends = f"the last {stability.END:.0%} of {stability.CHUNKS} chunks"
    long_tasks = [EvaluationTask(LONG, ends, [case]) for case in cases[:long]]
    return [
        EvaluationTask(use, text, part) for use, text in about.items() for part in parts
    ] + long_tasks


def evaluate_vae(loaded: Loaded, seed: int) -> tuple[UseResult, list[float]]:
    """Judge clips of held-out scenes after the VAE, with the PSNR in dB of each."""
    scenes = held_out_scenes(seed)
    cases = [EvaluationCase(scene.combination, seed + i) for i, scene in enumerate(scenes)]
    decibels = list[float]()

    def clips() -> Iterator[Tensor]:
        for scene in scenes:
            video, psnr = reconstruct(loaded.pipeline.vae, scene)
            decibels.append(psnr)
            yield video

    return judge_all("reconstruction", "rendered clips through the VAE", cases, clips()), decibels


def held_out_scenes(seed: int) -> list[Scene]:
    """Scenes that no training saw, the same for a seed."""
    choices = combinations(held_out=True)
    return [sample_scene(random.Random(s), choices) for s in range(seed, seed + CLIPS)]


def evaluate_tiny(loaded: Loaded, seed: int) -> float | None:
    """PSNR in dB of the tiny decoder against the VAE's own, on those scenes; None without one."""
    spec = find_tiny_decoder(loaded.spec)
    if spec is None:
        return None
    tiny = load_tiny_decoder(spec, dtype=torch.float32, device=loaded.device)
    errors = []
    for scene in held_out_scenes(seed):
        latents = encode(loaded.pipeline.vae, render([scene]))
        exact = decode(loaded.pipeline.vae, latents)
        with torch.no_grad():
            frames = to_pixels(tiny(latents, tiny.empty_memory))[0].numpy()
        errors.append(compare_videos(exact, frames).mse.mean)
    return psnr(fmean(errors))


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m wancli.demo.evaluate", description=__doc__)
    parser.add_argument("--model", default="demo", help="known name or folder")
    parser.add_argument("--preset", default="demo", help="demo or demo-4step")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="videos per use")
    parser.add_argument(
        "--long", type=int, default=0, help=f"number of rollouts of {stability.CHUNKS} chunks"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt")
    parser.add_argument("--sheet", type=Path, help="write contact sheets to this folder")
    parser.add_argument("--json", type=Path, help="write all figures and verdicts to this file")
    card = DEMO_FOLDER / "README.md"
    parser.add_argument("--card", type=Path, nargs="?", const=card, help="write the model card")
    parser.add_argument("--work", type=Path, help="training folder, for the curves in the card")
    return parser.parse_args()


def main() -> int:
    """Evaluate; returns 0, 1 if a goal is missed, or the exit code of an error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return run(parse())
    except WancliError as error:
        logger.error("%s\nhint: %s", error, error.hint)
        return error.exit_code


def run(options: argparse.Namespace) -> int:
    """Evaluate, and write the requested files."""
    names = ("model", "preset", "prompts", "long", "seed")
    flags = [f"--{name} {getattr(options, name)}" for name in names]
    loaded, settings = load_demo(options.model, options.preset)
    cases = make_cases(options.prompts, options.seed)
    reconstruction, decibels = evaluate_vae(loaded, options.seed)
    tasks = make_tasks(settings, cases, long=options.long)
    uses = [reconstruction, *evaluate_all(options.model, options.preset, tasks)]
    command = " ".join(["python -m wancli.demo.evaluate", *flags])
    report = make_report(loaded, settings, uses, decibels, command=command)
    report["tiny_decoder_db"] = evaluate_tiny(loaded, options.seed)
    log_report(report)
    if options.json:
        write_text(options.json, json.dumps(report, indent=1) + "\n")
    if options.sheet:
        write_sheets(options.sheet, uses)
    if options.card:
        write_text(options.card, make_card(report, work=options.work))
    return 1 if report["goals"]["missed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
