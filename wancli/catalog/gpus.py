"""GPUs to plan for: what `wancli plan --gpu` knows besides a size such as 24GB.

The published size is from the maker's page beside it. The MiB are what nvidia-smi reports for the
card: a little less, where error correction or the driver takes its share.
"""

import re
from dataclasses import dataclass

from wancli.errors import UsageError, closest, shortened

_SIZE = re.compile(r"(\d{1,4}(?:\.\d+)?) ?gi?b?")
_NVIDIA = "https://www.nvidia.com/en-us/"


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
    published_gb: int
    capability: tuple[int, int]
    source: str  # of the published size

    @property
    def bytes(self) -> int:
        """Memory in bytes."""
        return self.mib * 2**20


GPUS = {
    "rtx3060": Gpu(
        "NVIDIA GeForce RTX 3060", 12_288, 12, (8, 6),
        f"{_NVIDIA}geforce/graphics-cards/30-series/rtx-3060-3060ti/",
    ),
    "rtx3090": Gpu(
        "NVIDIA GeForce RTX 3090", 24_576, 24, (8, 6),
        f"{_NVIDIA}geforce/graphics-cards/30-series/rtx-3090-3090ti/",
    ),
    "rtx4060ti": Gpu(
        "NVIDIA GeForce RTX 4060 Ti", 16_380, 16, (8, 9),
        f"{_NVIDIA}geforce/graphics-cards/40-series/rtx-4060-4060ti/",
    ),
    "rtx4080": Gpu(
        "NVIDIA GeForce RTX 4080", 16_376, 16, (8, 9),
        f"{_NVIDIA}geforce/graphics-cards/40-series/rtx-4080-family/",
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", 24_564, 24, (8, 9),
        f"{_NVIDIA}geforce/graphics-cards/40-series/rtx-4090/",
    ),
    "rtx5070ti": Gpu(
        "NVIDIA GeForce RTX 5070 Ti", 16_303, 16, (12, 0),
        f"{_NVIDIA}geforce/graphics-cards/50-series/rtx-5070-family/",
    ),
    "rtx5080": Gpu(
        "NVIDIA GeForce RTX 5080", 16_303, 16, (12, 0),
        f"{_NVIDIA}geforce/graphics-cards/50-series/rtx-5080/",
    ),
    "rtx5090": Gpu(
        "NVIDIA GeForce RTX 5090", 32_607, 32, (12, 0),
        f"{_NVIDIA}geforce/graphics-cards/50-series/rtx-5090/",
    ),
    "rtxa6000": Gpu(
        "NVIDIA RTX A6000", 49_140, 48, (8, 6), f"{_NVIDIA}design-visualization/rtx-a6000/"
    ),
    "rtx6000ada": Gpu(
        "NVIDIA RTX 6000 Ada Generation", 49_140, 48, (8, 9),
        f"{_NVIDIA}design-visualization/rtx-6000/",
    ),
    "rtxpro6000": Gpu(
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97_887, 96, (12, 0),
        f"{_NVIDIA}products/workstations/professional-desktop-gpus/rtx-pro-6000/",
    ),
    "t4": Gpu("Tesla T4", 15_360, 16, (7, 5), f"{_NVIDIA}data-center/tesla-t4/"),
    "l4": Gpu("NVIDIA L4", 23_034, 24, (8, 9), f"{_NVIDIA}data-center/l4/"),
    "a10": Gpu("NVIDIA A10", 23_028, 24, (8, 6), f"{_NVIDIA}data-center/products/a10-gpu/"),
    "a10g": Gpu("NVIDIA A10G", 23_028, 24, (8, 6), "https://aws.amazon.com/ec2/instance-types/g5/"),
    "a40": Gpu("NVIDIA A40", 46_068, 48, (8, 6), f"{_NVIDIA}data-center/a40/"),
    "l40s": Gpu("NVIDIA L40S", 46_068, 48, (8, 9), f"{_NVIDIA}data-center/l40s/"),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 40_960, 40, (8, 0), f"{_NVIDIA}data-center/a100/"),
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", 81_920, 80, (8, 0), f"{_NVIDIA}data-center/a100/"),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 81_559, 80, (9, 0), f"{_NVIDIA}data-center/h100/"),
    "h100-nvl": Gpu("NVIDIA H100 NVL", 95_830, 94, (9, 0), f"{_NVIDIA}data-center/h100/"),
    "h200": Gpu("NVIDIA H200", 143_771, 141, (9, 0), f"{_NVIDIA}data-center/h200/"),
    "b200": Gpu("NVIDIA B200", 183_359, 180, (10, 0), f"{_NVIDIA}data-center/dgx-b200/"),
}  # fmt: skip


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
