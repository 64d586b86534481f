"""GPUs by size and by name, and the error for any other."""

import pytest

from wancli.catalog.gpus import find_gpu
from wancli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "name", "size"),
    [
        ("24GB", "a GPU of 24 GB", 24 * 2**30),
        ("7.5 gib", "a GPU of 7.5 GB", int(7.5 * 2**30)),
        ("80g", "a GPU of 80 GB", 80 * 2**30),
        ("rtx4090", "NVIDIA GeForce RTX 4090", 24_564 * 2**20),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090", 24_564 * 2**20),
        ("4090", "NVIDIA GeForce RTX 4090", 24_564 * 2**20),
        ("H100", "NVIDIA H100 80GB HBM3", 81_559 * 2**20),
        ("h100_nvl", "NVIDIA H100 NVL", 95_830 * 2**20),
        ("A100 40GB", "NVIDIA A100-SXM4-40GB", 40_960 * 2**20),
    ],
)
def test_a_gpu_is_a_size_or_a_name(text: str, name: str, size: int):
    assert find_gpu(text) == (name, size)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a100", "a100-40gb or a100-80gb"),
        ("rtx4091", "`gpu rtx4090`"),
        ("0GB", "24GB, or one of"),
        ("", "24GB, or one of"),
        ("24", "24GB, or one of"),
        ("quantum", "24GB, or one of"),
    ],
)
def test_an_unknown_gpu_has_a_hint(text: str, hint: str):
    with pytest.raises(UsageError, match="not a known GPU or size") as raised:
        find_gpu(text)
    assert hint in raised.value.hint
