"""The folders of a case, with files of a user that must survive it."""

import hashlib
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Files of a user with names similar to wancli's own. Their content is their name.
USER_FILES = (
    "notes.txt", "mine.mp4", "mine.json", "mine.safetensors", "mine.html", "mine.toml", "mine.gif",
    "mine.webp", "mine.png", "mine.preview.png", "mine.latents.safetensors", "mine.part.mp4",
    ".mine.mp4.part", "mine.rollout/notes.txt", "mine.part/notes.txt", "new.part.mp4",
    ".new.mp4.part", "new.part", "new.preview.png", "new.latents.safetensors", ".new.json.part",
    "bench.part/notes.txt", "folder/notes.txt", "new-2.part/videos/notes.txt",
)  # fmt: skip
LINKS = {"link.mp4": "notes.txt", "link.json": "notes.txt", "dangling.mp4": "nowhere"}
FIFOS = ("fifo.mp4", "fifo.safetensors", "fifo.png", "fifo.toml", "fifo.json", "fifo.pt")


@dataclass(frozen=True)
class FileState:
    """State of one file."""

    kind: int
    digest: str
    inode: int


Listing = dict[str, FileState]


@dataclass
class Place:
    """The command runs in work/; home/ and tmp/ are the user's; output/ takes what it prints."""

    root: Path
    materials: Path
    copied: list[str] = field(default_factory=list)  # materials copied into work/

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True)
        for folder in (self.work, self.home, self.tmp, self.output):
            folder.mkdir()
        for name in USER_FILES:
            path = self.work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"mine": 1}' if name == "mine.json" else name)
        for name, target in LINKS.items():
            (self.work / name).symlink_to(target)
        for name in FIFOS:
            os.mkfifo(self.work / name)

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def output(self) -> Path:
        return self.root / "output"

    def copy_in(self, *names: str) -> None:
        """Copy materials into work/."""
        for name in names:
            source, target = self.materials / name, self.work / name
            if source.is_symlink():
                target.symlink_to(source.resolve())
            elif source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target)
            self.copied.append(name)

    def snapshot(self) -> Listing:
        """State of everything in work/, home/ and tmp/, by path relative to the root."""
        return {
            str(path.relative_to(self.root)): state
            for part in (self.work, self.home, self.tmp)
            for path, state in _walk(part)
        }

    def remove(self) -> None:
        for path in self.root.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(self.root, ignore_errors=True)


def _walk(folder: Path) -> Iterator[tuple[Path, FileState]]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path, info = Path(entry.path), entry.stat(follow_symlinks=False)
        kind = stat.S_IFMT(info.st_mode)
        if kind == stat.S_IFREG:
            digest = hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()
        else:
            digest = str(path.readlink()) if kind == stat.S_IFLNK else ""
        yield path, FileState(kind, digest, info.st_ino)
        if kind == stat.S_IFDIR:
            yield from _walk(path)


def added(before: Listing, after: Listing) -> list[str]:
    """Files that did not exist before."""
    return [name for name in after if name not in before]


def damaged(before: Listing, after: Listing, *, may: Collection[str] = ()) -> list[tuple[str, str]]:
    """(name, "lost" or "replaced") of changed files, except those that may be replaced."""
    damages = []
    for name, state in before.items():
        if name not in after:
            damages.append((name, "lost"))
        elif name not in may and after[name] != state and state.kind != stat.S_IFDIR:
            damages.append((name, "replaced"))
    return damages
