"""Which hub models are on this disk, read from the cache's folders: no library, so it is instant.

The layout is huggingface_hub's: models--OWNER--NAME with refs/main (a commit), snapshots/COMMIT
(links, one per file) and blobs (what they point to).
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from wancli.errors import ModelError
from wancli.utils.reading import read_text, user_path

_PREFIX = "models--"
_REVISION = re.compile(r"\w[\w.-]{0,127}", re.ASCII)  # the name of a folder, and of no other


@dataclass(frozen=True)
class Cached:
    """A hub model on this disk; `folder` holds its files, `bytes` counts all of its revisions."""

    repo: str
    revision: str
    folder: Path
    bytes: int


def cache_folder() -> Path:
    """Where the hub's files are, as huggingface_hub finds it."""
    given = os.environ.get
    home = given("HF_HOME") or str(Path(given("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    legacy = given("HUGGINGFACE_HUB_CACHE", str(Path(home) / "hub"))
    return user_path(os.path.expandvars(given("HF_HUB_CACHE", legacy)))


def repo_folder(repo: str) -> Path:
    """Where the files of one hub model are, if they are here at all."""
    return cache_folder() / f"{_PREFIX}{repo.replace('/', '--')}"


def cached_revision(repo: str) -> str:
    """The commit that `main` was when it was downloaded; "" where there is none."""
    try:
        revision = read_text(repo_folder(repo) / "refs" / "main").strip()
    except (OSError, ValueError):
        return ""
    return revision if _REVISION.fullmatch(revision) else ""


def find_cached(repo: str) -> Cached | None:
    """The hub model as it is on this disk; None where it is not."""
    folder, revision = repo_folder(repo), cached_revision(repo)
    snapshot = folder / "snapshots" / revision
    if not revision or not snapshot.is_dir():
        return None
    return Cached(repo, revision, snapshot, cached_bytes(repo))


def cached_repos() -> list[str]:
    """Every OWNER/NAME of which there is something on this disk."""
    folders = [f for f in cache_folder().glob(f"{_PREFIX}*") if f.is_dir()]
    names = [f.name.removeprefix(_PREFIX).split("--") for f in folders]
    return sorted("/".join(name) for name in names if len(name) == 2)


def cached_bytes(repo: str) -> int:
    """What it takes of the disk, with all of its revisions and what has arrived of others.

    Links lead to blobs, and where there are no links there are no blobs.
    """
    folder = repo_folder(repo)
    paths = [path for part in ("blobs", "snapshots") for path in (folder / part).rglob("*")]
    return sum(path.stat().st_size for path in paths if path.is_file() and not path.is_symlink())


def is_offline() -> bool:
    """Whether huggingface_hub is told not to ask the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no")


def check_reachable(repo: str) -> None:
    """Raise ModelError where a model of the hub is not on this disk, and must not be asked for.

    Of a model that is not of the hub `repo` is "".
    """
    if repo and is_offline() and not cached_revision(repo):
        raise unreachable(repo)


def unreachable(model: str, *, how: str = "") -> ModelError:
    """The error for a model that is not on this disk, or not `how`, and cannot come."""
    offline = is_offline()
    why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    first = "unset HF_HUB_OFFLINE" if offline else "connect"
    return ModelError(
        f"model '{model}' is not{how} cached and {why}.",
        hint=f"{first}, then: wancli model pull {model}",
    )


def absent(model: str, *, hint: str = "") -> ModelError:
    """The error for a model of the hub that is not on this disk."""
    return ModelError(
        f"model '{model}' is not on this machine.", hint=hint or f"wancli model pull {model}"
    )
