"""Fixtures for all tests: a tiny model folder; the command line in this process, or in forks."""

import contextlib
import gc
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.forked import Run, forking
from wancli.utils.heap import keep_heap
from wancli.utils.packages import silence_torchao
from wancli.utils.threads import choose_threads

choose_threads()  # as the command line does; torch is imported by the tests
keep_heap()
silence_torchao()


@dataclass(frozen=True)
class Result:
    """Exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str


Wancli = Callable[..., Result]
Made = Callable[..., None]
_HOMES = itertools.count()


def pytest_configure() -> None:
    """Imported modules are never collected, and scanning them would take seconds."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _clean_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No user presets, no WANCLI_ variables, a terminal of a known width."""
    for name in [n for n in os.environ if n.startswith("WANCLI_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.getbasetemp() / f"config-{next(_HOMES)}"  # there is none, as for most
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)  # which --no-color sets


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.fakes import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def forked() -> Iterator[Run]:
    """Runs command lines in forks, which start at once."""
    with forking() as run:
        yield run


@pytest.fixture
def wancli(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Wancli:
    """Run `wancli ARGS` in an empty folder, as main() does."""
    from wancli.cli.app import main

    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Result:
        monkeypatch.setattr("sys.argv", ["wancli", *map(str, args)])
        capfd.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code or 0
        out, err = capfd.readouterr()
        return Result(int(str(code)), out, err)

    return run


@pytest.fixture(scope="session")
def _folders() -> dict[tuple[str, ...], Path]:
    return {}


@pytest.fixture
def made(
    wancli: Wancli, _folders: dict[tuple[str, ...], Path], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """Put the files that `wancli ARGS` writes here: it runs once in a session, for all tests."""

    def make(*args: object) -> None:
        command = tuple(map(str, args))
        if command not in _folders:
            folder = tmp_path_factory.mktemp("made")
            with contextlib.chdir(folder):
                result = wancli(*args)
            assert result.code == 0, result.err
            _folders[command] = folder
        shutil.copytree(_folders[command], Path.cwd(), dirs_exist_ok=True)

    return make
