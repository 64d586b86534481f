"""From clean chunks to one MP4: decoded, written and measured as they come."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from diffusers import AutoencoderKLWan
from torch import Tensor

from wancli.catalog.geometry import Span
from wancli.models.vae import StreamingDecoder
from wancli.video.drift import DriftMeter
from wancli.video.write import VideoWriter


@dataclass
class ChunkOutput:
    """What became of one chunk's latents."""

    frames: int = 0  # video frames written, or, where there is no video, that they stand for
    decode_s: float = 0.0
    write_s: float = 0.0


class VideoSink:
    """Takes clean chunks in order. Memory does not grow with their number.

    With `beside`, a chunk is decoded and written in a thread of its own while the next one is
    denoised; never more than one waits. An error in it is raised by the next call.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        writer: VideoWriter,
        meter: DriftMeter,
        *,
        beside: bool = False,
        shows: Callable[[Span], bool] = lambda _span: True,
    ) -> None:
        """`shows` says which chunks are in the video; the others only prepare the VAE."""
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
        """The next chunk [1, C, n, H, W]; what is returned is filled in when it is done."""
        shown = ChunkOutput()
        if self._pool is None:
            self._show(span, latents, shown)
        else:
            self.settle()
            self._pending = self._pool.submit(self._show, span, latents, shown)
        return shown

    def settle(self) -> None:
        """Wait for what is still decoded beside."""
        if self._pending:
            self._pending.result()
            self._pending = None

    def _show(self, span: Span, latents: Tensor, shown: ChunkOutput) -> None:
        started = perf_counter()
        frames = self._decoder(latents)
        decoded = perf_counter()
        shown.decode_s = decoded - started
        if self._shows(span):
            self._writer.write(frames)
            shown.frames = len(frames)
            shown.write_s = perf_counter() - decoded
            self._meter.add(frames, latents, index=span.index)

    def drift(self) -> dict[str, Any]:
        """What has drifted from the first chunks to the last."""
        self.settle()
        return self._meter.summary()
