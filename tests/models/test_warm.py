"""A loaded model between requests."""

from pathlib import Path

import pytest
import torch

from wancli.catalog.local import find_spec
from wancli.config.settings import Machine
from wancli.models.load import place_again
from wancli.models.warm import WarmPipeline
from wancli.records.progress import ignore


def test_the_peak_of_gpu_memory_is_that_of_each_request(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    warm = WarmPipeline(find_spec(str(tiny_model)), Machine(device="cpu"), parts=("vae",))
    resets: list[torch.device] = []
    monkeypatch.setattr("wancli.models.memory.reset_gpu_peak", resets.append)
    for count in (1, 2):
        with warm.in_use(ignore):
            assert resets == [torch.device("cpu")] * count


def test_after_an_error_weights_are_brought_to_the_device_again(tiny_model: Path):
    warm = WarmPipeline(find_spec(str(tiny_model)), Machine(device="cpu"), parts=("vae",))
    moved: list[torch.device] = []

    def use(*, error: bool = False) -> None:
        with warm.in_use(ignore) as (loaded, _):
            loaded.pipeline.to = moved.append
            place_again(loaded, Machine(offload="model"))  # does nothing
            if error:
                raise MemoryError

    use()
    with pytest.raises(MemoryError):
        use(error=True)
    assert moved == []
    use()
    use()
    assert moved == [torch.device("cpu")]
