"""Open and parse files that anybody may have written.

All functions raise OSError for a file that cannot be read, and a one-line ValueError for invalid
content; `unreadable` turns either into an error for the user.
"""

import errno
import io
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import IO, Any, TypeGuard, TypeVar

from wancli.errors import InputError, WancliError, first_line

LARGEST_TEXT = 16 * 2**20  # bytes; the largest real file, an index of shards, has 0.1 MiB
LARGEST_TOML = 2**20  # bytes; tomllib parses 2 MiB per second
LARGEST_HEADER = 100_000_000  # bytes; the limit of safetensors itself
DEEPEST = 64  # levels, well below Python's recursion limit
MOST_AXES = 32
_TOO_DEEP = f"it is nested over {DEEPEST} levels deep"
Failure = TypeVar("Failure", bound=WancliError)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SURROGATE = re.compile("[\ud800-\udfff]")  # text that cannot be written as UTF-8
# Bits per element, by safetensors' dtype names.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip

DTYPE_NAMES = {  # torch's
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `begin` and `end` are byte offsets in the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def real(self) -> bool:
        """Whether its dtype is a float of 16 bits or more."""
        return self.dtype in ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Header:
    """Header of a file of tensors, whose data begin at byte `start`."""

    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]
    start: int


def user_path(text: str) -> Path:
    """Expand `~` in a typed path; an unknown `~user` is an ordinary name."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def open_file(path: Path) -> io.BufferedReader:
    """Open a regular file to read. Anything else (a pipe, say) is refused without blocking."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, f"it is {kind_of(mode)}, not a file", str(path))
    return os.fdopen(descriptor, "rb")


def kind_of(mode: int) -> str:
    """The kind of file that a `stat` mode describes, in words."""
    kinds = {
        stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_text(path: Path, *, most: int = LARGEST_TEXT) -> str:
    """Read UTF-8 text of at most `most` bytes, with or without a byte order mark."""
    with open_file(path) as file:
        return read_stream(file, most=most)


def read_stream(file: IO[bytes], *, most: int) -> str:
    """Read UTF-8 text of at most `most` bytes from an open file or pipe."""
    content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has over {most // 2**20} MiB")
    return _decoded(content)


def read_lines(path: Path) -> list[str]:
    """Read UTF-8 text by lines, without the blank ones.

    A line ends as in a text file; `str.splitlines` also splits at separators that a prompt in JSON
    may hold, such as U+2028.
    """
    return [line for line in re.split(r"\r\n|\r|\n", read_text(path)) if line.strip()]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file."""
    return parse_json(read_text(path))


def parse_json(text: str) -> dict[str, Any]:
    """Parse a JSON object of limited depth."""
    value = _json_object(text)
    _check_values(value)
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file."""
    text = read_text(path, most=LARGEST_TOML)
    with _parsing("TOML"):
        tables = tomllib.loads(text)
    _check_values(tables)
    return tables


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping from a file; an empty file is an empty one."""
    import yaml  # type: ignore[import-untyped]  # here, since hardly any command needs it

    text = read_text(path, most=LARGEST_TOML)
    try:
        value = yaml.safe_load(text) or {}
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"not YAML: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a YAML mapping")
    return value


def read_header(path: Path) -> Header:
    """Read a safetensors header, checking that the tensors fill the file without gaps."""
    entries, metadata, start, size = _read_entries(path)
    tensors = {name: _stored(name, entry) for name, entry in entries.items()}
    ordered = sorted((stored.begin, stored.end) for stored in tensors.values())
    bounds = [(0, 0), *ordered, (size - start, 0)]
    if any(before[1] != after[0] for before, after in pairwise(bounds)):
        raise ValueError("not safetensors: its tensors do not fill it, one after another")
    return Header(tensors, metadata, start)


def skim_header(path: Path) -> Header:
    """Read a safetensors header in a third of the time, checking only the end of the last tensor.

    An entry that is wrong raises ValueError when it is used.
    """
    entries, metadata, start, size = _read_entries(path)
    try:
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (KeyError, IndexError, TypeError):
        end = None
    if end != size - start:
        raise ValueError("not safetensors, or truncated: its tensors do not fill it")
    return Header(_Skimmed(entries), metadata, start)


class _Skimmed(Mapping[str, Stored]):
    """The tensors of a header, each of which is checked when it is used."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> Stored:
        return _stored(name, self._entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _read_entries(path: Path) -> tuple[dict[str, Any], dict[str, str], int, int]:
    """The entries of a safetensors header, its metadata, where data begin, and the file's size."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise ValueError("not safetensors: its header is truncated or broken")
        text = _decoded(file.read(length))
    header = _json_object(text)
    if "\\u" in text:  # else there are no surrogates; its depth is limited by its structure
        _check_values(header)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("not safetensors: its metadata is not text")
    return header, metadata, 8 + length, size


def check_tensors(path: Path) -> None:
    """Raise unless a file is safetensors or, with another suffix, begins like a torch pickle."""
    if path.suffix == ".safetensors":
        read_header(path)
        return
    with open_file(path) as file:
        if file.read(2) not in (b"PK", b"\x80\x02"):  # a zip, or what older torch wrote
            raise ValueError("neither .safetensors nor a pickle of torch's")


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what `git clone` leaves of a large one where Git LFS is not installed."""
    try:
        with open_file(path) as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except (OSError, ValueError):  # a NUL in the name
        return False


def pointer_error(path: Path, kind: type[Failure]) -> Failure:
    """The error for a file that is only a pointer of Git LFS."""
    return kind(
        f"{path} is only a pointer of Git LFS, not the file itself.",
        hint="in its folder: git lfs install && git lfs pull; or download it again",
    )


def unreadable(
    path: Path, error: Exception, *, hint: str, kind: type[WancliError] = InputError
) -> WancliError:
    """The error for a file that cannot be read or has invalid content."""
    if is_lfs_pointer(path):
        return pointer_error(path, kind)
    reason = isinstance(error, OSError) and error.strerror
    return kind(f"cannot read {path}: {reason or first_line(error)}.", hint=hint)


@contextmanager
def _parsing(what: str) -> Iterator[None]:
    """Turn any error of a parser into a one-line ValueError."""
    try:
        yield
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"not {what}: {error}") from None
    except ValueError:
        raise ValueError(f"not {what}: it has a number of too many digits") from None


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None


def _json_object(text: str) -> dict[str, Any]:
    with _parsing("JSON"):
        value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _stored(name: str, entry: Any) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if _counts(shape) and type(begin) is type(end) is int:
            size = -(-prod(shape[:MOST_AXES]) * _BITS[dtype] // 8)
            if len(shape) <= MOST_AXES and size == end - begin:
                return Stored(dtype, tuple(shape), begin, end)
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"not safetensors: its header says {name[:80]!r} wrongly")


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether a value is a list of non-negative integers."""
    # A header has a thousand of these: built-in functions take a third of a generator's time.
    if type(value) is not list or not {*map(type, value)} <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) < 2**63)


def _check_values(value: Any) -> None:
    """Raise ValueError for values nested too deeply, and for text with lone surrogates."""
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for outer in level:
            if isinstance(outer, dict):
                inner += [*outer, *outer.values()]
            elif isinstance(outer, list):
                inner += outer
            elif isinstance(outer, str) and _SURROGATE.search(outer):
                raise ValueError("it has half a surrogate pair")
        if not inner:
            return
        level = inner
    raise ValueError(_TOO_DEEP)
