"""Free disk space and existing folders."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import platformdirs

from wancli.utils.reading import user_path


def free_disk(path: Path) -> int:
    """Free bytes on the disk of `path`, which may not exist yet."""
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """The path, or its nearest existing parent."""
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):  # an unsearchable folder counts as missing
            if folder.exists():
                return folder
    return Path("/")


def user_cache() -> Path:
    """Folder of wancli's measurements."""
    folder = os.environ.get("WANCLI_CACHE_DIR")
    return user_path(folder) if folder else platformdirs.user_cache_path("wancli")
