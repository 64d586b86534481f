"""Stages under slow work and errors: order, bounded queues, nothing that waits for ever."""

import time
from queue import SimpleQueue
from threading import Event

import pytest

from wancli.rollouts.stages import IN_FLIGHT, PipelineStage


class Gate:
    """Work that waits until it is let through, and records what has passed."""

    def __init__(self) -> None:
        self.passed: list[int] = []
        self.begun: SimpleQueue[int] = SimpleQueue()
        self.opened = Event()

    def __call__(self, item: int) -> None:
        self.begun.put(item)
        assert self.opened.wait(10)
        self.passed.append(item)


def fail_at(number: int, error: Exception, passed: list[int]):
    def work(item: int) -> None:
        if item == number:
            raise error
        passed.append(item)

    return work


@pytest.mark.parametrize("threaded", [False, True])
def test_items_pass_in_order(threaded: bool):
    passed: list[int] = []
    last = PipelineStage("last", passed.append, threaded=threaded)
    first = PipelineStage[int]("first", lambda item: last.put(2 * item), threaded=threaded)
    for item in range(50):
        first.put(item)
    first.finish()
    last.finish()
    assert passed == list(range(0, 100, 2))


def test_whoever_is_faster_waits():
    gate = Gate()
    slow = PipelineStage("slow", gate, threaded=True)
    for item in range(IN_FLIGHT):
        slow.put(item)
    assert gate.begun.get(timeout=10) == 0
    fast_done: list[int] = []

    def hand_over(item: int) -> None:
        slow.put(item)
        fast_done.append(item)

    fast = PipelineStage("fast", hand_over, threaded=True)
    fast.put(IN_FLIGHT)
    assert not fast.ends_within(0.02)
    assert fast_done == []  # there is no room for it
    gate.opened.set()
    fast.finish()
    slow.finish()
    assert gate.passed == list(range(IN_FLIGHT + 1))


@pytest.mark.parametrize("threaded", [False, True])
def test_an_error_is_raised_by_the_next_calls_and_through_the_stages_before(threaded: bool):
    passed: list[int] = []
    error = OSError("the disk is full")
    last = PipelineStage("last", fail_at(2, error, passed), threaded=threaded)
    first = PipelineStage("first", last.put, threaded=threaded)

    def run() -> None:
        for item in range(100):
            first.put(item)

    with pytest.raises(OSError, match="the disk is full") as caught:
        run()
    assert caught.value is error
    assert passed == [0, 1]
    if threaded:
        for stage in (first, last):
            with pytest.raises(OSError, match="the disk is full"):
                stage.finish()


def test_an_error_at_the_last_item_is_raised_at_the_end():
    stage = PipelineStage("stage", fail_at(0, MemoryError(), []), threaded=True)
    stage.put(0)
    with pytest.raises(MemoryError):
        stage.finish()


def test_a_stage_that_is_closed_early_begins_nothing_more_and_frees_those_that_wait():
    gate = Gate()
    slow = PipelineStage("slow", gate, threaded=True)
    before = PipelineStage("before", slow.put, threaded=True)
    for item in range(IN_FLIGHT + 1):
        before.put(item)
    assert gate.begun.get(timeout=10) == 0
    slow.close(drop=True)
    before.close()
    assert before.ends_within(10)  # although the one behind it still works
    slow.put(99)
    assert not slow.ends_within(0.0)
    gate.opened.set()
    assert slow.ends_within(10)
    assert gate.passed == [0]


def test_a_stage_that_has_ended_takes_nothing_more():
    stage = PipelineStage("stage", time.sleep, threaded=True)
    stage.finish()
    for _ in range(IN_FLIGHT):
        with pytest.raises(RuntimeError, match="has ended"):
            stage.put(0)
