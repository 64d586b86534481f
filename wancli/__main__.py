"""`wancli` and `python -m wancli`: signals are handled before the rest is imported."""

import atexit
import gc
import os

if os.name == "nt":  # which lacks signals and locks that are imported next
    os.write(
        2,
        b"error: wancli runs on Linux and macOS, not on Windows itself.\n"
        b"hint:  in WSL: https://learn.microsoft.com/windows/wsl/install\n",
    )
    raise SystemExit(4)

from wancli.utils.interrupts import Interrupted, handle, leave


def main() -> None:
    """Run the command line and exit."""
    handle()
    start_fast()
    from wancli.cli.streams import open_streams

    open_streams()
    from wancli.cli.app import main as run

    try:
        run()
    except Interrupted as late:  # while another error was printed
        leave(late.number)
    except SystemExit as ended:
        if isinstance(ended.code, int):
            _codes.append(ended.code)
        raise


_codes: list[int] = []  # the exit code, once there is one


def start_fast() -> None:
    """Leave out what takes a quarter of a help's time: nothing is garbage until a command runs."""
    gc.disable()  # until a command is called, see lazy.py; then in imports, see garbage.py
    atexit.register(_end)  # the first to be registered, so the last to be called
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # looked for in every package


def _end() -> None:
    """End the process: all that is left is to take objects apart, for 0.2 s after a video."""
    if _codes:
        from wancli.cli.streams import flush_streams

        flush_streams()
        os._exit(_codes[-1])


if __name__ == "__main__":
    main()
