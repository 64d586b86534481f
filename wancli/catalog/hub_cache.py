"""Hub models on this disk, read from the cache folders without huggingface_hub, so instantly.

The layout is huggingface_hub's: models--OWNER--NAME with refs/main (a commit), snapshots/COMMIT
(links, one per file) and blobs (what they point to).
"""

import os
import re
import shlex
from contextlib import suppress
from pathlib import Path

from wancli.catalog.specs import converted_from, name_of
from wancli.errors import ModelError
from wancli.utils.reading import read_text, user_path

CONNECT_S = 4  # seconds in which a hub within reach accepts a connection
_PREFIX = "models--"
_FILE = re.compile(r"([\w.-]+/[\w.-]+):([^:]+)", re.ASCII)  # REPO:FILE
_REVISION = re.compile(r"\w[\w.-]{0,127}", re.ASCII)  # a single path component


def cache_folder() -> Path:
    """The hub cache, located as huggingface_hub does."""
    env = os.environ.get
    home = env("HF_HOME") or str(Path(env("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    legacy = env("HUGGINGFACE_HUB_CACHE", str(Path(home) / "hub"))
    return user_path(os.path.expandvars(env("HF_HUB_CACHE", legacy)))


def repo_folder(repo: str) -> Path:
    """Cache folder of a hub model, which may not exist."""
    return cache_folder() / f"{_PREFIX}{repo.replace('/', '--')}"


def cached_revision(repo: str) -> str:
    """The commit of `main` when it was downloaded, or ""."""
    try:
        revision = read_text(repo_folder(repo) / "refs" / "main").strip()
    except (OSError, ValueError):
        return ""
    return revision if _REVISION.fullmatch(revision) else ""


def find_cached(repo: str) -> Path | None:
    """Folder with the files of a hub model on this disk, or None."""
    revision = cached_revision(repo)
    snapshot = repo_folder(repo) / "snapshots" / revision
    return snapshot if revision and snapshot.is_dir() else None


def converted_folder(repo: str, name: str) -> Path:
    """Where a model lies that was converted from a checkpoint in `repo`; it may not exist."""
    return repo_folder(repo) / "converted" / name


def hub_file(name: str) -> tuple[str, str] | None:
    """The repository and file of a name, REPO:FILE; None for any other, and for a file's path."""
    match = _FILE.fullmatch(name)
    return (match[1], match[2]) if match and not user_path(name).exists() else None


def cached_file(repo: str, file: str) -> Path | None:
    """A single file of a repository on this disk, or None."""
    folder = find_cached(repo)
    return folder / file if folder and (folder / file).is_file() else None


def cached_repos() -> list[str]:
    """Every OWNER/NAME with files on this disk."""
    folders = [f for f in cache_folder().glob(f"{_PREFIX}*") if f.is_dir()]
    names = [f.name.removeprefix(_PREFIX).split("--") for f in folders]
    return sorted("/".join(name) for name in names if len(name) == 2)


def cached_bytes(repo: str) -> int:
    """Bytes on disk of all revisions, partial downloads and conversions included.

    Symbolic links point to blobs; without links there are no blobs.
    """
    folder, parts = repo_folder(repo), ("blobs", "snapshots", "converted")
    paths = [path for part in parts for path in (folder / part).rglob("*")]
    return sum(path.stat().st_size for path in paths if path.is_file() and not path.is_symlink())


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no")


def check_reachable(repo: str, file: str = "") -> None:
    """Raise ModelError for a hub model that is not cached while offline; `repo` may be "".

    With `file`, only that file of the repository is wanted.
    """
    if repo and not cached_revision(repo) and not hub_answers():
        raise unreachable(repo, file)


def hub_answers() -> bool:
    """Whether the hub, or the proxy in between, accepts a connection within `CONNECT_S`.

    huggingface_hub's client has no timeout: where a firewall drops packets it waits for minutes.
    """
    import socket  # here, since these take 20 ms that most commands do not need
    from threading import Event, Thread
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    if is_offline():
        return False
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxy = None if proxy_bypass(hub.hostname or "") else getproxies().get(hub.scheme)
    place = urlsplit(proxy) if proxy else hub
    address = (place.hostname or "", place.port or (443 if place.scheme == "https" else 80))
    answers = Event()

    def connect() -> None:
        with suppress(OSError), socket.create_connection(address, CONNECT_S):
            answers.set()

    attempt = Thread(target=connect, daemon=True)  # looking the name up may block, too
    attempt.start()
    attempt.join(CONNECT_S)
    return answers.is_set()


def pull_command(repo: str, file: str = "") -> str:
    """The command that downloads a model, or one file of its repository.

    For the checkpoint of a known model it is the one that converts it, too.
    """
    name = converted_from(repo, file) or (f"{repo}:{file}" if file else name_of(repo))
    return shlex.join(["wancli", "model", "pull", name])


def unreachable(repo: str, file: str = "", *, how: str = "") -> ModelError:
    """The error for a model, or a file, that is not (`how`) cached and cannot be downloaded."""
    offline = is_offline()
    why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    first = "unset HF_HUB_OFFLINE" if offline else "connect"
    what = f"file '{file}' of '{repo}'" if file else f"model '{name_of(repo)}'"
    return ModelError(
        f"{what} is not{how} cached and {why}.",
        hint=f"{first}, then: {pull_command(repo, file)}",
    )


def absent(model: str, *, kind: str = "model", hint: str = "") -> ModelError:
    """The error for a model of the hub, or a file of a `kind`, that is not on this disk."""
    name = name_of(model)
    return ModelError(
        f"{kind} '{name}' is not on this machine.", hint=hint or f"wancli model pull {name}"
    )
