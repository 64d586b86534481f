"""Seeds from text."""

import random
import re

from wancli.config.settings import MAX_SEED
from wancli.errors import SettingsError, shortened


def parse_seeds(text: str | None, count: int | None) -> list[int]:
    """Seeds of `7`, `1,2,5`, `0-9` or `random`; `count` of them up from a single one.

    Raises SettingsError for anything else, and for seeds over 2**53.
    """
    if text is None or text == "random":
        seeds = [random.SystemRandom().randrange(2**31)]
    elif match := re.fullmatch(r"(\d{1,18})-(\d{1,18})", text):
        first, last = map(int, match.groups())
        if not 0 <= last - first < 100_000:
            raise SettingsError(f"`seed {text}`: not a range of seeds.", hint="`seed 0-9`")
        seeds = list(range(first, last + 1))
    elif re.fullmatch(r"\d{1,18}(,\d{1,18})*", text):
        seeds = [int(s) for s in text.split(",")]
    else:
        raise SettingsError(
            f"Invalid `seed {shortened(text)}`.", hint="`seed 7`, 1,2,5, 0-9 or random"
        )
    return _counted(seeds, count)


def _counted(seeds: list[int], count: int | None) -> list[int]:
    if count is not None and len(seeds) > 1:
        raise SettingsError(f"`num_videos {count}` needs a single seed.", hint="drop `num_videos`")
    seeds = [seeds[0] + i for i in range(count)] if count else seeds
    if max(seeds) > MAX_SEED:
        raise SettingsError(f"`seed {max(seeds)}` is over 2^53.", hint=f"at most {MAX_SEED}")
    if len(set(seeds)) < len(seeds):
        raise SettingsError("`seed` lists a seed twice.", hint="list each seed once")
    return seeds
