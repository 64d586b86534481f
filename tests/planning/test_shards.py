"""Shares of a batch are disjoint and complete."""

import pytest

from wancli.errors import UsageError
from wancli.planning.shards import Shard, parse_shard


@pytest.mark.parametrize("count", [1, 8, 30])
def test_every_job_is_in_exactly_one_share(count: int):
    shares = [parse_shard(f"{number}/{count}", {}) for number in range(1, count + 1)]
    jobs = [job for share in shares for job in share.of(range(20))]
    assert sorted(jobs) == list(range(20))


def slurm(task: int, count: int, first: int, last: int, step: int = 1) -> dict[str, str]:
    values = {"ID": task, "COUNT": count, "MIN": first, "MAX": last, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (slurm(0, 4, 0, 3), Shard(1, 4)),
        (slurm(13, 4, 10, 13), Shard(4, 4)),
        (slurm(5, 3, 1, 9, step=4), Shard(2, 3)),
        (
            {f"SLURM_ARRAY_TASK_{n}": v for n, v in (("ID", "1"), ("COUNT", "2"), ("MIN", "0"))},
            Shard(2, 2),
        ),
    ],
)
def test_auto_is_the_place_of_a_task_in_its_array(environment: dict[str, str], expected: Shard):
    assert parse_shard("auto", environment) == expected


@pytest.mark.parametrize(
    ("text", "environment"),
    [("0/4", {}), ("5/4", {}), ("1", {}), ("x/y", {}), ("auto", {}),
     ("auto", slurm(3, 3, 1, 17)), ("auto", slurm(4, 3, 1, 9, step=4))],
)  # fmt: skip
def test_what_is_no_share_is_refused(text: str, environment: dict[str, str]):
    with pytest.raises(UsageError, match="`shard"):
        parse_shard(text, environment)
