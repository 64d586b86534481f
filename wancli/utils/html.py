"""HTML templates with autoescaping."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def page_mark(kind: str) -> str:
    """The tag in a page's head by which a page of that kind is known as ours."""
    return f'<meta name="generator" content="wancli {kind}">'


def is_page(path: Path, kind: str) -> bool:
    """Whether a file is a page of that kind, by its mark."""
    try:
        with path.open("rb") as file:
            return page_mark(kind).encode() in file.read(300)
    except OSError:
        return False


def templates(folder: Path) -> Environment:
    """Jinja environment of a folder: autoescaped, and strict about undefined names."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
