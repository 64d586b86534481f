"""Stages of a pipeline, each a thread with a short queue."""

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")
IN_FLIGHT = 2  # items of a stage: one in work, one that waits
_CHECK_S = 0.1  # after which whoever waits looks whether there is still something to wait for


class PipelineStage(Generic[T]):
    """Works on one item after another, in order, on a thread of its own.

    `put` waits while two items are in flight, so that memory stays bounded. The first error is
    raised by all later calls; what comes after it is dropped, so that nobody waits for a dead
    stage. Not `threaded`, `put` itself does the work.

    Only queues written in C are shared with the thread: a signal may interrupt the caller anywhere,
    and would leave a lock of Python's locked.
    """

    def __init__(self, name: str, work: Callable[[T], None], *, threaded: bool) -> None:
        self.threaded = threaded
        self._work = work
        self._items: SimpleQueue[T | None] = SimpleQueue()  # None is the end
        self._room: SimpleQueue[None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._error: BaseException | None = None
        self.dropping = False
        if threaded:
            for _ in range(IN_FLIGHT):
                self._room.put(None)
            # A daemon, since an interrupt may come before anybody knows of it.
            Thread(target=self._run, name=f"wancli-{name}", daemon=True).start()

    def put(self, item: T) -> None:
        """Hand an item over. Raises the stage's error; does nothing once items are dropped."""
        if not self.threaded:
            self._work(item)
            return
        while not self.dropping:
            self.check()
            if self.ends_within(0.0):
                raise RuntimeError("this stage has ended")
            try:
                self._room.get(timeout=_CHECK_S)
            except Empty:
                continue
            self._items.put(item)
            return

    def check(self) -> None:
        """Raise the stage's error, if it has failed."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until every item is done. Raises the stage's error."""
        self.close()
        while not self.ends_within(_CHECK_S):
            pass
        self.check()

    def close(self, *, drop: bool = False) -> None:
        """End the thread after its items; with `drop` it does not begin another one."""
        self.dropping = self.dropping or drop
        if self.threaded:
            self._items.put(None)

    def ends_within(self, seconds: float) -> bool:
        """Wait for the end of the thread; whether it has come."""
        if not self.threaded:
            return True
        try:
            self._ended.get(timeout=seconds)
        except Empty:
            return False
        self._ended.put(None)  # for whoever asks again
        return True

    def _run(self) -> None:
        try:
            while (item := self._items.get()) is not None:
                try:
                    if self._error is None and not self.dropping:
                        self._work(item)
                except BaseException as error:  # noqa: BLE001 - raised by the next call
                    self._error = error
                del item  # large, and the next one may be long in coming
                self._room.put(None)
        finally:
            self._ended.put(None)
