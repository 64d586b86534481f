"""From a checked request to videos: plan, names, what is there already, and the runner."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from wancli.catalog.hub_cache import check_reachable
from wancli.catalog.local import check_files, find_spec, revision
from wancli.catalog.specs import ModelSpec
from wancli.catalog.vocabulary import vocabulary_warnings
from wancli.config.resolve import Resolved
from wancli.config.settings import Settings
from wancli.cost.capacity import CapacityCheck, check_capacity, generation_estimator
from wancli.errors import PlanError, UsageError, WancliError
from wancli.planning.existing import check_existing
from wancli.planning.input_files import look_at, recorded
from wancli.planning.inputs import NO_INPUTS, InputFiles, assume
from wancli.planning.lora import find_lora
from wancli.planning.output_files import beside
from wancli.planning.plan import Plan, check_given, make_plan
from wancli.records.naming import name_output
from wancli.records.progress import Observer, say_warnings
from wancli.records.record import Request, write_json
from wancli.utils.outputs import OutputFile, OutputSet, nobodys, preview_file
from wancli.video.ffmpeg import Encoding, check_encoder
from wancli.video.integrity import DAMAGED

if TYPE_CHECKING:
    from wancli.generate.runner import Runner


@dataclass(frozen=True)
class GenerateRequest:
    """What to make: one video per seed."""

    command: str
    prompt: str
    seeds: Sequence[int]
    resolved: Resolved[Settings]
    force: bool = False
    inputs: InputFiles = NO_INPUTS
    task: str | None = None


@dataclass(frozen=True)
class OutputFiles:
    """Where results go, and what may be replaced."""

    output: str | None
    folder: Path
    overwrite: bool = False
    skip_existing: bool = False
    latents: str | None = None
    perf: Path | None = None
    preview_every: int | None = None  # denoising steps


@dataclass(frozen=True)
class _PlannedVideo:
    request: Request
    output: Path
    latents: Path | None


@dataclass(frozen=True)
class PlannedVideos:
    """Videos that were checked and named, and that nothing was loaded for yet."""

    asked: GenerateRequest
    files: OutputFiles
    spec: ModelSpec
    plan: Plan
    todo: Sequence[_PlannedVideo]
    capacity: CapacityCheck
    warnings: Sequence[str] = ()

    def plan_json(self) -> dict[str, Any]:
        """What it comes to, by name."""
        return asdict(self.plan)

    def items(self) -> list[tuple[Request, Path]]:
        """Each request, and the name of its video."""
        return [(item.request, item.output) for item in self.todo]

    def make(self, observer: Observer) -> list[dict[str, Any]]:
        """Make every video; the records of those made. Raises WancliError."""
        asked, files = self.asked, self.files
        todo = [t for t in self.todo if _wanted(t, files, observer)]
        if not todo:
            return []
        outputs = _outputs(asked, todo, files)
        with outputs.held():
            say_warnings(self.warnings, observer)
            since = perf_counter()  # the libraries are part of what loading costs
            check_reachable(self.spec.repo)
            from wancli.generate.runner import Runner

            settings = self.capacity.with_offload(asked.resolved.settings)
            resolved = replace(asked.resolved, settings=settings)
            runner = Runner(self.spec, resolved, self.plan, command=asked.command, since=since)
            return _make(todo, runner, asked.inputs, files, outputs.replaced, observer)


def plan_videos(
    asked: GenerateRequest, files: OutputFiles, *, assume_inputs: bool = False
) -> PlannedVideos:
    """Check everything. With `assume_inputs`, files that the model needs may be missing."""
    settings = asked.resolved.settings
    spec = find_spec(settings.model, layers=settings.machine.layers)
    inputs = assume(spec, asked.inputs, asked.task) if assume_inputs else asked.inputs
    plan = make_plan(settings, spec, inputs, task=asked.task)
    check_given(asked.resolved, plan.task)
    if files.latents and plan.segments > 1:
        raise PlanError(
            f"--save-latents: those of {plan.segments} segments do not decode as one video.",
            hint="drop --save-latents",
        )
    check_files(spec)
    check_encoder(Encoding.of(settings.output))
    warnings = vocabulary_warnings(spec, [asked.prompt])
    look_at(asked.inputs, settings.video)
    weights, told = revision(spec), recorded(asked.inputs, plan)
    todo = []
    for seed in asked.seeds:
        request = Request(
            asked.prompt, seed, settings, asked.resolved.sources, weights, told, warnings
        )
        todo.append(_placed(request, files, several=len(asked.seeds) > 1))
    estimated = generation_estimator(spec, lambda s: make_plan(s, spec, inputs, task=asked.task))
    taken = check_capacity(settings, spec, estimated, force=asked.force)
    return PlannedVideos(asked, files, spec, plan, todo, taken, warnings)


def _make(
    todo: Sequence[_PlannedVideo], runner: "Runner", inputs: InputFiles, files: OutputFiles,
    replaced: frozenset[Path], observer: Observer,
) -> list[dict[str, Any]]:  # fmt: skip
    from wancli.generate.runner import Job
    from wancli.records.write import failed_record

    made: list[dict[str, Any]] = []
    for item in todo:
        if files.preview_every:
            observer.say(f"preview: {preview_file(item.output)}")
        try:
            with observer.progress() as report:
                job = Job(
                    item.request, item.output, item.latents, inputs, files.preview_every, replaced
                )
                record = runner.make(job, report)
        except WancliError as error:
            observer.failed(failed_record(item.request, error, command=runner.command))
            raise
        observer.done(record)
        made.append(record.as_json())
        if files.perf:
            timings = [{"path": m["output"]["path"], **m["timings"], **m["memory"]} for m in made]
            write_json(
                {"videos": timings},
                files.perf,
                overwrite=files.perf in replaced or len(made) > 1,  # its own, after the first
            )
    return made


def _placed(request: Request, files: OutputFiles, *, several: bool) -> _PlannedVideo:
    """The request with the names of its files."""
    settings = request.settings
    fields: Mapping[str, Any] = {
        "prompt": request.prompt,
        "seed": request.seed,
        "model": settings.model,
        "steps": settings.sampling.steps,
        "width": settings.video.width,
        "height": settings.video.height,
    }
    output = name_output(files.output, fields, folder=files.folder, several=several)
    if files.latents is None:
        return _PlannedVideo(request, output, None)
    latents = name_output(files.latents, fields, folder=Path(), several=several)
    return _PlannedVideo(request, output, latents)


def _wanted(item: _PlannedVideo, files: OutputFiles, observer: Observer) -> bool:
    """Whether to make the video. Raises UsageError."""
    from wancli.video.write import check_name

    path = item.output
    check_name(path)
    if files.skip_existing and path.exists() and not files.overwrite:
        check = check_existing(path, item.request.hash)
        if check is None:
            message = f"{path} exists and is of another request."
            raise UsageError(message, hint="--overwrite, or another --output")
        if check.status != DAMAGED:
            observer.skipped(item.request, path)
            return False
        observer.warn(f"{path} is damaged: {check.why}.", hint="it is made again")
    return True


def _is_of(path: Path, *, digest: str) -> bool:
    """Whether a video is of the request with that hash, damaged or not."""
    return check_existing(path, digest) is not None


def _outputs(
    asked: GenerateRequest, todo: Sequence[_PlannedVideo], files: OutputFiles
) -> OutputSet:
    """All that is written. Raises UsageError where two of them are one file."""
    given = [path for paths in asked.inputs.named().values() for path in paths]
    loras = [find_lora(text).path for text in asked.resolved.settings.machine.lora]
    outputs = OutputSet(overwrite=files.overwrite, reads=[*given, *loras])
    for item in todo:
        ours = partial(_is_of, digest=item.request.hash) if files.skip_existing else nobodys
        outputs.add(OutputFile(item.output, "--output", ours))
        outputs.add(*beside(item.output, previews=bool(files.preview_every)))
        if item.latents:
            outputs.add(OutputFile(item.latents, "--save-latents"))
    if files.perf:
        outputs.add(OutputFile(files.perf, "--perf-json"))
    return outputs
