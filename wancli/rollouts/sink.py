"""Decodes, writes and measures clean chunks as they come."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import numpy as np
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor

from wancli.catalog.geometry import Span
from wancli.models.vae import StreamingDecoder
from wancli.video.drift import DriftMeter
from wancli.video.write import VideoWriter


@dataclass
class ChunkOutput:
    """Frames and times of one decoded chunk."""

    frames: int = 0  # video frames written or, without a VAE, represented
    pixels: NDArray[np.uint8] | None = None  # those frames, [T, H, W, 3], until they are passed on
    decode_s: float = 0.0
    write_s: float = 0.0
    done: bool = False  # decoded, and written or hidden


class VideoSink:
    """Decodes clean chunks, in order, into one video. Memory does not grow with their number.

    With `beside`, a thread decodes and writes a chunk while the next one is denoised; at most one
    is pending, and its errors are raised by the next call.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        writer: VideoWriter | None,
        meter: DriftMeter,
        *,
        beside: bool = False,
        shows: Callable[[Span], bool] = lambda _span: True,
    ) -> None:
        """`shows` selects the chunks of the video; the others only advance the VAE's state.

        Without a `writer` the frames are passed on, and not written.
        """
        self._decoder, self._writer, self._meter = StreamingDecoder(vae), writer, meter
        self._shows = shows
        self._pool = ThreadPoolExecutor(1) if beside else None
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, span: Span, latents: Tensor) -> ChunkOutput:
        """Add the next chunk [1, C, n, H, W]; the output is filled in once it is decoded."""
        output = ChunkOutput()
        if self._pool is None:
            self._write(span, latents, output)
        else:
            self.wait()
            self._pending = self._pool.submit(self._write, span, latents, output)
        return output

    def wait(self) -> None:
        """Wait for the chunk that is being decoded."""
        if self._pending:
            self._pending.result()
            self._pending = None

    def _write(self, span: Span, latents: Tensor, output: ChunkOutput) -> None:
        started = perf_counter()
        frames = self._decoder(latents)
        decoded = perf_counter()
        output.decode_s = decoded - started
        if self._shows(span):
            if self._writer:
                self._writer.write(frames)
            output.frames, output.pixels = len(frames), frames
            output.write_s = perf_counter() - decoded
            self._meter.add(frames, latents, index=span.index)
        output.done = True

    def drift(self) -> dict[str, Any]:
        """Drift from the first chunks to the last, for the record."""
        self.wait()
        return self._meter.summary()
