"""Names that one process writes at a time; a process that dies lets go of them.

A folder in which something is written has a hidden, empty `.wancli.lock` as long as that lasts.
Each name is one byte of it, far apart by a hash, that is locked for its writer alone. Locks of this
kind go with the process, however it ends; its children do not have them; and the kernel says whose
they are. Byte 0 is shared by all who use the file: who has it alone may remove the file.
"""

import errno
import fcntl
import hashlib
import os
import shlex
import stat
import struct
import sys
from contextlib import suppress
from pathlib import Path

FILE = ".wancli.lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_FLOCK = struct.Struct("hhqqi0q")  # type, whence, start, length, pid; as Linux has it
_LONGEST_COMMAND = 100  # characters


class NameLocked(Exception):
    """Another process has the name. `pid` is 0 where it cannot be seen."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self.pid = pid

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        command = _command(self.pid)
        return f"process {self.pid} ({command})" if command else f"process {self.pid}"


class FolderLock:
    """Names of one folder that this process keeps to itself. At most one a folder and process.

    Where there can be no locks (a shared folder in which the file is another user's; some network
    disks) nothing is kept, and `works` is false: then files that appear meanwhile still stay.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._file = _join(self._path)

    @property
    def works(self) -> bool:
        """Whether names are kept."""
        return self._file is not None

    def take(self, name: str) -> None:
        """Keep a name until `release`. Raises Held at once where another process has it."""
        if self._file is None:
            return
        byte = 1 + int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:7])
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno in _HELD:
                raise NameLocked(_holder(self._file, byte)) from None

    def release(self) -> None:
        """Let go of all names, and remove the file if nobody else uses it."""
        file, self._file = self._file, None
        if file is None:
            return
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_UN)  # first, so that of two who end at once one removes it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            if _is_at(file, self._path) and not os.fstat(file).st_size:
                self._path.unlink()
        os.close(file)


def _join(path: Path) -> int | None:
    """The file, open, with a share in its first byte; None where that cannot be."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            file = os.open(path, flags, 0o666)
        except OSError:
            return None
        try:
            if stat.S_ISREG(os.fstat(file).st_mode):
                fcntl.lockf(file, fcntl.LOCK_SH, 1, 0)  # waits while another process removes it
                if _is_at(file, path):
                    return file
            else:
                os.close(file)
                return None
        except OSError:
            os.close(file)
            return None
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file still has that name."""
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except OSError:
        return False


def _holder(file: int, byte: int) -> int:
    """The process that keeps a byte; 0 where it is not known."""
    if not sys.platform.startswith("linux"):
        return 0
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    with suppress(OSError):
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked))
        return int(pid) if kind != fcntl.F_UNLCK else 0
    return 0


def _command(pid: int) -> str:
    """What a process was started as, on one line; "" where that is not known."""
    try:
        return as_typed(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return ""


def as_typed(words: bytes) -> str:
    """A command line that the kernel tells, each word with a zero after it; from wancli on."""
    told = [word.decode(errors="replace") for word in words.split(b"\0")[:-1]] or [""]
    began = next((i for i, word in enumerate(told[:3]) if Path(word).name == "wancli"), 0)
    text = shlex.join([Path(told[began]).name, *told[began + 1 :]])
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _LONGEST_COMMAND else f"{text[:_LONGEST_COMMAND]}…"
