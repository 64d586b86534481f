"""A share of a batch's jobs, such as each task of a SLURM array makes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from wancli.errors import UsageError, shortened

AUTO = "auto"
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
    names = {"ID": "", "COUNT": "", "MIN": "", "MAX": "", "STEP": "1"}
    values = {name: environment.get(f"SLURM_ARRAY_TASK_{name}", v) for name, v in names.items()}
    if not all(value.isdecimal() for value in values.values()):
        raise UsageError(
            "`shard auto` is for tasks of a SLURM array.", hint="an array such as 0-7, or `shard 1/8`"
        )
    task, count, first, last, step = (int(values[name]) for name in names)
    place, left = divmod(task - first, max(1, step))
    if left or (last - first) // max(1, step) + 1 != count:
        raise UsageError(
            "`shard auto` needs a SLURM array of evenly spaced numbers.",
            hint="an array such as 0-7, or `shard 1/8`",
        )
    return Shard(place + 1, count)
