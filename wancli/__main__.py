"""`wancli` and `python -m wancli`: signals are handled before the rest is imported."""

import atexit
import gc
import os

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


def start_fast() -> None:
    """Leave out what takes a quarter of a help's time: nothing is garbage until a command runs."""
    gc.disable()  # until a command is called, see lazy.py; then in imports, see garbage.py
    atexit.register(gc.freeze)  # Python looks for garbage once more when it exits
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # looked for in every package


if __name__ == "__main__":
    main()
