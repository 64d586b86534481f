"""How threads wait is set before torch loads, unless the user has set it."""

import os
import subprocess
import sys

import pytest

from wancli.utils.threads import choose_threads, thread_settings


def variables() -> dict[str, str]:
    return {n: v for n, v in os.environ.items() if n.startswith(("OMP_", "GOMP_", "MKL_", "KMP_"))}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process with neither OpenMP variables nor torch."""
    for name in {*variables(), "GOMP_SPINCOUNT"}:
        monkeypatch.setenv(name, "")  # so that it is restored or removed
        monkeypatch.delenv(name)
    monkeypatch.setattr("wancli.utils.threads._chosen", {})
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
    assert variables() == {name: "7", "OMP_NUM_THREADS": "3"}
    assert sorted(thread_settings().split(", ")) == sorted([f"{name}=7", "OMP_NUM_THREADS=3"])


def test_nothing_is_set_once_torch_is_loaded(fresh):
    fresh.setitem(sys.modules, "torch", object())
    choose_threads()
    assert variables() == {}


def test_the_command_line_chooses_before_torch_loads():
    program = (
        "import os, sys; sys.argv = ['wancli', '--help']; from wancli.cli.app import main\n"
        "try: main()\n"
        "finally: sys.exit(os.environ.get('GOMP_SPINCOUNT') != '1000' or 'torch' in sys.modules)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True)
