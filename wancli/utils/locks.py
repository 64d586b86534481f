"""Locks on file names, released when the process ends, however it ends.

While something is written to a folder, it holds a hidden `.wancli.lock` with a hash of each name
that is being written. A process appends the hashes of its names and locks them as one range of
bytes; a hash that is not locked counts for nothing. Such locks (POSIX record locks) end with the
process, are not inherited by children, and the kernel knows their holder. One range, because the
kernel compares each new lock with all others on the file: a lock a name takes minutes for 200,000.

Two more locks are on bytes far beyond the end. One is shared by all users of the file: whoever can
have it exclusively may remove the file. The other is held while hashes are compared and appended.
"""

import errno
import fcntl
import hashlib
import os
import shlex
import stat
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

FILE = ".wancli.lock"
_MARK = b"wancli.1"  # the first bytes: other files stay as they are
_HASH = len(_MARK)  # bytes
_USERS, _GATE = 2**62, 2**62 + 1  # offsets
_HELD = (errno.EACCES, errno.EAGAIN)
_FLOCK = struct.Struct("hhqqi0q")  # type, whence, start, length, pid; as Linux has it
_LONGEST_COMMAND = 100  # characters


class NameLocked(Exception):
    """Another process has locked the name. `pid` is 0 if unknown."""

    def __init__(self, name: str, pid: int) -> None:
        super().__init__(name, pid)
        self.name, self.pid = name, pid

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

    def acquire(self, *names: str) -> None:
        """Lock names until `release`; to be called once.

        Raises NameLocked at once if another process has one of them.
        """
        if self._file is None:
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _GATE)
            try:
                _append(self._file, {_hash(name): name for name in names})
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _GATE)
        except OSError:
            self.release()

    def release(self) -> None:
        """Release all names, and remove the lock file if nobody else uses it."""
        file, self._file = self._file, None
        if file is None:
            return
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_UN)  # first, so that one of two ending at once removes it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _USERS)
            if _is_at(file, self._path) and _is_ours(file):
                self._path.unlink()
        os.close(file)


def _join(path: Path) -> int | None:
    """Open the lock file as one of its users; None if that is impossible."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            file = os.open(path, flags, 0o666)
        except OSError:
            return None
        try:
            if stat.S_ISREG(os.fstat(file).st_mode):
                fcntl.lockf(file, fcntl.LOCK_SH, 1, _USERS)  # waits while another one removes it
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


def _is_ours(file: int) -> bool:
    """Whether a file is a lock file, or empty."""
    return _MARK.startswith(os.pread(file, _HASH, 0))


def _hash(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()[:_HASH]


def _append(file: int, names: Mapping[bytes, str]) -> None:
    """Append hashes of names and lock them. Raises NameLocked, OSError."""
    if not _is_ours(file):
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    if _is_free(file, 0, length=_USERS):  # nobody has a name: all were of killed processes
        os.ftruncate(file, 0)
    size = os.fstat(file).st_size
    content = os.pread(file, size, 0)
    for at in range(_HASH, size, _HASH):
        name = names.get(content[at : at + _HASH])
        if name is not None and not _is_free(file, at):
            raise NameLocked(name, _holder(file, at))
    start = _HASH * max(1, -(-size // _HASH))
    hashes = b"".join(names)
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, max(1, len(hashes)), start)
    os.pwrite(file, _MARK, 0)
    if os.pwrite(file, hashes, start) < len(hashes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_free(file: int, start: int, *, length: int = 1) -> bool:
    """Whether no other process has locked any of these bytes. Raises OSError."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    fcntl.lockf(file, fcntl.LOCK_UN, length, start)
    return True


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
