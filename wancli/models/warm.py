"""A pipeline that stays loaded, for any number of requests."""

import gc
import logging
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from wancli.catalog.local import PARTS
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import TEXT
from wancli.config.settings import Machine
from wancli.errors import UsageError
from wancli.models.encoded_texts import EncodedTexts
from wancli.planning.rules_machine import check_gguf_package, check_quantizer
from wancli.records.progress import Phase, Report, ignore
from wancli.utils.garbage import freeze_again, uncollected
from wancli.utils.threads import choose_idle_threads

if TYPE_CHECKING:
    from wancli.models.load import Loaded

OnBytes = Callable[[int], None]  # called with the bytes downloaded so far


@dataclass(frozen=True)
class LoadWatch:
    """Callbacks of a model that is loaded; without `on_bytes`, huggingface_hub draws its bars."""

    report: Report = ignore
    on_bytes: OnBytes | None = None


UNWATCHED = LoadWatch()

# They log while they are imported: warnings about what is not used here.
_LOUD = ("torchao", "torch.utils._pytree", "diffusers")


@contextmanager
def quiet_imports(report: Report) -> Iterator[None]:
    """Import the libraries in the block, without what they log meanwhile."""
    first = "torch" not in sys.modules
    if first:
        choose_idle_threads()
        report(Phase("import"))
    with uncollected():
        import diffusers  # noqa: F401 - sets the level of its own logger, once

        with _quiet():
            yield
        if first:
            freeze_again()


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class WarmPipeline:
    """A model's weights on their device, from their first use until `close`.

    Requests take turns: each finds the pipeline as it was loaded, and leaves it so. The libraries
    are imported at the first use, too.
    """

    def __init__(
        self, spec: ModelSpec, machine: Machine, *, parts: Collection[str] = PARTS,
        stays: Collection[str] = (), on_bytes: OnBytes | None = None,
    ) -> None:  # fmt: skip
        """`parts` and `stays` as in `load_pipeline`, `on_bytes` as in `LoadWatch`.

        Raises SetupError, before anything is imported, if `machine` needs a missing package.
        """
        check_quantizer(machine)
        check_gguf_package(spec)
        self.spec, self.machine, self.stays = spec, machine, stays
        self._parts, self._on_bytes, self._since = parts, on_bytes, perf_counter()
        self.texts = EncodedTexts()
        self._loaded: Loaded | None = None
        self._busy = self._closed = self._failed = False

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._loaded is not None

    @contextmanager
    def in_use(self, report: Report, *, task: str = TEXT) -> Iterator[tuple["Loaded", float]]:
        """The pipeline of a task, and the seconds that loading took; 0 if it was loaded before.

        They include the import of the libraries. The peak of GPU memory counts from here. Raises
        UsageError while another request uses the pipeline, such as a rollout that is not finished.
        """
        if self._closed:
            raise UsageError("this model is closed.", hint="load it again")
        if self._busy:
            raise UsageError(
                f"{self.spec.name} is in use: it makes one video at a time.",
                hint="finish or close the rollout first",
            )
        self._busy = True
        try:
            loaded, seconds = self._load(report, task)
            from wancli.models.memory import reset_gpu_peak  # torch, quietly by now

            reset_gpu_peak(loaded.device)
            yield loaded, seconds
        except BaseException:
            self._failed = True  # its weights may be anywhere
            raise
        finally:
            self._busy = False

    def _load(self, report: Report, task: str) -> tuple["Loaded", float]:
        with quiet_imports(report):
            import torch

            from wancli.models.load import load_pipeline, place_again, switch_task

        if self._loaded is not None:
            if self._failed:
                place_again(self._loaded, self.machine)
                self._failed = False
            return switch_task(self._loaded, task), 0.0
        report(Phase("load"))
        # Weights are drawn before they are read.
        with torch.random.fork_rng(devices=[]), uncollected():
            self._loaded = load_pipeline(
                self.spec, self.machine, self._parts, task=task, stays=self.stays,
                watch=LoadWatch(report, self._on_bytes),
            )  # fmt: skip
        return self._loaded, perf_counter() - self._since

    def close(self) -> None:
        """Give the memory back. The pipeline cannot be used again."""
        self._closed = True
        self.texts.clear()
        if self._loaded is None:
            return
        import torch

        from wancli.models.memory import trim_heap

        device, self._loaded = self._loaded.device, None
        gc.collect()  # modules and their hooks refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
        trim_heap()
