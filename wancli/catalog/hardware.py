"""Facts about processors: how many keys at a time their matrix units like to be given.

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
HELPED: frozenset[str] = frozenset()  # where padding was measured to be faster: nowhere so far


def tokens_to_align(choice: str, hardware: object) -> int:
    """The multiple to which stored tokens are padded, of `--kv-align auto|off|N`.

    `auto` pads where that has been measured to help, and nowhere else.
    """
    if choice == "auto":
        return TILES[str(hardware)] if str(hardware) in HELPED else 1
    return 1 if choice == "off" else int(choice)
