"""What the name of a file of weights tells, or else that of its folder."""

import re
from pathlib import Path

from wancli.catalog.tasks import IMAGE, TEXT

_DISTILLED = re.compile(
    r"lightx2v|lightning|causvid|accvid|fusionx|distill|(?<![a-z])dmd|"
    r"(?<!\d)[1-8][ _-]?steps?(?![a-z])"
)


def task_by_name(path: Path) -> str:
    """The task that a name tells; "" if none does."""
    by_name = {"t2v": TEXT, "i2v": IMAGE, "": ""}
    return by_name[_only(r"(?<![a-z])(t2v|i2v)(?![a-z])", path)]


def expert_by_name(path: Path) -> str:
    """`high` or `low`, as a name tells; "" if none does."""
    plain = r"(?<![a-z])(high|low)(?![a-z])"
    return _only(r"(?<![a-z])(high|low)[ _-]?noise", path) or _only(plain, path)


def is_distilled_by_name(path: Path) -> bool:
    """Whether the name of a file tells that it was distilled to few steps without guidance."""
    return bool(_DISTILLED.search(path.stem.lower()))


def _only(pattern: str, path: Path) -> str:
    """The only match of a pattern in the name of a file or, failing that, of its folder."""
    for name in (path.stem.lower(), path.parent.name.lower()):
        if len(matches := set(re.findall(pattern, name))) == 1:
            return str(matches.pop())
    return ""
