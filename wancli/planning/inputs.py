"""Pictures and videos that are given, and the task that they make of a model."""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

from wancli.catalog.specs import RANDOM, SPECS, ModelSpec
from wancli.catalog.tasks import ANIMATE, TASKS, TEXT, Task
from wancli.config.resolve import flag
from wancli.config.settings import Sampling, Video
from wancli.errors import PlanError, SettingsError, closest

VIDEOS = ("video", "mask", "pose_video", "face_video", "background_video")


@dataclass(frozen=True)
class InputFiles:
    """Files, by flag. Those in VIDEOS are videos, as long as the one that is made of them."""

    image: Path | None = None
    last_image: Path | None = None
    video: Path | None = None
    mask: Path | None = None
    ref_image: tuple[Path, ...] = ()
    pose_video: Path | None = None
    face_video: Path | None = None
    background_video: Path | None = None

    def named(self) -> dict[str, tuple[Path, ...]]:
        """Those that are given."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: it if isinstance(it, tuple) else (it,) for name, it in named.items() if it}


NO_INPUTS = InputFiles()


def choose_task(spec: ModelSpec, inputs: InputFiles, forced: str | None = None) -> Task:
    """The first task of the model that is of these inputs, or the one that is forced.

    Raises SettingsError for a task that nobody knows, PlanError for what does not go together.
    """
    given = inputs.named()
    if forced is not None and forced not in TASKS:
        near = closest(forced, TASKS)
        known = ", ".join(TASKS)
        raise SettingsError(
            f"--task {forced!r} is no task.", hint=f"'{near}'; known: {known}" if near else known
        )
    if forced is not None and forced not in spec.tasks:
        raise PlanError(
            f"--task {forced} does not go with {spec.name}: {_is(spec)}.",
            hint=_models(spec, given, [TASKS[forced]]),
        )
    possible = [TASKS[name] for name in ([forced] if forced else spec.tasks)]
    for task in possible:
        if set(task.needs) <= set(given) <= set(task.inputs):
            _check_together(task, inputs)
            return task
    raise _mismatch(spec, given, possible, forced)


def assume(spec: ModelSpec, inputs: InputFiles, forced: str | None = None) -> InputFiles:
    """The same and, by name only, what the model's first task that takes them also needs."""
    given = set(inputs.named())
    for task in (TASKS[name] for name in spec.tasks if forced in (None, name)):
        if given <= set(task.inputs):
            lacking = {name: Path(name) for name in task.needs if name not in given}
            named: dict[str, Any] = {n: (p,) if n == "ref_image" else p for n, p in lacking.items()}
            return replace(inputs, **named)
    return inputs


def references(task: Task, inputs: InputFiles) -> int:
    """Latent frames that stand before the video's own while it is denoised: one a picture."""
    return len(inputs.ref_image) if "ref_image" in task.inputs else 0


def segments(task: Task, video: Video) -> tuple[int, int]:
    """How many segments a video is made in, and the video frames of one. Raises PlanError.

    Each but the first begins with the last video frame of the one before.
    """
    frames, most = video.num_frames, video.segment_frames
    if not task.segmented or 1 < frames <= most:
        return 1, frames
    if frames == 1:
        raise PlanError(f"{task.name} makes more than one video frame.", hint="--num-frames 77")
    if (most - 1) % 4:
        near = most // 4 * 4 + 1
        raise PlanError(f"--segment-frames {most} is not 4k+1.", hint=f"use {near} or {near + 4}")
    return ceil((frames - 1) / (most - 1)), most


def _mismatch(
    spec: ModelSpec, given: Collection[str], possible: list[Task], forced: str | None
) -> PlanError:
    """Why no task of the model is of these inputs."""
    who = f"--task {forced}" if forced else spec.name
    for name in given:
        if not any(name in task.inputs for task in possible):
            told = "" if forced else f": {_is(spec)}"
            hint = f"drop {flag(name)}" if forced else _models(spec, given, list(TASKS.values()))
            return PlanError(f"{flag(name)} does not go with {who}{told}.", hint=hint)
    fitting = [task for task in possible if set(given) <= set(task.inputs)]
    if not fitting:
        flags = " and ".join(map(flag, given))
        return PlanError(f"{flags} are of different tasks.", hint="give the files of one task")
    task = min(fitting, key=lambda task: len(set(task.needs) - set(given)))
    lost = " and ".join(flag(name) for name in task.needs if name not in given)
    hint = f"{lost.split()[0]} FILE"
    if not given:
        hint += f", or {_models(spec, (), [TASKS[TEXT]])}"
    return PlanError(f"{who} needs {lost}: it is {task.name}.", hint=hint)


def _check_together(task: Task, inputs: InputFiles) -> None:
    if inputs.mask and not (inputs.video or task.name == ANIMATE):
        raise PlanError("--mask says which parts of a --video are made.", hint="--video FILE")
    if task.name == ANIMATE and bool(inputs.mask) != bool(inputs.background_video):
        raise PlanError(
            "--background-video and --mask go together: who is replaced, and before what.",
            hint="give both, or neither",
        )
    if task.name == ANIMATE and len(inputs.ref_image) > 1:
        raise PlanError(f"animate takes one --ref-image, not {len(inputs.ref_image)}.", hint="one")


def _is(spec: ModelSpec) -> str:
    return f"it is {' and '.join(spec.tasks)}"


def _models(spec: ModelSpec, given: Collection[str], tasks: Collection[Task]) -> str:
    """A hint that names the models of a task that takes all of these; random ones for `spec`'s."""
    wanted = [task.name for task in tasks if set(given) <= set(task.inputs)]
    kind = RANDOM if spec.random else ""
    names = [kind + known.name for known in SPECS.values() if set(wanted) & set(known.tasks)]
    return f"--model {' or '.join(names[:3])}" if names else "give the files of one task"


def steps_made(sampling: Sampling, task: Task) -> int:
    """Denoising steps of one segment: video-to-video leaves the first out. Raises PlanError."""
    if "strength" not in task.settings:
        return sampling.steps
    steps = int(sampling.steps * sampling.strength)  # as diffusers rounds
    if not steps:
        raise PlanError(
            f"--strength {sampling.strength:g} leaves none of {sampling.steps} steps to make.",
            hint="--strength 0.8",
        )
    return steps
