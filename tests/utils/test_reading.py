"""Foreign files are read, or rejected in one line, whatever they contain."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wancli.utils.reading import (
    LARGEST_TEXT,
    open_file,
    parse_json,
    read_header,
    read_json,
    read_toml,
)


def header(content: Any, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(first: int = 0, last: int = 16, *, dtype: Any = "F32", shape: Any = (4,)) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


DEEP = b'{"a":' * 100_000
BAD_JSON = {
    "empty": b"",
    "deep": DEEP,
    "deep and whole": b'{"a":' * 70 + b"1" + b"}" * 70,
    "a list": b"[]",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "half a character": b'{"a": "\\ud800"}',
    "a long number": b'{"a": 1' + b"0" * 5000 + b"}",
    "large": b" " * (LARGEST_TEXT + 1),
}
BAD_TOML = {
    "deep": b"a = " + b"[" * 100_000,
    "dotted": b"a." * 70 + b"a = 1",
    "not UTF-8": b"\xff",
    "a long number": b"a = 1" + b"0" * 5000,
}
BAD_HEADERS = {
    "empty": b"",
    "short": b"\0" * 5,
    "long": (2**63).to_bytes(8, "little") + b"{}",
    "deep": header(DEEP),
    "a list": header([]),
    "no tensor": header({"a": 1}),
    "overlap": header({"a": tensor(), "b": tensor(8, 24)}, b"\0" * 24),
    "gap": header({"a": tensor(), "b": tensor(20, 36)}, b"\0" * 36),
    "past the end": header({"a": tensor()}, b"\0" * 15),
    "trailing bytes": header({"a": tensor()}, b"\0" * 17),
    "backwards": header({"a": tensor(16, 0)}, b"\0" * 16),
    "negative": header({"a": tensor(shape=[-4])}, b"\0" * 16),
    "true": header({"a": tensor(shape=[4, True])}, b"\0" * 16),
    "another size": header({"a": tensor(shape=[5])}, b"\0" * 16),
    "many axes": header({"a": tensor(shape=[4, *[1] * 99])}, b"\0" * 16),
    "unknown dtype": header({"a": tensor(dtype="F31")}, b"\0" * 16),
    "dtype as a list": header({"a": tensor(dtype=[])}, b"\0" * 16),
    "metadata": header({"__metadata__": {"a": 1}}),
}


def cases(of: dict[str, bytes]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("content", of.values(), ids=of)


@cases(BAD_JSON)
def test_bad_json_is_rejected(tmp_path: Path, content: bytes):
    assert_rejected(read_json, tmp_path / "x.json", content)


@cases(BAD_TOML)
def test_bad_toml_is_rejected(tmp_path: Path, content: bytes):
    assert_rejected(read_toml, tmp_path / "x.toml", content)


@cases(BAD_HEADERS)
def test_bad_safetensors_headers_are_rejected(tmp_path: Path, content: bytes):
    assert_rejected(read_header, tmp_path / "x.safetensors", content)


def assert_rejected(read: Callable[[Path], Any], path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\A[^\n]{3,150}\Z") as raised:
        read(path)
    assert type(raised.value) is ValueError  # our own message


def test_valid_files_are_read(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf" + '{"a": "ä\\ud83d\\ude00"}'.encode())
    assert read_json(tmp_path / "x") == {"a": "ä😀"}  # a byte order mark is accepted
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfa = 1")
    assert read_toml(tmp_path / "x") == {"a": 1}
    tensors = {
        "b": tensor(16, 18, dtype="BF16", shape=[]),
        "a": tensor(),
        "c": tensor(18, 18, shape=[0]),
    }
    whole = {**tensors, "d": tensor(18, 21, dtype="F4", shape=[5]), "__metadata__": {"x": "y"}}
    (tmp_path / "x").write_bytes(header(whole, b"\0" * 21))
    read = read_header(tmp_path / "x")
    assert read.metadata == {"x": "y"}
    assert read.tensors["b"].shape == ()
    assert [name for name, tensor in read.tensors.items() if tensor.real] == ["b", "a", "c"]


def test_headers_are_read_as_torch_wrote_them(tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.bool), "c": torch.zeros(0)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    read = read_header(tmp_path / "x").tensors
    assert {name: tensor.shape for name, tensor in read.items()} == {
        "a": (2, 3),
        "b": (),
        "c": (0,),
    }


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
def test_opening_anything_but_a_file_fails_without_waiting(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # a socket's path is at most 108 bytes
    path = Path("/dev/zero" if kind == "device" else "x")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as place:
            place.bind("x")
    with pytest.raises(OSError, match=r"it is a|No such device"):
        open_file(path)


def test_many_shallow_values_are_accepted():
    assert len(parse_json(json.dumps({"a": [[]] * 10_000}))["a"]) == 10_000
