"""What a rollout keeps on the disk while it runs, so that any kill loses one chunk at most.

NAME.rollout/ holds `rollout.json` (the request) and the clean latents of every chunk, a safetensors
file each: `given.safetensors`, `chunk-000000.safetensors`, ... A rollout's keys and values, and the
VAE's state, follow from these alone. `chunks.jsonl` has a digest of each of these files, so that no
other is taken for one of them. `times.jsonl` says where the time of the last run went.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from wancli.errors import OutputError
from wancli.records.record import ROLLOUT_FILE, ROLLOUT_SCHEMA
from wancli.utils.files import remove, write_whole
from wancli.utils.reading import open_file, parse_json

GIVEN = "given"
_CHUNK = re.compile(r"chunk-([0-9]{6,18})\.safetensors")
DIGESTS_FILE = "chunks.jsonl"
TIMES_FILE = "times.jsonl"
HINT = "free some space, then run the same command with --resume"


class RolloutStore:
    """The folder of one rollout. Append-only, but for chunks that are to be made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digests: dict[str, str] = {}  # by name, as they were read
        self._digests_size = 0  # of their file then

    def write_request(self, told: Mapping[str, Any]) -> None:
        """Whole or not at all. Raises OutputError."""
        text = json.dumps({"schema": ROLLOUT_SCHEMA, **told}, indent=2, ensure_ascii=False) + "\n"
        self._put(ROLLOUT_FILE, text.encode())

    def save(self, name: str, latents: Tensor) -> None:
        """Keep clean latents [1, C, n, H, W], on the disk when this returns. Raises OutputError."""
        frames = latents[0].transpose(0, 1).float().cpu().contiguous()
        content = save({"latents": frames})
        self._note(name, content)  # first: no kill leaves latents that nothing vouches for
        self._put(f"{name}.safetensors", content)

    def load(self, name: str, device: torch.device | None = None) -> Tensor | None:
        """Clean latents [1, C, n, H, W] on `device`; None where they are not as they were saved."""
        try:
            content = self._read(name)
            frames = load(content)["latents"]
        except (OSError, SafetensorError, KeyError):
            return None
        digests = self._known_digests()
        if digests and digests.get(name) != hashlib.sha256(content).hexdigest():
            return None
        real = frames.ndim == 4 and frames.dtype == torch.float32
        sound = real and bool(torch.isfinite(frames).all())
        return frames.transpose(0, 1)[None].to(device or "cpu") if sound else None

    def chunk(self, number: int) -> Tensor:
        """Clean latents [1, C, n, H, W] of a chunk that was made. Raises OutputError."""
        latents = self.load(chunk_name(number))
        if latents is None:
            raise OutputError(f"chunk {number} is gone from {self.folder}.", hint="make it again")
        return latents

    def vouch(self, chunks: int) -> bool:
        """Take what an earlier version saved, which kept no digests, as it is; whether any was."""
        if self._known_digests():
            return False
        for name in (GIVEN, *map(chunk_name, range(chunks))):
            with suppress(FileNotFoundError):
                self._note(name, self._read(name))
        return chunks > 0

    def holds(self, chunks: int) -> bool:
        """Whether the request and so many chunks are still there, and nobody deleted them."""
        names = (f"{chunk_name(number)}.safetensors" for number in range(chunks))
        return all((self.folder / name).exists() for name in (ROLLOUT_FILE, *names))

    def sound_chunks(self) -> int:
        """How many chunks there are from the first, whole and without a gap."""
        count = 0
        while self.load(chunk_name(count)) is not None:
            count += 1
        return count

    def chunks(self) -> list[int]:
        """The numbers of all chunks there are files of, damaged or not."""
        return sorted(int(path.stem[6:]) for path in _chunk_files(self.folder))

    def drop_from(self, first: int) -> Path | None:
        """Set chunks aside, from `first` on; says where. They are not deleted."""
        dropped = [number for number in self.chunks() if number >= first]
        if not dropped:
            return None
        aside = next(
            path
            for number in range(10_000)
            if not (path := self.folder / f"replaced-{number}").exists()
        )
        try:
            aside.mkdir()
            for number in reversed(dropped):  # whenever this stops, what is left has no gap
                name = f"{chunk_name(number)}.safetensors"
                (self.folder / name).replace(aside / name)
        except OSError as error:
            raise OutputError(f"cannot write {self.folder}: {error.strerror}.", hint=HINT) from None
        return aside

    def leave_nothing(self) -> None:
        """Remove the folder again where no chunk was made."""
        if not self.chunks():
            self.clear()
            for name in (ROLLOUT_FILE, TIMES_FILE):
                remove(self.folder / name)
            with suppress(OSError):  # somebody has put a file of theirs into it
                self.folder.rmdir()

    def clear(self) -> None:
        """Begin anew: what an earlier rollout left here is deleted, and nothing else."""
        remove(self.folder / f"{GIVEN}.safetensors")
        aside = [path for path in self.folder.glob("replaced-*") if path.name[9:].isdigit()]
        for folder in [self.folder, *aside]:
            for path in _chunk_files(folder):
                remove(path)
        for folder in aside:
            with suppress(OSError):
                folder.rmdir()
        remove(self.folder / DIGESTS_FILE)

    def _read(self, name: str) -> bytes:
        with open_file(self.folder / f"{name}.safetensors") as file:
            return file.read()

    def _known_digests(self) -> dict[str, str]:
        """By name, the last of each; a line that a kill has cut is none."""
        path = self.folder / DIGESTS_FILE
        size = path.stat().st_size if path.is_file() else 0
        if size != self._digests_size:
            self._digests, self._digests_size = {}, size
            with open_file(path) as file:
                lines = file.read().decode(errors="replace").splitlines()
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):
                    told = parse_json(line)
                    self._digests[told["name"]] = told["sha256"]
        return self._digests

    def _note(self, name: str, content: bytes) -> None:
        """Add the digest of latents, on the disk when this returns. Raises OutputError."""
        line = json.dumps({"name": name, "sha256": hashlib.sha256(content).hexdigest()}) + "\n"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            with os.fdopen(os.open(self.folder / DIGESTS_FILE, flags, 0o666), "ab") as file:
                # A line of its own, whatever a kill has left of the one before.
                file.write((b"\n" if file.tell() else b"") + line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.folder}: {error.strerror}.", hint=HINT) from None

    def _put(self, name: str, content: bytes) -> None:
        write_whole(self.folder / name, content, hint=HINT, overwrite=True, sync=True)


def _chunk_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("chunk-*.safetensors") if _CHUNK.fullmatch(path.name)]


def chunk_name(number: int) -> str:
    """The name of a chunk's latents."""
    return f"chunk-{number:06}"
