import pytest

from wancli.utils.units import duration, flops, gib


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (gib(3 * 2**30), "3.0 GiB"),
        (gib(1536 * 2**10), "1.5 MiB"),
        (gib(100), "0.1 KiB"),
        (flops(6.5e15), "6.50 PFLOP"),
        (flops(1.2e9), "1.20 GFLOP"),
        (duration(5.25), "5.2 s"),
        (duration(150), "2 min 30 s"),
        (duration(7500), "2 h 05 min"),
    ],
)
def test_amounts_are_formatted_for_people(text: str, expected: str):
    assert text == expected
