"""Headers of torch's pickles, read without torch and without running any code in them."""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from wancli.utils.reading import MOST_AXES, Header, Stored, open_file

_LARGEST = 16 * 2**20  # bytes of the pickle itself, without its tensors
_INDEX = "/data.pkl"
_DTYPES = {
    "DoubleStorage": ("F64", 8),
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
}
# Entries that hold a state dict in trainers' pickles. The EMA first: it is the one to sample from,
# unless its authors do not.
ENTRIES = ("generator_ema", "generator", "generator_lora")


class _Storage(NamedTuple):
    kind: str
    key: str


def is_zip(path: Path) -> bool:
    """Whether a file begins as the zip that torch.save writes; older pickles are none."""
    with open_file(path) as file:
        return file.read(2) == b"PK"


def read_pickle_header(path: Path) -> Header:
    """The tensors of a state dict that torch.save wrote (a zip), with offsets in their own files.

    They are in the first of `ENTRIES` that is there, else in the pickle itself.

    Raises OSError, and ValueError for a file that is truncated or holds more than tensors.
    """
    with open_file(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _read_archive(archive)
        except (zipfile.BadZipFile, EOFError, NotImplementedError):
            raise ValueError("not a torch pickle, or truncated") from None


def _read_archive(archive: zipfile.ZipFile) -> Header:
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    index = next((name for name in sizes if name.endswith(_INDEX)), "")
    if not index or sizes[index] > _LARGEST:
        raise ValueError("not a torch pickle: it has no index")
    try:
        state = _TensorUnpickler(io.BytesIO(archive.read(index))).load()
    except ValueError:
        raise
    except Exception:  # noqa: BLE001 - a broken pickle can raise anything
        raise ValueError("not a torch pickle: its index is broken") from None
    folder = index.removesuffix(_INDEX)
    if isinstance(state, Mapping):
        nested = (state.get(name) for name in ENTRIES)
        state = next((inner for inner in nested if isinstance(inner, Mapping) and inner), state)
    if not isinstance(state, Mapping) or not all(isinstance(v, _Tensor) for v in state.values()):
        raise ValueError("it holds more than a state dict of tensors")
    for name, tensor in state.items():
        if sizes.get(f"{folder}/data/{tensor.storage.key}", -1) < tensor.stored.end:
            raise ValueError(f"tensor {str(name)[:80]!r} is truncated")
    return Header({str(name): tensor.stored for name, tensor in state.items()}, {}, 0)


class _Tensor:
    """What a pickle says of one tensor."""

    def __init__(self, storage: Any, offset: Any, shape: tuple[Any, ...], *_: Any) -> None:
        whole = all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape))
        if not isinstance(storage, _Storage) or not whole or len(shape) > MOST_AXES:
            raise ValueError("its index says a tensor wrongly")
        self.storage = storage
        dtype, size = _DTYPES.get(storage.kind, (storage.kind, 1))
        begin = offset * size
        self.stored = Stored(dtype, tuple(shape), begin, begin + prod(shape) * size)


class _TensorUnpickler(pickle._Unpickler):
    """Knows tensors, and refuses everything else.

    In Python: the one in C takes 64 GB for a pickle of 13 bytes, which names the last of its slots.
    """

    _KNOWN: Mapping[tuple[str, str], Callable[..., Any]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The function of a name in a pickle."""
        if module == "torch" and name.endswith("Storage"):
            return name  # only its name is used
        if (module, name) in self._KNOWN:
            return self._KNOWN[module, name]
        raise ValueError(f"it holds more than tensors: loading it would run {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that a tensor refers to."""
        match pid:
            case ("storage", str(kind), str(key), _, _):
                return _Storage(kind, key)
        raise ValueError("its index says a tensor wrongly")
