"""Facts about processors: alignment of attention keys to their matrix units.

CUDA, by compute capability, for 16-bit numbers: NVIDIA's Matrix Multiplication Background User's
Guide, Tensor Core Requirements. TPU: the width of the matrix unit.
"""

TILES = {
    "cpu": 1,
    "cuda 7": 8,
    "cuda 8": 64,
    "tpu v5p": 128,
    "tpu v6e": 256,
    "tpu v7x": 256,
}
HELPED: frozenset[str] = frozenset()  # where padding measured faster: nowhere so far


def tokens_to_align(choice: str, hardware: object) -> int:
    """Multiple to which cached tokens are padded, for `kv_align` auto, off or N.

    `auto` pads only where that measured faster.
    """
    if choice == "auto":
        return TILES[str(hardware)] if str(hardware) in HELPED else 1
    return 1 if choice == "off" else int(choice)
