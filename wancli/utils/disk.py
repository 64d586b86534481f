"""Free disk space and existing folders."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import platformdirs


def free_disk(path: Path) -> int:
    """Bytes free where `path` is, or would be made."""
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):  # of a folder that may not be searched: it is as good as not there
            if folder.exists():
                return folder
    return Path("/")


def user_cache() -> Path:
    """Where wancli keeps what it measured."""
    given = os.environ.get("WANCLI_CACHE_DIR")
    return Path(given) if given else platformdirs.user_cache_path("wancli")
