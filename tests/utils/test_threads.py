"""How threads wait is set before torch loads, unless the user has set it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wancli.utils.threads import choose_idle_threads, choose_threads, thread_settings


def variables() -> dict[str, str]:
    return {n: v for n, v in os.environ.items() if n.startswith(("OMP_", "GOMP_", "MKL_", "KMP_"))}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process with neither OpenMP variables nor torch."""
    for name in {*variables(), "GOMP_SPINCOUNT"}:
        monkeypatch.setenv(name, "")  # so that it is restored or removed
        monkeypatch.delenv(name)
    monkeypatch.setattr("wancli.utils.threads._chosen", {})
    monkeypatch.setattr("wancli.utils.threads._first", [])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return monkeypatch


def test_threads_spin_briefly_and_the_choice_is_reported(fresh):
    assert thread_settings() == "OpenMP's defaults"
    choose_threads()
    assert variables() == {"GOMP_SPINCOUNT": "1000"}
    assert thread_settings() == "GOMP_SPINCOUNT=1000 (wancli)"


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_settings_of_the_user_stay(name, fresh):
    fresh.setenv(name, "7")
    fresh.setenv("OMP_NUM_THREADS", "3")
    choose_threads()
    choose_idle_threads()
    assert variables() == {name: "7", "OMP_NUM_THREADS": "3"}
    assert sorted(thread_settings().split(", ")) == sorted([f"{name}=7", "OMP_NUM_THREADS=3"])


@pytest.mark.parametrize(
    ("others", "seconds", "spins"),
    [
        ([0.02, 0.05], 0.4, "30000"),
        ([0.02, 0.4], 0.4, "1000"),  # a core is busy
        ([0.4, 0.4], 0.4, "1000"),
        ([0.0, 0.0], 0.05, "1000"),  # too short to tell
        ([], 0.4, "1000"),  # not Linux
    ],
)
def test_threads_spin_longer_if_others_left_the_cores_idle(
    others: list[float], seconds: float, spins: str, fresh, tmp_path: Path
):
    def write(*worked: float) -> None:
        cores = [f"cpu{n} {s * ticks:.0f} 0 0 900 50 0 0 0 0 0" for n, s in enumerate(worked)]
        (tmp_path / "stat").write_text("\n".join(["cpu  9 9 9 9 9", *cores, "intr 5"]))

    ticks = os.sysconf("SC_CLK_TCK")
    clock, own = iter([5.0, 5.0 + seconds]), iter([0.1, 0.3])
    fresh.setattr("wancli.utils.threads.monotonic", lambda: next(clock))
    fresh.setattr(os, "times", lambda: (next(own), 0.0, 0.0, 0.0, 0.0))
    fresh.setattr("wancli.utils.threads._STAT", tmp_path / "stat")
    fresh.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    if others:
        write(700, 900, 3)
    choose_threads()
    if others:
        write(700 + others[0] + 0.2, 900 + others[1], 99)  # 0.2 are our own; the last core is not
    choose_idle_threads()
    assert variables() == {"GOMP_SPINCOUNT": spins}
    assert thread_settings() == f"GOMP_SPINCOUNT={spins} (wancli)"


def test_nothing_is_set_once_torch_is_loaded(fresh):
    fresh.setitem(sys.modules, "torch", object())
    choose_threads()
    choose_idle_threads()
    assert variables() == {}


def test_the_command_line_chooses_before_torch_loads():
    program = (
        "import os, sys; sys.argv = ['wancli', '--help']; from wancli.cli.app import main\n"
        "try: main()\n"
        "finally: sys.exit(os.environ.get('GOMP_SPINCOUNT') != '1000' or 'torch' in sys.modules)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True)
