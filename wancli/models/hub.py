"""Models of the Hugging Face hub: downloaded, deleted, and what went wrong said in one line.

huggingface_hub does the work, and honours HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

import errno
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import scan_cache_dir, snapshot_download
from huggingface_hub.errors import (
    CacheNotFound,
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from tqdm import tqdm

from wancli.catalog.hub_cache import absent, cache_folder, repo_folder, unreachable
from wancli.errors import ModelError, OutputError, first_line
from wancli.utils.disk import existing, free_disk

# Not the same weights again as .bin or .pth; the text files are words of image processors' CLIP.
PATTERNS = ("*.json", "*.model", "*.safetensors", "*.txt")
_ELSEWHERE = "HF_HOME=/other/folder, one that can be written"
_STORAGE = {
    errno.ENOSPC: "free some space, or use another disk: HF_HOME=/other/disk",
    errno.ENOTDIR: _ELSEWHERE,
    errno.EACCES: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
}
Tell = Callable[[int], None]  # bytes that have arrived


def download(repo: str, tell: Tell | None = None) -> Path:
    """Its folder in the cache; files that are there already stay.

    Without `tell`, huggingface_hub draws its own bars. Raises ModelError, and OutputError for a
    full disk.
    """
    stop = Event()
    with explained(repo), ThreadPoolExecutor(1) as background:
        work = background.submit(
            snapshot_download,
            repo,
            allow_patterns=list(PATTERNS),
            cache_dir=cache_folder(),
            tqdm_class=_bars(tell, stop) if tell else None,
        )
        try:
            return Path(work.result())
        except BaseException:  # Ctrl-C: its threads would first finish their files, for minutes
            stop.set()
            raise


def bytes_to_download(repo: str) -> int | None:
    """What `download` would fetch; None where the hub does not say.

    Raises ModelError, also for a repository that holds no pipeline.
    """
    with explained(repo):
        try:
            files = snapshot_download(
                repo,
                allow_patterns=list(PATTERNS),
                cache_dir=cache_folder(),
                tqdm_class=_bars(lambda _: None, Event()),
                dry_run=True,
            )
        except DryRunError:
            return None  # offline, or refused: download() says which, or finds all of it here
    if not {"model_index.json", "transformer/config.json"} & {file.filename for file in files}:
        raise ModelError(
            f"model '{repo}' is no pipeline: it has no model_index.json.",
            hint="give a Wan model in diffusers' format; its name often ends in -Diffusers",
        )
    return sum(file.file_size or 0 for file in files if file.will_download)


def check_space(repo: str, needed: int) -> None:
    """Raise OutputError where the cache's disk has less than `needed` bytes left."""
    folder = cache_folder()
    free = free_disk(folder)
    if free < needed:
        raise OutputError(
            f"model '{repo}' needs {needed / 1e9:.1f} GB, and {existing(folder)} has "
            f"{free / 1e9:.1f} GB left.",
            hint=f"free {(needed - free) / 1e9:.1f} GB, or use another disk: HF_HOME=/other/disk",
        )


def delete(repo: str) -> int:
    """Delete every revision from the cache; the bytes it gave back. Raises ModelError."""
    try:
        cache = scan_cache_dir(cache_folder())
    except CacheNotFound:
        raise absent(repo) from None
    found = [r for r in cache.repos if r.repo_type == "model" and r.repo_id == repo]
    if not found:
        if repo_folder(repo).exists():
            raise ModelError(
                f"{repo_folder(repo)} is broken: huggingface_hub finds no model in it.",
                hint=f"rm -r {repo_folder(repo)}",
            )
        raise absent(repo)
    # Of this model alone: by a commit it finds any, and a copy of a repository has the same ones.
    alone = replace(cache, repos=frozenset(found))
    strategy = alone.delete_revisions(*(r.commit_hash for model in found for r in model.revisions))
    strategy.execute()
    if repo_folder(repo).exists():
        raise OutputError(f"cannot delete {repo_folder(repo)}.", hint="check its permissions")
    return int(strategy.expected_freed_size)


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    try:
        yield
    except GatedRepoError:
        raise ModelError(
            f"model '{where}' is gated.",
            hint=f"accept its terms at https://huggingface.co/{where}, then set HF_TOKEN",
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"model '{where}' is not on the hub, or is private.",
            hint="check the name; set HF_TOKEN",
        ) from None
    except LocalEntryNotFoundError as error:
        partly = isinstance(error, IncompleteSnapshotError)
        raise unreachable(where, how=" completely" if partly else "") from None
    except HfHubHTTPError as error:
        raise ModelError(f"the hub answered: {first_line(error)}", hint="try again later") from None
    except HTTPError as error:
        raise ModelError(
            f"the connection to the hub broke: {first_line(error)}",
            hint=f"whole files are kept: wancli model pull {where}",
        ) from None
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        raise OutputError(
            f"cannot write {cache_folder()}: {error.strerror}.", hint=_STORAGE[error.errno]
        ) from None


def _bars(tell: Tell, stop: Event) -> type[Any]:
    """huggingface_hub's progress bars, as calls of `tell` that fail once `stop` is set."""

    class Told(tqdm):  # type: ignore[misc]  # it has no types
        """A bar that is never drawn."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            """What the threads that download call for every piece."""
            if stop.is_set():
                raise InterruptedError("stopped")
            drawn: bool | None = super().update(n)
            return drawn

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            """Where tqdm would draw it."""
            if self.unit == "B":  # the others count files
                tell(int(self.n))
            return True

    return Told
