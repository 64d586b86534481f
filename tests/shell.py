"""Bash, in which `wancli` and `python` are forks of one process that has imported everything.

`python -m tests.shell SOCKET` is that process: the two programs on bash's path hand it their
arguments, folder, environment and streams, and end with the exit code that it answers.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.forked import exit_code, renew_threads

ROOT = Path(__file__).parents[1]
PROGRAMS = ("wancli", "python")
CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
socket.send_fds(server, [json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
server.shutdown(socket.SHUT_WR)
os._exit(int(server.recv(16) or b"99"))
"""

Shell = Callable[[str, Path], "subprocess.CompletedProcess[str]"]


@contextmanager
def shell(folder: Path, **variables: str) -> Iterator[Shell]:
    """Yield what runs a script in a folder, by `bash -euo pipefail`."""
    programs, path = folder / "bin", folder / "socket"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(CLIENT.format(python=sys.executable, path=str(path)))
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"} | variables
    command = [sys.executable, "-m", "tests.shell", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=environment) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"

            def run(script: str, place: Path) -> "subprocess.CompletedProcess[str]":
                return subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", script], cwd=place, env=environment,
                    stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=False,
                )  # fmt: skip

            yield run
        finally:
            server.terminate()


def serve(path: str) -> None:
    """Answer until ended."""
    from tests.fuzz.warm import freeze_objects, warm

    warm()
    freeze_objects()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        os.write(1, b"ready\n")
        while True:
            client, _ = server.accept()
            if not os.fork():
                server.close()
                answer(client)
            client.close()


def answer(client: socket.socket) -> None:
    """Be the program in a fork, and send its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sent, streams, _, _ = socket.recv_fds(client, 2**20, 3)
    while more := client.recv(2**20):
        sent += more
    arguments, folder, variables = json.loads(sent)
    if not (child := os.fork()):
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, max(streams) + 1)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        be(arguments)
    _, status = os.waitpid(child, 0)
    client.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def be(arguments: list[str]) -> None:
    """The program, to its end."""
    from wancli.__main__ import main

    renew_threads()
    if Path(arguments[0]).name == "wancli":
        sys.argv = arguments
        code = exit_code(main)
    else:
        sys.argv = arguments[1:]
        code = exit_code(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve(sys.argv[1])
