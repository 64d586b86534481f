"""The folders a case works in: with files of a user's, which must outlive it."""

import hashlib
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Files of a user's whose names are near those that wancli makes. Content is their own name.
MINE = (
    "notes.txt", "mine.mp4", "mine.json", "mine.safetensors", "mine.html", "mine.toml", "mine.gif",
    "mine.webp", "mine.png", "mine.preview.png", "mine.latents.safetensors", "mine.part.mp4",
    ".mine.mp4.part", "mine.rollout/notes.txt", "mine.part/notes.txt", "new.part.mp4",
    ".new.mp4.part", "new.part", "new.preview.png", "new.latents.safetensors", ".new.json.part",
    "bench.part/notes.txt", "folder/notes.txt", "new-2.part/videos/notes.txt",
)  # fmt: skip
LINKS = {"link.mp4": "notes.txt", "link.json": "notes.txt", "dangling.mp4": "nowhere"}
FIFOS = ("fifo.mp4", "fifo.safetensors", "fifo.png", "fifo.toml", "fifo.json", "fifo.pt")


@dataclass(frozen=True)
class Seen:
    """One file, as it is there."""

    kind: int
    digest: str
    inode: int


Listing = dict[str, Seen]


@dataclass
class Place:
    """work/ is where the command runs; home/ and tmp/ are the user's; said/ what it says."""

    root: Path
    materials: Path
    taken: list[str] = field(default_factory=list)  # materials that were copied into work/

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True)
        for folder in (self.work, self.home, self.tmp, self.said):
            folder.mkdir()
        for name in MINE:
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
    def said(self) -> Path:
        return self.root / "said"

    def take(self, *names: str) -> None:
        """Copy materials into work/."""
        for name in names:
            source, target = self.materials / name, self.work / name
            if source.is_symlink():
                target.symlink_to(source.resolve())
            elif source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target)
            self.taken.append(name)

    def look(self) -> Listing:
        """Everything in work/, home/ and tmp/, by its path from the root."""
        return {
            str(path.relative_to(self.root)): seen
            for part in (self.work, self.home, self.tmp)
            for path, seen in _walk(part)
        }

    def remove(self) -> None:
        for path in self.root.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(self.root, ignore_errors=True)


def _walk(folder: Path) -> Iterator[tuple[Path, Seen]]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path, found = Path(entry.path), entry.stat(follow_symlinks=False)
        kind = stat.S_IFMT(found.st_mode)
        if kind == stat.S_IFREG:
            digest = hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()
        else:
            digest = str(path.readlink()) if kind == stat.S_IFLNK else ""
        yield path, Seen(kind, digest, found.st_ino)
        if kind == stat.S_IFDIR:
            yield from _walk(path)


def added(before: Listing, after: Listing) -> list[str]:
    """What was not there before."""
    return [name for name in after if name not in before]


def harmed(before: Listing, after: Listing, *, may: Collection[str] = ()) -> list[tuple[str, str]]:
    """(name, lost or replaced) of what is not as it was, but for what may be replaced."""
    found = []
    for name, seen in before.items():
        if name not in after:
            found.append((name, "lost"))
        elif name not in may and after[name] != seen and seen.kind != stat.S_IFDIR:
            found.append((name, "replaced"))
    return found
