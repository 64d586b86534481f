"""Sizes, counts and durations as text, and counts from it."""


def gib(size: float) -> str:
    """Format bytes."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 2**10:,.1f} KiB"


def flops(count: float) -> str:
    """Format FLOPs."""
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count / 1e6:,.2f} MFLOP"


def duration(spent: float) -> str:
    """Format seconds."""
    if spent < 120:
        return f"{spent:.1f} s"
    minutes, left = divmod(round(spent), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {left:02} s"


def is_count(text: str) -> bool:
    """Whether a text is a whole number of up to nine digits; isdigit passes `²`, too."""
    return text.isascii() and text.isdigit() and len(text) <= 9


def bounds_in_words(
    *, ge: float | None = None, gt: float | None = None, lt: float | None = None,
    le: float | None = None,
) -> str:  # fmt: skip
    """Bounds as "1 to 1000" or "above 0, at most 1"; "" without any."""
    if ge is not None and le is not None:
        return f"{ge} to {le}"
    words = {"at least": ge, "above": gt, "below": lt, "at most": le}
    return ", ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)
