"""Headers of GGUF files: read as the gguf package writes them, or refused with a ValueError."""

import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from wancli.utils.gguf import LAYOUTS, is_gguf, read_gguf_header

gguf = pytest.importorskip("gguf", reason="pip install gguf")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Two tensors, and metadata of every kind."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_name("a name")
    writer.add_quantization_version(2)
    writer.add_array("tokens", ["a", "bc"])
    writer.add_array("scores", [0.5, 1.5])
    writer.add_bool("yes", val=True)
    writer.add_float64("wide", 0.25)
    quantized = gguf.quants.quantize(np.ones((3, 64), "f4"), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("a.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("b.weight", np.ones((1, 2, 3), "f2"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_types_have_the_sizes_of_the_gguf_package():
    theirs = {kind.name: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    ours = {name: (each.weights, each.bytes) for name, each in LAYOUTS.items()}
    assert ours.items() >= theirs.items()


def test_a_header_has_every_tensor_at_its_place_and_the_texts_of_the_metadata(written: Path):
    header, theirs = read_gguf_header(written), gguf.GGUFReader(written)
    assert is_gguf(written)
    assert header.metadata == {
        "general.architecture": "wan", "general.name": "a name",
        "general.quantization_version": "2", "yes": "True", "wide": "0.25",
    }  # fmt: skip
    assert {name: (stored.dtype, stored.shape) for name, stored in header.tensors.items()} == {
        "a.weight": ("Q8_0", (3, 64)),
        "b.weight": ("F16", (1, 2, 3)),
    }
    for tensor in theirs.tensors:
        stored = header.tensors[tensor.name]
        assert header.start + stored.begin == tensor.data_offset
        assert stored.end - stored.begin == tensor.n_bytes


def test_a_file_that_ends_anywhere_is_refused(written: Path):
    content = written.read_bytes()
    for length in range(0, len(content) - 26, 3):  # its last bytes are padding
        written.write_bytes(content[:length])
        with pytest.raises(ValueError, match="GGUF"):
            read_gguf_header(written)


def test_a_damaged_header_is_read_or_refused(written: Path):
    content, generator = written.read_bytes(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(400)] = generator.choice((0, 1, 255, 127))
        written.write_bytes(damaged)
        with suppress(ValueError):
            header = read_gguf_header(written)
            assert all(stored.begin <= stored.end for stored in header.tensors.values())


def version_1(content: bytes) -> bytes:
    return content[:4] + b"\1\0\0\0" + content[8:]


def many_tensors(content: bytes) -> bytes:
    return content[:8] + b"\xff" * 8 + content[16:]


def another_type(content: bytes) -> bytes:
    place = content.index(b"a.weight") + 8 + 4 + 2 * 8
    return content[:place] + b"\4\0\0\0" + content[place + 4 :]


def aligned_to_gibibytes(content: bytes) -> bytes:
    version, key = b"general.quantization_version", b"general.alignment"
    old = struct.pack("<Q", len(version)) + version + struct.pack("<II", 4, 2)
    return content.replace(old, struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, 2**30))


def overlapping(content: bytes) -> bytes:
    place = content.index(b"b.weight") + 8 + 4 + 3 * 8 + 4
    return content[:place] + b"\0" * 8 + content[place + 8 :]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (overlapping, "its tensors overlap"),
        (aligned_to_gibibytes, "its alignment is broken"),
        (version_1, "version 1, which is not read"),
        (many_tensors, "its header is broken"),
        (another_type, "a type that is not known: 4 of 'a.weight'"),
        (lambda content: b"GGML" + content[4:], "not GGUF"),
        (
            lambda content: content.replace(b"b.weight", b"a.weight"),
            "two of its tensors have one name",
        ),
    ],
)
def test_other_formats_are_refused_by_name(
    change: Callable[[bytes], bytes], words: str, written: Path
):
    written.write_bytes(change(written.read_bytes()))
    with pytest.raises(ValueError, match=words):
        read_gguf_header(written)
