"""Make every prompt and seed once in every arm, in one process, interleaved, and compare."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from wancli.benchmark.cases import BenchInputs, Case, Run, Variant
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import TASKS
from wancli.config.settings import Settings
from wancli.generation.conditioning import read_pictures
from wancli.generation.denoise import StepResult, clip_frames, denoise
from wancli.generation.prompts import encode_prompt
from wancli.generation.runner import write_video
from wancli.models.load import Loaded, load_pipeline, resolve_machine
from wancli.models.memory import fits_in_memory, peak_memory, reset_peak_memory
from wancli.models.timer import Timer
from wancli.records.progress import Phase, Report, Step
from wancli.records.record import Request
from wancli.records.write import start_record, versions
from wancli.video.compare import Quality, compare_latents, compare_videos


@dataclass
class RenderedRun:
    """One case rendered by one variant: frames uint8 [T, H, W, 3], latents [1, C, F, H, W]."""

    run: Run
    frames: NDArray[Any]
    latents: Tensor


class Measurer:
    """A loaded model that makes cases, and keeps what the baseline made of them."""

    def __init__(
        self, spec: ModelSpec, baseline: Variant, folder: Path, report: Report, given: BenchInputs
    ) -> None:
        self.spec, self.baseline, self.folder, self._report = spec, baseline, folder, report
        self._usual: dict[Case, RenderedRun] = {}
        self._prompts: list[str] = []  # numbered in the names of files
        report(Phase("load"))
        task, video = baseline.plan.task, baseline.settings.video
        self.loaded: Loaded = load_pipeline(spec, baseline.settings.machine, task=task)
        size = (video.width, video.height)
        self._pictures = read_pictures(TASKS[task], given.inputs, size=size)
        self._recorded = given.recorded

    @property
    def machine(self) -> dict[str, str]:
        """The machine it is measured on."""
        found = resolve_machine(self.baseline.settings.machine)
        named = ("device", "dtype", "attention_backend")
        return {name: getattr(found, name) for name in named} | versions()

    def measure(self, variants: Sequence[Variant], cases: Sequence[Case]) -> Iterator[list[Run]]:
        """Warm every variant up, then give the runs of each case; their order takes turns."""
        for variant in variants:
            self._make(variant, cases[0], "warmup")
        for turn, case in enumerate(cases):
            first = turn % len(variants)
            order = [*variants[first:], *variants[:first]]
            what = f"{turn + 1} of {len(cases)}"
            made = {variant.name: self._make(variant, case, what) for variant in order}
            yield [
                self._compared(made[v.name], v, case, number) for number, v in enumerate(variants)
            ]

    def usual(self, case: Case) -> RenderedRun:
        """The baseline's render of a case, made once."""
        if case not in self._usual:
            self._usual[case] = self._make(self.baseline, case, "to compare with")
        return self._usual[case]

    def made(self, variant: Variant, case: Case) -> RenderedRun:
        """A variant's render of a case compared with the baseline's; writes no video."""
        usual, made = self.usual(case), self._make(variant, case, variant.flags)
        made.run = _beside(made, usual)
        return made

    def floor(self, cases: Sequence[Case]) -> list[Quality]:
        """The baseline's videos of one prompt against each other: of two seeds, and of no others.

        A prompt with one seed gets another, of which nothing else is measured.
        """
        found = []
        for prompt in dict.fromkeys(case.prompt for case in cases):
            known = [case for case in cases if case.prompt == prompt][:2]
            if len(known) == 1:
                known.append(replace(known[0], seed=known[0].seed + 1))
            one, other = (self.usual(case).frames for case in known)
            found.append(compare_videos(one, other))
        return found

    def _compared(self, made: RenderedRun, variant: Variant, case: Case, number: int) -> Run:
        if case.prompt not in self._prompts:
            self._prompts.append(case.prompt)
        prompt = f"{self._prompts.index(case.prompt)}-{_safe(case.prompt)}"
        video = f"videos/{prompt}-{case.seed}-{number}-{_safe(variant.name)}.mp4"
        told = self._recorded
        request = Request(case.prompt, case.seed, variant.settings, {}, inputs=told)
        record = start_record(request, command="bench", created=datetime.now(UTC))
        record = replace(record, status="ok")
        settings = _shown_by_browsers(variant.settings)
        whole = made.latents if variant.plan.segments == 1 else None
        write_video(made.frames, self.folder / video, record, settings, whole)
        if variant is self.baseline:
            self._usual[case] = made
            return replace(made.run, video=video)
        return replace(_beside(made, self._usual[case]), video=video)

    def _make(self, variant: Variant, case: Case, what: str) -> RenderedRun:
        loaded, settings, plan = self.loaded, variant.settings, variant.plan
        self._report(Phase(f"{variant.name}, seed {case.seed}, {what}"))

        def on_step(step: StepResult) -> None:
            self._report(Step(step.index, plan.steps, step.sigma))

        reset_peak_memory(loaded.device)
        with fits_in_memory(self.spec.name):
            clock = Timer(loaded.device)
            prompt = encode_prompt(loaded, case.prompt, settings.sampling)
            prompt = replace(prompt, pictures=self._pictures)
            clock.mark("encode")
            denoised = denoise(loaded, prompt, settings, plan, seed=case.seed, on_step=on_step)
            clock.mark("denoise")
            frames = clip_frames(loaded, denoised)
            clock.mark("decode")
        run = Run(
            arm=variant.name,
            prompt=case.prompt,
            seed=case.seed,
            video="",
            denoise_s=clock.seconds("denoise"),
            decode_s=clock.seconds("decode"),
            total_s=clock.seconds("encode", "denoise", "decode"),
            uses=tuple(denoised.uses),
            peak_gib=max(peak_memory(loaded.device).values(), default=None),
        )
        return RenderedRun(run, frames, denoised.latents)


def _beside(made: RenderedRun, usual: RenderedRun) -> Run:
    quality = compare_videos(usual.frames, made.frames)
    latents = compare_latents(usual.latents, made.latents)
    return replace(made.run, quality=quality, latents=latents)


def _shown_by_browsers(settings: Settings) -> Settings:
    """The same with H.264 in YUV: the report shows videos, and measures raw frames."""
    output = settings.output.model_copy(update={"lossless": False})
    return settings.model_copy(update={"output": output})


def _safe(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text).strip("-.")[:40] or "x"
