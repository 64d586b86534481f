"""Files that are whole under their name, or are not there; and none that is not ours replaced.


What is written grows under the name of a part: hidden, and so random that no file of a user has it.
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
from itertools import count
from pathlib import Path

from wancli.errors import OutputError, missing
from wancli.utils.interrupts import held, unwind_from_here
from wancli.utils.reading import open_file, unreadable

LONGEST_NAME = 255  # bytes, on every file system we met
_PART = re.compile(r"\.(?P<name>.*)\.[0-9a-f]{16}\.(?P<kind>part|old)", re.DOTALL)
_ADDED = len("..0123456789abcdef.part")


def write_whole(
    path: Path, content: bytes, *, hint: str, overwrite: bool = False, sync: bool = False
) -> None:
    """Write a part, then give it its name; folders are made. Raises OutputError with `hint`.

    A file that is there stays, and is an error, unless `overwrite`. With `sync` the content is on
    the disk, and not only on its way, when this returns.
    """
    try:
        _write(path, content, overwrite=overwrite, sync=sync)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}.", hint=hint) from None


def write_beside(path: Path, content: bytes, *, hint: str) -> Path:
    """The same under that name or, where it is taken, under NAME-1, NAME-2, ...; says which."""
    for number in count():
        free = path.with_stem(f"{path.stem}-{number}") if number else path
        try:
            _write(free, content)
        except FileExistsError:
            if number < 10_000:
                continue
            raise
        except OSError as error:
            raise OutputError(f"cannot write {free}: {error.strerror}.", hint=hint) from None
        return free
    raise AssertionError  # count() does not end


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
    """An empty file beside `final`, to be filled and placed. Raises OSError."""
    part = part_name(final)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
    return part


def part_name(final: Path, kind: str = "part") -> Path:
    """A hidden name beside `final`, each time another."""
    return final.with_name(f".{_cut(final.name)}.{secrets.token_hex(8)}.{kind}")


def place(part: Path, final: Path, *, overwrite: bool) -> None:
    """Give `part` its final name. Raises FileExistsError where that is taken, OSError.

    With `overwrite` a regular file is replaced, and nothing else.
    """
    if overwrite:
        check_regular(final)
        part.replace(final)
        return
    try:
        os.link(part, final, follow_symlinks=False)  # which never replaces, whoever was faster
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        part.replace(final)
    else:
        remove(part)


def check_regular(path: Path) -> None:
    """Raise FileExistsError for what is there and is no regular file, OSError."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise FileExistsError(errno.EEXIST, f"it is {kind_of(mode)}", str(path))


def kind_of(mode: int) -> str:
    """What a mode of `stat` is of, in words."""
    kinds = {
        stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "a device")


@contextmanager
def whole_folder(out: Path, *, hint: str, overwrite: bool = False) -> Iterator[Path]:
    """An empty hidden folder beside `out`, which takes its place if the block ends well.

    If not, `out` is what it was, and nothing else is left. A folder that is there and is not empty
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
        with held():
            if old.exists() and not final.exists():
                old.rename(final)
            for folder in (part, old):
                shutil.rmtree(folder, ignore_errors=True)


def remove_parts(folder: Path, finals: Collection[str] | None = None) -> None:
    """Remove what killed processes left of these files, or of all: parts.

    Only for who keeps those names from other processes: their parts look the same.
    """
    cut = None if finals is None else {_cut(name): name for name in finals}
    with suppress(OSError):
        for path in list(folder.iterdir()):
            found = _PART.fullmatch(path.name)
            if not found or (cut is not None and found["name"] not in cut):
                continue
            final = folder / (cut or {}).get(found["name"], found["name"])
            if found["kind"] == "old" and not final.exists():
                path.rename(final)  # killed between the two renames
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                remove(path)


def is_part(name: str) -> bool:
    """Whether a file of that name is a part."""
    return _PART.fullmatch(name) is not None


def remove(path: Path) -> None:
    """Remove a file of ours, if it is there; what is no regular file is not ours."""
    with suppress(OSError):  # a disk that broke must not hide how
        check_regular(path)
        path.unlink()


def cut_name(name: str, length: int) -> str:
    """At most `length` bytes of a name, and no half of a character."""
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
