from time import perf_counter, sleep

import pytest
import torch

from wancli.models.timer import Timer


def test_an_interval_has_the_label_of_the_mark_that_ends_it():
    timer = Timer(torch.device("cpu"))
    sleep(0.02)
    timer.mark("encode")
    for _ in range(3):
        timer.mark("step")
    sleep(0.04)
    timer.mark("decode")
    assert timer.ms("encode")[0] >= 20
    assert len(timer.ms("step")) == 3
    assert timer.seconds("decode") >= 0.04
    assert timer.seconds("step", "decode") >= timer.seconds("decode")
    assert timer.ms("never") == []


@pytest.mark.gpu
def test_reading_waits_for_nothing_behind_the_last_mark():
    timer = Timer(torch.device("cuda"))
    torch.cuda._sleep(10_000_000)
    timer.mark("step")
    torch.cuda._sleep(1_000_000_000)
    started = perf_counter()
    assert timer.seconds("step") < 0.1
    assert perf_counter() - started < 0.1
    torch.cuda.synchronize()
