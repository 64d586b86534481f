"""Runs a rollout: load, encode, then chunk after chunk into one video, and a record."""

import shlex
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wancli.catalog.geometry import Span
from wancli.config.settings import RolloutSettings
from wancli.errors import DecodeError, InputError, OutputError
from wancli.generation.noise import IndexedNoise, Noise, StreamNoise
from wancli.generation.runner import finish
from wancli.models.fast_decoder import benchmark_decoder, compile_decoder, decoder_in_words
from wancli.models.load import Loaded
from wancli.models.memory import fits_in_memory, peak_memory, trim_heap
from wancli.models.timer import Timer
from wancli.models.vae import StreamingDecoder, encode
from wancli.models.warm import WarmPipeline
from wancli.planning.context import NO_FILES, ContextFiles
from wancli.planning.plan import RolloutPlan
from wancli.planning.prompts import PromptSchedule
from wancli.records.naming import literal
from wancli.records.progress import ChunkDone, Phase, Report, Step
from wancli.records.record import (
    UNFINISHED,
    UNFINISHED_JSON,
    Request,
    RunRecord,
    rounded,
    write_record,
)
from wancli.records.write import start_record, versions
from wancli.rollouts.context import PromptEncoder, read_context, read_noise
from wancli.rollouts.denoiser import CausalDenoiser
from wancli.rollouts.loop import Chunk, KVCommitted, RolloutInputs, rollout
from wancli.rollouts.loop import StepDone as ChunkStep
from wancli.rollouts.resume import may_redecode, start_rollout
from wancli.rollouts.sampler import ChunkSampler, causal_denoiser
from wancli.rollouts.sink import ChunkSink, VideoSink
from wancli.rollouts.store import CONTEXT, TIMES_FILE, RolloutStore, Store, chunk_name
from wancli.rollouts.timings import ChunkTiming, TimingLog, rates, reuse, summed
from wancli.utils.interrupts import Interrupted
from wancli.video.drift import DriftMeter
from wancli.video.ffmpeg import choose_encoding
from wancli.video.latents import save_latents
from wancli.video.write import VideoWriter, WrittenVideo


@dataclass(frozen=True)
class RolloutJob:
    """One rollout to start or to resume, and where its files go."""

    request: Request
    settings: RolloutSettings
    plan: RolloutPlan
    schedule: PromptSchedule
    seeds: Mapping[int, int]  # by the first chunk that uses it
    store: Store
    video: Path | None  # None: no video is written
    decodes: bool = True  # False: latents only
    starts: ContextFiles = NO_FILES
    latents: Path | None = None
    only_new: bool = False
    replaces: bool = False  # the rollout in `store`, once the model has loaded
    replaced: frozenset[Path] = frozenset()  # files that may be overwritten
    beside: bool | None = None  # save and write chunks beside later ones; None: on CUDA devices

    @property
    def resume(self) -> str:
        """The command that resumes it, as it is typed into a shell."""
        flags = ["-o"] if self.video else ["--no-video", "--save-latents"]
        name = literal(self.video or self.latents or "")
        return shlex.join(["wancli", "rollout", "--resume", *flags, name])

    @property
    def record_path(self) -> Path | None:
        """The file that the record lies beside; None without files."""
        return self.video or self.latents or self.store.folder


@dataclass(frozen=True)
class RolloutChunk:
    """A decoded chunk: frames uint8 [T, H, W, 3], and clean latents [1, C, n, H, W] on the CPU.

    `index` is negative for the initial context; `generated` is False there, and for chunks of an
    earlier run.
    """

    index: int
    frames: NDArray[np.uint8]
    latents: Tensor
    generated: bool


Chunks = Generator[RolloutChunk, None, RunRecord]


def roll(job: RolloutJob, model: WarmPipeline, report: Report) -> Chunks:
    """Generate the missing chunks of a rollout, its video, its sidecar and its record.

    Yields each chunk of the video once it is decoded. The caller holds the store's lock. Raises
    WancliError; finished chunks are kept.
    """
    store = job.store
    try:
        with fits_in_memory(model.spec.name):
            record = yield from _roll(job, model, report)
        if not store.holds(len(job.plan.spans)):
            hint = f"{job.video or job.latents} is complete"
            raise OutputError(f"chunks were deleted from {store.folder} during the run.", hint=hint)
        return record
    except Interrupted as error:
        if store.chunks():
            error.hint = f"finished chunks are kept: {job.resume}"
        raise
    except DecodeError as error:
        if not store.folder:
            raise
        how = "resume" if may_redecode(job.request.as_json()) else "overwrite"
        raise DecodeError(str(error), hint=f"`{how}` with {error.hint}") from error
    except OutputError as error:
        if not store.folder:
            raise
        gone = not store.holds(0)
        then = "it cannot be resumed: its folder was deleted" if gone else f"then {job.resume}"
        raise OutputError(str(error), hint=f"{error.hint}; {then}") from error


def _roll(job: RolloutJob, model: WarmPipeline, report: Report) -> Chunks:
    record = start_record(job.request, command="rollout", created=datetime.now(UTC))
    with model.in_use(report) as (loaded, load_s):
        loading = perf_counter()
        ready = _prepare(job, loaded, report, load_s=load_s)
        record, rows = yield from _generate(job, ready, record, report)
        # With a video but without its chunks there is nothing to save: `roll` reports that.
        if job.latents and (job.video is None or job.store.holds(len(job.plan.spans))):
            _save_latents(job.latents, job, [latents for _, latents in ready.context], record)
        spent = {"total_s": perf_counter() - loading + load_s, "chunks": rows}
    record = replace(record, timings=rounded({**record.timings, **spent}))
    if job.record_path:
        write_record(record, job.record_path, job.replaced)
    return record


@dataclass(frozen=True)
class _Prepared:
    """A loaded model and what its chunks are generated from."""

    loaded: Loaded
    prompts: PromptEncoder
    context: list[tuple[Span, Tensor]]
    start: Tensor | None  # clean latents that the first chunk begins with
    timings: Mapping[str, float]  # of loading and encoding


def _prepare(job: RolloutJob, loaded: Loaded, report: Report, *, load_s: float) -> _Prepared:
    """Encode the inputs; only then an earlier rollout is deleted."""
    started = perf_counter()
    report(Phase("encode"))
    prompts = PromptEncoder(
        loaded, job.settings, job.schedule, guided=job.plan.guided, embeds=job.starts.prompt_embeds
    )
    prompts.encode()
    if job.replaces and isinstance(job.store, RolloutStore):
        start_rollout(job.store, job.request.as_json())
    context, start = _context(job, loaded)
    timings = {"load_s": load_s, "encode_prompt_s": perf_counter() - started}
    return _Prepared(loaded, prompts, context, start, timings)


def _generate(
    job: RolloutJob, ready: _Prepared, record: RunRecord, report: Report
) -> Generator[RolloutChunk, None, tuple[RunRecord, list[dict[str, Any]]]]:
    """Generate, decode and write chunk after chunk; the record, and the timings of the chunks."""
    loaded = ready.loaded
    with ExitStack() as stack:
        model = stack.enter_context(causal_denoiser(loaded, job.settings, job.plan))
        preparing = {**ready.timings, **_compile(job, model, ready, report)}
        report(Phase("rollout"))
        began = perf_counter()
        writer = _open_video(stack, job, record)
        sink = stack.enter_context(_sink(job, loaded, writer))
        if isinstance(sink, VideoSink) and job.settings.rollout.reencode_first:
            model.encode_first = partial(_encode_recent, loaded, sink)
        sampler = ChunkSampler(loaded, job.settings, job.plan, _noise(job))
        folder = job.store.folder
        timings_log = stack.enter_context(TimingLog(folder / TIMES_FILE if folder else None))
        run = _Run(job, model, sampler, sink, timings_log, report)
        for event in rollout(model, _inputs(job, ready, sampler)):
            run.handle(event)
            yield from run.decoded()
        sink.finish()
        yield from run.decoded()
        run.finish()
        rollout_s = perf_counter() - began
        timings: dict[str, Any] = {
            **preparing,
            **summed(timings_log),
            "rollout_s": rollout_s,
            "total_s": sum(preparing.values()) + rollout_s,
            "fps": rates(timings_log, rollout_s),
            "kv_bytes": model.nbytes,
        }
        env = versions() | {"attention": model.kernel.name}
        if loaded.pipeline.vae is not None:
            env["vae_decoder"] = decoder_in_words(loaded.pipeline.vae)
        memory = peak_memory(loaded.device) | {"offload": job.settings.machine.offload}
        record = replace(
            record, status="ok", timings=timings, env=env, memory=memory,
            drift=sink.drift(), cache=_reuse(job, timings_log),
        )  # fmt: skip
        written = finish(writer, record, job.settings) if writer else None
        rows = timings_log.ends()
        frames = sum(row["video_frames"] for row in timings_log)
    return replace(record, output=_output_json(job, written, frames=frames)), rows


def _inputs(job: RolloutJob, ready: _Prepared, sampler: ChunkSampler) -> RolloutInputs:
    return RolloutInputs(
        context=ready.context,
        spans=job.plan.spans,
        prompts=ready.prompts.of_chunk,
        finished=lambda span: _finished(job, ready.loaded, span),
        denoise=sampler,
        start=ready.start,
        context_timestep=job.settings.rollout.context_noise,
    )


def _compile(
    job: RolloutJob, model: CausalDenoiser, ready: _Prepared, report: Report
) -> dict[str, float]:
    """Compile every graph before the first chunk; how long it took, nothing without `compile`."""
    if not job.settings.machine.compile:
        return {}
    started = perf_counter()
    report(Phase("compile"))
    spans, shape = [*job.plan.context, *job.plan.spans], job.plan.shape
    longest = max(span.frames for span in spans)
    model.set_prompt(ready.prompts.of_chunk(spans[0]).prompts)
    size = (1, shape.channels, longest, shape.height, shape.width)
    zeros = torch.zeros(size, device=model.device)
    model.warm_up(spans, zeros)
    vae = ready.loaded.pipeline.vae
    if vae is not None and compile_decoder(vae):
        benchmark_decoder(vae)
        decoder = StreamingDecoder(vae)
        for span in spans[:3]:  # the first two begin the video, the third continues it
            decoder.frames(zeros[:, :, : span.frames])
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return {"compile_s": perf_counter() - started}


def _output_json(job: RolloutJob, written: WrittenVideo | None, *, frames: int) -> dict[str, Any]:
    """The output section of the record."""
    if job.record_path is None:
        return {"frames": frames, "duration_s": round(frames / job.settings.video.fps, 3)}
    output = written.as_json() if written else {"path": str(job.latents)}
    return {**output, "rollout": str(job.store.folder)}


def _save_latents(path: Path, job: RolloutJob, context: list[Tensor], record: RunRecord) -> None:
    """Save the latents of the context and all chunks as one file. Raises OutputError."""
    chunks = [*context, *(job.store.chunk(span.index) for span in job.plan.spans)]
    latents = torch.cat([chunk.cpu() for chunk in chunks], 2)
    save_latents(latents, path, record.as_json(), overwrite=path in job.replaced)


class _Run:
    """Handles the events of a rollout: chunks go to store and video, timings to their file."""

    def __init__(
        self, job: RolloutJob, model: CausalDenoiser, sampler: ChunkSampler, sink: ChunkSink,
        timings: TimingLog, report: Report,
    ) -> None:  # fmt: skip
        self._job, self._model, self._sampler, self._sink = job, model, sampler, sink
        self._store = job.store
        self._report, self._device = report, model.device
        self._timer = Timer(self._device)
        self._timings = timings
        self._open: deque[ChunkTiming] = deque()  # may not be fully timed yet
        self._undecoded: deque[ChunkTiming] = deque()  # or not yielded yet
        self._sigmas: list[float] = []
        self._folder_lost = False

    def handle(self, event: ChunkStep | Chunk | KVCommitted) -> None:
        """Handle one event of the rollout."""
        if isinstance(event, ChunkStep):
            self._timer.mark("step")
            self._sigmas.append(event.denoised.sigma)
            self._report(self._step(event))
        elif isinstance(event, Chunk):
            self._handle_chunk(event)
        else:
            self._timer.mark("clean")
            self._next()

    def _step(self, event: ChunkStep) -> Step:
        plan, chunk = self._job.plan, event.span.index
        step = len(self._sigmas) - 1
        return Step(step, plan.steps[chunk], event.denoised.sigma, chunk, len(plan.spans))

    def _handle_chunk(self, event: Chunk) -> None:
        span = event.span
        stats = self._sampler.stats if event.generated else ()
        save = self._save if event.generated else None
        output = self._sink.add(span, event.latents, self._timer, save=save)
        # Without threads the sink takes the time of writing, else none.
        self._timer.mark("wait" if self._sink.beside else "shown")
        if not self._job.decodes:
            output.frames = span.video_frames(self._sampler.loaded.spec.strides)
        row = ChunkTiming(
            span, self._timer, event.generated, self._model.visible, self._sigmas, output, stats
        )  # fmt: skip
        self._open.append(row)
        self._undecoded.append(row)
        if self._folder_lost:
            self._report(Phase("rollout without its folder, which was deleted"))
        if span.index >= 0:
            self._report(ChunkDone(span.index, len(self._job.plan.spans), event.generated))

    def _save(self, span: Span, latents: Tensor) -> None:
        # If the folder was deleted, finish the video before reporting it.
        self._folder_lost = self._job.decodes and not self._store.holds(0)
        if not self._folder_lost:
            self._store.save(chunk_name(span.index), latents)

    def decoded(self) -> Iterator[RolloutChunk]:
        """The chunks of the video that are decoded and were not yielded yet, in order."""
        while self._undecoded and self._undecoded[0].output.done:
            row = self._undecoded.popleft()
            frames, latents = row.output.pixels, row.output.latents
            row.output.pixels = row.output.latents = None
            if frames is not None and latents is not None:
                yield RolloutChunk(row.span.index, frames, latents, row.generated)

    def _next(self) -> None:
        self._timer, self._sigmas = Timer(self._device), []
        while len(self._open) > 1 and self._open[0].output.done:  # and its clean pass is, too
            self._timings.add(self._open.popleft())
        if self._device.type != "cuda":  # which keeps no activations on the heap
            trim_heap()

    def finish(self) -> None:
        """Log the timings of the last chunks, once everything is done."""
        while self._open:
            self._timings.add(self._open.popleft())


def _reuse(job: RolloutJob, timings: TimingLog) -> dict[str, Any]:
    """Savings of the step cache; empty without one."""
    method = job.settings.step_cache.step_cache
    return {} if method == "none" else {"method": method, **reuse(timings)}


def _finished(job: RolloutJob, loaded: Loaded, span: Span) -> Tensor | None:
    """Latents [1, C, n, H, W] of a finished chunk; None if it has to be generated."""
    latents, shape = job.store.load(chunk_name(span.index), loaded.device), job.plan.shape
    expected = (1, shape.channels, span.frames, shape.height, shape.width)
    return latents if latents is not None and latents.shape == expected else None


def _context(job: RolloutJob, loaded: Loaded) -> tuple[list[tuple[Span, Tensor]], Tensor | None]:
    """Chunks of the initial context, and latents that the first chunk begins with.

    They are encoded once: a resumed rollout reuses the same latents.
    """
    plan = job.plan
    if not plan.start_frames:
        return [], None
    latents = job.store.load(CONTEXT, loaded.device)
    if latents is None:
        latents = read_context(job.starts, loaded, job.plan).to(loaded.device)
        job.store.save(CONTEXT, latents)
    context = [(span, latents[:, :, span.first_frame : span.end]) for span in plan.context]
    return context, None if context else latents


def _noise(job: RolloutJob) -> Noise:
    plan, file = job.plan, job.starts.noise_file
    shape = (plan.shape.channels, plan.shape.height, plan.shape.width)
    if job.settings.rollout.noise == "indexed" and not file:
        return IndexedNoise(job.seeds, shape)
    start, renoise = read_noise(file) if file else (None, None)
    few = job.settings.sampling.scheduler == "few-step"
    draws = plan.steps if few else [1] * len(plan.spans)  # a solver only needs initial noise
    try:
        return StreamNoise(
            plan.spans, draws, shape, seed=job.seeds[0], start=start, renoise=renoise
        )
    except ValueError as error:
        raise InputError(
            f"{file}: {error}.", hint="see `noise_file` in wancli rollout --help"
        ) from None


def _open_video(stack: ExitStack, job: RolloutJob, record: RunRecord) -> VideoWriter | None:
    """The writer, closed with the stack; None without a file."""
    if job.video is None:
        return None
    output, video = job.settings.output, job.settings.video
    unfinished = replace(record, status=UNFINISHED)  # until it is finished, and replaced
    size = (video.width, video.height)
    return stack.enter_context(
        VideoWriter(
            job.video,
            size=size,
            fps=video.fps,
            encoding=choose_encoding(output, size, live=True),
            replaced=job.replaced,
            streaming=True,
            metadata={"comment": unfinished.embedded() if output.metadata else UNFINISHED_JSON},
        )
    )


def _sink(job: RolloutJob, loaded: Loaded, writer: VideoWriter | None) -> ChunkSink:
    """Where the clean chunks go: to their files alone, or to a video as well."""
    beside = loaded.device.type == "cuda" if job.beside is None else job.beside
    if not job.decodes:
        return ChunkSink(beside=beside)
    recalls = job.plan.window.window * loaded.spec.strides.temporal
    return VideoSink(
        loaded.pipeline.vae,
        writer,
        DriftMeter(job.settings.video.fps),
        beside=beside,
        shows=lambda span: span.index >= 0 or not job.only_new,
        recalls=recalls if job.settings.rollout.reencode_first else 0,
    )


@torch.no_grad()
def _encode_recent(loaded: Loaded, sink: VideoSink, following: int) -> Tensor:
    """The last video frame of a latent frame, encoded as a picture [1, C, 1, H, W].

    `following` latent frames have been decoded after it.
    """
    assert sink.recent is not None  # noqa: S101 - a chunk whose context has an end follows others
    frame = sink.recent[-1 - following * loaded.spec.strides.temporal]
    return encode(loaded.pipeline.vae, frame.permute(2, 0, 1)[None, :, None] / 127.5 - 1)
