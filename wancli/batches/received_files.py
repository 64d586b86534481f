"""Files of a video that another machine sends in pieces."""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

from wancli.batches.remote_maker import FilePiece
from wancli.batches.worker import JobOutcome
from wancli.errors import OVERWRITE_HINT, OutputError
from wancli.planning.existing import record_in
from wancli.utils.files import part_name, place


class ReceivedFiles:
    """The files of one job, as they arrive. They appear whole, the video first."""

    def __init__(self, replaced: Collection[Path] = ()) -> None:
        """`replaced` are existing files that may be replaced, and folders in which all may."""
        self._replaced = frozenset(replaced)
        self._parts: dict[Path, Path] = {}  # by where they belong
        self._open: tuple[IO[bytes], Any] | None = None  # and its digest so far

    def write(self, piece: FilePiece) -> None:
        """Append a piece. Raises OutputError if it cannot be written, or is damaged."""
        try:
            if self._open is None:
                piece.path.parent.mkdir(parents=True, exist_ok=True)
                self._parts[piece.path] = part_name(piece.path)
                self._open = self._parts[piece.path].open("xb"), hashlib.sha256()
            file, digest = self._open
            file.write(piece.data)
            digest.update(piece.data)
            if piece.digest:
                file.close()
                self._open = None
                if digest.hexdigest() != piece.digest:
                    raise OutputError(f"{piece.path} arrived damaged.", hint="`retries 1`")
        except OSError as error:
            raise OutputError(
                f"cannot write {piece.path}: {error.strerror}.", hint="free some space"
            ) from None

    def place(self, outcome: JobOutcome) -> JobOutcome:
        """Give all files their names; a video of the same job is kept. Raises OutputError."""
        job = outcome.job
        try:
            for final in sorted(self._parts, key=lambda path: path != job.output):
                overwrite = not self._replaced.isdisjoint((final, *final.parents))
                place(self._parts[final], final, overwrite=overwrite)
                del self._parts[final]
        except FileExistsError:
            there = record_in(job.output) if final == job.output else None
            if there and there["hash"] == (outcome.record or {}).get("hash"):
                return JobOutcome(job, record=there, kept=True)
            raise OutputError(f"{final} exists.", hint=OVERWRITE_HINT) from None
        except OSError as error:
            raise OutputError(
                f"cannot write {job.output}: {error.strerror}.", hint="free some space"
            ) from None
        return outcome

    def drop(self) -> None:
        """Remove what was not placed."""
        if self._open:
            self._open[0].close()
        for part in self._parts.values():
            part.unlink(missing_ok=True)
