"""Headers of pickles: read without taking more memory than the pickle has bytes."""

import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from wancli.utils.pickles import read_pickle_header


def test_a_pickle_that_names_a_far_slot_takes_no_memory(tmp_path: Path):
    empty_dict_in_a_slot = b"\x80\x02}r" + struct.pack("<I", 2_000_000) + b"."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", empty_dict_in_a_slot)
    tracemalloc.start()
    try:
        assert read_pickle_header(tmp_path / "x.pt").tensors == {}
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_pickle_without_an_end_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}")
    with pytest.raises(ValueError, match="its index is broken"):
        read_pickle_header(tmp_path / "x.pt")
