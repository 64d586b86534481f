"""A request for one video per seed: plan it, name and check its files, run it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.catalog.local import check_available, check_files
from wancli.catalog.specs import ModelSpec
from wancli.catalog.vocabulary import prompt_warnings
from wancli.catalog.weight_files import weights_json
from wancli.config.layers import find_model
from wancli.config.resolve import Resolved
from wancli.config.settings import Settings
from wancli.errors import PlanError, PlanWarning, WancliError
from wancli.models.warm import OnBytes, WarmPipeline, quiet_imports
from wancli.planning.distilled import distilled_warnings
from wancli.planning.existing import existing_video, is_kept, is_video_of
from wancli.planning.input_files import check_input_files, inputs_json
from wancli.planning.inputs import NO_INPUTS, InputFiles, add_required_inputs
from wancli.planning.listed_steps import step_count
from wancli.planning.lora import find_lora, merged_revision, report_loras
from wancli.planning.model_warnings import model_warnings
from wancli.planning.output_files import is_latents_of, sidecar_files
from wancli.planning.plan import Plan, check_unused_settings, clip_warnings, make_plan
from wancli.records.naming import name_fields, name_output
from wancli.records.progress import Observer, report_warnings
from wancli.records.record import Request, write_json
from wancli.utils.outputs import OutputFile, OutputSet, not_ours, preview_file
from wancli.video.ffmpeg import choose_encoding
from wancli.video.integrity import Check

if TYPE_CHECKING:
    from wancli.cost.capacity import CapacityCheck
    from wancli.cost.devices import Device
    from wancli.generation.runner import Clip, Runner


@dataclass(frozen=True)
class GenerateRequest:
    """A request for one video per seed."""

    command: str
    prompt: str
    seeds: Sequence[int]
    resolved: Resolved[Settings]
    force: bool = False
    inputs: InputFiles = NO_INPUTS
    task: str | None = None


@dataclass(frozen=True)
class OutputFiles:
    """Where outputs go, and whether they may be replaced."""

    output: str | None
    folder: Path
    overwrite: bool = False
    skip_existing: bool = False
    latents: str | None = None
    perf: Path | None = None
    preview_every: int | None = None  # denoising steps
    video: bool = True  # False: the frames stay in memory, and there is no `output`


@dataclass(frozen=True)
class _PlannedVideo:
    request: Request
    output: Path | None
    latents: Path | None


@dataclass(frozen=True)
class PlannedVideos:
    """Videos that are checked and named; nothing is loaded yet."""

    request: GenerateRequest
    files: OutputFiles
    spec: ModelSpec
    plan: Plan
    todo: Sequence[_PlannedVideo]
    capacity: "CapacityCheck"
    warnings: Sequence[PlanWarning] = ()

    @property
    def resolved(self) -> Resolved[Settings]:
        """The settings, and where each is from."""
        return self.request.resolved

    @property
    def task(self) -> str:
        """The task that the inputs select."""
        return self.plan.task

    def plan_json(self) -> dict[str, Any]:
        """The plan as JSON."""
        return asdict(self.plan)

    def items(self) -> list[tuple[Request, Path]]:
        """Each request and the path of its video, empty without one."""
        return [(item.request, item.output or Path()) for item in self.todo]

    def check_outputs(self) -> frozenset[Path]:
        """Raise what `run` would raise about its outputs; writes and locks nothing.

        Returns the existing files that it may replace.
        """
        todo = [item for item in self.todo if not is_kept(_existing(item, self.files))]
        outputs = _outputs(self.request, todo, self.files, self.spec)
        outputs.check()
        return outputs.replaced

    @property
    def kept(self) -> bool:
        """Whether `skip_existing` keeps all of them. Raises UsageError for those of others."""
        return all(is_kept(_existing(item, self.files)) for item in self.todo)

    def make(self, observer: Observer) -> list[dict[str, Any]]:
        """Make every video, and return the new records. Raises WancliError."""
        return [clip.record.as_json() for clip in self.run(observer)]

    def pipeline(self, on_bytes: OnBytes | None = None) -> WarmPipeline:
        """The pipeline that these videos need; it loads at its first use."""
        settings = self.capacity.with_offload(self.request.resolved.settings)
        return WarmPipeline(self.spec, settings.machine, on_bytes=on_bytes)

    def run(
        self, observer: Observer, model: WarmPipeline | None = None, *, ahead: Sequence[str] = ()
    ) -> Iterator["Clip"]:
        """Make the videos one by one, on `model` or a pipeline of their own. Raises WancliError.

        `ahead` are prompts of later requests on `model`, which may be encoded with these.
        """
        self.capacity.check()
        request, files = self.request, self.files
        todo = [item for item in self.todo if _is_needed(item, files, observer)]
        if not todo:
            return
        outputs = _outputs(request, todo, files, self.spec)
        with outputs.locked():
            report_warnings(self.warnings, observer)
            report_loras(self.plan.lora, observer)
            model = model or self.pipeline()
            if not model.loaded:
                check_available(self.spec)
            with observer.progress() as report, quiet_imports(report):
                from wancli.generation.runner import Runner

            settings = self.capacity.with_offload(request.resolved.settings)
            resolved = replace(request.resolved, settings=settings)
            runner = Runner(model, resolved, self.plan, command=request.command, ahead=ahead)
            yield from _make(todo, runner, request.inputs, files, outputs.replaced, observer)


def plan_videos(
    request: GenerateRequest, files: OutputFiles, *, assume_inputs: bool = False,
    gpu: "Device | None" = None,
) -> PlannedVideos:  # fmt: skip
    """Check a request and name its videos. Raises WancliError.

    With `assume_inputs`, input files that the model needs may be missing. With `gpu`, the plan is
    for that GPU and not for this machine.
    """
    settings = request.resolved.settings
    spec = find_model(request.resolved)
    inputs = (
        add_required_inputs(spec, request.inputs, request.task) if assume_inputs else request.inputs
    )
    plan = make_plan(settings, spec, inputs, task=request.task)
    check_unused_settings(request.resolved, plan.task)
    if files.latents and plan.segments > 1:
        raise PlanError(
            f"`save_latents`: latents of {plan.segments} segments do not decode as one video.",
            hint="drop `save_latents`",
        )
    check_files(spec)
    if gpu is None:
        choose_encoding(settings.output, (settings.video.width, settings.video.height))
    words = prompt_warnings(spec, [request.prompt])
    cropping = check_input_files(request.inputs, settings.video, spec.strides)
    about_model = (*clip_warnings(spec), *model_warnings(spec, request.resolved))
    warnings = (*words, *about_model, *distilled_warnings(request.resolved), *cropping)
    texts = [warning.text for warning in warnings]
    weights = merged_revision(spec, settings.machine.lora)
    input_records = inputs_json(request.inputs, plan)
    todo = []
    for seed in request.seeds:
        video = Request(
            request.prompt, seed, settings, request.resolved.sources, weights, input_records,
            texts, [asdict(use) for use in plan.lora], weights_json(spec),
        )  # fmt: skip
        todo.append(_name_files(video, files, several=len(request.seeds) > 1))
    # Only what is valid so far needs what follows.
    from wancli.cost.capacity import check_capacity, generation_estimator

    estimated = generation_estimator(
        spec, lambda s: make_plan(s, spec, inputs, task=request.task), gpu=gpu
    )
    capacity = check_capacity(settings, spec, estimated, force=request.force)
    return PlannedVideos(request, files, spec, plan, todo, capacity, warnings)


def _make(
    todo: Sequence[_PlannedVideo], runner: "Runner", inputs: InputFiles, files: OutputFiles,
    replaced: frozenset[Path], observer: Observer,
) -> Iterator["Clip"]:  # fmt: skip
    from wancli.generation.runner import Job
    from wancli.records.write import failed_record

    timings: list[dict[str, Any]] = []
    for item in todo:
        if files.preview_every and item.output:
            observer.note(f"preview: {preview_file(item.output)}")
        try:
            with observer.progress() as report:
                job = Job(
                    item.request, item.output, item.latents, inputs, files.preview_every, replaced
                )
                clip = runner.make(job, report)
        except WancliError as error:
            observer.failed(failed_record(item.request, error, command=runner.command))
            raise
        record = clip.record
        observer.done(record)
        if files.perf:
            timings.append({"path": record.output.get("path"), **record.timings, **record.memory})
            write_json(
                {"videos": timings},
                files.perf,
                overwrite=files.perf in replaced or len(timings) > 1,  # our own after the first
            )
        yield clip
        del clip  # or it would stay while the next one is made


def _name_files(request: Request, files: OutputFiles, *, several: bool) -> _PlannedVideo:
    """The request with the paths of its files."""
    settings = request.settings
    fields = name_fields(
        settings, prompt=request.prompt, seed=request.seed, steps=step_count(settings.sampling)
    )
    output = latents = None
    if files.video:
        output = name_output(files.output, fields, folder=files.folder, several=several)
    if files.latents is not None:
        latents = name_output(files.latents, fields, folder=Path(), several=several)
    return _PlannedVideo(request, output, latents)


def _is_needed(item: _PlannedVideo, files: OutputFiles, observer: Observer) -> bool:
    """Whether the video has to be made, reported if it was there. Raises UsageError."""
    check = _existing(item, files)
    if item.output is None or check is None:
        return True
    if is_kept(check):
        observer.skipped(item.request, item.output)
        return False
    observer.warn(f"{item.output} is damaged: {check.why}.", hint="rendering it again")
    return True


def _existing(item: _PlannedVideo, files: OutputFiles) -> Check | None:
    """Check of a video that `skip_existing` keeps if it is whole; None without one.

    Raises UsageError for an unusable name, and for a video of another request.
    """
    from wancli.video.write import check_name

    path = item.output
    if path is None:
        return None
    check_name(path)
    if not files.skip_existing:
        return None
    return existing_video(path, item.request, overwrite=files.overwrite)


def _outputs(
    request: GenerateRequest, todo: Sequence[_PlannedVideo], files: OutputFiles, spec: ModelSpec
) -> OutputSet:
    """All files to be written. Raises UsageError if two of them are the same."""
    inputs = [path for paths in request.inputs.named().values() for path in paths]
    loras = [find_lora(text).path for text in request.resolved.settings.machine.lora]
    weights = [file.path for file in spec.files]
    outputs = OutputSet(overwrite=files.overwrite, reads=[*inputs, *loras, *weights])
    for item in todo:
        goes_on, video = files.skip_existing, item.request
        if item.output:
            ours = partial(is_video_of, request=video) if goes_on else not_ours
            outputs.add(OutputFile(item.output, "`output`", ours))
            outputs.add(*sidecar_files(item.output, previews=bool(files.preview_every)))
        if item.latents:  # an earlier run may have ended while it decoded them
            ours = partial(is_latents_of, request=video) if goes_on else not_ours
            outputs.add(OutputFile(item.latents, "`save_latents`", ours))
    if files.perf:
        outputs.add(OutputFile(files.perf, "`perf_json`"))
    return outputs
