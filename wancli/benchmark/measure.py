"""Render every case with every variant, interleaved in one process, and compare the results."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from wancli.benchmark.cases import BenchInputs, Case, Run, Variant
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import TASKS
from wancli.config.settings import Machine, Settings
from wancli.generation.conditioning import read_pictures
from wancli.generation.denoise import StepResult, clip_frames, denoise
from wancli.generation.prompts import encode_prompt
from wancli.generation.runner import write_video
from wancli.models.load import Loaded, load_beside, load_pipeline, resolve_machine
from wancli.models.memory import fits_in_memory, peak_memory, reset_peak_memory
from wancli.models.timer import Timer
from wancli.records.progress import Phase, Report, Step
from wancli.records.record import Request
from wancli.records.write import TimedRecord, start_record, versions
from wancli.video.compare import Quality, compare_latents, compare_videos
from wancli.video.measures import motion


@dataclass
class RenderedRun:
    """A case rendered by a variant: frames uint8 [T, H, W, 3], latents [1, C, F, H, W]."""

    run: Run
    frames: NDArray[Any]
    latents: Tensor


class Measurer:
    """A loaded model that renders cases, and keeps the baseline's renders to compare with."""

    def __init__(
        self, spec: ModelSpec, baseline: Variant, folder: Path, report: Report, inputs: BenchInputs
    ) -> None:
        self.spec, self.baseline, self.folder, self._report = spec, baseline, folder, report
        self._baseline_runs: dict[Case, RenderedRun] = {}
        self._prompts: list[str] = []  # file names have their index
        report(Phase("load"))
        task, video = baseline.plan.task, baseline.settings.video
        machine = baseline.settings.machine
        self.loaded: Loaded = load_pipeline(spec, machine, task=task)
        self._models = {_loaded_with(machine): self.loaded}
        size = (video.width, video.height)
        self._pictures = read_pictures(TASKS[task], inputs.inputs, size=size)
        self._recorded_inputs = inputs.recorded

    @property
    def machine(self) -> dict[str, str]:
        """Device, dtype, attention backend and versions."""
        machine = resolve_machine(self.baseline.settings.machine)
        names = ("device", "dtype", "attention_backend")
        return {name: getattr(machine, name) for name in names} | versions()

    def measure(self, variants: Sequence[Variant], cases: Sequence[Case]) -> Iterator[list[Run]]:
        """Warm up every variant, then yield the runs of each case; the variants' order rotates."""
        for variant in variants:  # first: loading drops the graphs that are compiled already
            self._model(variant)
        for variant in variants:
            self._render(variant, cases[0], "warmup")
        for turn, case in enumerate(cases):
            first = turn % len(variants)
            order = [*variants[first:], *variants[:first]]
            label = f"{turn + 1} of {len(cases)}"
            rendered = {variant.name: self._render(variant, case, label) for variant in order}
            yield [
                self._write(rendered[variant.name], variant, case, index)
                for index, variant in enumerate(variants)
            ]

    def baseline_run(self, case: Case) -> RenderedRun:
        """The baseline's render of a case, rendered once."""
        if case not in self._baseline_runs:
            self._baseline_runs[case] = self._render(self.baseline, case, "reference")
        return self._baseline_runs[case]

    def compare(self, variant: Variant, case: Case) -> RenderedRun:
        """Render a case and compare it with the baseline; writes no video."""
        reference, rendered = self.baseline_run(case), self._render(variant, case, variant.flags)
        rendered.run = _compared(rendered, reference)
        return rendered

    def compare_seeds(self, cases: Sequence[Case]) -> list[Quality]:
        """Compare two seeds of each prompt under the baseline.

        A prompt with one seed is rendered with the next one, too.
        """
        qualities = []
        for prompt in dict.fromkeys(case.prompt for case in cases):
            pair = [case for case in cases if case.prompt == prompt][:2]
            if len(pair) == 1:
                pair.append(replace(pair[0], seed=pair[0].seed + 1))
            one, other = (self.baseline_run(case).frames for case in pair)
            qualities.append(compare_videos(one, other))
        return qualities

    def _model(self, variant: Variant) -> Loaded:
        """The model with a variant's speed-ups, loaded once."""
        machine = variant.settings.machine
        key = _loaded_with(machine)
        if key not in self._models:
            self._report(Phase(f"load {variant.name}"))
            self._models[key] = load_beside(self.loaded, machine, task=variant.plan.task)
        return self._models[key]

    def _write(self, rendered: RenderedRun, variant: Variant, case: Case, index: int) -> Run:
        """Write the video, and compare it with the baseline."""
        if case.prompt not in self._prompts:
            self._prompts.append(case.prompt)
        prompt = f"{self._prompts.index(case.prompt)}-{_safe(case.prompt)}"
        video = f"videos/{prompt}-{case.seed}-{index}-{_safe(variant.name)}.mp4"
        inputs = self._recorded_inputs
        request = Request(case.prompt, case.seed, variant.settings, {}, inputs=inputs)
        record = start_record(request, command="bench", created=datetime.now(UTC))
        run = rendered.run
        times = {"denoise_s": run.denoise_s, "decode_s": run.decode_s}
        record = replace(record, status="ok", timings=times)
        timed = TimedRecord(record, perf_counter() - run.total_s)
        settings = _playable_in_browsers(variant.settings)
        latents = rendered.latents if variant.plan.segments == 1 else None
        write_video(rendered.frames, self.folder / video, timed, settings, latents)
        if variant is self.baseline:
            self._baseline_runs[case] = rendered
            return replace(rendered.run, video=video)
        return replace(_compared(rendered, self._baseline_runs[case]), video=video)

    def _render(self, variant: Variant, case: Case, label: str) -> RenderedRun:
        loaded, settings, plan = self._model(variant), variant.settings, variant.plan
        self._report(Phase(f"{variant.name}, seed {case.seed}, {label}"))

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
            uses=tuple(denoised.stats),
            peak_gib=max(peak_memory(loaded.device).values(), default=None),
            motion=motion(frames),
        )
        return RenderedRun(run, frames, denoised.latents)


def _compared(rendered: RenderedRun, reference: RenderedRun) -> Run:
    quality = compare_videos(reference.frames, rendered.frames)
    latents = compare_latents(reference.latents, rendered.latents)
    return replace(rendered.run, quality=quality, latents=latents)


def _loaded_with(machine: Machine) -> Machine:
    """The settings that the weights depend on."""
    return machine.model_copy(update={"attention_backend": "auto"})


def _playable_in_browsers(settings: Settings) -> Settings:
    """The settings without lossless RGB, which browsers cannot play."""
    output = settings.output.model_copy(update={"lossless": False})
    return settings.model_copy(update={"output": output})


def _safe(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text).strip("-.")[:40] or "x"
