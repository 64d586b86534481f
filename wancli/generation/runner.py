"""Encode, denoise, decode, write and record each video, on a pipeline that stays loaded."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wancli.catalog.decoder_files import add_vae_decoder
from wancli.catalog.local import find_spec
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import TASKS
from wancli.catalog.tiny_decoder import DECODER
from wancli.catalog.weight_files import add_weight_files, weights_json
from wancli.config.resolve import Layer, Resolved, check_tuned, resolve
from wancli.config.settings import Settings
from wancli.generation.conditioning import read_pictures
from wancli.generation.denoise import DenoisedClip, StepResult, clip_frames, decode, denoise
from wancli.generation.preview import Previews, previews
from wancli.generation.prompts import Prompt, encode_prompt
from wancli.models.fast_decoder import decoder_in_words
from wancli.models.load import Loaded, load_vae, resolve_machine
from wancli.models.memory import DECODING, fits_in_memory, peak_memory
from wancli.models.timer import Timer
from wancli.models.warm import WarmPipeline
from wancli.planning.inputs import NO_INPUTS, InputFiles
from wancli.planning.offload import check_tiling, check_vae_decoder
from wancli.planning.plan import Plan
from wancli.planning.rules_machine import check_machine, check_output
from wancli.records.progress import Phase, Report, Step
from wancli.records.record import (
    ForwardStats,
    Request,
    RunRecord,
    reuse_json,
    settings_of,
    write_record,
)
from wancli.records.write import TimedRecord, start_record, versions
from wancli.utils.outputs import preview_file
from wancli.video.ffmpeg import choose_encoding
from wancli.video.latents import drop_kept_latents, keeping, read_latents, save_latents
from wancli.video.write import VideoWriter, WrittenVideo


@dataclass(frozen=True)
class Job:
    """One video to make, and its output files."""

    request: Request
    output: Path | None  # None: no file is written
    latents: Path | None = None
    inputs: InputFiles = NO_INPUTS
    preview_every: int | None = None  # denoising steps
    replaced: frozenset[Path] = frozenset()  # existing files that may be replaced


@dataclass(frozen=True)
class Clip:
    """A finished video: frames uint8 [T, H, W, 3], and latents [1, C, F, H, W] on the CPU.

    The latents of several segments are those of the last one.
    """

    record: RunRecord
    frames: NDArray[np.uint8]
    latents: Tensor


class Runner:
    """Renders videos on a pipeline with the settings of one request; keeps its encoded prompts."""

    def __init__(
        self, model: WarmPipeline, resolved: Resolved[Settings], plan: Plan, *, command: str,
        ahead: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Prompts `ahead` are encoded with the first that is not known, as in `encode_prompt`.

        Raises SettingsError for a step cache that was tuned on another kind of machine.
        """
        self._model, self._ahead = model, ahead
        self.settings, self.plan, self.command = resolved.settings, plan, command
        machine = {"machine": resolve_machine(self.settings.machine)}
        check_tuned(resolved.tuned_for, self.settings.model_copy(update=machine))
        self._prompts: dict[str, Prompt] = {}
        self._pictures: tuple[InputFiles, Mapping[str, Any]] | None = None

    def make(self, job: Job, report: Report) -> Clip:
        """Make one video and its record. Raises WancliError; finished latents are then kept."""
        record = start_record(job.request, command=self.command, created=datetime.now(UTC))
        overwrite = job.output is not None and preview_file(job.output) in job.replaced
        with (
            self._model.in_use(report, task=self.plan.task) as (loaded, load_s),
            previews(job.output, report, every=job.preview_every, overwrite=overwrite) as preview,
        ):
            started = perf_counter() - load_s
            record = replace(record, timings={"load_s": load_s})
            clip = self._make(job, loaded, record, report, preview)
            timed = TimedRecord(clip.record, started)
            output = self._write(clip, job, timed, report)
            record = replace(timed.now(), output=output)
        if job.output:
            write_record(record, job.output, job.replaced)
            drop_kept_latents(job.output, record.request)
        return replace(clip, record=record)

    def _make(
        self, job: Job, loaded: Loaded, record: RunRecord, report: Report, preview: Previews
    ) -> Clip:
        clock = Timer(loaded.device)
        sigmas: list[float] = []

        def on_step(step: StepResult) -> None:
            clock.mark("step")
            sigmas.append(step.sigma)
            report(Step(step.index, self.plan.steps, step.sigma))
            preview(step, loaded)
            clock.mark("preview")

        with fits_in_memory(loaded.spec.name):
            report(Phase("encode"))
            prompt = self._prompt(job, loaded)
            clock.mark("encode")
            report(Phase("denoise"))
            denoised = denoise(
                loaded, prompt, self.settings, self.plan, seed=job.request.seed, on_step=on_step
            )
            clock.mark("denoise" if denoised.frames is None else "decode")
        _save(denoised.latents, job, record)
        report(Phase("decode"))
        with (
            keeping(self._whole(denoised.latents), job.output, record.as_json()),
            fits_in_memory(loaded.spec.name, DECODING),
        ):
            frames = clip_frames(loaded, denoised, report)
        clock.mark("decode")
        cache = _cache(self.settings, self.plan, denoised.stats)
        compiles = self.settings.machine.compile
        measured = _timings(job, clock, denoised.stats, sigmas, compiles=compiles)
        timings = {**record.timings, **measured}
        timings |= {"uses": [asdict(forward) for forward in denoised.stats]} if cache else {}
        memory = self._memory(loaded.device, denoised)
        env = versions() | {"attention": denoised.attention}
        env["vae_decoder"] = decoder_in_words(loaded.pipeline.vae)
        record = replace(record, status="ok", timings=timings, memory=memory, env=env, cache=cache)
        return Clip(record, frames, denoised.latents.cpu())

    def _write(self, clip: Clip, job: Job, record: TimedRecord, report: Report) -> dict[str, Any]:
        """Write the video, if it has a file; the output section of its record."""
        if job.output is None:
            frames = len(clip.frames)
            return {"frames": frames, "duration_s": round(frames / self.settings.video.fps, 3)}
        report(Phase("write"))
        latents = self._whole(clip.latents)
        return write_video(
            clip.frames, job.output, record, self.settings, latents, replaced=job.replaced
        ).as_json()

    def _memory(self, device: torch.device, denoised: DenoisedClip) -> dict[str, Any]:
        return peak_memory(device) | {
            "offload": self.settings.machine.offload,
            "prompt_kv_gib": denoised.prompt_kv_bytes / 2**30,
            "freed_weights_gib": denoised.freed_bytes / 2**30,
        }

    def _whole(self, latents: Tensor) -> Tensor | None:
        """The latents, if they are those of the whole video."""
        return latents if self.plan.segments == 1 else None

    def _prompt(self, job: Job, loaded: Loaded) -> Prompt:
        text = job.request.prompt
        if text not in self._prompts:
            self._prompts[text] = encode_prompt(
                loaded, text, self.settings.sampling, known=self._model.texts, ahead=self._ahead
            )
        if self._pictures is None or self._pictures[0] != job.inputs:
            size = (self.settings.video.width, self.settings.video.height)
            pictures = read_pictures(TASKS[self.plan.task], job.inputs, size=size)
            self._pictures = job.inputs, pictures
        return replace(self._prompts[text], pictures=self._pictures[1])


def _save(latents: Tensor, job: Job, record: RunRecord) -> None:
    """Write the latents if `save_latents` is set."""
    if job.latents:
        overwrite = job.latents in job.replaced
        save_latents(latents, job.latents, record.as_json(), overwrite=overwrite)


def _timings(
    job: Job, clock: Timer, stats: Sequence[ForwardStats], sigmas: list[float], *, compiles: bool
) -> dict[str, Any]:
    """Seconds of each phase up to the video frames; time, sigma and forwards of each step.

    A first step that `compiles` is a phase by itself.
    """
    forwards = [sum(s.step == step and s.blocks > 0 for s in stats) for step in range(len(sigmas))]
    first = clock.ms("step")[0] / 1000 if compiles else 0.0
    return {
        "encode_prompt_s": clock.seconds("encode"),
        **({"first_step_s": first} if compiles else {}),
        "denoise_s": clock.seconds("step", "denoise") - first,
        **({"preview_s": clock.seconds("preview")} if job.preview_every else {}),
        "decode_s": clock.seconds("decode"),
        "steps_ms": clock.ms("step"),
        "sigmas": sigmas,
        "forwards": forwards,
    }


def _cache(settings: Settings, plan: Plan, stats: Sequence[ForwardStats]) -> dict[str, Any]:
    """The lossy caches and what they reused; empty without one."""
    method = settings.step_cache.step_cache
    methods: list[str] = [method] if method != "none" else []
    if plan.gate is not None:
        methods.append(f"cfg-gate {plan.gate}")
    if not methods:
        return {}
    return {"method": " and ".join(methods), **reuse_json(stats)}


def decode_file(
    latents_file: Path, output: Path, report: Report, overrides: Layer, *,
    replaced: Collection[Path] = (),
) -> RunRecord:  # fmt: skip
    """Decode saved latents to a video, loading only the VAE. Raises WancliError.

    `overrides` go above the settings in the record of the latents. Existing files are replaced
    only if they are in `replaced`.
    """
    started = perf_counter()
    latents, source = read_latents(latents_file)
    layer = Layer(f"record of {latents_file.name}", settings_of(source))
    settings = resolve([layer, overrides], Settings).settings
    check_machine(settings.machine)
    check_tiling(settings)
    check_vae_decoder(settings.machine)
    check_output(settings.output)
    choose_encoding(settings.output, (settings.video.width, settings.video.height))
    report(Phase("load"))
    spec = add_weight_files(find_spec(settings.model), vae=settings.machine.vae)
    spec = add_vae_decoder(spec, settings.machine.vae_decoder)
    vae, device = load_vae(spec, settings.machine)
    loaded = perf_counter()
    report(Phase("decode"))
    with fits_in_memory(spec.name, DECODING):
        frames = decode(vae, latents, report)
    decoded = perf_counter()
    timings = {"load_s": loaded - started, "decode_s": decoded - loaded}
    update: dict[str, Any] = {
        "status": "ok",
        "command": "decode",
        "error": None,
        "env": versions() | {"vae_decoder": decoder_in_words(vae)},
        "request": _decoding_request(source["request"], settings, spec),
        "timings": timings,
        "memory": peak_memory(device),
    }
    copied = {field.name: source[field.name] for field in fields(RunRecord) if field.name in source}
    record = RunRecord(**(copied | update))
    report(Phase("write"))
    timed = TimedRecord(record, started)
    written = write_video(frames, output, timed, settings, latents, replaced=replaced)
    record = replace(timed.now(), output=written.as_json())
    write_record(record, output, replaced)
    return record


def _decoding_request(
    request: Mapping[str, Any], settings: Settings, spec: ModelSpec
) -> dict[str, Any]:
    """The request of latents, with the settings and weights that decode them now."""
    decoding = [entry for entry in weights_json(spec) if entry["part"] in ("vae", DECODER)]
    replaced = {entry["part"] for entry in decoding} | {DECODER}
    weights = [entry for entry in request.get("weights", []) if entry["part"] not in replaced]
    others = {name: value for name, value in request.items() if name != "weights"}
    weights += decoding
    machine = {"machine": settings.machine.model_dump()}
    return others | machine | ({"weights": weights} if weights else {})


def write_video(
    frames: Any, path: Path, record: TimedRecord, settings: Settings, latents: Tensor | None, *,
    replaced: Collection[Path] = (),
) -> WrittenVideo:  # fmt: skip
    """Write uint8 [T, H, W, 3]. If that fails, the latents are saved and the error says where.

    The times in the record inside are those before the file is read back.
    """
    _, height, width, _ = frames.shape
    encoding = choose_encoding(settings.output, (width, height))
    with (
        keeping(latents, path, record.now().as_json()),
        fits_in_memory(settings.model, DECODING),
        VideoWriter(
            path, size=(width, height), fps=settings.video.fps, encoding=encoding,
            replaced=replaced,
        ) as writer,
    ):  # fmt: skip
        writer.write(frames)
        writer.digests()  # once the encoder has ended
        return finish(writer, record.now(), settings)


def finish(writer: VideoWriter, record: RunRecord, settings: Settings) -> WrittenVideo:
    """Finish the video with its record and digests inside. Raises OutputError."""
    if not settings.output.metadata:
        return writer.finish({})
    return writer.finish({"comment": replace(record, output=writer.digests()).embedded()})
