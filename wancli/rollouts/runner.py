"""Runs a rollout: load, encode, then chunk after chunk into one video, and a record."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from wancli.catalog.geometry import Span
from wancli.catalog.specs import ModelSpec
from wancli.config.settings import RolloutSettings
from wancli.errors import DecodeError, InputError, OutputError, RunError
from wancli.generation.noise import IndexedNoise, Noise, StreamNoise
from wancli.generation.runner import finish
from wancli.models.load import Loaded, load_pipeline
from wancli.models.memory import fits_in_memory, peak_memory, trim_heap
from wancli.models.timer import Timer
from wancli.planning.context import NO_FILES, ContextFiles
from wancli.planning.plan import RolloutPlan
from wancli.planning.prompts import PromptSchedule
from wancli.records.progress import Phase, Report, Step
from wancli.records.record import UNFINISHED, Request, RunRecord, rounded, write_record
from wancli.records.write import start_record, versions
from wancli.rollouts.context import PromptEncoder, read_context, read_noise
from wancli.rollouts.denoiser import CausalDenoiser
from wancli.rollouts.loop import Chunk, KVCommitted, RolloutInputs, rollout
from wancli.rollouts.loop import StepDone as ChunkStep
from wancli.rollouts.resume import may_redecode, start_rollout
from wancli.rollouts.sampler import ChunkSampler, causal_denoiser
from wancli.rollouts.sink import ChunkOutput, VideoSink
from wancli.rollouts.store import CONTEXT, TIMES_FILE, RolloutStore, chunk_name
from wancli.rollouts.timings import ChunkTiming, TimingLog, rates, reuse, summed
from wancli.utils.interrupts import Interrupted
from wancli.video.drift import DriftMeter
from wancli.video.ffmpeg import Encoding
from wancli.video.latents import save_latents
from wancli.video.metadata import output_json
from wancli.video.write import VideoWriter


@dataclass(frozen=True)
class RolloutJob:
    """One rollout to start or to resume, and where its files go."""

    request: Request
    settings: RolloutSettings
    plan: RolloutPlan
    schedule: PromptSchedule
    seeds: Mapping[int, int]  # by the first chunk that uses it
    store: Path
    video: Path | None  # None: latents only
    starts: ContextFiles = NO_FILES
    latents: Path | None = None
    only_new: bool = False
    replaces: bool = False  # the rollout in `store`, once the model has loaded
    replaced: frozenset[Path] = frozenset()  # files that may be overwritten

    @property
    def resume(self) -> str:
        """The command that resumes it."""
        where = f"-o {self.video}" if self.video else f"--no-video --save-latents {self.latents}"
        return f"wancli rollout --resume {where}"

    @property
    def parts(self) -> list[str]:
        """Parts of the pipeline to load."""
        text = [] if self.starts.prompt_embeds else ["text_encoder"]
        return ["transformer", *text, *(["vae"] if self.video or self.starts.needs_vae else [])]


def roll(
    job: RolloutJob, spec: ModelSpec, report: Report, *, since: float, beside: bool | None = None
) -> RunRecord:
    """Generate the missing chunks of a rollout, its video, its sidecar and its record.

    `since` is when loading began, by perf_counter. With `beside`, a chunk is decoded while the next
    one is denoised; the default is to do so on CUDA devices. The caller holds the store's lock.
    Raises WancliError; finished chunks are kept.
    """
    try:
        with fits_in_memory(spec.name):
            record = _roll(job, spec, report, since=since, beside=beside)
        if not RolloutStore(job.store).holds(len(job.plan.spans)):
            hint = f"{job.video or job.latents} is complete"
            raise OutputError(f"chunks were deleted from {job.store} during the run.", hint=hint)
        return record
    except Interrupted as error:
        if RolloutStore(job.store).chunks():
            error.hint = f"finished chunks are kept: {job.resume}"
        raise
    except DecodeError as error:
        how = "resume" if may_redecode(job.request.as_json()) else "overwrite"
        raise DecodeError(str(error), hint=f"`{how}` with {error.hint}") from error
    except OutputError as error:
        gone = not RolloutStore(job.store).holds(0)
        then = "it cannot be resumed: its folder was deleted" if gone else f"then {job.resume}"
        raise OutputError(str(error), hint=f"{error.hint}; {then}") from error


def _roll(
    job: RolloutJob, spec: ModelSpec, report: Report, *, since: float, beside: bool | None
) -> RunRecord:
    record = start_record(job.request, command="rollout", created=datetime.now(UTC))
    store = RolloutStore(job.store)
    ready = _prepare(job, spec, store, report, since=since)
    loaded, started = ready.loaded, perf_counter()
    report(Phase("rollout"))
    with ExitStack() as stack:
        model = stack.enter_context(causal_denoiser(loaded, job.settings, job.plan))
        writer, sink = _open_video(stack, job, loaded, record, beside=beside)
        sampler = ChunkSampler(loaded, job.settings, job.plan, _noise(job))
        inputs = RolloutInputs(
            context=ready.context,
            spans=job.plan.spans,
            prompts=ready.prompts.of_chunk,
            finished=lambda span: _finished(job, loaded, store, span),
            denoise=sampler,
            context_timestep=job.settings.rollout.context_noise,
        )
        timings_log = stack.enter_context(TimingLog(store.folder / TIMES_FILE))
        run = _Run(job, model, sampler, sink, timings_log, report)
        for event in rollout(model, inputs):
            run.handle(event)
        drift = sink.drift() if sink else {}
        run.finish()
        timings: dict[str, Any] = {
            **ready.timings,
            **summed(timings_log),
            "rollout_s": perf_counter() - started,
            "total_s": perf_counter() - since,
        }
        timings |= {"fps": rates(timings_log, timings["rollout_s"]), "kv_bytes": model.nbytes}
        record = replace(
            record, status="ok", timings=timings, env=versions(),
            memory=peak_memory(loaded.device) | {"offload": job.settings.machine.offload},
            drift=drift, cache=_reuse(job, timings_log),
        )  # fmt: skip
        written = finish(writer, record, job.settings) if writer else None
        rows = timings_log.ends()
    # With a video but without its chunks there is nothing to save: `roll` reports that.
    if job.latents and (written is None or store.holds(len(job.plan.spans))):
        context = [latents for _, latents in ready.context]
        _save_latents(job.latents, job, context, store, record)
    timings |= {"total_s": perf_counter() - since, "chunks": rows}
    output = output_json(written) if written else {"path": str(job.latents)}
    output = {**output, "rollout": str(job.store)}
    record = replace(record, output=output, timings=rounded(timings))
    write_record(record, job.video or job.latents or job.store, job.replaced)
    return record


@dataclass(frozen=True)
class _Prepared:
    """A loaded model and what its chunks are generated from."""

    loaded: Loaded
    prompts: PromptEncoder
    context: list[tuple[Span, Tensor]]
    timings: Mapping[str, float]  # of loading and encoding


def _prepare(
    job: RolloutJob, spec: ModelSpec, store: RolloutStore, report: Report, *, since: float
) -> _Prepared:
    """Load the model and encode the inputs; only then an earlier rollout is deleted."""
    report(Phase("load"))
    # Every chunk needs the transformer and the VAE: the VAE, which is small, stays on the device.
    loaded = load_pipeline(spec, job.settings.machine, job.parts, stays=("vae",))
    loading = perf_counter()
    report(Phase("encode"))
    prompts = PromptEncoder(
        loaded, job.settings, job.schedule, guided=job.plan.guided, embeds=job.starts.prompt_embeds
    )
    prompts.encode()
    if job.replaces:
        start_rollout(store, job.request.as_json())
    context = _context(job, loaded, store)
    timings = {"load_s": loading - since, "encode_prompt_s": perf_counter() - loading}
    return _Prepared(loaded, prompts, context, timings)


def _save_latents(
    path: Path, job: RolloutJob, context: list[Tensor], store: RolloutStore, record: RunRecord
) -> None:
    """Save the latents of the context and all chunks as one file. Raises OutputError."""
    chunks = [*context, *(store.chunk(span.index) for span in job.plan.spans)]
    latents = torch.cat([chunk.cpu() for chunk in chunks], 2)
    save_latents(latents, path, record.as_json(), overwrite=path in job.replaced)


class _Run:
    """Handles the events of a rollout: chunks go to store and video, timings to their file."""

    def __init__(
        self, job: RolloutJob, model: CausalDenoiser, sampler: ChunkSampler, sink: VideoSink | None,
        timings: TimingLog, report: Report,
    ) -> None:  # fmt: skip
        self._job, self._model, self._sampler, self._sink = job, model, sampler, sink
        self._store = RolloutStore(job.store)
        self._report, self._done, self._steps = report, 0, sum(job.plan.steps)
        self._device = model.device
        self._timer = Timer(self._device)
        self._timings = timings
        self._open: list[ChunkTiming] = []  # may not be fully timed yet
        self._sigmas: list[float] = []

    def handle(self, event: ChunkStep | Chunk | KVCommitted) -> None:
        """Handle one event of the rollout."""
        if isinstance(event, ChunkStep):
            self._timer.mark("step")
            self._sigmas.append(event.denoised.sigma)
            self._report(Step(self._done, self._steps, event.denoised.sigma))
            self._done += 1
        elif isinstance(event, Chunk):
            self._handle_chunk(event)
        else:
            self._timer.mark("clean")
            self._next()

    def _handle_chunk(self, event: Chunk) -> None:
        span = event.span
        if event.generated:
            if not torch.isfinite(event.latents).all():
                raise RunError(
                    f"the latents of chunk {span.index} are not finite: denoising failed.",
                    hint="`overwrite` with `dtype float32` or a lower `guidance_scale`",
                )
            # If the folder was deleted, finish the video before reporting it.
            if self._sink is None or self._store.holds(0):
                self._store.save(chunk_name(span.index), event.latents)
            else:
                self._report(Phase("rollout without its folder, which was deleted"))
        elif span.index >= 0:
            self._done += self._job.plan.steps[span.index]
        stats = self._sampler.stats if event.generated else ()
        row = ChunkTiming(
            span, self._timer, event.generated, self._model.visible, self._sigmas, stats=stats
        )
        self._open.append(row)
        if self._sink:
            row.output = self._sink.add(span, event.latents)
        else:
            row.output = ChunkOutput(span.video_frames(self._sampler.loaded.spec.strides))
        self._timer.mark("shown")

    def _next(self) -> None:
        self._timer, self._sigmas = Timer(self._device), []
        if len(self._open) > 1:  # all before the last are fully timed
            self._timings.add(self._open.pop(0))
        trim_heap()

    def finish(self) -> None:
        """Log the timings of the last chunks, once everything is done."""
        while self._open:
            self._timings.add(self._open.pop(0))


def _reuse(job: RolloutJob, timings: TimingLog) -> dict[str, Any]:
    """Savings of the step cache; empty without one."""
    method = job.settings.step_cache.step_cache
    return {} if method == "none" else {"method": method, **reuse(timings)}


def _finished(job: RolloutJob, loaded: Loaded, store: RolloutStore, span: Span) -> Tensor | None:
    """Latents [1, C, n, H, W] of a finished chunk; None if it has to be generated."""
    latents, shape = store.load(chunk_name(span.index), loaded.device), job.plan.shape
    expected = (1, shape.channels, span.frames, shape.height, shape.width)
    return latents if latents is not None and latents.shape == expected else None


def _context(job: RolloutJob, loaded: Loaded, store: RolloutStore) -> list[tuple[Span, Tensor]]:
    """Chunks of the initial context, encoded once: a resumed rollout reuses the same latents."""
    if not job.plan.context:
        return []
    latents = store.load(CONTEXT, loaded.device)
    if latents is None:
        latents = read_context(job.starts, loaded, job.plan).to(loaded.device)
        store.save(CONTEXT, latents)
    return [(span, latents[:, :, span.first_frame : span.end]) for span in job.plan.context]


def _noise(job: RolloutJob) -> Noise:
    plan, file = job.plan, job.starts.noise_file
    shape = (plan.shape.channels, plan.shape.height, plan.shape.width)
    if job.settings.rollout.noise == "indexed" and not file:
        return IndexedNoise(job.seeds, shape)
    start, renoise = read_noise(file) if file else (None, None)
    few = job.settings.rollout.sampler == "few-step"
    draws = plan.steps if few else [1] * len(plan.spans)  # a solver only needs initial noise
    try:
        return StreamNoise(
            plan.spans, draws, shape, seed=job.seeds[0], start=start, renoise=renoise
        )
    except ValueError as error:
        raise InputError(
            f"{file}: {error}.", hint="see `noise_file` in wancli rollout --help"
        ) from None


def _open_video(
    stack: ExitStack, job: RolloutJob, loaded: Loaded, record: RunRecord, *, beside: bool | None
) -> tuple[VideoWriter | None, VideoSink | None]:
    """The writer and its sink, closed with the stack; None without a video."""
    if job.video is None:
        return None, None
    output, video = job.settings.output, job.settings.video
    writer = stack.enter_context(
        VideoWriter(
            job.video,
            size=(video.width, video.height),
            fps=video.fps,
            encoding=Encoding.of(output),
            replaced=job.replaced,
            streaming=True,
            metadata={"comment": record.embedded() if output.metadata else UNFINISHED},
        )
    )
    sink = stack.enter_context(
        VideoSink(
            loaded.pipeline.vae,
            writer,
            DriftMeter(video.fps),
            beside=_beside(loaded, job) if beside is None else beside,
            shows=lambda span: span.index >= 0 or not job.only_new,
        )
    )
    return writer, sink


def _beside(loaded: Loaded, job: RolloutJob) -> bool:
    """Whether decoding can overlap with denoising: an asynchronous device with memory to spare."""
    return loaded.device.type == "cuda" and job.settings.machine.offload in ("auto", "none")
