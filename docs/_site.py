"""MkDocs: pages of the repository's root as pages of the site, with their links."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "LICENSE.txt",
}


def on_files(files: Any, *, config: Any) -> None:
    """Add the pages of the root."""
    for source, target in PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](").replace('src="docs/', 'src="')
        files.append(File.generated(config, target, content=_relinked(text, prefix="")))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to pages of the root, as they are called here."""
    return _relinked(markdown, prefix="../")


def _relinked(text: str, *, prefix: str) -> str:
    for source, target in PAGES.items():
        for end in ")#":
            text = text.replace(f"]({prefix}{source}{end}", f"]({target}{end}")
    return text
