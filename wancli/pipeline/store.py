"""What a rollout keeps on the disk while it runs, so that any kill loses one chunk at most.

NAME.rollout/ holds `rollout.json` (the request) and the clean latents of every chunk, a safetensors
file each: `given.safetensors`, `chunk-000000.safetensors`, ... A rollout's keys and values, and the
VAE's state, follow from these alone. `times.jsonl` says where the time of the last run went.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from wancli.errors import OutputError
from wancli.files import remove, write_whole
from wancli.records import ROLLOUT_FILE, ROLLOUT_SCHEMA

GIVEN = "given"
_CHUNK = re.compile(r"chunk-([0-9]{6,18})\.safetensors")
TIMES_FILE = "times.jsonl"
HINT = "free some space, then run the same command with --resume"


class RolloutStore:
    """The folder of one rollout. Append-only, but for chunks that are to be made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write_request(self, told: Mapping[str, Any]) -> None:
        """Whole or not at all. Raises OutputError."""
        text = json.dumps({"schema": ROLLOUT_SCHEMA, **told}, indent=2, ensure_ascii=False) + "\n"
        self._put(ROLLOUT_FILE, text.encode())

    def save(self, name: str, latents: Tensor) -> None:
        """Keep clean latents [1, C, n, H, W], on the disk when this returns. Raises OutputError."""
        frames = latents[0].transpose(0, 1).float().cpu().contiguous()
        self._put(f"{name}.safetensors", save({"latents": frames}))

    def load(self, name: str, device: torch.device | None = None) -> Tensor | None:
        """Clean latents [1, C, n, H, W] on `device`, or None where they are missing or damaged."""
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                frames = file.get_tensor("latents")
        except (OSError, SafetensorError):
            return None
        sound = frames.ndim == 4 and bool(torch.isfinite(frames).all())
        return frames.transpose(0, 1)[None].to(device or "cpu") if sound else None

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

    def _put(self, name: str, content: bytes) -> None:
        write_whole(self.folder / name, content, hint=HINT, overwrite=True, sync=True)


def _chunk_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("chunk-*.safetensors") if _CHUNK.fullmatch(path.name)]


def chunk_name(number: int) -> str:
    """The name of a chunk's latents."""
    return f"chunk-{number:06}"
