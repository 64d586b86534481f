"""Runs cases in order of their value until time is up, and writes a line for each measurement."""

import gc
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any, TypeVar

import torch

Facts = Mapping[str, Any]
Item = tuple[str, Callable[[], Facts]]  # a name, and what measures it

T = TypeVar("T")

logger = logging.getLogger("bench")


@dataclass
class Session:
    """The device, the time left, and the file of measurements."""

    device: torch.device
    small: bool
    seconds: float
    out: Path | None = None
    commit: str = ""  # of wancli
    began: float = field(default_factory=perf_counter)
    rows: list[dict[str, Any]] = field(default_factory=list)
    _shared: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (perf_counter() - self.began)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns, made once: cases share the model and the references."""
        if name not in self._shared:
            self._shared[name] = make()
        shared: T = self._shared[name]
        return shared

    def run(self, case: int, items: Callable[["Session"], Iterator[Item]]) -> None:
        """Measure each item of a case that there is time for; errors become lines."""
        took = [0.0]
        try:
            for name, measure in items(self):
                if self.left < 2 + mean(took):
                    self.write({"case": case, "name": name, "skipped": f"{self.left:.0f} s left"})
                    continue
                started = perf_counter()
                self.write({"case": case, "name": name, **self._measured(measure)})
                took.append(perf_counter() - started)
        except Exception as error:  # noqa: BLE001 - the other cases go on
            self.write({"case": case, "error": _text(error)})
        self._clean_up()

    def _measured(self, measure: Callable[[], Facts]) -> Facts:
        started = perf_counter()
        try:
            facts = dict(measure())
        except Exception as error:  # noqa: BLE001 - the other items go on
            facts = {"error": _text(error)}
            self._clean_up()
        return facts | {"took_s": round(perf_counter() - started, 2)}

    def _clean_up(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def write(self, row: dict[str, Any]) -> None:
        """Print a measurement, and append it to the file."""
        row["at_s"] = round(self.seconds - self.left, 1)
        self.rows.append(row)
        line = json.dumps(row)
        logger.info("%s", line)
        if self.out:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:400]
