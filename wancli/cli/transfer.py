"""How a download is shown: a bar on a terminal, a line now and then elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console

LINE_EVERY_S = 10  # where there is no terminal
Tell = Callable[[int], None]  # bytes that have arrived


def lines(console: Console, total: int | None) -> Tell:
    """For logs; of `total` bytes, where that is known."""
    said = monotonic()

    def tell(done: int) -> None:
        nonlocal said
        if monotonic() - said >= LINE_EVERY_S:
            said = monotonic()
            of = f" of {total / 1e9:.2f} GB {done / total:.0%}" if total else " GB"
            console.print(f"{done / 1e9:.2f}{of}", markup=False)

    return tell


@contextmanager
def bar(console: Console, total: int | None) -> Iterator[Tell]:
    """For terminals."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("download", total=total)
        yield lambda done: progress.update(task, completed=done)
