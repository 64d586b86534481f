"""A loaded model, and the chunks of a rollout."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

from wancli.api.keywords import AnyPath, ChunkKeywords, ClipKeywords, errors_name_keywords
from wancli.api.requests import (
    SOURCE,
    Listener,
    ignore_bytes,
    plan_clip,
    rollout_request,
    split,
)
from wancli.api.results import Video
from wancli.config.keywords import check_keywords
from wancli.config.resolve import Layer
from wancli.errors import UsageError
from wancli.generation.batch import PlannedVideos
from wancli.models.warm import WarmPipeline
from wancli.planning.existing import record_of
from wancli.records.progress import Report
from wancli.records.record import RunRecord
from wancli.rollouts.session import RolloutSession, open_session

if TYPE_CHECKING:
    from wancli.rollouts.runner import RolloutChunk


class _Closing(ABC):
    """Closed at the end of its `with` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Give back what is held."""


class Model(_Closing):
    """A loaded model, made by `load`. It makes one video at a time."""

    def __init__(
        self, planned: PlannedVideos | RolloutSession, layers: Sequence[Layer], listener: Listener
    ) -> None:
        """Load what `planned` needs; `layers` are the defaults of later requests."""
        spec, settings = planned.spec, planned.capacity.with_offload(planned.resolved.settings)
        self._model, self._machine, self._listener = settings.model, settings.machine, listener
        self._offload = Layer(SOURCE, {"machine": {"offload": settings.machine.offload}})
        self._layers = layers
        stays = ("vae",) if spec.causal else ()  # as rollouts need it
        self._pipeline = WarmPipeline(spec, settings.machine, stays=stays, on_bytes=ignore_bytes)
        try:
            with self._pipeline.in_use(listener.report, task=planned.task):
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

    @errors_name_keywords()
    def generate(
        self, prompt: str, *, seed: int | None = None, output: AnyPath | None = None,
        progress: Report | None = None, **settings: Unpack[ClipKeywords],
    ) -> Video:  # fmt: skip
        """Generate a video, as `wancli.generate` does. Raises WancliError."""
        check_keywords(settings, ClipKeywords.__optional_keys__, of="Model.generate")
        planned = self.plan_clip(prompt, seed=seed, output=output, settings=settings)
        return make_clip(planned, self._pipeline, self._listener.with_report(progress))

    @errors_name_keywords()
    def rollout(
        self, prompt: str | None = None, *, seed: int | None = None,
        output: AnyPath | None = None, progress: Report | None = None,
        **settings: Unpack[ChunkKeywords],
    ) -> "RolloutStream":  # fmt: skip
        """Generate a video chunk by chunk, as `wancli.rollout` does. Raises WancliError."""
        check_keywords(settings, ChunkKeywords.__optional_keys__, of="Model.rollout")
        session = self.plan_rollout(prompt, seed=seed, output=output, settings=settings)
        return RolloutStream(session, self._pipeline, self._listener.with_report(progress))

    @property
    def pipeline(self) -> WarmPipeline:
        """The loaded pipeline, on which planned videos run."""
        return self._pipeline

    def plan_clip(
        self, prompt: str, *, seed: int | None, output: AnyPath | None,
        settings: Mapping[str, Any], defaults: Sequence[Layer] = (),
    ) -> PlannedVideos:  # fmt: skip
        """Check and plan a video. Raises WancliError, which names settings in backticks.

        `defaults` take the place of those that the model was loaded with, such as of another preset
        for the same weights.
        """
        layer, options = split(settings)
        layers = [*self._under(defaults), layer]
        return plan_clip(prompt, layers, options, seed=seed, output=output)

    def plan_rollout(
        self, prompt: str | None, *, seed: int | None, output: AnyPath | None,
        settings: Mapping[str, Any], defaults: Sequence[Layer] = (),
    ) -> RolloutSession:  # fmt: skip
        """Check and plan a rollout, as `plan_clip` does a video. Raises WancliError."""
        if self._machine.offload == "model" and "vae" not in self._pipeline.stays:
            raise UsageError(
                f"`offload model` moves the VAE of {self.name}, which was loaded for clips.",
                hint="wancli.rollout(..., force=True)",
            )
        layer, options = split(settings)
        loaded = Layer("load", {"model": self._model, "machine": self._machine.model_dump()})
        session = open_session(
            rollout_request(prompt, options, seed=seed, output=output),
            lambda: [*self._under(defaults), layer],
            lambda: [loaded, layer],
        )
        session.capacity.check()
        session.check_outputs()
        return session

    def _under(self, defaults: Sequence[Layer]) -> list[Layer]:
        """The layers under a request's own settings."""
        return [*(defaults or self._layers), self._offload]


class RolloutStream(_Closing, Iterator["RolloutChunk"]):
    """The chunks of a rollout, made as they are asked for.

    After the last one `record` says how the video was made. Close the stream, leave its block or
    drop it to stop early.
    """

    def __init__(
        self, session: RolloutSession, pipeline: WarmPipeline, listener: Listener, *,
        closes: bool = False,
    ) -> None:  # fmt: skip
        """With `closes`, the pipeline is closed at the end."""
        self.path = session.files.video
        self.plan: Mapping[str, Any] = session.plan_json()
        self.record: Mapping[str, Any] | None = None
        self._pipeline = pipeline if closes else None
        self._run = session.run(listener, pipeline)

    @errors_name_keywords()
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


def make_clip(planned: PlannedVideos, pipeline: WarmPipeline, listener: Listener) -> Video:
    """Make the one video of a plan, or read the one that is kept."""
    (item,) = planned.todo
    for clip in planned.run(listener, pipeline):
        return Video(item.output, clip.frames, clip.record.as_json(), clip.latents)
    from wancli.video.read import read_frames

    path = item.output or Path()
    return Video(path, read_frames(path), record_of(path) or {})
