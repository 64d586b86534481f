"""`wancli` and `python -m wancli`: signals are handled before the rest is imported."""

from wancli.utils.interrupts import Interrupted, handle, leave


def main() -> None:
    """Run the command line and exit."""
    handle()
    from wancli.cli.streams import open_streams

    open_streams()
    from wancli.cli.app import main as run

    try:
        run()
    except Interrupted as late:  # while another error was printed
        leave(late.number)


if __name__ == "__main__":
    main()
