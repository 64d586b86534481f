from time import sleep

import torch

from wancli.models.timer import Timer


def test_an_interval_has_the_label_of_the_mark_that_ends_it():
    clock = Timer(torch.device("cpu"))
    sleep(0.02)
    clock.mark("encode")
    for _ in range(3):
        clock.mark("step")
    sleep(0.04)
    clock.mark("decode")
    assert clock.ms("encode")[0] >= 20
    assert len(clock.ms("step")) == 3
    assert clock.seconds("decode") >= 0.04
    assert clock.seconds("step", "decode") >= clock.seconds("decode")
    assert clock.ms("never") == []
