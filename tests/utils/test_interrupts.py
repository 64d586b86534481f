"""A signal ends a run at once, or as soon as nothing is left half done."""

import signal
import subprocess
import sys

import pytest

from wancli.utils import interrupts

START = """
import os, signal, sys, time
from wancli.utils import interrupts
from wancli.utils.interrupts import Interrupted
interrupts.handle()
def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
def wait():
    time.sleep(10)
    print("not interrupted")
"""
UNWIND = "interrupts.unwind_from_here()\n"


def run(script, folder, *, ignored=None):
    """Exit code, stdout and stderr of a script in a process of its own."""

    def reset():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)

    done = subprocess.run(
        [sys.executable, "-c", START + script],
        capture_output=True,
        env={"PYTHONPATH": f"{folder}:{':'.join(sys.path)}"},
        text=True,
        check=False,
        preexec_fn=reset,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_process_if_there_is_nothing_to_clean_up(name, tmp_path):
    code, out, err = run(f"try: send(signal.{name})\nfinally: print('tidied up')", tmp_path)
    assert (code, out) == (128 + signal.Signals[name], "")
    assert [line[:7] for line in err.splitlines()] == ["error: ", "hint:  "]
    assert f"interrupted by {name}." in err


def test_registered_cleanup_runs_before_the_end(tmp_path):
    script = "with interrupts.tidied(lambda: os.write(1, b'tidied up')): send()"
    code, out, err = run(script, tmp_path)
    assert (code, out, len(err.splitlines())) == (143, "tidied up", 2)


def test_a_signal_raises_interrupted_once_unwinding_is_on(tmp_path):
    script = (
        "interrupts.unwind_from_here()\ntry: send()\nexcept Interrupted as e: print(e.exit_code)"
    )
    assert run(UNWIND + script, tmp_path) == (0, "143\n", "")


def test_an_import_is_not_interrupted(tmp_path):
    kill = "os.kill(os.getpid(), signal.SIGTERM)"
    library = f"import os, signal\ntry: {kill}\nexcept BaseException: print('swallowed')\n"
    (tmp_path / "library.py").write_text(library)
    script = "try:\n  import library; wait()\nexcept Interrupted as error: print(error)"
    assert run(UNWIND + script, tmp_path) == (0, "interrupted by SIGTERM.\n", "")


def test_an_uninterrupted_block_is_finished_first(tmp_path):
    script = """
try:
    with interrupts.uninterrupted():
        send()
        print("whole")
    wait()
except Interrupted:
    print("then")
"""
    assert run(UNWIND + script, tmp_path) == (0, "whole\nthen\n", "")


def test_a_signal_is_not_lost_where_python_drops_exceptions(tmp_path):
    script = """
class Dropped:
    def __del__(self):
        send()
try:
    Dropped()
    wait()
except Interrupted as error:
    print(error)
"""
    assert run(UNWIND + script, tmp_path) == (0, "interrupted by SIGTERM.\n", "")


def test_a_signal_is_not_lost_where_a_library_makes_another_error_of_it(wancli, monkeypatch):
    assert wancli("show", "missing.mp4").code == 4
    monkeypatch.setattr(interrupts._state, "number", signal.SIGINT)
    result = wancli("show", "missing.mp4")
    assert (result.code, result.err.splitlines()[0]) == (130, "error: interrupted by SIGINT.")


def test_a_second_signal_does_not_disturb_cleanup(tmp_path):
    script = """
try:
    send()
except Interrupted:
    send(signal.SIGINT)
    print("tidied up")
"""
    assert run(UNWIND + script, tmp_path) == (0, "tidied up\n", "")


def test_nohup_is_respected(tmp_path):
    code, out, err = run("send(signal.SIGHUP)\nprint('on')", tmp_path, ignored=signal.SIGHUP)
    assert (code, out, err) == (0, "on\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.3, 1, 2, 4])
def test_ctrl_c_in_the_first_seconds_of_a_command_is_clean(after_s, tiny_model, tmp_path):
    command = [sys.executable, "-m", "wancli", "generate", "x", "--model", str(tiny_model)]
    command += ["--size", "32x32", "--frames", "5", "--steps", "1000", "-q"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=after_s)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert [line[:7] for line in err.splitlines()] == ["error: ", "hint:  "]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seconds", "cleaned"), [(0.0, "cleaned"), (5.0, "tidied")])
def test_a_second_signal_ends_the_cleanup_of_the_first_unless_it_belongs_to_it(
    tmp_path, seconds, cleaned
):
    script = UNWIND + (
        "interrupts.second_ends_at_once()\n"
        "with interrupts.tidied(lambda: os.write(1, b'tidied ')):\n"
        "    try: send(signal.SIGINT)\n"
        "    except Interrupted:\n"
        f"        interrupts._state.since -= {seconds}\n"
        "        send(); os.write(1, b'cleaned ')\n"
    )
    code, out, _ = run(script, tmp_path)
    assert out.split()[0] == cleaned
    assert code == (0 if cleaned == "cleaned" else 130)
