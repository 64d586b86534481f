"""Input pictures and videos, and the task that follows from them."""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

from wancli.catalog.specs import RANDOM, SPECS, ModelSpec
from wancli.catalog.tasks import ANIMATE, TASKS, TEXT, Task
from wancli.config.settings import Sampling, VideoShape
from wancli.errors import PlanError, SettingsError, closest
from wancli.planning.listed_steps import step_count

VIDEOS = ("video", "mask", "pose_video", "face_video", "background_video")
# References are not cropped: pipelines put them on a canvas themselves. Faces are cropped square.
WHOLE, SQUARE = ("ref_image",), ("face_video",)


@dataclass(frozen=True)
class InputFiles:
    """Input files. Those in VIDEOS are videos, as long as the output."""

    image: Path | None = None
    last_image: Path | None = None
    video: Path | None = None
    mask: Path | None = None
    ref_image: tuple[Path, ...] = ()
    pose_video: Path | None = None
    face_video: Path | None = None
    background_video: Path | None = None

    def named(self) -> dict[str, tuple[Path, ...]]:
        """The files that are set, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: it if isinstance(it, tuple) else (it,) for name, it in named.items() if it}


NO_INPUTS = InputFiles()


def choose_task(spec: ModelSpec, inputs: InputFiles, forced: str | None = None) -> Task:
    """The model's first task that accepts these inputs, or the `forced` one.

    Raises SettingsError for an unknown task, PlanError for incompatible inputs.
    """
    names = inputs.named()
    if forced is not None and forced not in TASKS:
        near = closest(forced, TASKS)
        known = ", ".join(TASKS)
        raise SettingsError(
            f"`task {forced!r}` is not a task.", hint=f"'{near}'; known: {known}" if near else known
        )
    if forced is not None and forced not in spec.tasks:
        raise PlanError(
            f"`task {forced}` does not work with {spec.name}: {_kind(spec)}.",
            hint=_models(spec, names, [TASKS[forced]]),
        )
    possible = [TASKS[name] for name in ([forced] if forced else spec.tasks)]
    for task in possible:
        if set(task.needs) <= set(names) <= set(task.inputs):
            _check_combination(task, inputs)
            return task
    raise _mismatch(spec, names, possible, forced)


def add_required_inputs(
    spec: ModelSpec, inputs: InputFiles, forced: str | None = None
) -> InputFiles:
    """The inputs plus placeholders for what the model's first matching task also requires."""
    names = set(inputs.named())
    for task in (TASKS[name] for name in spec.tasks if forced in (None, name)):
        if names <= set(task.inputs):
            lacking = {name: Path(name) for name in task.needs if name not in names}
            added: dict[str, Any] = {n: (p,) if n == "ref_image" else p for n, p in lacking.items()}
            return replace(inputs, **added)
    return inputs


def reference_frames(task: Task, inputs: InputFiles) -> int:
    """Latent frames prepended to the video while it is denoised: one per reference picture."""
    return len(inputs.ref_image) if "ref_image" in task.inputs else 0


def segments(task: Task, video: VideoShape) -> tuple[int, int]:
    """Number of segments of a video, and video frames per segment. Raises PlanError.

    Each segment but the first begins with the last video frame of the previous one.
    """
    frames, most = video.num_frames, video.segment_frames
    if not task.segmented or 1 < frames <= most:
        return 1, frames
    if frames == 1:
        raise PlanError(f"{task.name} generates more than one video frame.", hint="`num_frames 77`")
    if (most - 1) % 4:
        near = most // 4 * 4 + 1
        raise PlanError(f"`segment_frames {most}` is not 4k+1.", hint=f"use {near} or {near + 4}")
    return ceil((frames - 1) / (most - 1)), most


def _mismatch(
    spec: ModelSpec, names: Collection[str], possible: list[Task], forced: str | None
) -> PlanError:
    """Explain why no task of the model accepts these inputs."""
    who = f"`task {forced}`" if forced else spec.name
    for name in names:
        if not any(name in task.inputs for task in possible):
            reason = "" if forced else f": {_kind(spec)}"
            hint = f"drop `{name}`" if forced else _models(spec, names, list(TASKS.values()))
            return PlanError(f"`{name}` does not work with {who}{reason}.", hint=hint)
    fitting = [task for task in possible if set(names) <= set(task.inputs)]
    if not fitting:
        together = " and ".join(f"`{name}`" for name in names)
        return PlanError(
            f"{together} belong to different tasks.", hint="drop the files of one of them"
        )
    task = min(fitting, key=lambda task: len(set(task.needs) - set(names)))
    lacking = [f"`{name}`" for name in task.needs if name not in names]
    hint = f"{lacking[0]} FILE"
    if not names:
        hint += f", or {_models(spec, (), [TASKS[TEXT]])}"
    return PlanError(f"{who} needs {' and '.join(lacking)}: it is {task.name}.", hint=hint)


def _check_combination(task: Task, inputs: InputFiles) -> None:
    if inputs.mask and not (inputs.video or task.name == ANIMATE):
        raise PlanError("`mask` marks the areas of a `video` to generate.", hint="`video FILE`")
    if task.name == ANIMATE and bool(inputs.mask) != bool(inputs.background_video):
        raise PlanError(
            "`background_video` needs `mask`, and `mask` needs `background_video`.",
            hint="set both, or neither",
        )
    if task.name == ANIMATE and len(inputs.ref_image) > 1:
        raise PlanError(
            f"animate takes one `ref_image`, not {len(inputs.ref_image)}.",
            hint="`ref_image FILE` once",
        )


def _kind(spec: ModelSpec) -> str:
    return f"it is {' and '.join(spec.tasks)}"


def _models(spec: ModelSpec, inputs: Collection[str], tasks: Collection[Task]) -> str:
    """A hint naming models of a task that accepts all inputs; random ones if `spec` is random."""
    wanted = [task.name for task in tasks if set(inputs) <= set(task.inputs)]
    kind = RANDOM if spec.random else ""
    names = [kind + known.name for known in SPECS.values() if set(wanted) & set(known.tasks)]
    return f"`model` {' or '.join(names[:3])}" if names else "drop the files of one of them"


def effective_steps(sampling: Sampling, task: Task) -> int:
    """Denoising steps of one segment: video-to-video skips the first ones. Raises PlanError."""
    if "strength" not in task.settings:
        return step_count(sampling)
    steps = int(step_count(sampling) * sampling.strength)  # as diffusers rounds
    if not steps:
        raise PlanError(
            f"`strength {sampling.strength:g}` leaves none of {step_count(sampling)} steps to run.",
            hint="`strength 0.8`",
        )
    return steps
