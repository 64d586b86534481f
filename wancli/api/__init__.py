"""The door for Python: `wancli.generate`, `wancli.rollout`, `wancli.plan` and `wancli.load`.

Keyword arguments are the settings. Nothing is printed, no file is written without `output`.
"""

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Unpack

from wancli.api.keywords import (
    AnyPath,
    ChunkKeywords,
    ClipKeywords,
    GenerateKeywords,
    LoadKeywords,
    PlanKeywords,
    RolloutKeywords,
    errors_name_keywords,
)
from wancli.api.model import Model, RolloutStream, make_clip
from wancli.api.requests import (
    Listener,
    all_layers,
    clip_request,
    ignore_bytes,
    plan_clip,
    rollout_request,
    split,
)
from wancli.api.results import Video, VideoPlan, video_plan
from wancli.config.keywords import check_keywords
from wancli.config.layers import resuming_layers, settings_layers
from wancli.config.resolve import resolve
from wancli.config.settings import Settings
from wancli.cost.devices import planned_device
from wancli.generation.batch import GenerateRequest, OutputFiles, PlannedVideos, plan_videos
from wancli.records.progress import Report
from wancli.rollouts.session import RolloutSession, open_session

__all__ = [
    "ChunkKeywords", "ClipKeywords", "GenerateKeywords", "LoadKeywords", "Model", "PlanKeywords",
    "RolloutKeywords", "RolloutStream", "Video", "VideoPlan", "generate", "load", "plan", "rollout",
]  # fmt: skip
IN_MEMORY = OutputFiles(None, Path(), video=False)


@errors_name_keywords()
def generate(
    prompt: str, *, model: str | None = None, seed: int | None = None,
    output: AnyPath | None = None, progress: Report | None = None,
    **settings: Unpack[GenerateKeywords],
) -> Video:  # fmt: skip
    """Generate a video from a prompt, and from pictures and videos with models that take them.

    With `output`, an MP4 with its record inside and beside it is written, too; the name may be a
    template, such as "{prompt:40}-{seed}.mp4". `progress` is called with each Phase, Loading, Step,
    PreviewEvent and Decoded. The other settings are those of `wancli generate --help`, with the
    same presets and defaults. To make several videos, `load` the model once. Raises WancliError.

    >>> video = wancli.generate("a red circle moving right", model="demo", seed=1, steps=4)
    >>> video.frames.shape
    (33, 96, 96, 3)
    """
    check_keywords(settings, GenerateKeywords.__optional_keys__, of="generate")
    listener = Listener(progress)
    layers, options = all_layers({**settings, "model": model}, listener)
    planned = plan_clip(prompt, layers, options, seed=seed, output=output)
    with closing(planned.pipeline(on_bytes=ignore_bytes)) as pipeline:
        return make_clip(planned, pipeline, listener)


@errors_name_keywords()
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
    listener = Listener(progress)
    layer, options = split({**settings, "model": model})
    preset = options.pop("preset", None), options.pop("cachedit_preset", None)
    request = rollout_request(prompt, options, seed=seed, output=output)
    layers = partial(settings_layers, listener.warn, layer, *preset)
    session = open_session(request, layers, partial(resuming_layers, layer, *preset))
    session.capacity.check()
    session.check_outputs()
    pipeline = session.pipeline(on_bytes=ignore_bytes)
    return RolloutStream(session, pipeline, listener, closes=True)


@errors_name_keywords()
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
    listener = Listener(progress)
    layers, options = all_layers({**settings, "model": model}, listener)
    task, force = options.get("task"), options.get("force", False)
    resolved = resolve(layers, Settings)
    request = GenerateRequest("generate", "", [0], resolved, force, task=task)
    planned = plan_videos(request, IN_MEMORY, assume_inputs=True)
    planned.capacity.check()
    return Model(planned, layers, listener)


@errors_name_keywords()
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
    layers, options = all_layers({**settings, "model": model}, Listener(None))
    planned: PlannedVideos | RolloutSession
    if is_rollout:
        request = rollout_request(prompt or "video", options)
        planned = RolloutSession(request, layers, before={}, gpu=device)
    else:
        videos = clip_request(prompt or "video", layers, options)
        planned = plan_videos(videos, IN_MEMORY, assume_inputs=True, gpu=device)
    return video_plan(planned.capacity, planned.plan_json(), planned.warnings)
