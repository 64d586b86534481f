"""Chunks saved, decoded, written and measured beside the loop, as they are one after the other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread
from time import perf_counter, sleep
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from tests.fakes import tiny_vae
from wancli.catalog.geometry import Span
from wancli.errors import DecodeError, OutputError, RunError
from wancli.models.timer import Timer
from wancli.rollouts import sink as sinks
from wancli.rollouts.sink import ChunkOutput, ChunkSink, VideoSink
from wancli.rollouts.stages import IN_FLIGHT
from wancli.video.drift import DriftMeter

CPU = torch.device("cpu")


@dataclass
class Writer:
    """Stands for ffmpeg: keeps the frames, `delay_s` a frame, and may not read at all."""

    delay_s: float = 0.0
    reads: Event | None = None  # set when frames are read, or ffmpeg is killed
    fails: bool = False
    frames: list[Any] = field(default_factory=list)
    killed: bool = False
    begun: Event = field(default_factory=Event)

    def write(self, frames: Any) -> None:
        self.begun.set()
        if self.reads:
            assert self.reads.wait(10)
        if self.killed or self.fails:
            raise OutputError("cannot write a.mp4: the disk is full", hint="another disk")
        sleep(self.delay_s)
        self.frames.extend(frames.copy())

    def kill(self) -> None:
        self.killed = True
        assert self.reads
        self.reads.set()


@dataclass
class Made:
    """What has come out of a sink."""

    frames: list[Any]
    saved: list[tuple[int, Tensor]]
    drift: dict[str, Any]
    outputs: list[ChunkOutput]


def chunks(count: int, device: torch.device = CPU) -> list[tuple[Span, Tensor]]:
    latents = torch.randn(1, 4, 2 * count, 2, 2, generator=torch.Generator().manual_seed(0))
    return [(Span(n, 2 * n, 2), part.to(device)) for n, part in enumerate(latents.split(2, dim=2))]


def video_sink(vae: AutoencoderKLWan, writer: Writer, *, beside: bool, **more: Any) -> VideoSink:
    return VideoSink(vae, writer, DriftMeter(8), beside=beside, **more)  # type: ignore[arg-type]


def make(vae: AutoencoderKLWan, writer: Writer, *, beside: bool, count: int = 7) -> Made:
    saved: list[tuple[int, Tensor]] = []
    with video_sink(vae, writer, beside=beside) as sink:
        outputs = [
            sink.add(
                span,
                latents,
                Timer(latents.device),
                save=lambda s, kept: saved.append((s.index, kept)),
            )
            for span, latents in chunks(count, next(vae.parameters()).device)
        ]
        sink.finish()
        return Made(writer.frames, saved, sink.drift(), outputs)


@contextmanager
def slowed(vae: AutoencoderKLWan, seconds: float) -> Iterator[None]:
    hook = vae.decoder.register_forward_hook(lambda *_: sleep(seconds))
    try:
        yield
    finally:
        hook.remove()


def same(one: Made, other: Made) -> bool:
    frames = np.array_equal(one.frames, other.frames)
    pairs = zip(one.saved, other.saved, strict=True)
    saved = all(a == b and torch.equal(kept, other) for (a, kept), (b, other) in pairs)
    return frames and saved and one.drift == other.drift


@pytest.mark.parametrize("slow", ["nothing", "decoder", "encoder"])
def test_frames_beside_the_loop_equal_those_in_it(slow: str):
    vae = tiny_vae()
    plain = make(vae, Writer(), beside=False)
    with slowed(vae, 0.005 if slow == "decoder" else 0.0):
        beside = make(vae, Writer(0.002 if slow == "encoder" else 0.0), beside=True)
    assert same(beside, plain)
    assert [index for index, _ in beside.saved] == list(range(7))
    assert len(beside.frames) == 7 * 8 - 3
    for output in beside.outputs:
        assert output.done
        assert output.pixels is not None
    assert np.array_equal(np.concatenate([out.pixels for out in beside.outputs]), plain.frames)


def failing_writer(_vae: AutoencoderKLWan, sink: VideoSink) -> None:
    sink._writer = Writer(fails=True)  # type: ignore[assignment]


def failing_meter(_vae: AutoencoderKLWan, sink: VideoSink) -> None:
    sink._meter.add = None  # type: ignore[assignment, method-assign]


def failing_decoder(vae: AutoencoderKLWan, _sink: VideoSink) -> None:
    vae.decoder.forward = None


def white(vae: AutoencoderKLWan, _sink: VideoSink) -> None:
    torch.nn.init.constant_(vae.decoder.conv_out.bias, float("inf"))


@pytest.mark.parametrize(
    ("beside", "count"), [(False, 20), (True, 1), (True, 20)]
)  # beside: at the end, and while chunks still come
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (failing_writer, OutputError), (failing_meter, TypeError), (failing_decoder, TypeError),
        (white, DecodeError),
    ],
)  # fmt: skip
def test_an_error_of_any_stage_is_raised(
    spoil: Callable[[AutoencoderKLWan, VideoSink], None], error: type[Exception], count: int,
    *, beside: bool,
):  # fmt: skip
    vae = tiny_vae()

    def run() -> None:
        with video_sink(vae, Writer(), beside=beside) as sink:
            spoil(vae, sink)
            for span, latents in chunks(count):
                sink.add(span, latents, Timer(latents.device))
            sink.finish()

    started = perf_counter()
    with pytest.raises(error):
        run()
    assert perf_counter() - started < 10  # a wait without end would be stopped after minutes


@pytest.mark.parametrize("beside", [False, True])
def test_nothing_that_is_not_finite_is_saved(*, beside: bool):
    saved: list[int] = []

    def run() -> None:
        with ChunkSink(beside=beside) as sink:
            for span, latents in chunks(6):
                spoilt = latents.log() if span.index == 2 else latents
                sink.add(span, spoilt, Timer(CPU), save=lambda s, _: saved.append(s.index))
            sink.finish()

    with pytest.raises(RunError, match="latents of chunk 2 are not finite"):
        run()
    assert saved == [0, 1]


class Leaves(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("reads", [True, False])
def test_a_rollout_that_is_left_early_saves_its_chunks_and_writes_no_more(
    monkeypatch: pytest.MonkeyPatch, *, reads: bool
):
    monkeypatch.setattr(sinks, "_PATIENCE_S", 0.05)
    writer, saved = Writer(0.02, reads=None if reads else Event()), []

    def run() -> None:
        with video_sink(tiny_vae(), writer, beside=True) as sink:
            for span, latents in chunks(4):
                sink.add(
                    span, latents, Timer(latents.device), save=lambda s, _: saved.append(s.index)
                )
            assert writer.begun.wait(10)
            raise Leaves

    started = perf_counter()
    with pytest.raises(Leaves):
        run()
    assert perf_counter() - started < 10  # as above
    assert saved == [0, 1, 2, 3]
    assert writer.killed is not reads  # an ffmpeg that does not read is killed
    assert len(writer.frames) < 4 * 8 - 3


def test_the_loop_waits_for_an_encoder_that_does_not_keep_up():
    reads = Event()
    writer, added = Writer(reads=reads), []
    with video_sink(tiny_vae(), writer, beside=True) as sink:

        def add() -> None:
            for span, latents in chunks(20):
                sink.add(span, latents, Timer(latents.device))
                added.append(span.index)

        thread = Thread(target=add)
        thread.start()
        thread.join(0.3)
        assert len(added) <= 3 * IN_FLIGHT  # saved, decoded, and waiting to be written
        reads.set()
        thread.join()
        sink.finish()
    assert len(writer.frames) == 20 * 8 - 3


def test_hidden_chunks_advance_the_decoder_alone():
    vae = tiny_vae()
    whole, writer = make(vae, Writer(), beside=False), Writer()
    with video_sink(vae, writer, beside=True, shows=lambda span: span.index > 1) as sink:
        for span, latents in chunks(7):
            sink.add(span, latents, Timer(latents.device))
        sink.finish()
    assert np.array_equal(writer.frames, whole.frames[13:])


def cuda_vae() -> AutoencoderKLWan:
    return tiny_vae().cuda()


@pytest.mark.gpu
def test_frames_beside_a_gpu_equal_those_in_its_loop():
    vae = cuda_vae()
    plain, beside = (make(vae, Writer(), beside=value, count=20) for value in (False, True))
    assert same(beside, plain)


@pytest.mark.gpu
def test_the_decoder_reads_latents_that_are_computed_just_then():
    vae = cuda_vae()
    plain, writer = make(vae, Writer(), beside=False), Writer()
    with video_sink(vae, writer, beside=True) as sink:
        for span, latents in chunks(7, torch.device("cuda")):
            torch.cuda._sleep(50_000_000)
            computed = latents * 1  # after it, in memory that is freed at once
            sink.add(span, computed, Timer(computed.device))
            del computed
            torch.full_like(latents, 9.0)
        sink.finish()
    assert np.array_equal(writer.frames, plain.frames)


@pytest.mark.gpu
def test_decoding_is_timed_without_the_denoising_before_it():
    vae = cuda_vae()
    make(vae, Writer(), beside=True)  # chooses kernels
    with video_sink(vae, Writer(), beside=True) as sink:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        (span, latents), *_ = chunks(1, torch.device("cuda"))
        timer = Timer(latents.device)
        before.record()
        torch.cuda._sleep(1_000_000_000)
        after.record()
        sink.add(span, latents, timer)
        sink.finish()
    assert before.elapsed_time(after) > 200
    assert 0 < timer.seconds("decode") < 0.1


@pytest.mark.gpu
def test_nothing_in_the_loop_waits_for_the_device():
    vae = cuda_vae()
    make(vae, Writer(), beside=True)
    with video_sink(vae, Writer(), beside=True) as sink:
        (span, latents), *_ = chunks(1, torch.device("cuda"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(1_000_000_000)
            started = perf_counter()
            sink.add(span, latents, Timer(latents.device))
            assert perf_counter() - started < 0.1
            sink.finish()
        finally:
            torch.cuda.set_sync_debug_mode("default")
