"""Progress: what a bar and a line show, with a clock that the tests move."""

import time

import pytest

from wancli.cli import progress
from wancli.cli.console import open_console
from wancli.cli.options import OutputOptions
from wancli.cli.progress import Pace, RunProgress, TransferProgress, bar_line, clock_time
from wancli.cli.screen import Screen
from wancli.records.progress import ChunkDone, Decoded, Loading, Phase, Step


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A run that takes known times."""

    def __init__(self, phase: str) -> None:
        self.clock = Clock()
        self.progress = RunProgress(self.clock)
        self.progress.handle(Phase(phase))

    def steps(self, *seconds: float, total: int, chunk: int = 0, chunks: int = 1) -> None:
        for index, spent in enumerate(seconds):
            self.clock.now += spent
            self.progress.handle(Step(index, total, 0.5, chunk, chunks))

    def chunk_done(self, index: int, total: int, *, generated: bool = True) -> None:
        self.progress.handle(ChunkDone(index, total, generated))


def test_a_phase_without_steps_shows_its_time_and_promises_nothing():
    run = Run("decode")
    run.clock.now += 75
    assert (run.progress.fraction, run.progress.text()) == (None, "1:15")


def test_loading_counts_bytes_and_decoding_video_frames():
    run = Run("load")
    run.progress.handle(Loading("transformer", 2**29, 2**31))
    run.clock.now += 12
    text = "transformer 512.0 MiB of 2.0 GiB 25% 0:12"
    assert (run.progress.fraction, run.progress.text()) == (0.25, text)
    run.progress.handle(Phase("decode"))
    assert (run.progress.fraction, run.progress.text()) == (None, "0:00")
    run.progress.handle(Decoded(17, 34))
    run.clock.now += 3
    assert (run.progress.fraction, run.progress.text()) == (0.5, "frame 17/34 50% 0:03")


def test_the_count_of_one_phase_does_not_last_into_the_next():
    run = Run("denoise")
    run.steps(1, 1, total=2)
    run.progress.handle(Phase("decode"))
    assert (run.progress.fraction, run.progress.text()) == (None, "0:00")


def test_a_line_has_count_share_pace_and_time_left():
    run = Run("denoise")
    run.steps(*[0.8] * 12, total=30)
    assert run.progress.text() == "step 12/30 40% 800 ms/step eta 0:14"


def test_a_compiled_first_step_is_an_upper_bound_and_then_forgotten():
    run = Run("denoise")
    run.steps(60, total=50)
    assert run.progress.text().endswith("60.0 s/step eta < 49:00")
    run.progress.handle(Phase("denoise"))
    run.steps(60, 0.5, total=50)
    assert run.progress.text().endswith("500 ms/step eta 0:24")


def test_a_step_that_loads_an_expert_is_left_out_of_the_pace():
    pace = Pace()
    for seconds in (9, 1, 1, 1, 40, 1):
        pace.add(seconds)
    assert pace.each == 1


def test_the_pace_follows_recent_steps():
    pace = Pace()
    for seconds in [5, *[2.0] * 20, *[0.5] * 8]:
        pace.add(seconds)
    assert pace.each == 0.5


def test_the_time_left_counts_down_between_steps():
    run = Run("denoise")
    run.steps(1, 10, 10, total=5)
    run.clock.now += 4
    assert run.progress.text().endswith("eta 0:16")
    run.clock.now += 40
    assert run.progress.text().endswith("eta 0:00")


def test_a_rollout_counts_chunks_and_its_first_time_is_a_lower_bound():
    run = Run("rollout")
    run.steps(1, 1, total=4, chunks=3)
    assert run.progress.text() == "chunk 1/3 step 2/4 17% 1000 ms/step eta > 0:10"
    assert run.progress.fraction == pytest.approx(2 / 12)


def test_decoding_counts_in_the_time_left_of_a_rollout():
    run = Run("rollout")
    for chunk in range(2):
        run.steps(1, 1, total=2, chunk=chunk, chunks=5)
        run.clock.now += 6  # decoding
        run.chunk_done(chunk, 5)
    run.steps(1, total=2, chunk=2, chunks=5)
    assert run.progress.text() == "chunk 3/5 step 1/2 50% 8.0 s/chunk eta 0:23"


def test_kept_chunks_of_a_resumed_rollout_do_not_set_its_pace():
    run = Run("rollout")
    for chunk in range(3):
        run.clock.now += 0.1
        run.chunk_done(chunk, 5, generated=False)
    assert run.progress.text() == "chunk 3/5 60%"
    run.steps(2, 2, total=4, chunk=3, chunks=5)
    assert run.progress.text() == "chunk 4/5 step 2/4 70% 2.0 s/step eta > 0:12"


def test_a_download_shows_its_rate_without_what_was_kept():
    clock = Clock()
    transfer = TransferProgress(4_000_000_000, clock)
    transfer.update(1_000_000_000)
    clock.now += 10
    transfer.update(2_000_000_000)
    assert transfer.text() == "2.00 of 4.00 GB 50% 100.0 MB/s eta 0:20"
    assert TransferProgress(None, clock).fraction is None


@pytest.mark.parametrize(("seconds", "text"), [(-3, "0:00"), (59.6, "1:00"), (3723, "1:02:03")])
def test_times_are_written_like_those_of_a_clock(seconds: float, text: str):
    assert clock_time(seconds) == text


def long_rollout() -> RunProgress:
    run = Run("rollout without its folder, which was deleted")
    run.steps(*[11.5] * 13, total=20, chunk=6, chunks=12)
    return run.progress


@pytest.mark.parametrize("width", [20, 40, 79, 200])
@pytest.mark.parametrize("shown", [Run("load").progress, long_rollout()], ids=["load", "rollout"])
def test_a_bar_never_leaves_its_line(shown: RunProgress, width: int):
    assert bar_line(shown, width=width).cell_len <= width


def test_a_bar_is_readable_without_color_and_without_unicode():
    run = Run("denoise")
    run.steps(1, total=4)
    assert " ━━━━━━━━─" in bar_line(run.progress, width=79).plain
    assert " ========-" in bar_line(run.progress, width=79, ascii_only=True).plain


def test_a_bar_is_readable_on_light_and_dark_terminals(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = open_console(color=True, width=79, legacy_windows=False)
    run = Run("denoise")
    run.steps(1, total=4)
    styles = {style for _, style, _ in console.render(bar_line(run.progress, width=79)) if style}
    colors = {style.color.name for style in styles if style.color}
    assert colors == {"magenta"}
    assert not any(style.bgcolor for style in styles)


def test_a_log_gets_a_line_per_phase_and_one_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.02)
    with Screen(OutputOptions()).progress() as report:
        report(Phase("load"))
        time.sleep(0.05)
        report(Phase("denoise"))
        report(Step(0, 2, 0.5))
        time.sleep(0.05)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["load", "load 0:00"]
    assert "denoise" in lines
    assert lines[-1].startswith("step 1/2 50% ")
