"""Saves, decodes, writes and measures clean chunks as they come."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Self

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor

from wancli.catalog.geometry import Span
from wancli.errors import RunError
from wancli.models.streams import HostCopy
from wancli.models.timer import Timer
from wancli.models.vae import StreamingDecoder, check_finite
from wancli.rollouts.stages import PipelineStage
from wancli.utils.interrupts import uninterrupted
from wancli.video.drift import DriftMeter
from wancli.video.write import VideoWriter

_PATIENCE_S = 2.0  # for the chunk that a stage works on when the rollout ends early

Save = Callable[[Span, Tensor], None]  # latents [1, C, n, H, W] on the CPU


@dataclass
class ChunkOutput:
    """What became of a chunk, and how long it took."""

    frames: int = 0  # video frames written or, without a VAE, represented
    pixels: NDArray[np.uint8] | None = None  # those frames, [T, H, W, 3], until they are passed on
    latents: Tensor | None = None  # [1, C, n, H, W] on the CPU, until they are passed on
    write_s: float = 0.0
    drift_s: float = 0.0
    done: bool = False  # through all stages


@dataclass
class _Item:
    """A chunk on its way through the stages."""

    span: Span
    timer: Timer  # of the chunk
    latents: Tensor  # on the device
    on_host: HostCopy  # of the latents, and whether they are finite
    save: Save | None
    decoded: HostCopy | None = None  # the video frames, and whether they were finite
    output: ChunkOutput = field(default_factory=ChunkOutput)
    frames: NDArray[np.uint8] | None = None


class ChunkSink:
    """Checks and saves clean chunks, in order. Memory does not grow with their number.

    With `beside`, a thread does so while the next chunk is denoised. Its errors are raised by the
    next call, and nothing that is not finite is saved.
    """

    def __init__(self, *, beside: bool = False) -> None:
        self.beside = beside
        self._saving = PipelineStage("save", self._save, threaded=beside)
        self._later: list[PipelineStage[_Item]] = []  # in order

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with uninterrupted():
            self._stop()

    def add(
        self, span: Span, latents: Tensor, timer: Timer, *, save: Save | None = None
    ) -> ChunkOutput:
        """Add the next chunk [1, C, n, H, W]; the output is filled in as it goes through.

        `save` is called with it once it is known to be finite. `timer` gets the interval "decode".
        """
        on_host = HostCopy(latents, torch.isfinite(latents).all())
        item = _Item(span, timer, latents, on_host, save)
        try:
            self._queue(item)
        except Exception:  # what cannot be decoded is saved, too; an interrupt must not wait
            self._saving.put(item)
            raise
        self._saving.put(item)
        return item.output

    def finish(self) -> None:
        """Wait until every chunk is through. Raises the first error of a stage."""
        for stage in (self._saving, *self._later):
            stage.finish()

    def drift(self) -> dict[str, Any]:
        """Drift of the video for the record, once every chunk is through; {} without a video."""
        return {}

    def _save(self, item: _Item) -> None:
        item.output.latents, finite = item.on_host.wait()
        if not finite:
            raise RunError(
                f"the latents of chunk {item.span.index} are not finite: denoising failed.",
                hint="`overwrite` with `dtype float32` or a lower `guidance_scale`",
            )
        if item.save:
            item.save(item.span, item.output.latents)
        self._pass_on(item)

    def _queue(self, item: _Item) -> None:
        """Queue what the device has to do for a chunk."""

    def _pass_on(self, item: _Item) -> None:
        """Continue with a chunk that is saved."""
        item.output.done = True

    def _stop(self) -> None:
        """End all threads: what is denoised is still saved, but not decoded or written."""
        for stage in self._later:
            stage.close(drop=True)
        self._saving.close()
        for stage in (self._saving, *self._later):
            stage.ends_within(_PATIENCE_S)


class VideoSink(ChunkSink):
    """Also decodes the chunks, writes them into one video, and measures their drift.

    With `beside`, writing and measuring are two more threads. The device decodes a chunk between
    the denoising of two: either keeps a GPU busy alone, and in turns they share their memory.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        writer: VideoWriter | None,
        meter: DriftMeter,
        *,
        beside: bool = False,
        shows: Callable[[Span], bool] = lambda _span: True,
        recalls: int = 0,
    ) -> None:
        """`shows` selects the chunks of the video; the others only advance the VAE's state.

        Without a `writer` the frames are passed on, and not written. As many as `recalls` of the
        last decoded frames are kept in `recent`.
        """
        super().__init__(beside=beside)
        self._decoder, self._writer, self._meter = StreamingDecoder(vae), writer, meter
        self._shows, self._recalls = shows, recalls
        self.recent: Tensor | None = None  # uint8 [T, H, W, 3], on the device
        self._writing = PipelineStage("write", self._write, threaded=beside)
        self._measuring = PipelineStage("drift", self._measure, threaded=beside)
        self._later = [self._writing, self._measuring]

    def drift(self) -> dict[str, Any]:
        """Drift from the first chunks to the last."""
        return self._meter.summary()

    def _queue(self, item: _Item) -> None:
        if self.beside:  # else first saved: a device that is not asynchronous takes its time
            self._decode(item)

    def _pass_on(self, item: _Item) -> None:
        if not self.beside:
            self._decode(item)
        if item.decoded:
            self._writing.put(item)

    def _decode(self, item: _Item) -> None:
        item.timer.mark("save")
        decoded = self._decoder.frames(item.latents)
        item.decoded = HostCopy(decoded.pixels, decoded.finite)
        if self._recalls:
            before = () if self.recent is None else (self.recent,)
            self.recent = torch.cat([*before, decoded.pixels])[-self._recalls :]
        item.timer.mark("decode")

    def _write(self, item: _Item) -> None:
        assert item.decoded  # noqa: S101 - else it is not passed on
        pixels, finite = item.decoded.wait()
        check_finite(finite)
        if self._shows(item.span):
            started = perf_counter()
            frames: NDArray[np.uint8] = pixels.numpy()
            if self._writer:
                self._feed(self._writer, frames)
            item.frames, item.output.frames = frames, len(frames)
            item.output.write_s = perf_counter() - started
        self._measuring.put(item)

    def _feed(self, writer: VideoWriter, frames: NDArray[np.uint8]) -> None:
        for frame in frames:
            if self._writing.dropping:
                return
            writer.write(frame[None])

    def _measure(self, item: _Item) -> None:
        output, frames = item.output, item.frames
        if frames is not None and output.latents is not None:
            started = perf_counter()
            self._meter.add(frames, output.latents, index=item.span.index)
            output.drift_s = perf_counter() - started
        output.pixels = frames
        output.done = True

    def _stop(self) -> None:
        super()._stop()
        if self._writer and not self._writing.ends_within(0.0):
            self._writer.kill()  # it waits for an ffmpeg that does not read
            self._writing.ends_within(_PATIENCE_S)
