"""What one call writes: checked before anything loads, and kept from other processes to the end.

No file is replaced that wancli did not make, unless `--overwrite` says so for that very file; what
is no regular file never is; two outputs are never one file, nor is an output an input.
"""

import os
import stat
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from wancli.errors import OutputError, UsageError
from wancli.utils.files import LONGEST_NAME, cut_name, kind_of, remove_parts
from wancli.utils.interrupts import tidied
from wancli.utils.locks import FolderLock, NameLocked

PREVIEW_MARK = ("Software", "wancli --preview-every")  # key and text inside such a picture
Ours = Callable[[Path], bool]  # whether a file, or a folder, is one that wancli made for this


def sidecar(video: Path) -> Path:
    """Where the record of a video, or of latents, is."""
    return video.with_suffix(".json")


def preview_file(video: Path) -> Path:
    """Where a picture of a video is while it is made."""
    return _named_after(video, ".preview.png")


def stream_part(video: Path) -> Path:
    """Where a rollout can be watched while it grows."""
    return _named_after(video, ".part.mp4")


def _named_after(video: Path, suffix: str) -> Path:
    return video.with_name(cut_name(video.stem, LONGEST_NAME - len(suffix)) + suffix)


def nobodys(_path: Path) -> bool:
    """Not."""
    return False


@dataclass(frozen=True)
class OutputFile:
    """A file, or a folder, that a call writes."""

    path: Path
    role: str  # the flag that names it, or what it is to the file it comes beside
    ours: Ours = nobodys  # what is known to be wancli's own is replaced unasked
    named: bool = True  # by the user, so that --overwrite is said of it
    folder: bool = False


@dataclass
class OutputSet:
    """All that a call writes and reads; `held` checks it, and keeps its names from others."""

    overwrite: bool = False
    reads: Iterable[Path] = ()
    another: str = "another --output"  # the hint where a name will not do
    _all: dict[str, OutputFile] = field(default_factory=dict)  # by their keys
    _folders: dict[str, OutputFile] = field(default_factory=dict)
    _found: dict[str, OutputFile] = field(default_factory=dict)  # those that are there, by place
    _replaced: set[Path] = field(default_factory=set)

    def add(self, *outputs: OutputFile) -> None:
        """More of them. Raises UsageError where one is a file that is among them already."""
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
            self._found |= dict.fromkeys(places, output)

    def _other(self, key: str, places: set[str], output: OutputFile) -> OutputFile | None:
        """What is the same file, or lies in the same folder of files."""
        same = [self._all.get(key), *map(self._found.get, places)]
        folders = self._all if output.folder else self._folders
        same += [o for k, o in folders.items() if _inside(k, of=key) or _inside(key, of=k)]
        return next(filter(None, same), None)

    @property
    def replaced(self) -> frozenset[Path]:
        """The paths at which what is there may be replaced; once they are checked."""
        return frozenset(self._replaced)

    def check(self) -> None:
        """Raise UsageError for what must not be written, OutputError for what cannot be."""
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
    def held(self) -> Iterator[None]:
        """Keep all names from other processes. Raises UsageError, OutputError.

        Folders are made, and removed again where nothing was written; what killed processes left of
        these files is removed.
        """
        self.check()  # before anything is made
        with ExitStack() as stack:
            for folder, output in {o.path.parent: o for o in self._all.values()}.items():
                missing = [f for f in (folder, *folder.parents) if not f.exists()]
                stack.callback(_remove_empty, missing)
                _try(folder, output)
            folders: dict[Path, FolderLock] = {}
            for key, output in self._all.items():
                folder = _real(output).parent
                if folder not in folders:
                    folders[folder] = FolderLock(folder)
                    stack.enter_context(tidied(folders[folder].release))
                try:
                    folders[folder].take(Path(key).name)
                except NameLocked as held:
                    stop = f", or stop it: kill {held.pid}" if held.pid else ""
                    raise UsageError(
                        f"{output.path} is being written by {held}.", hint=f"wait for it{stop}"
                    ) from None
            self.check()  # again: what wrote one of them may have ended between the two
            self._remove_parts(folders)  # of killed processes
            try:
                yield
            finally:
                self._remove_parts(folders)  # of what a signal has cut between two of its lines

    def _remove_parts(self, folders: Mapping[Path, FolderLock]) -> None:
        finals = [_real(output) for output in self._all.values()]
        for folder, lock in folders.items():
            if lock.works:
                remove_parts(folder, {path.name for path in finals if path.parent == folder})
                for path in (o.path for o in self._all.values() if o.folder):
                    remove_parts(path)

    def _check(self, output: OutputFile) -> None:
        path = output.path
        if output.named and self.overwrite:
            self._replaced.add(path)
        mode = self._look_at(output)
        if mode is None:
            return
        wanted = stat.S_ISDIR if output.folder else stat.S_ISREG
        if not wanted(mode):
            raise UsageError(f"{path} is {kind_of(mode)}, and stays.", hint=self.another)
        if output.ours(path):
            self._replaced.add(path)
        elif not output.named:
            raise UsageError(
                f"{path} exists and is not {output.role}; it would be overwritten.",
                hint=self.another,
            )
        elif not self.overwrite:
            raise UsageError(f"{path} exists.", hint=f"--overwrite, or {self.another}")

    def _look_at(self, output: OutputFile) -> int | None:
        """The mode of what is there, if anything. Raises UsageError, OutputError."""
        path = output.path
        if (length := len(os.fsencode(path.name))) > LONGEST_NAME:
            raise UsageError(
                f"output name {path.name[:40]}… has {length} bytes; {LONGEST_NAME} may be used.",
                hint="use a shorter name, or cut the prompt: {prompt:40}.mp4",
            )
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}", hint=self.another) from None
        if output.folder and stat.S_ISLNK(found.st_mode):
            with suppress(OSError):
                found = path.stat()  # nothing takes a folder's place: files go into it
        return found.st_mode


def _key(path: Path) -> str:
    """Equal for names that are one file on some disk: of any case, by any way."""
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def _places(path: Path) -> set[str]:
    """Where on the disk a file is; nowhere if there is none."""
    try:
        found = path.stat()
    except OSError:
        return set()
    return {f"{found.st_dev}:{found.st_ino}"}


def _real(output: OutputFile) -> Path:
    """The file itself, whatever links lead to it."""
    return Path(os.path.realpath(output.path))


def _inside(key: str, *, of: str) -> bool:
    return key.startswith(f"{of}{os.sep}")


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the deepest first, up to one that holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _try(folder: Path, output: OutputFile) -> None:
    """Make a folder, and try it: mode bits mean nothing to root, and to disks that are read-only.

    Raises OutputError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write {output.path}: {error.strerror}",
            hint="use another place, or free some space",
        ) from error
