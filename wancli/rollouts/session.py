"""From a request to a rollout's job: plan, prompt schedule, seeds, paths, resuming."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.catalog.local import check_available, check_files
from wancli.catalog.tasks import TEXT
from wancli.catalog.vocabulary import prompt_warnings
from wancli.catalog.weight_files import weights_json
from wancli.config.layers import find_model
from wancli.config.resolve import Layer, Resolved, resolve
from wancli.config.seeds import parse_seeds
from wancli.config.settings import RolloutSettings
from wancli.cost.capacity import CapacityCheck, check_capacity, savings_in_words
from wancli.cost.devices import Device
from wancli.cost.estimate import Estimate, estimate, resolve_device
from wancli.cost.totals import rollout_cost
from wancli.errors import (
    OVERWRITE_HINT,
    CapacityError,
    PlanError,
    PlanWarning,
    UsageError,
    WancliError,
)
from wancli.models.warm import OnBytes, WarmPipeline, quiet_imports
from wancli.planning.context import check_context_files, context_frames
from wancli.planning.distilled import distilled_warnings
from wancli.planning.earlier_rollout import find_rollout, stored_request
from wancli.planning.existing import check_existing, existing_video, is_kept, record_of
from wancli.planning.lora import find_lora, merged_revision, report_loras
from wancli.planning.model_warnings import size_warnings, swapped_expert_warnings
from wancli.planning.plan import RolloutPlan, check_unused_settings, make_rollout_plan
from wancli.planning.prompts import PromptChange, PromptSchedule, make_prompt_schedule
from wancli.planning.rules_rollout import check_rollout_flags
from wancli.records.naming import name_fields
from wancli.records.progress import Observer, report_warnings
from wancli.records.record import Request, RunRecord, settings_of
from wancli.rollouts.outputs import RolloutFiles, check_no_other, name_files, output_set
from wancli.rollouts.request import RolloutRequest
from wancli.rollouts.resume import (
    ResumePoint,
    check_chunks,
    check_rerender,
    check_same,
    resume_rollout,
    start_rollout,
)
from wancli.rollouts.store import NoStore, RolloutStore
from wancli.utils.files import digest
from wancli.utils.interrupts import Interrupted
from wancli.utils.outputs import OutputSet
from wancli.video.ffmpeg import choose_encoding

if TYPE_CHECKING:
    from wancli.catalog.specs import ModelSpec
    from wancli.rollouts.runner import RolloutChunk, RolloutJob


class RolloutSession:
    """One rollout, from its options to its record."""

    task = TEXT

    def __init__(
        self, options: RolloutRequest, layers: list[Layer], *,
        before: Mapping[str, Any], base: Path | None = None, gpu: Device | None = None,
    ) -> None:  # fmt: skip
        """`before` is the request of the rollout to continue, `base` its folder.

        With `gpu`, it is planned for that GPU and not for this machine.
        """
        self.options, self.before, self.base, self._gpu = options, before, base, gpu
        self.resolved: Resolved[RolloutSettings] = resolve(layers, RolloutSettings)
        check_unused_settings(self.resolved)
        settings = self.resolved.settings
        self.spec: ModelSpec = find_model(self.resolved)
        self._context = context_frames(options.starts, settings, self.spec, before)
        self.schedule = self._schedule()
        self.plan = self._plan(settings)
        check_rollout_flags(self.resolved, changes=bool(self.schedule.changes))
        self._cropping = check_context_files(options.starts, self.plan, settings, self.spec)
        self._check_flags()
        self.seeds = self._seeds()
        if options.video and options.files and gpu is None:
            video = settings.video
            choose_encoding(settings.output, (video.width, video.height), live=True)

    def _check_flags(self) -> None:
        """Raise PlanError for what does nothing without a video, or without frames before it."""
        options, settings = self.options, self.resolved.settings
        if options.only_new and self.plan.spans[0].clean_frames:
            raise PlanError(
                "`only_new` leaves out chunks before the generated ones; with `image_start "
                "first-frame` the picture is part of the first.",
                hint="drop `only_new`",
            )
        if options.only_new and not self._context:
            raise PlanError("`only_new` needs frames to leave out.", hint="`image` or `extend`")
        for is_set, what, less in (
            (settings.rollout.reencode_first, "`reencode_first` encodes", "`no_reencode_first`"),
            (options.report, "`report` measures", "drop `report`"),
            (options.only_new, "`only_new` leaves out", "drop `only_new`"),
        ):
            if is_set and not options.video:
                raise PlanError(
                    f"{what} frames of the video, which `no_video` leaves undecoded.",
                    hint=f"drop `no_video`, or {less}",
                )

    @property
    def warnings(self) -> Sequence[PlanWarning]:
        """Warnings to print before it runs."""
        prompts = [] if self.options.starts.prompt_embeds else self.schedule.prompts
        length = self.resolved.settings.rollout.text_length
        words = prompt_warnings(self.spec, prompts, text_length=length)
        size = size_warnings(self.spec, self.resolved)
        swapped = swapped_expert_warnings(self.spec, self.resolved)
        return *words, *size, *swapped, *distilled_warnings(self.resolved), *self._cropping

    @cached_property
    def capacity(self) -> CapacityCheck:
        """Whether it fits this machine."""
        return check_capacity(
            self.resolved.settings, self.spec, self._estimated, force=self.options.force
        )

    def plan_json(self) -> dict[str, Any]:
        """The plan, for printing."""
        return self.plan.as_json()

    def items(self) -> list[tuple[Request, Path]]:
        """The request and its output, empty without files."""
        return [(self.request(), self.files.video or self.files.latents or Path())]

    def check_outputs(self) -> frozenset[Path]:
        """Raise what `run` would raise about its outputs; writes and locks nothing.

        Returns the existing files and folders that it may replace.
        """
        if self.kept:
            return frozenset()
        outputs = self._outputs()
        outputs.check()
        check_no_other(self.files, self.options)
        return outputs.replaced

    @cached_property
    def kept(self) -> bool:
        """Whether `skip_existing` keeps the video. Raises UsageError for another request's."""
        video = self.files.video
        if video is None or not self.options.skip_existing:
            return False
        overwrite = self.options.overwrite
        return is_kept(existing_video(video, self.request(), overwrite=overwrite))

    def earlier_chunks(self) -> Path | None:
        """Folder with finished chunks that `skip_existing` goes on with; None if there is none.

        Raises UsageError for the chunks of another request.
        """
        folder = self.files.store
        if folder is None or self.kept or not RolloutStore(folder).chunks():
            return None
        before = stored_request(folder)
        try:
            check_same(before, self.request().as_json(), keep=before["rollout"]["chunks"])
            check_chunks(len(self.plan.spans), finished=RolloutStore(folder).undamaged_chunks())
        except UsageError as error:
            if self.options.overwrite:
                return None
            raise UsageError(f"{folder} exists: {error}", hint=OVERWRITE_HINT) from None
        return folder

    def check_resumable(self, folder: Path) -> None:
        """Raise UsageError if its chunks would not be those that are finished in a folder.

        PlanError if more are finished than it has, or fewer than `rerender` keeps.
        """
        store, first = RolloutStore(folder), self.options.rerender
        finished = store.undamaged_chunks()
        if first is not None:  # an earlier version's chunks have no digests
            there = finished or len(store.chunks())
            check_rerender(first, chunks=len(self.plan.spans), finished=there)
        keep = finished if first is None else min(first, finished)
        check_same(self.before, self.request().as_json(), keep=keep)
        if first is None:
            check_chunks(len(self.plan.spans), finished=finished)

    def make(self, observer: Observer) -> list[dict[str, Any]]:
        """Run it to its end and return its record, unless nothing is left. Raises WancliError."""
        if video := self._finished_video():
            observer.note(f"nothing is left: {video} and its chunks are there")
            observer.skipped(self.request(), video)
            return [record_of(video) or {}]
        return [self.run_whole(observer)]

    def _finished_video(self) -> Path | None:
        """The video of a rollout that is resumed with nothing left to make, else None."""
        files, options, video = self.files, self.options, self.files.video
        others = files.latents or files.report or options.overwrite or options.rerender is not None
        if not options.resume or others or video is None or files.store is None:
            return None
        if not video.exists():  # most often: its chunks need not be read
            return None
        finished = RolloutStore(files.store).undamaged_chunks() == len(self.plan.spans)
        return video if finished and is_kept(check_existing(video, self.request())) else None

    @property
    def parts(self) -> list[str]:
        """Parts of the pipeline that it needs."""
        starts = self.options.starts
        text = [] if starts.prompt_embeds else ["text_encoder"]
        vae = ["vae"] if self.options.video or starts.needs_vae else []
        return ["transformer", *text, *vae]

    def pipeline(self, on_bytes: OnBytes | None = None) -> WarmPipeline:
        """The pipeline that it needs, which loads at its first use.

        Every chunk needs the transformer and the VAE: that, being small, stays on the device.
        """
        machine = self.capacity.with_offload(self.resolved.settings).machine
        return WarmPipeline(self.spec, machine, parts=self.parts, stays=("vae",), on_bytes=on_bytes)

    def run(
        self, observer: Observer, model: WarmPipeline | None = None
    ) -> Generator["RolloutChunk", None, RunRecord]:
        """Yield each chunk of the video once it is decoded; returns the record. Raises WancliError.

        It runs on `model` or a pipeline of its own. Closed early, it keeps the finished chunks in
        its folder, as an interrupt does.
        """
        self.capacity.check()
        outputs = self._outputs()
        with outputs.locked():
            check_no_other(self.files, self.options)
            report_warnings(self.warnings, observer)
            report_loras(self.plan.lora, observer)
            model = model or self.pipeline()
            if not model.loaded:
                check_available(self.spec)
            with observer.progress() as report, quiet_imports(report):
                job = self._job(self.request())
            return (yield from self._run(job, outputs.replaced, observer, model))

    def run_whole(self, observer: Observer, model: WarmPipeline | None = None) -> dict[str, Any]:
        """`run` to its end; returns the record. Raises WancliError."""
        run = self.run(observer, model)
        while True:
            try:
                next(run)
            except StopIteration as end:
                record: RunRecord = end.value
                return record.as_json()

    def _run(
        self, job: "RolloutJob", replaced: frozenset[Path], observer: Observer, model: WarmPipeline,
    ) -> Generator["RolloutChunk", None, RunRecord]:  # fmt: skip
        from wancli.records.write import failed_record
        from wancli.rollouts import runner

        job = self._begin(job, replaced, observer)
        try:
            with observer.progress() as report:
                record = yield from runner.roll(job, model, report)
        except (WancliError, Interrupted, KeyboardInterrupt, GeneratorExit) as error:
            if not self.options.continues:
                job.store.remove_if_empty()
            if isinstance(error, CapacityError):
                error.hint = self._less_memory()
            if isinstance(error, WancliError):
                observer.failed(failed_record(job.request, error, command="rollout"))
            raise
        self._report_drift(record, replaced)
        observer.done(record)
        return record

    def _less_memory(self) -> str:
        """Settings that need less memory, where what was planned did not suffice."""
        less = savings_in_words(self.resolved.settings, self._estimated)
        smaller = "a smaller `rolling_window` or `size`"
        return f"{less}, or {smaller}" if less else smaller

    def _begin(
        self, job: "RolloutJob", replaced: frozenset[Path], observer: Observer
    ) -> "RolloutJob":
        """The job with its settings settled and its folder begun, or checked to be resumed."""
        options, store, request = self.options, job.store, job.request.as_json()
        replaces = options.overwrite and not options.continues and bool(store.chunks())
        settled = self.capacity.with_offload(job.settings)
        job = replace(job, settings=settled, replaces=replaces, replaced=replaced)
        check_files(self.spec, self.parts)
        if not isinstance(store, RolloutStore):
            return job
        if options.continues:
            point = resume_rollout(store, self.before, request, rerender=options.rerender)
            self._report_resumed(point, observer)
        elif not replaces:
            start_rollout(store, request)
        return job

    def _report_drift(self, record: RunRecord, replaced: frozenset[Path]) -> None:
        if path := self.files.report:
            from wancli.video.drift_report import write_report

            title = self.schedule.prompt
            write_report(record.drift, path, title=title, overwrite=path in replaced)

    def request(self) -> Request:
        """The request as stored, compared on resuming, and recorded."""
        settings, starts = self.resolved.settings, self.options.starts
        video = settings.video.model_copy(update={"num_frames": self.plan.num_frames})
        inputs: dict[str, Any] = {
            "changes": [[c.chunk, c.prompt] for c in self.schedule.changes],
            "seeds": [[chunk, seed] for chunk, seed in sorted(self.seeds.items())],
        }
        earlier = self.before.get("inputs", {})
        inputs |= {key: value for key, value in earlier.items() if key not in inputs}
        for name, path in starts.named().items():
            inputs[name] = {"name": path.name, "sha256": digest(name, path)}
        if self.options.only_new:
            inputs["only_new"] = True
        return Request(
            self.schedule.prompt,
            self.seeds[0],
            settings.model_copy(update={"video": video}),
            self.resolved.sources,
            merged_revision(self.spec, settings.machine.lora),
            inputs,
            [warning.text for warning in self.warnings],
            [asdict(use) for use in self.plan.lora],
            weights_json(self.spec),
        )

    @cached_property
    def files(self) -> RolloutFiles:
        """The files that it writes. Raises UsageError."""
        fields = name_fields(
            self.resolved.settings, prompt=self.schedule.prompt, seed=self.seeds[0],
            steps=self.plan.steps[0],
        )  # fmt: skip
        return name_files(self.options, fields, base=self.base)

    def _outputs(self) -> OutputSet:
        """All files to write. Raises UsageError if two of them are the same."""
        loras = [find_lora(text).path for text in self.resolved.settings.machine.lora]
        weights = [file.path for file in self.spec.files]
        reads = [*self.options.starts.named().values(), *loras, *weights]
        return output_set(
            self.files, self.options, reads=reads, request=self.request, before=self.before
        )

    def _plan(self, settings: RolloutSettings) -> RolloutPlan:
        return make_rollout_plan(
            settings,
            self.spec,
            context_frames=self._context,
            changes={change.chunk for change in self.schedule.changes},
            force=self.options.force,
        )

    def _estimated(self, settings: RolloutSettings) -> Estimate | None:
        plan = self.plan if settings == self.resolved.settings else self._plan(settings)
        device, wide = resolve_device(settings.machine, self._gpu)
        cost = rollout_cost(settings, self.spec, plan, wide=wide, kind=device.kind)
        return estimate(cost, settings.machine, device, plan.offloads) if cost else None

    def _schedule(self) -> PromptSchedule:
        rollout, earlier = self.resolved.settings.rollout, self.before.get("inputs", {})
        changes = self.options.changes or [
            PromptChange(*entry) for entry in earlier.get("changes", [])
        ]
        gone = any(change.chunk >= rollout.chunks for change in changes)
        if gone and self.base and not self.options.changes and self.options.rerender is None:
            check_chunks(rollout.chunks, finished=RolloutStore(self.base).undamaged_chunks())
        prompt = (
            self.before.get("prompt", "") if self.options.prompt is None else self.options.prompt
        )
        return make_prompt_schedule(
            prompt,
            changes,
            chunks=rollout.chunks,
            blend=rollout.blend,
            prefix=rollout.shot_prefix.strip(),
        )

    def _seeds(self) -> dict[int, int]:
        earlier = {int(c): s for c, s in self.before.get("inputs", {}).get("seeds", [])}
        seeds = parse_seeds(self.options.seed, None) if self.options.seed or not earlier else []
        if len(seeds) > 1:
            raise UsageError("a rollout has one seed.", hint="`seed 7`")
        if not seeds:
            return earlier
        first = self.options.rerender
        if first is None:
            return {**earlier, 0: seeds[0]}
        return {chunk: seed for chunk, seed in earlier.items() if chunk < first} | {first: seeds[0]}

    def _job(self, request: Request) -> "RolloutJob":
        from wancli.rollouts.runner import RolloutJob

        files = self.files
        return RolloutJob(
            request=request,
            settings=self.resolved.settings,
            plan=self.plan,
            schedule=self.schedule,
            seeds=self.seeds,
            store=RolloutStore(files.store) if files.store else NoStore(),
            video=files.video,
            decodes=self.options.video,
            starts=self.options.starts,
            latents=files.latents,
            only_new=bool(request.inputs.get("only_new")),
        )

    def _report_resumed(self, point: ResumePoint, observer: Observer) -> None:
        again = (
            "; they are decoded again for the MP4" if self.options.video and point.chunks else ""
        )
        observer.note(f"{point.chunks} of {len(self.plan.spans)} chunks are kept{again}")
        if point.damaged:
            observer.warn(
                f"damaged or replaced chunks were moved to {point.damaged}.",
                hint="they are rendered again",
            )
        if point.no_digests:
            observer.warn(
                "the chunks have no digests: they are used unchecked.",
                hint="they are from an earlier version",
            )


def open_session(
    request: RolloutRequest, layers: Callable[[], list[Layer]],
    overrides: Callable[[], list[Layer]], *, gpu: Device | None = None,
) -> RolloutSession:  # fmt: skip
    """The session of a request that is checked; nothing is loaded yet. Raises WancliError.

    Its settings are those of `layers` or, where it continues an earlier rollout, of that one, with
    `overrides` on top. With `skip_existing` it continues one of the very same settings.
    """
    if request.continues:
        base = find_rollout(request.prompt, request.output, request.latents, request.folder)
        before = stored_request(base)
        settings = [Layer(base.name, settings_of({"request": before})), *overrides()]
    else:
        settings = layers()
        session = RolloutSession(request, settings, before={}, gpu=gpu)
        earlier = session.earlier_chunks() if request.skip_existing else None
        if earlier is None:
            return session
        base, before, request = earlier, stored_request(earlier), replace(request, resume=True)
    session = RolloutSession(request, settings, before=before, base=base, gpu=gpu)
    session.check_resumable(base)  # before torch is imported
    return session
