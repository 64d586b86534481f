"""GPUs to plan for: what `wancli plan --gpu` knows besides a size such as 24GB.

The MiB are what nvidia-smi reports for the card: a little less than what its maker publishes, where
error correction or the driver takes its share.
"""

import re
from dataclasses import dataclass

from wancli.errors import UsageError, closest, shortened

_SIZE = re.compile(r"(\d{1,4}(?:\.\d+)?) ?gi?b?")

# The first compute capability that multiplies in fp8, and how much faster than in bfloat16: dense
# products with sums in float32, of "Peak FP8 Tensor TFLOPS" in NVIDIA's architecture papers of Ada
# (RTX 4090: 330.3 against 165.2), Hopper (H100 SXM: 1978.9 against 989.4) and Blackwell (RTX 5090:
# 419 against 209.5).
FP8_CAPABILITY = (8, 9)
FP8_RATE = 2.0


@dataclass(frozen=True)
class Gpu:
    """A GPU's name, as NVIDIA's driver spells it, its memory and its compute capability.

    The capability is from https://developer.nvidia.com/cuda-gpus.
    """

    name: str
    mib: int  # as the driver reports it
    capability: tuple[int, int]

    @property
    def bytes(self) -> int:
        """Memory in bytes."""
        return self.mib * 2**20


GPUS = {
    "rtx3060": Gpu("NVIDIA GeForce RTX 3060", 12_288, (8, 6)),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 24_576, (8, 6)),
    "rtx4060ti": Gpu("NVIDIA GeForce RTX 4060 Ti", 16_380, (8, 9)),
    "rtx4080": Gpu("NVIDIA GeForce RTX 4080", 16_376, (8, 9)),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 24_564, (8, 9)),
    "rtx5070ti": Gpu("NVIDIA GeForce RTX 5070 Ti", 16_303, (12, 0)),
    "rtx5080": Gpu("NVIDIA GeForce RTX 5080", 16_303, (12, 0)),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", 32_607, (12, 0)),
    "rtxa6000": Gpu("NVIDIA RTX A6000", 49_140, (8, 6)),
    "rtx6000ada": Gpu("NVIDIA RTX 6000 Ada Generation", 49_140, (8, 9)),
    "rtxpro6000": Gpu("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97_887, (12, 0)),
    "t4": Gpu("Tesla T4", 15_360, (7, 5)),
    "l4": Gpu("NVIDIA L4", 23_034, (8, 9)),
    "a10": Gpu("NVIDIA A10", 23_028, (8, 6)),
    "a10g": Gpu("NVIDIA A10G", 23_028, (8, 6)),
    "a40": Gpu("NVIDIA A40", 46_068, (8, 6)),
    "l40s": Gpu("NVIDIA L40S", 46_068, (8, 9)),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 40_960, (8, 0)),
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", 81_920, (8, 0)),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 81_559, (9, 0)),
    "h100-nvl": Gpu("NVIDIA H100 NVL", 95_830, (9, 0)),
    "h200": Gpu("NVIDIA H200", 143_771, (9, 0)),
    "b200": Gpu("NVIDIA B200", 183_359, (10, 0)),
}


def find_gpu(text: str) -> tuple[str, int]:
    """Name and bytes of a GPU by size (`24GB`, of 2^30 bytes) or by name. Raises UsageError.

    Names are matched without spaces, dashes, capitals and the maker: `NVIDIA RTX 4090` and `4090`
    are `rtx4090`.
    """
    size = _SIZE.fullmatch(text.strip().lower())
    if size and float(size[1]) > 0:
        return f"a GPU of {size[1]} GB", int(float(size[1]) * 2**30)
    wanted = "" if size else _plain(text)
    plain = {_plain(name): name for name in GPUS}
    names = [name for key, name in plain.items() if wanted and wanted in key]
    name = plain.get(wanted) or (names[0] if len(names) == 1 else None)
    if name is None:
        near = " or ".join(names) or closest(wanted, GPUS) or f"24GB, or one of {', '.join(GPUS)}"
        raise UsageError(
            f"`gpu {shortened(text)}` is not a known GPU or size.", hint=f"`gpu {near}`"
        )
    return GPUS[name].name, GPUS[name].bytes


def capability_of(name: str) -> tuple[int, int] | None:
    """Compute capability of a GPU by the driver's name; None if it is not listed."""
    return next((gpu.capability for gpu in GPUS.values() if gpu.name == name), None)


def _plain(text: str) -> str:
    """Letters and digits of a name, without the maker's."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", text.lower())
