"""Files that are whole under their name, or are not there."""

import os
from contextlib import suppress
from pathlib import Path

from wancli.errors import OutputError
from wancli.interrupts import unwind_from_here


def write_whole(path: Path, content: bytes, *, hint: str, sync: bool = False) -> None:
    """Write beside `path`, then rename; folders are made. Raises OutputError with `hint`.

    With `sync` the content is on the disk, and not only on its way, when this returns.
    """
    # ".part" must fit as well: a name may have 255 bytes.
    unwind_from_here()
    part = path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:240])}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}.", hint=hint) from None
    finally:
        with suppress(OSError):  # a disk that broke must not hide how
            part.unlink()
