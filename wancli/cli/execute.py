"""From a checked request to videos: plan, names, what is there already, and the runner."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from wancli.cli.costing import Taken, generation, say_warnings, take
from wancli.cli.existing import check_existing
from wancli.cli.given import look_at, recorded
from wancli.cli.naming import name_output
from wancli.cli.places import beside
from wancli.errors import PlanError, UsageError, WancliError
from wancli.folders import check_files, find_spec, revision
from wancli.hub_cache import check_reachable
from wancli.inputs import NOTHING, Inputs, assume
from wancli.lora import find_lora
from wancli.outputs import Output, Outputs, nobodys, preview_file
from wancli.plan import Plan, check_given, make_plan
from wancli.records import Observer, Request, write_json
from wancli.resolve import Resolved
from wancli.settings import Settings
from wancli.specs import ModelSpec
from wancli.video.ffmpeg import Encoding, check_encoder
from wancli.video.integrity import DAMAGED
from wancli.vocabulary import vocabulary_warnings

if TYPE_CHECKING:
    from wancli.pipeline.run import Runner


@dataclass(frozen=True)
class Asked:
    """What to make: one video per seed."""

    command: str
    prompt: str
    seeds: Sequence[int]
    resolved: Resolved[Settings]
    force: bool = False
    inputs: Inputs = NOTHING
    task: str | None = None


@dataclass(frozen=True)
class Files:
    """Where results go, and what may be replaced."""

    output: str | None
    folder: Path
    overwrite: bool = False
    skip_existing: bool = False
    latents: str | None = None
    perf: Path | None = None
    preview_every: int | None = None  # denoising steps


@dataclass(frozen=True)
class _Todo:
    request: Request
    output: Path
    latents: Path | None


@dataclass(frozen=True)
class PlannedVideos:
    """Videos that were checked and named, and that nothing was loaded for yet."""

    asked: Asked
    files: Files
    spec: ModelSpec
    plan: Plan
    todo: Sequence[_Todo]
    capacity: Taken
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
            from wancli.pipeline.run import Runner

            settings = self.capacity.settled(asked.resolved.settings)
            resolved = replace(asked.resolved, settings=settings)
            runner = Runner(self.spec, resolved, self.plan, command=asked.command, since=since)
            return _make(todo, runner, asked.inputs, files, outputs.replaced, observer)


def plan_videos(asked: Asked, files: Files, *, assume_inputs: bool = False) -> PlannedVideos:
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
    estimated = generation(spec, lambda s: make_plan(s, spec, inputs, task=asked.task))
    taken = take(settings, spec, estimated, force=asked.force)
    return PlannedVideos(asked, files, spec, plan, todo, taken, warnings)


def _make(
    todo: Sequence[_Todo], runner: "Runner", inputs: Inputs, files: Files,
    replaced: frozenset[Path], observer: Observer,
) -> list[dict[str, Any]]:  # fmt: skip
    from wancli.pipeline.run import Job, failed_record

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


def _placed(request: Request, files: Files, *, several: bool) -> _Todo:
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
        return _Todo(request, output, None)
    latents = name_output(files.latents, fields, folder=Path(), several=several)
    return _Todo(request, output, latents)


def _wanted(item: _Todo, files: Files, observer: Observer) -> bool:
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


def _outputs(asked: Asked, todo: Sequence[_Todo], files: Files) -> Outputs:
    """All that is written. Raises UsageError where two of them are one file."""
    given = [path for paths in asked.inputs.named().values() for path in paths]
    loras = [find_lora(text).path for text in asked.resolved.settings.machine.lora]
    outputs = Outputs(overwrite=files.overwrite, reads=[*given, *loras])
    for item in todo:
        ours = partial(_is_of, digest=item.request.hash) if files.skip_existing else nobodys
        outputs.add(Output(item.output, "--output", ours))
        outputs.add(*beside(item.output, previews=bool(files.preview_every)))
        if item.latents:
            outputs.add(Output(item.latents, "--save-latents"))
    if files.perf:
        outputs.add(Output(files.perf, "--perf-json"))
    return outputs
