"""Attention kernels as `wancli doctor --measure` timed and checked them on a device."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from statistics import median
from typing import Annotated

from pydantic import Field

# Relative to float32. In bfloat16 the output alone is rounded by 0.002; kernels that compute in 8
# bits are 0.02 and more off.
WORST_ERROR = 0.01
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class AttentionCase:
    """Numbers of heads (of 128 channels), queries and keys."""

    heads: int
    queries: int
    keys: int


@dataclass(frozen=True)
class KernelTime:
    """One of diffusers' attention backends in one case."""

    backend: str
    case: AttentionCase
    seconds: Positive
    error: float  # of the output, relative to float32; 1 if it is not finite


def wrong_kernels(times: Sequence[KernelTime]) -> dict[str, float]:
    """Backends whose error is above `WORST_ERROR` in any case, with their largest error."""
    wrong: dict[str, float] = {}
    for time in times:
        if not time.error <= WORST_ERROR:
            wrong[time.backend] = max(time.error, wrong.get(time.backend, 0.0))
    return wrong


def rank_kernels(times: Sequence[KernelTime], *, heads: int, tokens: int) -> dict[str, float]:
    """Backends that are right in all cases, fastest first, in the cases most like this one.

    With their seconds over all numbers of keys, since a block attends to itself and to the prompt.
    Empty without times.
    """

    def distance(case: AttentionCase) -> float:
        return abs(log(case.heads / heads)) + abs(log(case.queries / tokens))

    if not times:
        return {}
    nearest = min((time.case for time in times), key=distance)
    seconds: dict[str, list[float]] = defaultdict(list)
    cases = set()
    for time in times:
        if (time.case.heads, time.case.queries) == (nearest.heads, nearest.queries):
            seconds[time.backend].append(time.seconds)
            cases.add(time.case)
    wrong = wrong_kernels(times)
    right = {
        backend: sum(each)
        for backend, each in seconds.items()
        if backend not in wrong and len(each) == len(cases)
    }
    return dict(sorted(right.items(), key=lambda item: item[1]))


def tokens_to_align(choice: str, rounds: Mapping[int, Sequence[float]]) -> int:
    """Multiple to which cached tokens are padded, for `kv_align` auto, off or N.

    `rounds` are measured seconds by multiple; 1 is unpadded. `auto` pads only where that is faster
    by more than the noise: in its slowest round than unpadded in the fastest.
    """
    if choice != "auto":
        return 1 if choice == "off" else int(choice)
    unpadded = min(rounds.get(1, (0.0,)))
    faster = {n: median(each) for n, each in rounds.items() if n > 1 and max(each) < unpadded}
    return min(faster, key=lambda n: faster[n], default=1)
