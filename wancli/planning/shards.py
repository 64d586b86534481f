"""A share of a batch's jobs, such as each task of a SLURM array makes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from wancli.errors import UsageError, shortened
from wancli.utils.units import is_count

AUTO = "auto"
_ARRAY = "an array such as 0-7, or `shard 1/8`"
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One of `count` shares, from 1: every job is in exactly one of them."""

    number: int
    count: int

    def of(self, jobs: Sequence[T]) -> Sequence[T]:
        """Every `count`-th job: shares take about as long where jobs alike are neighbours."""
        return jobs[self.number - 1 :: self.count]

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """The share `2/8`, or with `auto` that of this task of a SLURM array. Raises UsageError."""
    if text == AUTO:
        return _slurm_shard(environment)
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(
            f"`shard {shortened(text)}` is no share.", hint="`shard 1/4` to 4/4, or auto"
        )
    return Shard(int(match[1]), int(match[2]))


def _slurm_shard(environment: Mapping[str, str]) -> Shard:
    """The task's place among the numbers of its array, which may begin anywhere."""
    names = ("ID", "COUNT", "MIN", "MAX", "STEP")
    texts = {name: environment.get(f"SLURM_ARRAY_TASK_{name}", "") for name in names}
    values = {name: int(text) for name, text in texts.items() if is_count(text)}
    try:
        task, count, first = (values[name] for name in ("ID", "COUNT", "MIN"))
    except KeyError:
        raise UsageError("`shard auto` is for tasks of a SLURM array.", hint=_ARRAY) from None
    step = values.get("STEP") or 1
    place, left = divmod(task - first, step)
    even = values.get("MAX", first + (count - 1) * step) == first + (count - 1) * step
    if left or not even or not 0 <= place < count:
        raise UsageError("`shard auto` needs a SLURM array of evenly spaced numbers.", hint=_ARRAY)
    return Shard(place + 1, count)
