"""Command lines, each in a fork of one fresh process that has imported our light modules.

What a process of its own does beside is to start python and to import them: most of the time of a
command that only tells. `python -m tests.forked` reads a command line a line, and answers each.
"""

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
ROOT = Path(__file__).parents[1]

# Exit code, heavy modules that were imported, stdout and stderr of `wancli ARGUMENTS`.
Answer = tuple[int, list[str], str, str]
Run = Callable[..., Answer]


@contextmanager
def forking() -> Iterator[Run]:
    """What runs command lines in forks, of one process as long as this lasts."""
    command = [sys.executable, "-m", "tests.forked"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        asks, answers = process.stdin, process.stdout
        assert asks is not None
        assert answers is not None

        def run(*arguments: str, folder: Path, **variables: str) -> Answer:
            asked = [arguments, str(folder), environment(**variables)]
            print(json.dumps(asked), file=asks, flush=True)
            code, heavy, out, err = json.loads(answers.readline())
            return code, heavy, out, err

        yield run


def environment(**variables: str) -> dict[str, str]:
    """Ours and these, without colors."""
    return {name: text for name, text in os.environ.items() if name != "FORCE_COLOR"} | variables


def main() -> None:
    """Answer until there is no more to read."""
    for folder in ("wancli", *(f"wancli/{name}" for name in LIGHT)):
        for file in sorted((ROOT / folder).glob("[!_]*.py")):
            importlib.import_module(f"{folder}/{file.stem}".replace("/", "."))
    for line in sys.stdin:
        arguments, folder, variables = json.loads(line)
        with TemporaryDirectory() as place:
            out, err, told = (Path(place, name) for name in ("out", "err", "told"))
            if not (child := os.fork()):
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(variables)
                _run(arguments, out, err, told)
            os.waitpid(child, 0)
            answer = [*json.loads(told.read_text()), out.read_text(), err.read_text()]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _run(arguments: list[str], out: Path, err: Path, told: Path) -> NoReturn:
    """Be `wancli ARGUMENTS`, and no more."""
    from wancli.__main__ import main as wancli

    for number, path in enumerate((Path(os.devnull), out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    for number in range(3):  # STREAM_1=FILE is >FILE, and without a name >&-
        if (name := os.environ.pop(f"STREAM_{number}", None)) is not None:
            os.dup2(os.open(name, os.O_RDWR), number) if name else os.close(number)
    sys.argv = ["wancli", *arguments]
    code: object = 0
    try:
        wancli()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:  # noqa: BLE001 - a process would end with it too
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    told.write_text(json.dumps([code, [name for name in HEAVY if name in sys.modules]]))
    os._exit(0)


if __name__ == "__main__":
    main()
