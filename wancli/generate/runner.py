"""The runner: load once, then encode, denoise, decode, write and record each video."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from wancli.catalog.local import find_spec
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import TASKS
from wancli.config.resolve import Layer, Resolved, check_tuned, resolve
from wancli.config.settings import Settings
from wancli.generate.conditioning import read_pictures
from wancli.generate.denoise import StepResult, decode, decoded, denoise
from wancli.generate.preview import Previews, previews
from wancli.generate.prompts import Prompt, encode_prompt
from wancli.models.load import Loaded, load_pipeline, load_vae, resolve_machine
from wancli.models.memory import fits_in_memory, peak_memory
from wancli.models.timer import Timer
from wancli.planning.inputs import NO_INPUTS, InputFiles
from wancli.planning.offload import check_tiling
from wancli.planning.plan import Plan
from wancli.planning.rules_machine import check_machine
from wancli.records.progress import Phase, Report, Step
from wancli.records.record import (
    ForwardStats,
    Request,
    RunRecord,
    reuse_json,
    rounded,
    settings_of,
    write_record,
)
from wancli.records.write import start_record, versions
from wancli.utils.outputs import preview_file
from wancli.video.ffmpeg import Encoding, check_encoder
from wancli.video.latents import keeping, read_latents, save_latents
from wancli.video.metadata import output_json
from wancli.video.write import VideoWriter, WrittenVideo


@dataclass(frozen=True)
class Job:
    """One video to make, and where to put it."""

    request: Request
    output: Path
    latents: Path | None = None
    inputs: InputFiles = NO_INPUTS
    preview_every: int | None = None  # denoising steps
    replaced: frozenset[Path] = frozenset()  # where what is there may be replaced


class Runner:
    """A loaded model and the prompts it has embedded; `make` gives a video and its record."""

    def __init__(
        self, spec: ModelSpec, resolved: Resolved[Settings], plan: Plan, *, command: str,
        since: float,
    ) -> None:  # fmt: skip
        """`since` is when loading began, by perf_counter: before the libraries were imported.

        Raises SettingsError for a step cache that was tuned on another kind of machine.
        """
        self._since = since
        self.spec, self.settings, self.plan, self.command = spec, resolved.settings, plan, command
        here = {"machine": resolve_machine(self.settings.machine)}
        check_tuned(resolved.tuned_for, self.settings.model_copy(update=here))
        self._loaded: Loaded | None = None
        self._prompts: dict[str, Prompt] = {}
        self._pictures: tuple[InputFiles, Mapping[str, Any]] | None = None

    def make(self, job: Job, report: Report) -> RunRecord:
        """Make one video, its sidecar and its record. Raises WancliError; latents are kept then."""
        overwrite = preview_file(job.output) in job.replaced
        with previews(job.output, report, every=job.preview_every, overwrite=overwrite) as preview:
            return self._make(job, report, preview)

    def _make(self, job: Job, report: Report, preview: Previews) -> RunRecord:
        began = datetime.now(UTC)
        started = perf_counter() if self._loaded else self._since
        load_s = self._load(report)
        loaded = self._ready()
        clock = Timer(loaded.device)
        if loaded.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(loaded.device)
        sigmas: list[float] = []

        def on_step(step: StepResult) -> None:
            clock.mark("step")
            sigmas.append(step.sigma)
            report(Step(step.index, self.plan.steps, step.sigma))
            preview(step, loaded.pipeline.vae)
            clock.mark("preview")

        record = start_record(job.request, command=self.command, created=began)
        with fits_in_memory(self.spec.name):
            report(Phase("encode"))
            prompt = self._tell(job)
            clock.mark("encode")
            report(Phase("denoise"))
            denoised = denoise(
                loaded, prompt, self.settings, self.plan, seed=job.request.seed, on_step=on_step
            )
            clock.mark("denoise" if denoised.frames is None else "decode")
            _save(denoised.latents, job, record)
            report(Phase("decode"))
            whole = denoised.latents if self.plan.segments == 1 else None
            with keeping(whole, job.output, record.as_json()):
                frames = decoded(loaded, denoised)
            clock.mark("decode")
        cache = _cache(self.settings, self.plan, denoised.uses)
        timings = _timings(job, clock, denoised.uses, sigmas, load_s=load_s)
        timings |= {"uses": [asdict(use) for use in denoised.uses]} if cache else {}
        memory: dict[str, Any] = peak_memory(loaded.device) | {
            "offload": self.settings.machine.offload,
            "prompt_kv_gib": denoised.prompt_kv_bytes / 2**30,
            "freed_weights_gib": denoised.freed_bytes / 2**30,
        }
        record = replace(
            record, status="ok", timings=timings, memory=memory, env=versions(), cache=cache
        )
        report(Phase("write"))
        saving = perf_counter()
        written = write_video(
            frames, job.output, record, self.settings, whole, replaced=job.replaced
        )
        timings |= {"save_s": perf_counter() - saving, "total_s": perf_counter() - started}
        record = replace(record, output=output_json(written), timings=rounded(timings))
        write_record(record, job.output, job.replaced)
        return record

    def _load(self, report: Report) -> float:
        """Seconds it took to load the model, 0 where it was there."""
        if self._loaded is not None:
            return 0.0
        report(Phase("load"))
        self._loaded = load_pipeline(self.spec, self.settings.machine, task=self.plan.task)
        return perf_counter() - self._since

    def _ready(self) -> Loaded:
        if self._loaded is None:
            raise RuntimeError("make() loads before it asks")
        return self._loaded

    def _tell(self, job: Job) -> Prompt:
        text = job.request.prompt
        if text not in self._prompts:
            self._prompts[text] = encode_prompt(self._ready(), text, self.settings.sampling)
        if self._pictures is None or self._pictures[0] != job.inputs:
            size = (self.settings.video.width, self.settings.video.height)
            pictures = read_pictures(TASKS[self.plan.task], job.inputs, size=size)
            self._pictures = job.inputs, pictures
        return replace(self._prompts[text], pictures=self._pictures[1])


def _save(latents: Tensor, job: Job, record: RunRecord) -> None:
    """Write what --save-latents asks for."""
    if job.latents:
        overwrite = job.latents in job.replaced
        save_latents(latents, job.latents, record.as_json(), overwrite=overwrite)


def _timings(
    job: Job, clock: Timer, uses: Sequence[ForwardStats], sigmas: list[float], *, load_s: float
) -> dict[str, Any]:
    """Where the time up to the video frames went, and what each step was."""
    made = [sum(use.step == step and use.blocks > 0 for use in uses) for step in range(len(sigmas))]
    return {
        "load_s": load_s,
        "encode_prompt_s": clock.seconds("encode"),
        "denoise_s": clock.seconds("step", "denoise"),
        **({"preview_s": clock.seconds("preview")} if job.preview_every else {}),
        "decode_s": clock.seconds("decode"),
        "steps_ms": clock.ms("step"),
        "sigmas": sigmas,
        "forwards": made,
    }


def _cache(settings: Settings, plan: Plan, uses: Sequence[ForwardStats]) -> dict[str, Any]:
    """What the lossy caches saved; nothing where there is none."""
    method = settings.step_cache.step_cache
    methods: list[str] = [method] if method != "none" else []
    if plan.gate is not None:
        methods.append(f"cfg-gate {plan.gate}")
    if not methods:
        return {}
    return {"method": " and ".join(methods), **reuse_json(uses)}


def decode_file(
    latents_file: Path, output: Path, report: Report, given: Layer, *,
    replaced: Collection[Path] = (),
) -> RunRecord:  # fmt: skip
    """Make a video of saved latents, with only the VAE loaded. Raises WancliError.

    Of the files that are there only those at the paths `replaced` are.
    """
    started = perf_counter()
    latents, told = read_latents(latents_file)
    layer = Layer(f"record of {latents_file.name}", settings_of(told))
    settings = resolve([layer, given], Settings).settings
    check_machine(settings.machine)
    check_tiling(settings)
    check_encoder(Encoding.of(settings.output))
    report(Phase("load"))
    vae, device = load_vae(find_spec(settings.model), settings.machine)
    loaded = perf_counter()
    report(Phase("decode"))
    frames = decode(vae, latents)
    decoded = perf_counter()
    timings = {"load_s": loaded - started, "decode_s": decoded - loaded}
    about = {"status": "ok", "command": "decode", "error": None, "env": versions()}
    about["request"] = told["request"] | {"machine": settings.machine.model_dump()}
    known = {field.name: told[field.name] for field in fields(RunRecord) if field.name in told}
    record = RunRecord(**(known | about | {"timings": timings, "memory": peak_memory(device)}))
    report(Phase("write"))
    written = write_video(frames, output, record, settings, latents, replaced=replaced)
    timings |= {"save_s": perf_counter() - decoded, "total_s": perf_counter() - started}
    record = replace(record, output=output_json(written), timings=rounded(timings))
    write_record(record, output, replaced)
    return record


def write_video(
    frames: Any, path: Path, record: RunRecord, settings: Settings, latents: Tensor | None, *,
    replaced: Collection[Path] = (),
) -> WrittenVideo:  # fmt: skip
    """Write uint8 [T, H, W, 3]. When that fails the latents are kept, and the error says where."""
    _, height, width, _ = frames.shape
    encoding = Encoding.of(settings.output)
    with (
        keeping(latents, path, record.as_json()),
        VideoWriter(
            path, size=(width, height), fps=settings.video.fps, encoding=encoding,
            replaced=replaced,
        ) as writer,
    ):  # fmt: skip
        writer.write(frames)
        return finish(writer, record, settings)


def finish(writer: VideoWriter, record: RunRecord, settings: Settings) -> WrittenVideo:
    """Put the video under its name, its record and its digests in it. Raises OutputError."""
    if not settings.output.metadata:
        return writer.finish({})
    return writer.finish({"comment": replace(record, output=writer.digests()).embedded()})
