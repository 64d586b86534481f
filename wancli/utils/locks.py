"""Locks on file names, released when the process ends, however it ends.

While something is written to a folder, it holds a hidden, empty `.wancli.lock`. Each name is one
byte of it, at an offset given by a hash, locked exclusively by its writer. Such locks (POSIX record
locks) end with the process, are not inherited by children, and the kernel knows their holder. Byte
0 is shared by all users of the file: whoever can lock it exclusively may remove the file.
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
    """Another process has locked the name. `pid` is 0 if unknown."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self.pid = pid

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        command = _command(self.pid)
        return f"process {self.pid} ({command})" if command else f"process {self.pid}"


class FolderLock:
    """Locks on names in one folder. At most one per folder and process.

    Where locking is impossible (the lock file is another user's; some network disks) `works` is
    False and nothing is locked; files that appear meanwhile are still not replaced.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._file = _join(self._path)

    @property
    def works(self) -> bool:
        """Whether locking is possible."""
        return self._file is not None

    def acquire(self, name: str) -> None:
        """Lock a name until `release`. Raises NameLocked at once if another process has it."""
        if self._file is None:
            return
        byte = 1 + int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:7])
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno in _HELD:
                raise NameLocked(_holder(self._file, byte)) from None

    def release(self) -> None:
        """Release all names, and remove the lock file if nobody else uses it."""
        file, self._file = self._file, None
        if file is None:
            return
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_UN)  # first, so that one of two ending at once removes it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            if _is_at(file, self._path) and not os.fstat(file).st_size:
                self._path.unlink()
        os.close(file)


def _join(path: Path) -> int | None:
    """Open the lock file with a shared lock on byte 0; None if that is impossible."""
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
    """PID of the process that locked a byte; 0 if unknown."""
    if not sys.platform.startswith("linux"):
        return 0
    query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    with suppress(OSError):
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, query))
        return int(pid) if kind != fcntl.F_UNLCK else 0
    return 0


def _command(pid: int) -> str:
    """Command line of a process, on one line; "" if unknown."""
    try:
        return as_typed(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return ""


def as_typed(words: bytes) -> str:
    """Format NUL-terminated words of /proc/PID/cmdline, from `wancli` on."""
    argv = [word.decode(errors="replace") for word in words.split(b"\0")[:-1]] or [""]
    first = next((i for i, word in enumerate(argv[:3]) if Path(word).name == "wancli"), 0)
    text = shlex.join([Path(argv[first]).name, *argv[first + 1 :]])
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _LONGEST_COMMAND else f"{text[:_LONGEST_COMMAND]}…"
