from time import sleep

import torch

from wancli.models.timer import Timer


def test_the_time_up_to_a_mark_belongs_to_its_label():
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
