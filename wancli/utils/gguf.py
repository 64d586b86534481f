"""Headers of GGUF files, as llama.cpp and ComfyUI-GGUF write them.

The format: docs/gguf.md of https://github.com/ggml-org/ggml. Types and their sizes:
gguf/constants.py of https://pypi.org/project/gguf/0.19.0.
"""

import io
import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from wancli.utils.reading import LARGEST_HEADER, MOST_AXES, Header, Stored, open_file

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_ENTRIES = 2**20  # of a list, such as the tokens of a tokenizer
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class Blocks:
    """Layout of a type: so many weights of a row together take so many bytes."""

    weights: int
    bytes: int


# By number and name; types of one weight a block are not quantized.
_TYPES = {
    0: ("F32", Blocks(1, 4)),
    1: ("F16", Blocks(1, 2)),
    2: ("Q4_0", Blocks(32, 18)),
    3: ("Q4_1", Blocks(32, 20)),
    6: ("Q5_0", Blocks(32, 22)),
    7: ("Q5_1", Blocks(32, 24)),
    8: ("Q8_0", Blocks(32, 34)),
    9: ("Q8_1", Blocks(32, 40)),
    10: ("Q2_K", Blocks(256, 84)),
    11: ("Q3_K", Blocks(256, 110)),
    12: ("Q4_K", Blocks(256, 144)),
    13: ("Q5_K", Blocks(256, 176)),
    14: ("Q6_K", Blocks(256, 210)),
    15: ("Q8_K", Blocks(256, 292)),
    16: ("IQ2_XXS", Blocks(256, 66)),
    17: ("IQ2_XS", Blocks(256, 74)),
    18: ("IQ3_XXS", Blocks(256, 98)),
    19: ("IQ1_S", Blocks(256, 50)),
    20: ("IQ4_NL", Blocks(32, 18)),
    21: ("IQ3_S", Blocks(256, 110)),
    22: ("IQ2_S", Blocks(256, 82)),
    23: ("IQ4_XS", Blocks(256, 136)),
    24: ("I8", Blocks(1, 1)),
    25: ("I16", Blocks(1, 2)),
    26: ("I32", Blocks(1, 4)),
    27: ("I64", Blocks(1, 8)),
    28: ("F64", Blocks(1, 8)),
    29: ("IQ1_M", Blocks(256, 56)),
    30: ("BF16", Blocks(1, 2)),
    34: ("TQ1_0", Blocks(256, 54)),
    35: ("TQ2_0", Blocks(256, 66)),
    39: ("MXFP4", Blocks(32, 17)),
    40: ("NVFP4", Blocks(64, 36)),
    41: ("Q1_0", Blocks(128, 18)),
}
LAYOUTS = dict(_TYPES.values())
QUANTIZED = frozenset(name for name, blocks in LAYOUTS.items() if blocks.weights > 1)
# Formats of metadata's values by number, for struct; then texts and lists.
_FORMATS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_TEXT, _LIST = 8, 9


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF does. Raises OSError."""
    with open_file(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf_header(path: Path) -> Header:
    """Read the header of a GGUF file, checking that all its tensors are inside it.

    Shapes have the order of torch's. Metadata are texts and numbers, as text; lists are left out.
    Raises OSError, or ValueError for a file that is broken or of another version.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        fields = _Fields(file)
        if fields.take(len(MAGIC)) != MAGIC:
            raise ValueError("not GGUF")
        version, tensors, entries = fields.numbers("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"GGUF of version {version}, which is not read")
        if max(tensors, entries) > _MOST_ENTRIES:
            raise ValueError("not GGUF: its header is broken")
        metadata = {fields.text(): fields.value() for _ in range(entries)}
        infos = dict(fields.tensor() for _ in range(tensors))
        if len(infos) < tensors:
            raise ValueError("not GGUF: two of its tensors have one name")
        alignment = int(metadata.get(_ALIGNMENT) or 32)
        if not 0 < alignment <= 2**16:
            raise ValueError("not GGUF: its alignment is broken")
        start = -(-file.tell() // alignment) * alignment
    if start + max((stored.end for stored in infos.values()), default=0) > size:
        raise ValueError("GGUF that is truncated: its last tensors are missing")
    ordered = sorted((stored.begin, stored.end) for stored in infos.values())
    if any(before[1] > after[0] for before, after in pairwise(ordered)):
        raise ValueError("not GGUF: its tensors overlap")
    texts = {key: value for key, value in metadata.items() if value is not None}
    return Header(infos, texts, start)


class _Fields:
    """The values of a header in a row. Raises ValueError where they end or are too many."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file

    def take(self, length: int) -> bytes:
        """The next bytes."""
        if self._file.tell() + length <= LARGEST_HEADER:
            content = self._file.read(length)
            if len(content) == length:
                return content
        raise ValueError("GGUF that is truncated or broken in its header")

    def numbers(self, form: str) -> tuple[Any, ...]:
        """Little-endian numbers of struct's formats."""
        form = f"<{form}"
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def text(self) -> str:
        """A text with its length before it."""
        (length,) = self.numbers("Q")
        return self.take(length).decode("utf-8", "replace")

    def value(self) -> str | None:
        """A text or number, as text; None for a list."""
        (kind,) = self.numbers("I")
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            self._skip_list()
            return None
        return str(self.numbers(self._format(kind))[0])

    def tensor(self) -> tuple[str, Stored]:
        """The name of a tensor, and where it is stored."""
        name = self.text()
        (axes,) = self.numbers("I")
        if axes > MOST_AXES:
            raise ValueError(f"not GGUF: its header says {name[:80]!r} wrongly")
        shape = self.numbers(f"{axes}Q")[::-1]
        kind, begin = self.numbers("IQ")
        if kind not in _TYPES:
            raise ValueError(f"GGUF with a type that is not known: {kind} of {name[:80]!r}")
        dtype, blocks = _TYPES[kind]
        if shape and shape[-1] % blocks.weights:
            raise ValueError(f"not GGUF: {name[:80]!r} {[*shape]} is not whole blocks of {dtype}")
        return name, Stored(dtype, shape, begin, begin + stored_bytes(dtype, prod(shape)))

    def _skip_list(self) -> None:
        kind, length = self.numbers("IQ")
        if length > _MOST_ENTRIES or kind == _LIST:
            raise ValueError("not GGUF: a list in its header is broken")
        if kind == _TEXT:
            for _ in range(length):
                self.text()
        else:
            self.take(length * struct.calcsize(self._format(kind)))

    def _format(self, kind: int) -> str:
        if kind not in _FORMATS:
            raise ValueError("not GGUF: its metadata are broken")
        return _FORMATS[kind]


def stored_bytes(dtype: str, parameters: int) -> int:
    """Bytes of a tensor of that type."""
    return parameters // LAYOUTS[dtype].weights * LAYOUTS[dtype].bytes
