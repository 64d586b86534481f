"""Rich's console, without color where that is off, and without control characters."""

import os
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from wancli.cli.streams import printable


class _Console(Console):
    """A console that escapes control characters."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the segments of whatever is printed, escaped."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield Segment(text, segment.style, segment.control)


def open_console(*, color: bool, stderr: bool = False, **layout: Any) -> Console:
    """A console on standard output or error; without `color` it has no styles at all."""
    if color:
        forced = True if os.environ.get("FORCE_COLOR") else None
        styles: dict[str, Any] = {"force_terminal": forced}
    else:  # Rich would force a terminal by itself, and write bold where colors are off
        terminal = os.isatty(2 if stderr else 1)
        styles = {"force_terminal": terminal, "color_system": None, "no_color": True}
    return _Console(stderr=stderr, highlight=False, emoji=False, **styles, **layout)
