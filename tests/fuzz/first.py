"""Real processes that get a signal within their first 1.5 seconds."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz import judge
from tests.fuzz.campaign import Case
from tests.fuzz.judge import Fault
from tests.fuzz.materials import CHUNKED, SMALL
from tests.fuzz.warm import Outcome

SIZE = 120
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS = 1.5
TINY = ("--model", "tiny", *SMALL, "--num-frames", "5")
LINES: tuple[tuple[str, ...], ...] = (
    ("generate", "a", *TINY, "-o", "new-3.mp4"), ("--help",), ("generate", "x", "--dry-run"),
    ("rollout", "a", "--model", "tiny", *CHUNKED, "-o", "new-3.mp4"), ("model", "list"),
    ("bench", "a", *TINY, "--variant", "e: --no-prompt-kv", "-o", "new-3"), ("preview", "made.mp4"),
)  # fmt: skip


def attempt(case: Case) -> Iterator[Fault]:
    """One process and one signal; the moments are spread evenly."""
    number = SIGNALS[case.number % len(SIGNALS)]
    line = LINES[case.number % len(LINES)]
    moment = SECONDS * ((case.number * 0.6180339887) % 1)
    case.place.copy_in("tiny", "made.mp4", "made.json")
    before = case.place.snapshot()
    command = [str(Path(sys.executable).parent / "wancli"), *line]
    with (
        (case.place.output / "out").open("wb") as out,
        (case.place.output / "err").open("wb") as err,
    ):
        process = subprocess.Popen(
            command, cwd=case.place.work, env=case.variables(), stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err, preexec_fn=_default_signals, start_new_session=True,
        )  # fmt: skip
        time.sleep(moment)
        process.send_signal(number)
        try:
            code = process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            yield Fault(
                "hang", f"{signal.Signals(number).name} after {moment:.2f} s", " ".join(line)
            )
            return
    text = (case.place.output / "err").read_text(errors="replace")
    where = f"{signal.Signals(number).name} after {moment:.3f} s: wancli {' '.join(line)}"
    if code not in (0, 128 + number, -number):
        yield Fault(
            "exit code", f"{code} of {signal.Signals(number).name}", f"{where}\n{text[-1500:]}"
        )
    if ("Traceback" in text or "Exception ignored" in text) and "wancli/" in _without_script(text):
        yield Fault("traceback", judge.cause_of(text), f"{where}\n{text[-2000:]}")
    elif code == 128 + number and "error: interrupted" not in text:
        yield Fault("words", f"{code} without a word", f"{where}\n{text[-500:]}")
    if "\x1b" in text or "unexpected" in text:
        yield Fault("words", "an escape, or unexpected", f"{where}\n{text[-500:]}")
    # A process that finished in time has written its output; all others have written nothing.
    yield from judge.check_files(Outcome(2 if code else 0, b"", b"", 0), case.place, before)


def _without_script(text: str) -> str:
    """Drop lines of the installed script and of Python's startup: our code does not run yet."""
    return "\n".join(line for line in text.splitlines() if "/bin/wancli" not in line)


def _default_signals() -> None:
    """Default signal handlers, as a shell starts a process with them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
