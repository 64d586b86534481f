"""Locks on file names, released when the process ends, however it ends.

While something is written to a folder, it holds a hidden `.wancli.lock` with a hash of each name
that is being written. A process appends the hashes of its names and locks them as one range of
bytes; a hash that is not locked counts for nothing. Such locks (POSIX record locks) end with the
process, are not inherited by children, and the kernel knows their holder. One range, because the
kernel compares each new lock with all others on the file: a lock a name takes minutes for 200,000.

Two more locks are on bytes far beyond the end. One is shared by all users of the file: whoever can
have it exclusively may remove the file. The other is held while hashes are compared and appended.

Locks belong to the process, which loses them when any of its descriptors of the file is closed. So
it opens the file once for all of its requests, and compares their names by itself.
"""

import errno
import fcntl
import hashlib
import os
import shlex
import stat
import struct
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock

FILE = ".wancli.lock"
_MARK = b"wancli.1"  # the first bytes: other files stay as they are
_HASH = len(_MARK)  # bytes
_USERS, _GATE = 2**62, 2**62 + 1  # offsets
_HELD = (errno.EACCES, errno.EAGAIN)
_FLOCK = struct.Struct("hhqqi0q")  # type, whence, start, length, pid; as Linux has it
_LONGEST_COMMAND = 100  # characters


class NameLocked(Exception):
    """Another request has locked the name. `pid` is its process, 0 if unknown."""

    def __init__(self, name: str, pid: int) -> None:
        super().__init__(name, pid)
        self.name, self.pid = name, pid

    @property
    def other(self) -> int:
        """PID of another process; 0 if unknown, or this one."""
        return 0 if self.pid == os.getpid() else self.pid

    def __str__(self) -> str:
        if not self.other:
            return "this process" if self.pid else "another process"
        command = _command(self.pid)
        return f"process {self.pid} ({command})" if command else f"process {self.pid}"


@dataclass
class _LockFile:
    """The lock file of a folder, as this process has it open for all of its requests."""

    path: Path
    file: int
    users: int = 0
    locked: dict[int, set[bytes]] = field(default_factory=dict)  # hashes, by where they begin


_files: dict[Path, _LockFile] = {}
_using = RLock()  # of threads; a signal may release what its own thread is acquiring


class FolderLock:
    """Locks on names in one folder, for one request.

    Where locking is impossible (the lock file is another user's; some network disks) `works` is
    False and nothing is locked; files that appear meanwhile are still not replaced.
    """

    def __init__(self, folder: Path) -> None:
        self._start = 0  # of our hashes in the file
        with _using:
            self._shared = _share(Path(os.path.realpath(folder)) / FILE)  # one file, one descriptor

    @property
    def works(self) -> bool:
        """Whether locking is possible."""
        return self._shared is not None

    def acquire(self, *names: str) -> None:
        """Lock names until `release`; to be called once.

        Raises NameLocked at once if another request has one of them.
        """
        hashes = {_hash(name): name for name in names}
        with _using:
            if self._shared is None:
                return
            for held in self._shared.locked.values():
                if same := held & hashes.keys():
                    raise NameLocked(hashes[same.pop()], os.getpid())
            try:
                self._start = _lock(self._shared, hashes)
            except OSError:
                self.release()

    def release(self) -> None:
        """Release all names, and remove the lock file if nobody else uses it."""
        with _using:
            shared, self._shared = self._shared, None
            if shared is None:
                return
            shared.users -= 1
            hashes = shared.locked.pop(self._start, set())
            if shared.users:
                with suppress(OSError):
                    fcntl.lockf(shared.file, fcntl.LOCK_UN, _length(hashes), self._start)
                return
            if _files.get(shared.path) is shared:
                del _files[shared.path]
            _leave(shared.file, shared.path)


def _share(path: Path) -> _LockFile | None:
    """The lock file, opened unless this process has it open; None if that is impossible."""
    shared = _files.get(path)
    if shared is None or not _is_at(shared.file, path):
        file = _join(path)
        if file is None:
            return None
        shared = _files[path] = _LockFile(path, file)
    shared.users += 1
    return shared


def _lock(shared: _LockFile, names: Mapping[bytes, str]) -> int:
    """Lock hashes of names and return where they begin. Raises NameLocked, OSError."""
    file = shared.file
    fcntl.lockf(file, fcntl.LOCK_EX, 1, _GATE)
    try:
        start = _append(file, names, alone=not shared.locked)
        shared.locked[start] = set(names)
        return start
    finally:
        for begin, hashes in shared.locked.items():  # which looking at the file has unlocked
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, _length(hashes), begin)
        fcntl.lockf(file, fcntl.LOCK_UN, 1, _GATE)


def _leave(file: int, path: Path) -> None:
    """Close the lock file, and remove it if no other process uses it."""
    with suppress(OSError):
        fcntl.lockf(file, fcntl.LOCK_UN)  # first, so that one of two ending at once removes it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _USERS)
        if _is_at(file, path) and _is_ours(file):
            path.unlink()
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


def _length(hashes: Collection[bytes]) -> int:
    """Bytes that are locked for hashes; at least one."""
    return max(1, _HASH * len(hashes))


def _append(file: int, names: Mapping[bytes, str], *, alone: bool) -> int:
    """Append hashes of names and lock them; returns where they begin. Raises NameLocked, OSError.

    Looking whether another process holds bytes unlocks those of this process, unless it is `alone`:
    without any.
    """
    if not _is_ours(file):
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    if alone and _is_free(file, 0, length=_USERS):  # all names were of killed processes
        os.ftruncate(file, 0)
    size = os.fstat(file).st_size
    content = os.pread(file, size, 0)
    for at in range(_HASH, size, _HASH):
        name = names.get(content[at : at + _HASH])
        if name is not None and not _is_free(file, at):
            raise NameLocked(name, _holder(file, at))
    start = _HASH * max(1, -(-size // _HASH))
    hashes = b"".join(names)
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, _length(names), start)
    os.pwrite(file, _MARK, 0)
    if os.pwrite(file, hashes, start) < len(hashes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return start


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
