"""Atomic writes: a file appears complete or not at all, and never replaces one of the user's.

Content is written to a part first: a hidden file with a random name.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wancli.errors import OutputError, missing
from wancli.utils.interrupts import uninterrupted, unwind_from_here
from wancli.utils.reading import kind_of, open_file, unreadable

_NAMES_BESIDE = 100
LONGEST_NAME = 255  # bytes, on all common file systems
_PART = re.compile(  # SQLite adds two files to its own
    r"\.(?P<name>.*)\.[0-9a-f]{16}\.(?P<kind>part|old)(?:-wal|-shm)?", re.DOTALL
)
_ADDED = len("..0123456789abcdef.part")


def write_whole(
    path: Path, content: bytes, *, hint: str, overwrite: bool = False, sync: bool = False
) -> None:
    """Write a part, then rename it; folders are created. Raises OutputError with `hint`.

    An existing file is an error, unless `overwrite`. With `sync` the content is on disk when this
    returns.
    """
    try:
        _write(path, content, overwrite=overwrite, sync=sync)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}.", hint=hint) from None


def names_beside(path: Path) -> Iterator[Path]:
    """The names that `write_beside` may use: NAME, NAME-1, NAME-2 and so on."""
    yield path
    yield from (path.with_stem(f"{path.stem}-{number}") for number in range(1, _NAMES_BESIDE))


def write_beside(path: Path, content: bytes, *, hint: str) -> Path:
    """Write under the first of `names_beside` that is free, and return it. Raises OutputError."""
    for free in names_beside(path):
        try:
            _write(free, content)
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputError(f"cannot write {free}: {error.strerror}.", hint=hint) from None
        return free
    raise OutputError(f"{path} exists, and {_NAMES_BESIDE - 1} more beside it.", hint=hint)


def _write(path: Path, content: bytes, *, overwrite: bool = False, sync: bool = False) -> None:
    unwind_from_here()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = make_part(path)
    try:
        with part.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        place(part, path, overwrite=overwrite)
    finally:
        remove(part)


def make_part(final: Path) -> Path:
    """Create an empty part beside `final`. Raises OSError."""
    part = part_name(final)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
    return part


def part_name(final: Path, kind: str = "part") -> Path:
    """A random hidden name beside `final`."""
    return final.with_name(f".{_cut(final.name)}.{secrets.token_hex(8)}.{kind}")


def place(part: Path, final: Path, *, overwrite: bool) -> None:
    """Rename `part` to `final`. Raises FileExistsError if that exists, OSError.

    `overwrite` replaces a regular file, and nothing else.
    """
    if overwrite:
        check_regular(final)
        part.replace(final)
        return
    try:
        os.link(part, final, follow_symlinks=False)  # never replaces, even in a race
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        part.replace(final)
    else:
        remove(part)


def check_regular(path: Path) -> None:
    """Raise FileExistsError if the path exists and is not a regular file, OSError."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise FileExistsError(errno.EEXIST, f"it is {kind_of(mode)}", str(path))


@contextmanager
def whole_folder(out: Path, *, hint: str, overwrite: bool = False) -> Iterator[Path]:
    """A temporary hidden folder that replaces `out` if the block succeeds.

    If it fails, `out` is unchanged and the folder is removed. A folder that exists and is not empty
    is an error, unless `overwrite`. Raises OutputError with `hint`.
    """
    unwind_from_here()
    final = out.resolve()
    part, old = part_name(final), part_name(final, "old")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        if overwrite and final.exists():
            final.rename(old)
        part.rename(final)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {out}: {reason}.", hint=hint) from error
    finally:
        with uninterrupted():
            if old.exists() and not final.exists():
                old.rename(final)
            for folder in (part, old):
                shutil.rmtree(folder, ignore_errors=True)


def remove_parts(folder: Path, finals: Collection[str] | None = None) -> None:
    """Remove parts of `finals`, or of all files, that killed processes left behind.

    The caller must have locked those names: parts of a running process look the same.
    """
    cut = None if finals is None else {_cut(name): name for name in finals}
    with suppress(OSError):
        for path in list(folder.iterdir()):
            match = _PART.fullmatch(path.name)
            if not match or (cut is not None and match["name"] not in cut):
                continue
            final = folder / (cut or {}).get(match["name"], match["name"])
            if match["kind"] == "old" and not final.exists():
                path.rename(final)  # killed between the two renames
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                remove(path)


def is_part(name: str) -> bool:
    """Whether a name is that of a part."""
    return _PART.fullmatch(name) is not None


def remove(path: Path) -> None:
    """Remove a file if it exists and is regular."""
    with suppress(OSError):  # must not hide the error that led here
        check_regular(path)
        path.unlink()


def files_in(folder: Path) -> Iterator[Path]:
    """All files in a folder, at every level; links count as files and are not followed."""
    return (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def cut_name(name: str, length: int) -> str:
    """Truncate a name to at most `length` bytes of UTF-8, at a character boundary."""
    whole = os.fsencode(name)
    return name if len(whole) <= length else whole[:length].decode(errors="ignore")


def _cut(name: str) -> str:
    return cut_name(name, LONGEST_NAME - _ADDED)


def digest(kind: str, path: Path) -> str:
    """SHA-256 of a file. Raises InputError."""
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise missing(kind, path) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint="check the path") from None
