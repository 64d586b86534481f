"""The files of a running rollout: a kill at any time loses the chunk that is being denoised.

Beside the loop (on CUDA) also those that wait to be saved: two at most, while a disk is slow.

NAME.rollout/ holds `rollout.json` (the request) and the clean latents of every chunk, one
safetensors file each: `given.safetensors`, `chunk-000000.safetensors`, ... They alone determine
the KV cache and the VAE's state. `chunks.jsonl` has a digest of each of these files, so that no
other file passes for one of them. `times.jsonl` has the timings of the last run.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.errors import OutputError
from wancli.records.record import ROLLOUT_FILE, ROLLOUT_SCHEMA
from wancli.utils.files import remove, write_whole
from wancli.utils.reading import open_file, parse_json

if TYPE_CHECKING:  # it is asked what it holds before torch is imported
    import torch
    from torch import Tensor

CONTEXT = "given"  # the name of the initial context's latents
_CHUNK = re.compile(r"chunk-([0-9]{6,18})\.safetensors")
DIGESTS_FILE = "chunks.jsonl"
TIMES_FILE = "times.jsonl"
HINT = "free some space, then run the same command with `resume`"


class RolloutStore:
    """The folder of one rollout. Append-only, except for chunks that are redone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digests: dict[str, str] = {}  # by name, as last read
        self._digests_size = 0  # of the file when last read

    def write_request(self, request: Mapping[str, Any]) -> None:
        """Write the request atomically. Raises OutputError."""
        text = (
            json.dumps({"schema": ROLLOUT_SCHEMA, **request}, indent=2, ensure_ascii=False) + "\n"
        )
        self._put(ROLLOUT_FILE, text.encode())

    def save(self, name: str, latents: "Tensor") -> None:
        """Save clean latents [1, C, n, H, W], synced to disk on return. Raises OutputError."""
        from safetensors.torch import save

        frames = latents[0].transpose(0, 1).float().cpu().contiguous()
        content = save({"latents": frames})
        self._add_digest(name, content)  # first: a kill leaves no latents without a digest
        self._put(f"{name}.safetensors", content)

    def load(self, name: str, device: "torch.device | None" = None) -> "Tensor | None":
        """Clean latents [1, C, n, H, W] on `device`; None if missing or not as saved."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            content = self._read(name)
            frames = load(content)["latents"]
        except (OSError, SafetensorError, KeyError):
            return None
        digests = self._read_digests()
        if digests and digests.get(name) != hashlib.sha256(content).hexdigest():
            return None
        real = frames.ndim == 4 and frames.dtype == torch.float32
        sound = real and bool(torch.isfinite(frames).all())
        return frames.transpose(0, 1)[None].to(device or "cpu") if sound else None

    def chunk(self, number: int) -> "Tensor":
        """Clean latents [1, C, n, H, W] of a finished chunk. Raises OutputError."""
        latents = self.load(chunk_name(number))
        if latents is None:
            raise OutputError(f"chunk {number} is gone from {self.folder}.", hint="render it again")
        return latents

    def add_digests(self, chunks: int) -> bool:
        """Add digests for chunks of an earlier version, which had none; whether there were any."""
        if self._read_digests():
            return False
        for name in (CONTEXT, *map(chunk_name, range(chunks))):
            with suppress(FileNotFoundError):
                self._add_digest(name, self._read(name))
        return chunks > 0

    def holds(self, chunks: int) -> bool:
        """Whether the request and the first `chunks` chunks still exist."""
        names = (f"{chunk_name(number)}.safetensors" for number in range(chunks))
        return all((self.folder / name).exists() for name in (ROLLOUT_FILE, *names))

    def sound_chunks(self) -> int:
        """Number of intact chunks from the first, without a gap."""
        count = 0
        while self.load(chunk_name(count)) is not None:
            count += 1
        return count

    def undamaged_chunks(self) -> int:
        """Number of chunks from the first, without a gap, whose files have their digests."""
        digests, count = self._read_digests(), 0
        with suppress(OSError):
            while (name := chunk_name(count)) in digests:
                if hashlib.sha256(self._read(name)).hexdigest() != digests[name]:
                    break
                count += 1
        return count

    def chunks(self) -> list[int]:
        """Numbers of all chunks that have a file, damaged or not."""
        return sorted(int(path.stem[6:]) for path in _chunk_files(self.folder))

    def set_aside(self, first: int) -> Path | None:
        """Move chunks from `first` on to a folder, which is returned. Raises OutputError."""
        moved = [number for number in self.chunks() if number >= first]
        if not moved:
            return None
        aside = next(
            path
            for number in range(10_000)
            if not (path := self.folder / f"replaced-{number}").exists()
        )
        try:
            aside.mkdir()
            for number in reversed(moved):  # wherever this stops, the rest has no gap
                name = f"{chunk_name(number)}.safetensors"
                (self.folder / name).replace(aside / name)
        except OSError as error:
            raise OutputError(f"cannot write {self.folder}: {error.strerror}.", hint=HINT) from None
        return aside

    def remove_if_empty(self) -> None:
        """Remove the folder if it has no chunk."""
        if not self.chunks():
            self.clear()
            for name in (ROLLOUT_FILE, TIMES_FILE):
                remove(self.folder / name)
            with suppress(OSError):  # it holds a file of somebody else
                self.folder.rmdir()

    def clear(self) -> None:
        """Delete the files of an earlier rollout, and nothing else."""
        remove(self.folder / f"{CONTEXT}.safetensors")
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

    def _read_digests(self) -> dict[str, str]:
        """The last digest of each name; lines cut short by a kill are ignored."""
        path = self.folder / DIGESTS_FILE
        size = path.stat().st_size if path.is_file() else 0
        if size != self._digests_size:
            self._digests, self._digests_size = {}, size
            with open_file(path) as file:
                lines = file.read().decode(errors="replace").splitlines()
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):
                    entry = parse_json(line)
                    self._digests[entry["name"]] = entry["sha256"]
        return self._digests

    def _add_digest(self, name: str, content: bytes) -> None:
        """Append the digest of a file, synced to disk on return. Raises OutputError."""
        line = json.dumps({"name": name, "sha256": hashlib.sha256(content).hexdigest()}) + "\n"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            with os.fdopen(os.open(self.folder / DIGESTS_FILE, flags, 0o666), "ab") as file:
                # Begin a new line, whatever a kill left of the one before.
                file.write((b"\n" if file.tell() else b"") + line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.folder}: {error.strerror}.", hint=HINT) from None

    def _put(self, name: str, content: bytes) -> None:
        write_whole(self.folder / name, content, hint=HINT, overwrite=True, sync=True)


class NoStore:
    """Stands in for the folder of a rollout that writes no files: nothing is kept or resumed."""

    folder = None

    def load(self, name: str, device: "torch.device | None" = None) -> None:
        """None: nothing was saved."""

    def save(self, name: str, latents: "Tensor") -> None:
        """Save nothing."""

    def chunk(self, number: int) -> "Tensor":
        """Raises OutputError."""
        raise OutputError(f"chunk {number} was not saved.", hint="`output NAME.mp4`")

    def chunks(self) -> list[int]:
        """None are saved."""
        return []

    def holds(self, chunks: int) -> bool:
        """True: none can be lost."""
        return True

    def remove_if_empty(self) -> None:
        """Remove nothing."""


Store = RolloutStore | NoStore


def _chunk_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("chunk-*.safetensors") if _CHUNK.fullmatch(path.name)]


def chunk_name(number: int) -> str:
    """Name of a chunk's latents."""
    return f"chunk-{number:06}"
