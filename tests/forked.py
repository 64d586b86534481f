"""Runs each command line in a fork of one fresh process that has imported our light modules.

That saves starting Python and importing them, most of the time of a command that only prints.
`python -m tests.forked` reads one command line per line and answers each.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

HEAVY = ("torch", "diffusers", "transformers", "numpy", "cache_dit", "huggingface_hub")
LIGHT = ("catalog", "cli", "config", "cost", "planning", "records", "utils")
PLANNING = ("generation/batch.py", "video/ffmpeg.py", "video/images.py")  # imported by a plan
ROOT = Path(__file__).parents[1]

# Exit code, heavy modules that were imported, stdout and stderr of `wancli ARGUMENTS`.
Answer = tuple[int, list[str], str, str]
Run = Callable[..., Answer]


@contextmanager
def forking() -> Iterator[Run]:
    """Yield a function that runs command lines in forks of one process."""
    command = [sys.executable, "-m", "tests.forked"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        asks, answers = process.stdin, process.stdout
        assert asks is not None
        assert answers is not None

        def run(*arguments: str, folder: Path, **variables: str) -> Answer:
            request = [arguments, str(folder), environment(**variables)]
            print(json.dumps(request), file=asks, flush=True)
            code, heavy, out, err = json.loads(answers.readline())
            return code, heavy, out, err

        yield run


def environment(**variables: str) -> dict[str, str]:
    """Our environment plus `variables`, without colors."""
    return {name: text for name, text in os.environ.items() if name != "FORCE_COLOR"} | variables


def main() -> None:
    """Answer requests until stdin is closed."""
    files = [file for name in ("", *LIGHT) for file in (ROOT / "wancli" / name).glob("[!_]*.py")]
    for file in (*sorted(files), *(ROOT / "wancli" / name for name in PLANNING)):
        importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    from wancli.cli.app import COMMANDS
    from wancli.config.settings import Output
    from wancli.video.ffmpeg import choose_encoding

    for name, entry in COMMANDS.items():
        entry.load(name)
    for live in (False, True):
        choose_encoding(Output(), (16, 16), live=live)
    gc.freeze()
    for line in sys.stdin:
        arguments, folder, variables = json.loads(line)
        with TemporaryDirectory() as temporary:
            out, err, outcome = (Path(temporary, name) for name in ("out", "err", "outcome"))
            if not (child := os.fork()):
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(variables)
                _run(arguments, out, err, outcome)
            os.waitpid(child, 0)
            answer = [*json.loads(outcome.read_text()), out.read_text(), err.read_text()]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def exit_code(program: Callable[[], object]) -> object:
    """Run a program as a process would, and flush its streams."""
    code: object = 0
    try:
        program()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:  # noqa: BLE001 - a process would end with it too
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def renew_threads() -> None:
    """Give torch, if it is imported, its threads in a fork.

    It does so at its first use, and fails ("Invalid thread pool!") where two threads of the program
    get there at once, as when weights are read.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(torch.get_num_threads())


def _run(arguments: list[str], out: Path, err: Path, outcome: Path) -> NoReturn:
    """Run `wancli ARGUMENTS` and exit."""
    from wancli.__main__ import main as wancli

    for number, path in enumerate((Path(os.devnull), out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    for number in range(3):  # STREAM_1=FILE is >FILE, and without a name >&-
        if (name := os.environ.pop(f"STREAM_{number}", None)) is not None:
            os.dup2(os.open(name, os.O_RDWR), number) if name else os.close(number)
    sys.argv = ["wancli", *arguments]
    code = exit_code(wancli)
    outcome.write_text(json.dumps([code, [name for name in HEAVY if name in sys.modules]]))
    os._exit(0)


if __name__ == "__main__":
    main()
