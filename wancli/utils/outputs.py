"""Outputs of one command: checked before anything loads, and locked against other processes.

A file that wancli did not write is replaced only with `overwrite`, and anything but a regular file
never; no two outputs are the same file, and no output is an input.
"""

import os
import resource
import stat
import tempfile
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from wancli.errors import OutputError, UsageError
from wancli.utils.files import LONGEST_NAME, cut_name, remove_parts
from wancli.utils.interrupts import tidied
from wancli.utils.locks import FolderLock, NameLocked
from wancli.utils.reading import kind_of

PREVIEW_MARK = ("Software", "wancli --preview-every")  # PNG text that marks a preview
_CONTROLS = ("Cc", "Zl", "Zp")  # Unicode categories
Ours = Callable[[Path], bool]  # whether an existing file or folder may be replaced unasked


def sidecar(video: Path) -> Path:
    """Path of the record of a video or of latents."""
    return video.with_suffix(".json")


def preview_file(video: Path) -> Path:
    """Path of the preview of a video in progress."""
    return _named_after(video, ".preview.png")


def stream_part(video: Path) -> Path:
    """Path of the growing video of a rollout in progress."""
    return _named_after(video, ".part.mp4")


def _named_after(video: Path, suffix: str) -> Path:
    return video.with_name(cut_name(video.stem, LONGEST_NAME - len(suffix)) + suffix)


def not_ours(_path: Path) -> bool:
    """False: no existing file may be replaced unasked."""
    return False


@dataclass(frozen=True)
class OutputFile:
    """A file or folder that a command writes."""

    path: Path
    role: str  # the setting that names it, in backticks, or its relation to another output
    ours: Ours = not_ours
    named: bool = True  # by the user, so that `overwrite` applies
    folder: bool = False

    @cached_property
    def real(self) -> Path:
        """The path with links resolved."""
        return Path(os.path.realpath(self.path))


@dataclass
class OutputSet:
    """All files that a command writes and reads; `locked` checks them and locks their names."""

    overwrite: bool = False
    reads: Collection[Path] = ()
    another: str = "another `output`"  # hint for an unusable name
    _all: dict[str, OutputFile] = field(default_factory=dict)  # by key
    _folders: dict[str, OutputFile] = field(default_factory=dict)
    _existing: dict[str, OutputFile] = field(default_factory=dict)  # by device and inode
    _replaced: set[Path] = field(default_factory=set)

    def add(self, *outputs: OutputFile) -> None:
        """Add outputs. Raises UsageError if one collides with another."""
        for output in outputs:
            key, places = _key(output.path), _places(output.path)
            if other := self._other(key, places, output):
                if other.role == output.role:
                    raise UsageError(
                        f"several videos would be written to {output.path}.",
                        hint="put {seed} in the name",
                    )
                raise UsageError(
                    f"{output.path} would be {other.role} and {output.role} at once.",
                    hint="give them different names",
                )
            self._all[key] = output
            if output.folder:
                self._folders[key] = output
            self._existing |= dict.fromkeys(places, output)

    def _other(self, key: str, places: set[str], output: OutputFile) -> OutputFile | None:
        """Another output that is the same file, contains it or lies within it."""
        same = [self._all.get(key), *map(self._existing.get, places)]
        folders = self._all if output.folder else self._folders
        same += [o for k, o in folders.items() if _inside(k, of=key) or _inside(key, of=k)]
        return next(filter(None, same), None)

    @property
    def replaced(self) -> frozenset[Path]:
        """Paths whose existing files may be replaced; valid after `check`."""
        return frozenset(self._replaced)

    def check(self) -> None:
        """Raise UsageError for outputs that must not be written, OutputError if they cannot."""
        read = {_key(path) for path in self.reads}.union(*map(_places, self.reads))
        for key, output in self._all.items():
            self._check(output)
            inside = output.folder and any(_inside(path, of=key) for path in read)
            if inside or read & {key, *_places(output.path)}:
                raise UsageError(
                    f"{output.path} is an input, and cannot be {output.role} too.",
                    hint=self.another,
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock all names for the block. Raises UsageError, OutputError.

        Creates folders, removes them again if nothing was written, and removes parts that killed
        processes left of these files.
        """
        self.check()  # before anything is created
        places = {output.path.parent: output for output in self._all.values()}
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2  # a folder's lock is an open file
        if 0 < most < len(places):  # unlimited is -1
            raise UsageError(
                f"{len(places):,} folders cannot be written to at once; {most:,} can.",
                hint="put the videos into one folder, or raise the limit: ulimit -n",
            )
        with ExitStack() as stack:
            for folder, output in places.items():
                missing = [f for f in (folder, *folder.parents) if not f.exists()]
                stack.callback(_remove_empty, missing)
                _try(folder, output)
            folders: dict[Path, dict[str, OutputFile]] = {}
            for key, output in self._all.items():
                folders.setdefault(output.real.parent, {})[Path(key).name] = output
            for folder, outputs in list(folders.items()):
                lock = FolderLock(folder)
                stack.enter_context(tidied(lock.release))
                _acquire(lock, outputs)
                if not lock.works:
                    del folders[folder]  # parts in it may be those of a running process
            self.check()  # again: another process may have written one of them meanwhile
            _remove_parts(folders)  # of killed processes
            try:
                yield
            finally:
                _remove_parts(folders)  # left by a signal

    def _check(self, output: OutputFile) -> None:
        path = output.path
        if output.named and self.overwrite:
            self._replaced.add(path)
        mode = self._look_at(output)
        if mode is None:
            return
        wanted = stat.S_ISDIR if output.folder else stat.S_ISREG
        if not wanted(mode):
            raise UsageError(f"{path} is {kind_of(mode)} and is not replaced.", hint=self.another)
        if output.ours(path):
            self._replaced.add(path)
        elif not output.named:
            raise UsageError(
                f"{path} exists and is not {output.role}; it would be overwritten.",
                hint=self.another,
            )
        elif not self.overwrite:
            raise UsageError(f"{path} exists.", hint=f"`overwrite`, or {self.another}")

    def _look_at(self, output: OutputFile) -> int | None:
        """The `stat` mode of an existing file, or None. Raises UsageError, OutputError."""
        path = output.path
        check_length(path)
        if any(unicodedata.category(letter) in _CONTROLS for letter in str(path)):
            raise UsageError(
                f"output {str(path)!r} has a control character; results are printed one per line.",
                hint=self.another,
            )
        try:
            info = path.lstat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {error.strerror}.", hint=self.another
            ) from None
        if output.folder and stat.S_ISLNK(info.st_mode):
            with suppress(OSError):
                info = path.stat()  # files go into the folder, so the link stays
        return info.st_mode


def check_length(path: Path) -> None:
    """Raise UsageError for a name that is too long for any disk."""
    if (length := len(os.fsencode(path.name))) > LONGEST_NAME:
        raise UsageError(
            f"output name {path.name[:40]}… has {length} bytes; the limit is {LONGEST_NAME}.",
            hint="use a shorter name, or cut the prompt: {prompt:40}.mp4",
        )


def _key(path: Path) -> str:
    """Equal for paths that may be the same file on some disk, ignoring case and links."""
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def _places(path: Path) -> set[str]:
    """Device and inode of an existing file; empty if there is none."""
    try:
        info = path.stat()
    except OSError:
        return set()
    return {f"{info.st_dev}:{info.st_ino}"}


def _inside(key: str, *, of: str) -> bool:
    return key.startswith(f"{of}{os.sep}")


def _acquire(lock: FolderLock, outputs: Mapping[str, OutputFile]) -> None:
    """Lock the names of all outputs in one folder. Raises UsageError."""
    try:
        lock.acquire(*outputs)
    except NameLocked as holder:
        stop = f", or stop it: kill {holder.other}" if holder.other else ""
        raise UsageError(
            f"{outputs[holder.name].path} is being written by {holder}.", hint=f"wait for it{stop}"
        ) from None


def _remove_parts(folders: Mapping[Path, Mapping[str, OutputFile]]) -> None:
    """Remove the parts of outputs whose names are locked, by folder."""
    for folder, outputs in folders.items():
        remove_parts(folder, {output.real.name for output in outputs.values()})
        for output in outputs.values():
            if output.folder:
                remove_parts(output.path)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the deepest first, up to one that holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _try(folder: Path, output: OutputFile) -> None:
    """Create a folder and write to it, since mode bits say nothing for root or read-only disks.

    Raises OutputError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write {output.path}: {error.strerror}.",
            hint="choose another folder, or free some space",
        ) from error
