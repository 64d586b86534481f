"""Values for flags: valid ones, and hostile ones."""

import random
from collections.abc import Sequence
from typing import Any

# Text that terminals, file systems, templates and parsers may misinterpret.
ODD_TEXT = (
    "", " ", "\t", "\n", "a\nb", "\r", "-", "--", "--help", "-h", "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07", "\u009b31mred", "\u202eder\u202c", "\u2028", "\ufeffx", "caf\u00e9",
    "\u00fc\u0308",
    "\U0001f600", "\U000e0001", "\udcff", "bad\udcff\udcfe", "\udc80abc", "a" * 300, "\u00e9" * 130,
    "a" * 20_000, "[bold]x[/bold]", "[/]", "[red", "{seed}", "{", "}", "{}", "{prompt:9999}",
    "{seed:x}", "{prompt!r}", "{prompt.__class__}", "{0}", "%s%n", "$HOME", "~", "~root",
    "~nosuch/x",
    "..", ".", "/", "//", "../..", "a/b/c", "NUL", "con.mp4", "'", '"', "\\", "`id`", ";", "*", "?",
    "null", "None", "true", "\x7f", "\x01", "\x08", "\x85", "x\x00y".replace("\x00", "\x01"),
)  # fmt: skip
ODD_NUMBERS = (
    "", " ", "abc", "nan", "inf", "-inf", "-0", "0", "-1", "1e400", "-1e400", "1e-400", "5e-324",
    "1e308", "0x10", "1_0", "1,5", "1.", ".5", "+1", "--1", "1e", "\u0663", "\uff11", "\u00bd",
    "1 2",
    " 1", "9" * 20, "9" * 5000, "0." + "0" * 400 + "1", "1" + "0" * 400, "true", "\udcff",
    "\x1b[1m1",
    str(2**31 - 1), str(2**31), str(2**32), str(2**53), str(2**53 + 1), str(2**63 - 1), str(2**63),
    str(2**64), "0.1", "1.5", "1e3", "1.0", "None", "\u221e", "0b1", "1j",
)  # fmt: skip
WORDS = (
    "a",
    "red",
    "circle",
    "moving",
    "right",
    "on",
    "a",
    "black",
    "background",
    "cat",
    "unsinkable",
)


def prompt(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))


def odd_text(rng: random.Random) -> str:
    """Text from the list above, or a combination of its parts."""
    if rng.random() < 0.7:
        return rng.choice(ODD_TEXT)
    return "".join(rng.choice(ODD_TEXT)[:50] for _ in range(rng.randint(2, 4)))


def number(rng: random.Random, low: float | None, high: float | None, *, whole: bool) -> str:
    """A number in the range, mostly near its ends."""
    low = 0 if low is None else low
    high = low + 10 if high is None else high
    if rng.random() < 0.3:
        value = rng.choice((low, high))
    elif rng.random() < 0.6:
        value = min(high, low + rng.choice((0, 1, 2, 3, 4, 5, 8)))
    else:
        value = rng.uniform(low, high)
    return str(int(value)) if whole else f"{value:.4g}"


def odd_number(rng: random.Random, low: float | None, high: float | None) -> str:
    """A number beyond the range, or text that is not a number."""
    ends = [end for end in (low, high) if end is not None]
    if ends and rng.random() < 0.4:
        end = rng.choice(ends)
        step = rng.choice((1, -1, 0.5, -0.5, 1e-9, -1e-9, 1e9, -1e9))
        return f"{end + step:.12g}"
    return rng.choice(ODD_NUMBERS)


def size(rng: random.Random, *, small: bool) -> str:
    sides = (16, 32, 48) if small else (16, 32, 48, 96, 832, 480, 1280, 720, 16_384)
    return f"{rng.choice(sides)}{rng.choice('xxxX*')}{rng.choice(sides)}"


def odd_size(rng: random.Random) -> str:
    sides: Sequence[Any] = (
        0,
        -1,
        1,
        15,
        17,
        33,
        "",
        " 32",
        "a",
        "9" * 5000,
        "\u0663\u0662",
        2**63,
        1.5,
        "1e3",
    )
    return rng.choice(("{}x{}", "{}x", "x{}", "{}*{}x{}", "{}", "{}\u00d7{}", "{} x {}")).format(
        *rng.choices(sides, k=3)
    )


def seeds(rng: random.Random, *, several: bool) -> str:
    few = ("0", "1", "7", "random", str(2**53))
    return rng.choice((*few, "0-1", "1,2") if several else few)


def odd_seeds(rng: random.Random) -> str:
    return rng.choice((
        "-1", "1-", "-", "3-1", "0-999999", "1,1", "1,,2", ",", "1.5", str(2**53 + 1),
        "9" * 5000, "0-" + "9" * 30, "\u0663", "", " ", "RANDOM", "1 ", "1-2-3", "\udcff", "0x1",
    ))  # fmt: skip
