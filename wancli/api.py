"""The door for Python: `wancli.generate`, `wancli.rollout`, `wancli.plan` and `wancli.load`.

Keyword arguments are the settings, named as the flags of the command line, which runs the same
functions. Nothing is printed, no file is written without `output`, and the process of the caller
stays as it is. Errors are those of `wancli.errors`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from wancli.config.keywords import (
    ChunkSettings,
    ClipSettings,
    MachineSettings,
    SharedSettings,
    check_keywords,
    is_setting,
    keyword_layer,
)
from wancli.config.layers import settings_layers
from wancli.config.resolve import Layer, resolve
from wancli.config.seeds import parse_seeds
from wancli.config.settings import Settings
from wancli.cost.capacity import CapacityCheck
from wancli.cost.devices import planned_device
from wancli.errors import CapacityError, UsageError
from wancli.generation.batch import GenerateRequest, OutputFiles, PlannedVideos, plan_videos
from wancli.models.warm import WarmPipeline
from wancli.planning.context import ContextFiles
from wancli.planning.existing import record_beside, record_in
from wancli.planning.inputs import InputFiles
from wancli.planning.prompts import PromptChange, check_prompt, read_script
from wancli.records.progress import Report
from wancli.records.record import Request, RunRecord
from wancli.rollouts.session import RolloutRequest, RolloutSession, open_session
from wancli.utils.units import duration, gib

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from wancli.rollouts.runner import RolloutChunk

AnyPath = str | Path
SOURCE = "argument"  # of settings, in records
IN_MEMORY = OutputFiles(None, Path(), video=False)
log = logging.getLogger("wancli")
log.addHandler(logging.NullHandler())  # silent unless the application configures logging


class CommonOptions(TypedDict, total=False):
    """Options of clips and rollouts."""

    image: AnyPath  # first frame
    save_latents: AnyPath  # a safetensors file
    overwrite: bool  # replace existing files
    force: bool  # run even if it does not fit in memory, or the model was not trained for it


class ClipOptions(TypedDict, total=False):
    """Options of clips alone. The task follows from the pictures and videos."""

    last_image: AnyPath
    video: AnyPath
    mask: AnyPath
    ref_image: AnyPath | Sequence[AnyPath]
    pose_video: AnyPath
    face_video: AnyPath
    background_video: AnyPath
    task: str
    skip_existing: bool  # keep an `output` that holds this video already
    preview_every: int  # denoising steps from one PreviewEvent to the next


class ChunkOptions(TypedDict, total=False):
    """Options of rollouts alone."""

    at: Mapping[int, str]  # the prompt from a chunk on, by its number
    script: AnyPath  # TOML or JSONL file of prompt changes
    extend: AnyPath  # MP4 to continue
    only_new: bool  # leave the frames of `image` or `extend` out
    initial_latents: AnyPath
    noise_file: AnyPath
    prompt_embeds: AnyPath
    resume: bool  # continue the interrupted rollout of `output`, or extend it
    rerender: int  # render this chunk and all that follow again
    report: AnyPath  # HTML file about drift


class PresetOptions(TypedDict, total=False):
    """Settings by name."""

    preset: str  # to start from: name or file
    cachedit_preset: str  # of which only the step cache is used


class ClipKeywords(SharedSettings, ClipSettings, CommonOptions, ClipOptions, total=False):
    """Keyword arguments of `Model.generate`."""


class ChunkKeywords(SharedSettings, ChunkSettings, CommonOptions, ChunkOptions, total=False):
    """Keyword arguments of `Model.rollout`."""


class GenerateKeywords(ClipKeywords, MachineSettings, PresetOptions, total=False):
    """Keyword arguments of `generate`."""


class RolloutKeywords(ChunkKeywords, MachineSettings, PresetOptions, total=False):
    """Keyword arguments of `rollout`."""


class LoadKeywords(
    SharedSettings, ClipSettings, ChunkSettings, MachineSettings, PresetOptions, total=False
):
    """Keyword arguments of `load`."""

    task: str
    force: bool  # load even if it does not fit in memory


class PlanKeywords(
    SharedSettings, ClipSettings, ChunkSettings, MachineSettings, PresetOptions, CommonOptions,
    ClipOptions, ChunkOptions, total=False,
):  # fmt: skip
    """Keyword arguments of `plan`."""


@dataclass(frozen=True)
class Video:
    """A finished video: `frames` uint8 [T, H, W, 3], and the record of how it was made.

    `path` is None where no file was written. `latents` [1, C, F, H, W] are normalised, and those
    of the last segment where there are several; None for a video that was kept (`skip_existing`).
    """

    path: Path | None
    frames: "NDArray[np.uint8]" = field(repr=False)
    record: Mapping[str, Any] = field(repr=False)
    latents: "Tensor | None" = field(default=None, repr=False)

    @property
    def seed(self) -> int:
        """The seed, which was drawn if none was set."""
        return int(self.record["request"]["seed"])

    @property
    def fps(self) -> int:
        """Video frames per second."""
        return int(self.record["request"]["video"]["fps"])


@dataclass(frozen=True)
class VideoPlan:
    """What a video needs, and whether this machine has it; see `plan`.

    Without a cost (a model of the hub whose shape is not known before it is downloaded) `fits` and
    `needed` are None.
    """

    model: str
    fits: bool | None
    needed: int | None  # bytes at once on the device
    available: int | None  # bytes of the device
    device: str
    offload: str  # the mode that would be used
    seconds: float | None  # None where the device was not measured: wancli doctor --measure
    hint: str  # what would make it fit; empty if it does
    plan: Mapping[str, Any] = field(repr=False)  # steps, tokens, forwards, duration ...
    cost: Mapping[str, Any] = field(repr=False)  # parameters, FLOPs and bytes in detail
    warnings: Sequence[str] = ()

    def __str__(self) -> str:
        if self.needed is None or self.available is None:
            return f"{self.model}: its shape is not known before it is downloaded"
        verdict = "fits" if self.fits else "does not fit"
        how = "" if self.offload == "none" else f" with offload {self.offload}"
        sizes = f"needs {gib(self.needed)} of {gib(self.available)} ({self.device})"
        time = f", about {duration(self.seconds)}" if self.seconds else ""
        return f"{self.model} {verdict}{how}: {sizes}{time}"


def generate(
    prompt: str, *, model: str | None = None, seed: int | None = None,
    output: AnyPath | None = None, progress: Report | None = None,
    **settings: Unpack[GenerateKeywords],
) -> Video:  # fmt: skip
    """Generate a video from a prompt, and from pictures and videos with models that take them.

    With `output`, an MP4 with its record inside and beside it is written, too; the name may be a
    template, such as "{prompt:40}-{seed}.mp4". `progress` is called with each Phase, Step and
    PreviewEvent. The other settings are those of `wancli generate --help`, with the same presets
    and defaults. To make several videos, `load` the model once. Raises WancliError.

    >>> video = wancli.generate("a red circle moving right", model="demo", seed=1, steps=4)
    >>> video.frames.shape
    (33, 96, 96, 3)
    """
    check_keywords(settings, GenerateKeywords.__optional_keys__, of="generate")
    listener = _Listener(progress)
    layers, options = _layers({**settings, "model": model}, listener)
    planned = _plan_clip(prompt, layers, options, seed=seed, output=output)
    with closing(planned.pipeline(on_bytes=_ignore)) as pipeline:
        return _make_clip(planned, pipeline, listener)


def rollout(
    prompt: str | None = None, *, model: str | None = None, seed: int | None = None,
    output: AnyPath | None = None, progress: Report | None = None,
    **settings: Unpack[RolloutKeywords],
) -> "RolloutStream":  # fmt: skip
    """Generate a video chunk by chunk, of any length, at constant memory.

    Returns an iterator of its chunks, each yielded as soon as it is decoded: the next one is made
    when it is asked for. With `output`, the video is written as it grows, and a rollout that is
    closed early keeps its finished chunks for `resume=True`. The other settings are those of
    `wancli rollout --help`. Raises WancliError.

    >>> for chunk in wancli.rollout("a red circle moving right", chunks=3, seed=1):
    ...     print(chunk.index, chunk.frames.shape)
    0 (9, 96, 96, 3)
    1 (12, 96, 96, 3)
    2 (12, 96, 96, 3)
    """
    check_keywords(settings, RolloutKeywords.__optional_keys__, of="rollout")
    listener = _Listener(progress)
    layer, options = _split({**settings, "model": model})
    preset = options.pop("preset", None), options.pop("cachedit_preset", None)
    request = _rollout_request(prompt, options, seed=seed, output=output)
    session = open_session(request, lambda: settings_layers(listener.warn, layer, *preset), [layer])
    session.capacity.check()
    pipeline = session.pipeline(on_bytes=_ignore)
    return RolloutStream(session, pipeline, listener, closes=True)


def load(
    model: str | None = None, *, progress: Report | None = None, **settings: Unpack[LoadKeywords]
) -> "Model":
    """Load a model once, for any number of videos.

    The settings of the machine (device, dtype, offload, quantize, lora ...) are fixed from here on;
    the others become defaults for its videos, and `offload` "auto" is decided by them. Close it, or
    leave the block, to give the memory back. Raises WancliError.

    >>> with wancli.load("demo", steps=4) as model:
    ...     videos = [model.generate("a red circle moving right", seed=seed) for seed in (1, 2)]
    """
    check_keywords(settings, LoadKeywords.__optional_keys__, of="load")
    listener = _Listener(progress)
    layers, options = _layers({**settings, "model": model}, listener)
    task, force = options.get("task"), options.get("force", False)
    resolved = resolve(layers, Settings)
    request = GenerateRequest("generate", "", [0], resolved, force, task=task)
    planned = plan_videos(request, IN_MEMORY, assume_inputs=True)
    planned.capacity.check()
    return Model(planned, layers, listener)


def plan(
    prompt: str = "", *, model: str | None = None, gpu: str | None = None,
    **settings: Unpack[PlanKeywords],
) -> VideoPlan:  # fmt: skip
    """Estimate what a video needs, and whether it fits; loads nothing.

    Takes the settings of `generate`, and with `chunks` those of `rollout`. With `gpu` ("24GB",
    "rtx4090", ...) the plan is for that GPU and not for this machine. Raises WancliError for a
    request that cannot work; one that does not fit is an answer.

    >>> wancli.plan(model="wan2.1-t2v-14b", size="832x480", gpu="24GB").offload
    'group'
    """
    is_rollout = settings.get("chunks") is not None
    keywords = RolloutKeywords if is_rollout else GenerateKeywords
    name = "plan of a rollout" if is_rollout else "plan without `chunks`"
    check_keywords(settings, keywords.__optional_keys__, of=name)
    device = planned_device(gpu) if gpu else None
    layers, options = _layers({**settings, "model": model}, _Listener(None))
    planned: PlannedVideos | RolloutSession
    if is_rollout:
        request = _rollout_request(prompt or "video", options)
        planned = RolloutSession(request, layers, before={}, gpu=device)
    else:
        videos = _clip_request(prompt or "video", layers, options)
        planned = plan_videos(videos, IN_MEMORY, assume_inputs=True, gpu=device)
    return _video_plan(planned.capacity, planned.plan_json(), planned.warnings)


class _Closing(ABC):
    """Closed at the end of its `with` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Give back what is held."""


class Model(_Closing):
    """A loaded model, made by `load`. It makes one video at a time."""

    def __init__(
        self, planned: PlannedVideos, layers: Sequence[Layer], listener: "_Listener"
    ) -> None:
        """Load what `planned` needs; `layers` are the defaults of later requests."""
        spec = planned.spec
        settings = planned.capacity.with_offload(planned.request.resolved.settings)
        self._model, self._machine, self._listener = settings.model, settings.machine, listener
        offload = Layer(SOURCE, {"machine": {"offload": settings.machine.offload}})
        self._layers = [*layers, offload]
        stays = ("vae",) if spec.causal else ()  # as rollouts need it
        self._pipeline = WarmPipeline(spec, settings.machine, stays=stays, on_bytes=_ignore)
        try:
            with self._pipeline.in_use(listener.report, task=planned.plan.task):
                pass
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """Name of the model."""
        return self._pipeline.spec.name

    def close(self) -> None:
        """Give the memory back; the model cannot be used again."""
        self._pipeline.close()

    def generate(
        self, prompt: str, *, seed: int | None = None, output: AnyPath | None = None,
        progress: Report | None = None, **settings: Unpack[ClipKeywords],
    ) -> Video:  # fmt: skip
        """Generate a video, as `wancli.generate` does. Raises WancliError."""
        check_keywords(settings, ClipKeywords.__optional_keys__, of="Model.generate")
        layer, options = _split(settings)
        planned = _plan_clip(prompt, [*self._layers, layer], options, seed=seed, output=output)
        return _make_clip(planned, self._pipeline, self._listener.with_report(progress))

    def rollout(
        self, prompt: str | None = None, *, seed: int | None = None,
        output: AnyPath | None = None, progress: Report | None = None,
        **settings: Unpack[ChunkKeywords],
    ) -> "RolloutStream":  # fmt: skip
        """Generate a video chunk by chunk, as `wancli.rollout` does. Raises WancliError."""
        check_keywords(settings, ChunkKeywords.__optional_keys__, of="Model.rollout")
        if self._machine.offload == "model" and "vae" not in self._pipeline.stays:
            raise UsageError(
                f"`offload model` moves the VAE of {self.name}, which was loaded for clips.",
                hint="wancli.rollout(..., force=True)",
            )
        layer, options = _split(settings)
        loaded = Layer("load", {"model": self._model, "machine": self._machine.model_dump()})
        session = open_session(
            _rollout_request(prompt, options, seed=seed, output=output),
            lambda: [*self._layers, layer],
            [loaded, layer],
        )
        session.capacity.check()
        return RolloutStream(session, self._pipeline, self._listener.with_report(progress))


class RolloutStream(_Closing, Iterator["RolloutChunk"]):
    """The chunks of a rollout, made as they are asked for.

    After the last one `record` says how the video was made. Close the stream, leave its block or
    drop it to stop early.
    """

    def __init__(
        self, session: RolloutSession, pipeline: WarmPipeline, listener: "_Listener", *,
        closes: bool = False,
    ) -> None:  # fmt: skip
        """With `closes`, the pipeline is closed at the end."""
        self.path = session.paths()[0]
        self.plan: Mapping[str, Any] = session.plan_json()
        self.record: Mapping[str, Any] | None = None
        self._pipeline = pipeline if closes else None
        self._run = session.run(listener, pipeline)

    def __next__(self) -> "RolloutChunk":
        try:
            return next(self._run)
        except StopIteration as end:
            if isinstance(end.value, RunRecord):
                self.record = end.value.as_json()
            self.close()
            raise
        except BaseException:
            self.close()
            raise

    def __del__(self) -> None:
        if hasattr(self, "_run"):
            self.close()

    def close(self) -> None:
        """Stop, and give the model back. Finished chunks of an `output` stay for `resume`."""
        self._run.close()
        if self._pipeline:
            self._pipeline.close()


class _Listener:
    """Passes progress to a callback, and notes and warnings to the log."""

    def __init__(self, report: Report | None) -> None:
        self.report: Report = report or (lambda event: None)

    def with_report(self, report: Report | None) -> "_Listener":
        """A listener for one request; without a callback of its own, this one."""
        return _Listener(report) if report else self

    def note(self, text: str) -> None:
        log.info(text)

    def warn(self, text: str, *, hint: str) -> None:
        log.warning("%s (%s)", text, hint)

    def progress(self) -> AbstractContextManager[Report]:
        return nullcontext(self.report)

    def done(self, record: RunRecord) -> None:
        """The caller gets the record with the video."""

    def skipped(self, request: Request, path: Path) -> None:
        """The caller gets the video."""

    def failed(self, record: RunRecord) -> None:
        """The caller gets the error."""


def _split(keywords: Mapping[str, Any]) -> tuple[Layer, dict[str, Any]]:
    """The settings among keyword arguments, and the other options that are set."""
    settings = {name: value for name, value in keywords.items() if is_setting(name)}
    options = {name: value for name, value in keywords.items() if name not in settings}
    return keyword_layer(SOURCE, settings), {n: v for n, v in options.items() if v is not None}


def _layers(keywords: Mapping[str, Any], listener: _Listener) -> tuple[list[Layer], dict[str, Any]]:
    """All layers of settings under keyword arguments, and the other options."""
    layer, options = _split(keywords)
    preset, cachedit_preset = options.pop("preset", None), options.pop("cachedit_preset", None)
    return settings_layers(listener.warn, layer, preset, cachedit_preset), options


def _plan_clip(
    prompt: str, layers: list[Layer], options: dict[str, Any], *, seed: int | None,
    output: AnyPath | None,
) -> PlannedVideos:  # fmt: skip
    """Check and plan one video. Raises WancliError."""
    files = OutputFiles(
        output=_text(output),
        folder=Path(),
        overwrite=options.get("overwrite", False),
        skip_existing=options.get("skip_existing", False),
        latents=_text(options.get("save_latents")),
        preview_every=options.get("preview_every"),
        video=output is not None,
    )
    return plan_videos(_clip_request(prompt, layers, options, seed=seed), files)


def _clip_request(
    prompt: str, layers: list[Layer], options: Mapping[str, Any], *, seed: int | None = None
) -> GenerateRequest:
    return GenerateRequest(
        "generate",
        check_prompt(prompt),
        parse_seeds(_text(seed), None),
        resolve(layers, Settings),
        options.get("force", False),
        _input_files(options),
        options.get("task"),
    )


def _input_files(options: Mapping[str, Any]) -> InputFiles:
    names = [f.name for f in fields(InputFiles) if f.name in options and f.name != "ref_image"]
    pictures = options.get("ref_image", ())
    pictures = [pictures] if isinstance(pictures, AnyPath) else pictures
    files = {name: Path(options[name]) for name in names}
    return InputFiles(**files, ref_image=tuple(map(Path, pictures)))


def _rollout_request(
    prompt: str | None, options: Mapping[str, Any], *, seed: int | None = None,
    output: AnyPath | None = None,
) -> RolloutRequest:  # fmt: skip
    """The request of a rollout. Raises UsageError."""
    rerender = options.get("rerender")
    continues = options.get("resume", False) or rerender is not None
    for name, wanted in (("resume", continues), ("save_latents", "save_latents" in options)):
        if wanted and output is None:
            raise UsageError(f"`{name}` needs the name of a video.", hint="`output` NAME.mp4")
    if prompt is not None or not (continues or "prompt_embeds" in options):
        prompt = check_prompt(prompt or "")
    changes = [PromptChange(chunk, text.strip()) for chunk, text in options.get("at", {}).items()]
    changes += read_script(Path(options["script"])) if "script" in options else []
    files = {f.name: Path(options[f.name]) for f in fields(ContextFiles) if f.name in options}
    paths = {name: Path(options[name]) for name in ("report", "save_latents") if name in options}
    return RolloutRequest(
        prompt=prompt,
        seed=_text(seed),
        starts=ContextFiles(**files),
        output=_text(output),
        folder=Path(),
        changes=changes,
        latents=paths.get("save_latents"),
        files=output is not None,
        only_new=options.get("only_new", False),
        overwrite=options.get("overwrite", False),
        resume=options.get("resume", False),
        rerender=rerender,
        report=paths.get("report"),
        force=options.get("force", False),
    )


def _ignore(_bytes: int) -> None:
    """Take the bytes of a download, of which huggingface_hub would draw bars otherwise."""


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _make_clip(planned: PlannedVideos, pipeline: WarmPipeline, listener: _Listener) -> Video:
    """Make the one video of a plan, or read the one that is kept."""
    (item,) = planned.todo
    for clip in planned.run(listener, pipeline):
        return Video(item.output, clip.frames, clip.record.as_json(), clip.latents)
    from wancli.video.read import read_frames

    path = item.output or Path()
    return Video(path, read_frames(path), record_in(path) or record_beside(path) or {})


def _video_plan(
    capacity: CapacityCheck, plan: Mapping[str, Any], warnings: Sequence[str]
) -> VideoPlan:
    estimate, name = capacity.estimate, capacity.spec.name
    if estimate is None:
        return VideoPlan(name, None, None, None, "", "none", None, "", plan, {}, warnings)
    hint = ""
    try:
        replace(capacity, force=False).check()
    except CapacityError as error:
        hint = error.hint
    return VideoPlan(
        name,
        estimate.sufficient,
        estimate.needed,
        estimate.device.total,
        estimate.device.name,
        estimate.offload,
        estimate.total_s,
        hint,
        plan,
        estimate.as_json(),
        warnings,
    )
