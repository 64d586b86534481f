"""Download and delete models of the Hugging Face hub, with errors of one line.

huggingface_hub honours HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

import errno
import glob
import io
from collections.abc import Collection, Iterator
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

from wancli.catalog.hub_cache import (
    absent,
    cache_folder,
    cached_bytes,
    hub_answers,
    pull_command,
    repo_folder,
    unreachable,
)
from wancli.catalog.specs import name_of
from wancli.errors import ModelError, OutputError, first_line
from wancli.models.warm import OnBytes
from wancli.utils.disk import existing, free_disk

# Not the duplicates in .bin or .pth; *.txt is the vocabulary of CLIP tokenizers.
PATTERNS = ("*.json", "*.model", "*.safetensors", "*.txt")
_ELSEWHERE = "HF_HOME=/other/folder, one that can be written"
_STORAGE = {
    errno.ENOSPC: "free some space, or use another disk: HF_HOME=/other/disk",
    errno.ENOTDIR: _ELSEWHERE,
    errno.EACCES: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
}


def download(
    repo: str, on_bytes: OnBytes | None = None, *, only: str = "", without: Collection[str] = ()
) -> Path:
    """Download what is missing of a model, or `only` one file; returns its folder in the cache.

    The weights of the parts `without` are not fetched. Without `on_bytes`, huggingface_hub draws
    its own bars. Raises ModelError, and OutputError for a full disk.
    """
    stop = Event()
    with hub_errors(repo, only), ThreadPoolExecutor(1) as background:
        work = background.submit(
            snapshot_download,
            repo,
            allow_patterns=_patterns(only),
            ignore_patterns=_weights_of(without),
            cache_dir=cache_folder(),
            local_files_only=not hub_answers(),
            tqdm_class=_bars(on_bytes, stop) if on_bytes else None,
        )
        try:
            return Path(work.result())
        except BaseException:  # Ctrl-C: its threads would finish their files first, for minutes
            stop.set()
            raise


def _weights_of(parts: Collection[str]) -> list[str]:
    return [f"{part}/*.safetensors" for part in parts]


def _patterns(only: str) -> list[str]:
    return [glob.escape(only)] if only else list(PATTERNS)


def bytes_to_download(repo: str, *, only: str = "", without: Collection[str] = ()) -> int | None:
    """The bytes that `download` would fetch; None if the hub does not say.

    Raises ModelError, also for a repository without a pipeline, or without the file `only`.
    """
    if not hub_answers():
        return None
    with hub_errors(repo, only):
        try:
            files = snapshot_download(
                repo,
                allow_patterns=_patterns(only),
                ignore_patterns=_weights_of(without),
                cache_dir=cache_folder(),
                tqdm_class=_bars(lambda _: None, Event()),
                dry_run=True,
            )
        except DryRunError:
            return None  # offline or refused: download() says which, or finds it all cached
    names = {file.filename for file in files}
    if only and only not in names:
        raise ModelError(
            f"'{repo}' has no file '{only}'.", hint=f"see https://huggingface.co/{repo}/tree/main"
        )
    if not only and not {"model_index.json", "transformer/config.json"} & names:
        raise ModelError(
            f"model '{name_of(repo)}' is not a pipeline: it has no model_index.json.",
            hint="give a Wan model in diffusers' format; its name often ends in -Diffusers",
        )
    return sum(file.file_size or 0 for file in files if file.will_download)


def check_space(repo: str, needed: int, *, only: str = "") -> None:
    """Raise OutputError if the disk of the cache has less than `needed` bytes free.

    They are for a model, or `only` one file.
    """
    folder = cache_folder()
    free = free_disk(folder)
    if free < needed:
        what = f"file '{repo}:{only}'" if only else f"model '{name_of(repo)}'"
        raise OutputError(
            f"{what} needs {needed / 1e9:.1f} GB; {existing(folder)} has {free / 1e9:.1f} GB free.",
            hint=f"free {(needed - free) / 1e9:.1f} GB, or use another disk: HF_HOME=/other/disk",
        )


def delete(repo: str) -> int:
    """Delete every revision from the cache, and return the bytes freed. Raises ModelError."""
    try:
        cache = scan_cache_dir(cache_folder())
    except CacheNotFound:
        raise absent(repo) from None
    cached = [r for r in cache.repos if r.repo_type == "model" and r.repo_id == repo]
    if not cached:
        if repo_folder(repo).exists():
            raise ModelError(
                f"{repo_folder(repo)} is broken: huggingface_hub finds no model in it.",
                hint=f"rm -r {repo_folder(repo)}",
            )
        raise absent(repo)
    # Of this model alone: revisions are looked up by commit, which a copy of a repository shares.
    alone = replace(cache, repos=frozenset(cached))
    size = cached_bytes(repo)
    alone.delete_revisions(*(r.commit_hash for model in cached for r in model.revisions)).execute()
    if repo_folder(repo).exists():
        raise OutputError(f"cannot delete {repo_folder(repo)}.", hint="check its permissions")
    return size


@contextmanager
def hub_errors(repo: str, file: str = "") -> Iterator[None]:
    """Turn errors of huggingface_hub into ModelError or OutputError with a hint.

    `file` is the only one of the repository that is wanted, if any.
    """
    name = name_of(repo)
    try:
        yield
    except GatedRepoError:
        raise ModelError(
            f"model '{name}' is gated.",
            hint=f"accept its terms at https://huggingface.co/{repo}, then set HF_TOKEN",
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"model '{name}' is not on the hub, or is private.",
            hint="check the name; set HF_TOKEN",
        ) from None
    except LocalEntryNotFoundError as error:
        partly = isinstance(error, IncompleteSnapshotError)
        raise unreachable(repo, file, how=" completely" if partly else "") from None
    except HfHubHTTPError as error:
        raise ModelError(f"the hub answered: {first_line(error)}", hint="try again later") from None
    except HTTPError as error:
        raise ModelError(
            f"the connection to the hub broke: {first_line(error)}",
            hint=f"{pull_command(repo, file)} (finished files are kept)",
        ) from None
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        raise OutputError(
            f"cannot write {cache_folder()}: {error.strerror}.", hint=_STORAGE[error.errno]
        ) from None


def _bars(on_bytes: OnBytes, stop: Event) -> type[Any]:
    """A progress bar class that calls `on_bytes`, and raises in its threads once `stop` is set."""

    class CallbackBar(tqdm):  # type: ignore[misc]  # it has no types
        """A bar that is never drawn."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            """Called by the download threads for every piece."""
            if stop.is_set():
                raise InterruptedError("stopped")
            drawn: bool | None = super().update(n)
            return drawn

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            """Called where tqdm would draw it."""
            if self.unit == "B":  # the others count files
                on_bytes(int(self.n))
            return True

    return CallbackBar
