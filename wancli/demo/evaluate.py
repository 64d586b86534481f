"""How good the demo model is, from pixels alone. `python -m wancli.demo.evaluate`.

The prompts are combinations that training never saw, one seed each, in both uses: `generate` as the
product does it, and chunk after chunk. The exit code is 1 where a goal is missed.
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

from wancli.catalog.local import find_spec
from wancli.catalog.specs import DEMO_FOLDER
from wancli.config.presets import find_preset, layers
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import RolloutSettings, Settings
from wancli.demo import steady
from wancli.demo.card import make_card
from wancli.demo.judge import judge
from wancli.demo.report import (
    COLUMNS,
    LONG,
    EvaluationCase,
    Use,
    make_report,
    tell,
    write_sheets,
    write_text,
)
from wancli.demo.world import Scene, combinations, render, sample_scene
from wancli.errors import WancliError
from wancli.generation.denoise import decode, denoise
from wancli.generation.noise import IndexedNoise
from wancli.generation.prompts import encode_prompt
from wancli.models.load import Loaded, load_pipeline
from wancli.models.vae import to_pixels
from wancli.planning.plan import RolloutPlan, make_plan, make_rollout_plan
from wancli.rollouts.denoiser import PromptPair
from wancli.rollouts.loop import Chunk, ChunkPrompt, ContextBuffer, RolloutInputs, rollout
from wancli.rollouts.sampler import ChunkSampler, causal_denoiser

PROMPTS = 208  # every combination that is held out, once
PART = 16  # clips that one process makes at a time
CLIP = {"chunks": 3}  # 33 video frames, as `generate` makes
CLIPS = 48  # that the VAE reconstructs

say = logging.getLogger("wancli.demo").info


def make_cases(count: int, seed: int) -> list[EvaluationCase]:
    """Held-out combinations in an order that mixes them, each with a seed of its own."""
    mixed = combinations(held_out=True)
    random.Random(0).shuffle(mixed)
    return [EvaluationCase(mixed[i % len(mixed)], seed + i) for i in range(count)]


def generated(
    loaded: Loaded, settings: Settings, cases: Sequence[EvaluationCase]
) -> Iterator[Tensor]:
    """Uint8 [T, H, W, 3] of each case, by the product's own functions."""
    plan = make_plan(settings, loaded.spec)
    for case in cases:
        prompt = encode_prompt(loaded, case.what.prompt, settings.sampling)
        made = denoise(loaded, prompt, settings, plan, seed=case.seed, on_step=lambda _: None)
        yield torch.from_numpy(decode(loaded.pipeline.vae, made.latents))


def rolled_out(
    loaded: Loaded, settings: RolloutSettings, cases: Sequence[EvaluationCase]
) -> Iterator[Tensor]:
    """Uint8 [T, H, W, 3] of each case, chunk after chunk, by the product's own loop."""
    plan = make_rollout_plan(settings, loaded.spec)
    for case in cases:
        latents = roll_out(loaded, settings, plan, case)
        yield torch.from_numpy(decode(loaded.pipeline.vae, latents))


def roll_out(
    loaded: Loaded, settings: RolloutSettings, plan: RolloutPlan, case: EvaluationCase
) -> Tensor:
    """Latents [1, C, F, H, W]."""
    prompt = encode_prompt(loaded, case.what.prompt, settings.sampling)
    uncond = prompt.embeddings.get("negative_prompt_embeds")
    pair = ChunkPrompt(PromptPair(prompt.embeddings["prompt_embeds"], uncond))
    noise = IndexedNoise({0: case.seed}, (plan.shape.channels, plan.shape.height, plan.shape.width))
    inputs = RolloutInputs(
        context=(),
        spans=plan.spans,
        prompts=lambda _span: pair,
        finished=lambda _span: None,
        denoise=ChunkSampler(loaded, settings, plan, noise),
    )
    with causal_denoiser(loaded, settings, plan) as model:
        events = [*rollout(model, inputs, ContextBuffer(plan.window))]
    return torch.cat([event.latents for event in events if isinstance(event, Chunk)], 2)


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, scene: Scene) -> tuple[Tensor, float]:
    """A whole clip there and back, uint8 [T, H, W, 3], and its PSNR in dB."""
    video = render([scene]).to(vae.device)
    again = vae.decode(vae.encode(video).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (again - video).square().mean())
    return to_pixels(again)[0], float(psnr)


@dataclass(frozen=True)
class EvaluationTask:
    """Some cases of one use, small enough to share the work out among processes."""

    use: str
    about: str
    cases: Sequence[EvaluationCase]


@cache
def load_demo(model: str, chosen: str) -> tuple[Loaded, RolloutSettings]:
    """The model under the settings of the preset that is `chosen`, once a process."""
    preset = [*layers(find_preset(chosen)), Layer("--model", {"model": model})]
    settings = resolve([*preset, Layer("evaluate", {"rollout": CLIP})], RolloutSettings).settings
    return load_pipeline(find_spec(settings.model), settings.machine), settings


def examine(model: str, preset: str, task: EvaluationTask) -> Use:
    """Make the task's videos and judge them."""
    loaded, settings = load_demo(model, preset)
    if task.use == LONG:
        return examine_long(loaded, settings, task)
    made = generated if task.use == "generate" else rolled_out
    videos = made(loaded, settings, task.cases)
    return watch(task.use, task.about, task.cases, videos)


def examine_long(loaded: Loaded, settings: RolloutSettings, task: EvaluationTask) -> Use:
    """Make long rollouts, judge their last part, and compare it with the first."""
    layer = Layer("long", {"rollout": {"chunks": steady.CHUNKS}})
    longer = resolve([Layer("evaluate", settings.model_dump()), layer], RolloutSettings).settings
    changes = []

    def ends() -> Iterator[Tensor]:
        for case, video in zip(task.cases, rolled_out(loaded, longer, task.cases), strict=True):
            changes.append(steady.change(video, case.what.color))
            yield steady.last_part(video)

    return replace(watch(task.use, task.about, task.cases, ends()), changes=changes)


def watch(name: str, about: str, cases: Sequence[EvaluationCase], videos: Iterator[Tensor]) -> Use:
    """Judge each case's video, uint8 [T, H, W, 3], as it comes."""
    began, verdicts, strips = time.monotonic(), [], []
    for video in videos:
        verdicts.append(judge(video))
        columns = torch.linspace(0, len(video) - 1, COLUMNS).round().long()
        strips.append(torch.cat([*video[columns]], 1))
    seconds = (time.monotonic() - began) / len(cases)
    return Use(name, about, cases, verdicts, strips, seconds)


def examine_all(model: str, preset: str, tasks: Sequence[EvaluationTask]) -> list[Use]:
    """Every use whole: on a CPU in one process a core, since one clip is too small for two."""
    count = 1 if load_demo(model, preset)[0].device.type != "cpu" else os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    parts: dict[str, list[Use]] = {}
    with ProcessPoolExecutor(count, spawn, torch.set_num_threads, (1,)) as pool:
        for done in pool.map(partial(examine, model, preset), tasks):
            parts.setdefault(done.name, []).append(done)
            videos = sum(len(part.cases) for part in parts[done.name])
            say("%s: %d videos", done.name, videos)
    return [_joined(uses) for uses in parts.values()]


def _joined(uses: Sequence[Use]) -> Use:
    def flat(name: str) -> list[Any]:
        return [item for use in uses for item in getattr(use, name)]

    seconds = fmean(use.seconds for use in uses)
    cases, verdicts, strips, changes = map(flat, ("cases", "verdicts", "strips", "changes"))
    return Use(
        uses[0].name, uses[0].about, cases, verdicts, strips, seconds=seconds, changes=changes
    )


def make_tasks(
    settings: RolloutSettings, cases: Sequence[EvaluationCase], *, long: int
) -> list[EvaluationTask]:
    """All that is to be made, in parts; of the first `long` cases long rollouts, too."""
    sampling, chosen = settings.sampling, settings.rollout
    parts = [cases[i : i + PART] for i in range(0, len(cases), PART)]
    steps, shift = f"{sampling.steps} steps", f"shift {sampling.flow_shift:g}"
    of_chunk = f"at {chosen.steps_list}" if chosen.sampler == "few-step" else steps
    about = {
        "generate": f"{sampling.scheduler}, {steps}, {shift}",
        "rollout": f"chunks of {chosen.chunk_frames}, {chosen.sampler}, {of_chunk}, {shift}",
    }
    ends = f"the last {steady.END:.0%} of {steady.CHUNKS} chunks"
    lasting = [EvaluationTask(LONG, ends, [case]) for case in cases[:long]]
    return [
        EvaluationTask(use, words, part) for use, words in about.items() for part in parts
    ] + lasting


def examine_vae(loaded: Loaded, seed: int) -> tuple[Use, list[float]]:
    """Whole fresh clips of held-out scenes there and back: what is seen, and PSNR in dB of each."""
    choices, seeds = combinations(held_out=True), range(seed, seed + CLIPS)
    scenes = [sample_scene(random.Random(s), choices) for s in seeds]
    cases = [EvaluationCase(scene.what, s) for scene, s in zip(scenes, seeds, strict=True)]
    decibels = list[float]()

    def clips() -> Iterator[Tensor]:
        for scene in scenes:
            video, psnr = reconstruct(loaded.pipeline.vae, scene)
            decibels.append(psnr)
            yield video

    return watch("reconstruction", "true clips through the VAE", cases, clips()), decibels


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m wancli.demo.evaluate", description=__doc__)
    parser.add_argument("--model", default="demo", help="known name or folder")
    parser.add_argument("--preset", default="demo", help="how it is made: demo or demo-4step")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="videos of each use")
    parser.add_argument("--long", type=int, default=0, help=f"rollouts of {steady.CHUNKS} chunks")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt")
    parser.add_argument("--sheet", type=Path, help="folder for contact sheets")
    parser.add_argument("--json", type=Path, help="file for all numbers and verdicts")
    card = DEMO_FOLDER / "README.md"
    parser.add_argument("--card", type=Path, nargs="?", const=card, help="write the model card")
    parser.add_argument("--work", type=Path, help="training folder: its curves go into the card")
    return parser.parse_args()


def main() -> int:
    """Evaluate; 0 where every goal is met, 1 where one is missed, or the code of an error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return run(parse())
    except WancliError as error:
        say("%s\nhint: %s", error, error.hint)
        return error.exit_code


def run(given: argparse.Namespace) -> int:
    """Evaluate, and write what was asked for."""
    told = ("model", "preset", "prompts", "long", "seed")
    words = [f"--{name.replace('_', '-')} {getattr(given, name)}" for name in told]
    loaded, settings = load_demo(given.model, given.preset)
    cases = make_cases(given.prompts, given.seed)
    whole, decibels = examine_vae(loaded, given.seed)
    tasks = make_tasks(settings, cases, long=given.long)
    uses = [whole, *examine_all(given.model, given.preset, tasks)]
    command = " ".join(["python -m wancli.demo.evaluate", *words])
    report = make_report(loaded, settings, uses, decibels, command=command)
    tell(report)
    if given.json:
        write_text(given.json, json.dumps(report, indent=1) + "\n")
    if given.sheet:
        write_sheets(given.sheet, uses)
    if given.card:
        write_text(given.card, make_card(report, work=given.work))
    return 1 if report["goals"]["missed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
