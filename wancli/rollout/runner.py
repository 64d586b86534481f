"""The runner of rollouts: load, encode, then chunk after chunk into one video, and a record."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from wancli.catalog.geometry import Span
from wancli.catalog.specs import ModelSpec
from wancli.config.settings import RolloutSettings
from wancli.errors import InputError, OutputError, RunError
from wancli.generate.runner import finish
from wancli.models.load import Loaded, load_pipeline
from wancli.models.memory import fits_in_memory, give_back, peak_memory
from wancli.models.timer import Timer
from wancli.planning.plan import RolloutPlan
from wancli.planning.prompts import PromptSchedule
from wancli.records.progress import Phase, Report, Step
from wancli.records.record import UNFINISHED, Request, RunRecord, rounded, write_record
from wancli.records.write import start_record, versions
from wancli.rollout.context import (
    InitialContext,
    PromptEncoder,
    ResearchTensors,
    read_given,
    read_noise,
)
from wancli.rollout.denoiser import CausalDenoiser
from wancli.rollout.loop import Chunk, ContextBuffer, KVCommitted, RolloutInputs, rollout
from wancli.rollout.loop import StepDone as ChunkStep
from wancli.rollout.resume import begin
from wancli.rollout.sampler import ChunkSampler, causal_denoiser
from wancli.rollout.sink import ChunkOutput, VideoSink
from wancli.rollout.store import GIVEN, TIMES_FILE, RolloutStore, chunk_name
from wancli.rollout.timings import ChunkTiming, TimingLog, rates, reuse, summed
from wancli.sampling.noise import IndexedNoise, Noise, StreamNoise
from wancli.utils.interrupts import Interrupted
from wancli.video.drift import DriftMeter
from wancli.video.ffmpeg import Encoding
from wancli.video.latents import save_latents
from wancli.video.metadata import output_json
from wancli.video.write import VideoWriter


@dataclass(frozen=True)
class RolloutJob:
    """One rollout to make, or to go on with, and where to put it."""

    request: Request
    settings: RolloutSettings
    plan: RolloutPlan
    schedule: PromptSchedule
    seeds: Mapping[int, int]  # the seed that holds from a chunk on
    store: Path
    video: Path | None  # None: latents only
    given: InitialContext = field(default_factory=InitialContext)
    inputs: ResearchTensors = field(default_factory=ResearchTensors)
    latents: Path | None = None
    only_new: bool = False
    replaces: bool = False  # the rollout that is in `store`, once the model has loaded
    replaced: frozenset[Path] = frozenset()  # where what is there may be replaced

    @property
    def resume(self) -> str:
        """What to type to go on with it."""
        where = f"-o {self.video}" if self.video else f"--no-video --save-latents {self.latents}"
        return f"wancli rollout --resume {where}"

    @property
    def parts(self) -> list[str]:
        """What has to be loaded."""
        text = [] if self.inputs.embeds else ["text_encoder"]
        return ["transformer", *text, *(["vae"] if self.video or self.given.needs_vae else [])]


def roll(
    job: RolloutJob, spec: ModelSpec, report: Report, *, since: float, beside: bool | None = None
) -> RunRecord:
    """Make what is missing of a rollout, its video, its sidecar and its record.

    `since` is when loading began, by perf_counter. Chunks are decoded `beside` the denoising of the
    next where the device computes by itself (CUDA). The caller holds the store's lock. Raises
    WancliError; finished chunks are kept.
    """
    try:
        with fits_in_memory(spec.name):
            record = _roll(job, spec, report, since=since, beside=beside)
        if not RolloutStore(job.store).holds(len(job.plan.spans)):
            hint = f"{job.video or job.latents} is whole"
            raise OutputError(f"chunks were deleted from {job.store} meanwhile.", hint=hint)
        return record
    except Interrupted as error:
        if RolloutStore(job.store).chunks():
            error.hint = f"finished chunks are kept: {job.resume}"
        raise
    except OutputError as error:
        gone = not RolloutStore(job.store).holds(0)
        then = "it cannot go on: its folder was deleted" if gone else f"then {job.resume}"
        raise OutputError(str(error), hint=f"{error.hint}; {then}") from error


def _roll(
    job: RolloutJob, spec: ModelSpec, report: Report, *, since: float, beside: bool | None
) -> RunRecord:
    record = start_record(job.request, command="rollout", created=datetime.now(UTC))
    report(Phase("load"))
    # Every chunk needs the transformer and the VAE, which is small beside it: that stays.
    loaded = load_pipeline(spec, job.settings.machine, job.parts, stays=("vae",))
    loading = perf_counter()
    report(Phase("encode"))
    store, texts = (
        RolloutStore(job.store),
        PromptEncoder(loaded, job.settings, job.inputs, job.schedule),
    )
    texts.encode()
    if job.replaces:
        begin(store, job.request.as_json(), overwrite=True)
    given = _given(job, loaded, store)
    encoded = perf_counter()
    report(Phase("rollout"))
    with ExitStack() as stack:
        model = stack.enter_context(causal_denoiser(loaded, job.settings, job.plan))
        writer, film = _film(stack, job, loaded, record, beside=beside)
        sampler = ChunkSampler(loaded, job.settings, job.plan, _noise(job))
        inputs = RolloutInputs(
            context=given,
            spans=job.plan.spans,
            prompts=texts.of_chunk,
            finished=lambda span: _finished(job, loaded, store, span),
            denoise=sampler,
            context_timestep=job.settings.rollout.context_noise,
        )
        times = stack.enter_context(TimingLog(store.folder / TIMES_FILE))
        run = _Run(job, model, sampler, film, times, report)
        for event in rollout(model, inputs, ContextBuffer(job.plan.window)):
            run.take(event)
        drift = film.drift() if film else {}
        run.finish()
        timings: dict[str, Any] = {
            "load_s": loading - since,
            "encode_prompt_s": encoded - loading,
            **summed(times),
            "rollout_s": perf_counter() - encoded,
            "total_s": perf_counter() - since,
        }
        timings |= {"fps": rates(times, timings["rollout_s"]), "kv_bytes": model.nbytes}
        record = replace(
            record, status="ok", timings=timings, env=versions(),
            memory=peak_memory(loaded.device) | {"offload": job.settings.machine.offload},
            drift=drift, cache=_reused(job, times),
        )  # fmt: skip
        written = finish(writer, record, job.settings) if writer else None
        rows = times.ends()
    if job.latents and (written is None or store.holds(len(job.plan.spans))):  # or deleted: told
        everything = [latents for _, latents in given]
        everything += [store.chunk(span.index) for span in job.plan.spans]
        save_latents(
            torch.cat([x.cpu() for x in everything], 2), job.latents, record.as_json(),
            overwrite=job.latents in job.replaced,
        )  # fmt: skip
    timings |= {"total_s": perf_counter() - since, "chunks": rows}
    output = output_json(written) if written else {"path": str(job.latents)}
    output = {**output, "rollout": str(job.store)}
    record = replace(record, output=output, timings=rounded(timings))
    write_record(record, job.video or job.latents or job.store, job.replaced)
    return record


class _Run:
    """What one rollout has done so far: chunks into store and film, times into their file."""

    def __init__(
        self, job: RolloutJob, model: CausalDenoiser, sampler: ChunkSampler, film: VideoSink | None,
        times: TimingLog, report: Report,
    ) -> None:  # fmt: skip
        self._job, self._model, self._sampler, self._film = job, model, sampler, film
        self._store = RolloutStore(job.store)
        self._report, self._done, self._steps = report, 0, sum(job.plan.steps)
        self._device = model.device
        self._clock = Timer(self._device)
        self._times = times
        self._open: list[ChunkTiming] = []  # whose times may not all be known yet
        self._sigmas: list[float] = []

    def take(self, event: ChunkStep | Chunk | KVCommitted) -> None:
        """One event of the rollout."""
        if isinstance(event, ChunkStep):
            self._clock.mark("step")
            self._sigmas.append(event.denoised.sigma)
            self._report(Step(self._done, self._steps, event.denoised.sigma))
            self._done += 1
        elif isinstance(event, Chunk):
            self._take_chunk(event)
        else:
            self._clock.mark("clean")
            self._next()

    def _take_chunk(self, event: Chunk) -> None:
        span = event.span
        if event.generated:
            if not torch.isfinite(event.latents).all():
                raise RunError(
                    f"the latents of chunk {span.index} are not finite: the denoising went wrong.",
                    hint="--dtype float32, or a lower --guidance-scale",
                )
            # Where somebody deleted the folder, the video is finished before that is told.
            if self._film is None or self._store.holds(0):
                self._store.save(chunk_name(span.index), event.latents)
            else:
                self._report(Phase("rollout without its folder, which was deleted"))
        elif span.index >= 0:
            self._done += self._job.plan.steps[span.index]
        uses = self._sampler.uses if event.generated else ()
        row = ChunkTiming(
            span, self._clock, event.generated, self._model.visible, self._sigmas, uses=uses
        )
        self._open.append(row)
        if self._film:
            row.shown = self._film.add(span, event.latents)
        else:
            row.shown = ChunkOutput(span.video_frames(self._sampler.loaded.spec.strides))
        self._clock.mark("shown")

    def _next(self) -> None:
        self._clock, self._sigmas = Timer(self._device), []
        if len(self._open) > 1:  # the one before the last is done on every lane
            self._times.add(self._open.pop(0))
        give_back()

    def finish(self) -> None:
        """The times of the last chunks: every lane is done."""
        while self._open:
            self._times.add(self._open.pop(0))


def _reused(job: RolloutJob, times: TimingLog) -> dict[str, Any]:
    """What the step cache saved; nothing where there is none."""
    method = job.settings.step_cache.step_cache
    return {} if method == "none" else {"method": method, **reuse(times)}


def _finished(job: RolloutJob, loaded: Loaded, store: RolloutStore, span: Span) -> Tensor | None:
    """A chunk that was made, [1, C, n, H, W]; None where it has to be made again."""
    latents, plan = store.load(chunk_name(span.index), loaded.device), job.plan.shape
    shape = (1, plan.channels, span.frames, plan.height, plan.width)
    return latents if latents is not None and latents.shape == shape else None


def _given(job: RolloutJob, loaded: Loaded, store: RolloutStore) -> list[tuple[Span, Tensor]]:
    """The context's chunks, encoded once: a resumed rollout goes on from the same latents."""
    if not job.plan.context:
        return []
    latents = store.load(GIVEN, loaded.device)
    if latents is None:
        latents = read_given(job.given, loaded, job.plan).to(loaded.device)
        store.save(GIVEN, latents)
    return [(span, latents[:, :, span.first_frame : span.end]) for span in job.plan.context]


def _noise(job: RolloutJob) -> Noise:
    plan = job.plan
    shape = (plan.shape.channels, plan.shape.height, plan.shape.width)
    if job.settings.rollout.noise == "indexed" and not job.inputs.noise:
        return IndexedNoise(job.seeds, shape)
    start, again = read_noise(job.inputs.noise) if job.inputs.noise else (None, None)
    few = job.settings.rollout.sampler == "few-step"
    draws = plan.steps if few else [1] * len(plan.spans)  # a solver is given its start alone
    try:
        return StreamNoise(plan.spans, draws, shape, seed=job.seeds[0], start=start, again=again)
    except ValueError as error:
        raise InputError(f"{job.inputs.noise}: {error}.", hint="see --noise-file --help") from None


def _film(
    stack: ExitStack, job: RolloutJob, loaded: Loaded, record: RunRecord, *, beside: bool | None
) -> tuple[VideoWriter | None, VideoSink | None]:
    """The writer and what feeds it, both closed with the stack; nothing without a video."""
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
    film = stack.enter_context(
        VideoSink(
            loaded.pipeline.vae,
            writer,
            DriftMeter(video.fps),
            beside=_beside(loaded, job) if beside is None else beside,
            shows=lambda span: span.index >= 0 or not job.only_new,
        )
    )
    return writer, film


def _beside(loaded: Loaded, job: RolloutJob) -> bool:
    """Whether there is memory to spare, and a device that computes by itself."""
    return loaded.device.type == "cuda" and job.settings.machine.offload in ("auto", "none")
