"""`python -m benchmarks.gpu.table`: write the tables of README.md and docs/gpu.md.

They are made of the measurements in benchmarks/results/, a file for each card; where there are
none, there is no table.
"""

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
REGION = re.compile(r"(<!-- gpu-(\w+): begin -->\n).*?(<!-- gpu-\2: end -->)", re.DOTALL)
DOCUMENTS = ("README.md", "docs/gpu.md")

Row = Mapping[str, Any]
Card = Mapping[tuple[int, str], Row]  # measurements by case and name, the latest of each

logger = logging.getLogger("bench")


def read_results(folder: Path = RESULTS) -> list[Card]:
    """The measurements of each card."""
    cards: list[Card] = []
    for path in sorted(folder.glob("*.json")):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        cards.append({(row["case"], row["name"]): row for row in rows if "name" in row})
    return cards


def filled(text: str, cards: Sequence[Card]) -> str:
    """A document with its tables."""
    return REGION.sub(lambda m: m[1] + table(m[2], cards) + m[3], text)


def table(kind: str, cards: Sequence[Card]) -> str:
    """The tables of a kind for every card, in Markdown; "" without measurements."""
    make = {"rollouts": _rollouts, "decoding": _decoding, "attention": _attention}[kind]
    parts = []
    for card in cards:
        header, *rows = make(card)
        if rows:
            line = "|".join(["---", *["---:"] * (len(header) - 1)])
            lines = [f"| {' | '.join(row)} |" for row in rows]
            head = f"| {' | '.join(header)} |"
            parts.append("\n".join([f"\n{_title(card)}:\n", head, f"|{line}|", *lines, ""]))
    return "".join(part + "\n" for part in parts)


def _title(card: Card) -> str:
    """The card, and the versions that were measured."""
    of = dict(card.get((0, "versions"), {}))
    if of.get("cudnn"):  # 91900 is 9.19.0
        of["cudnn"] = ".".join(map(str, divmod(of["cudnn"] // 100, 100)))
    known = [("driver", "driver"), ("torch", "torch"), ("cuDNN", "cudnn"), ("wancli", "wancli")]
    versions = ", ".join(f"{label} {of[name]}" for label, name in known if of.get(name))
    return f"{of.get('card', 'unknown card')} ({versions})"


def _rollouts(card: Card) -> Iterator[Sequence[str]]:
    """Frames per second of late chunks, by variant and window."""
    yield "frames a second", "transformer alone", "with the VAE", "and into an MP4", "error"
    names = [name for case, name in card if case in (5, 6, 8) and "window" in name]
    for name in sorted(dict.fromkeys(names), key=_order):
        alone = next(row for case in (5, 6, 8) if (row := card.get((case, name))))
        error = next((card[key] for key in card if key[1] == f"{_variant(name)}, error"), {})
        cells = [
            _number(alone.get("transformer_fps"), 1),
            _number(card.get((9, name), {}).get("wall_fps"), 1),
            _number(card.get((9, f"{name}, MP4"), {}).get("wall_fps"), 1),
            _number(error.get("error"), None),
        ]
        if any(cells[:3]):
            yield name, *cells


def _decoding(card: Card) -> Iterator[Sequence[str]]:
    yield "decoding", "ms a latent", "frames a second", "error", "PSNR"
    for (case, name), row in card.items():
        if case == 7 and "decode_fps" in row:
            psnr = f"{row['psnr_db']} dB" if row.get("psnr_db") else ""
            fps = _number(row["decode_fps"], 1)
            yield name, _number(row["ms_per_latent"], 1), fps, _number(row["error"], None), psnr


def _attention(card: Card) -> Iterator[Sequence[str]]:
    """TFLOP/s by backend."""
    rows = [(name.split(", "), row) for (case, name), row in card.items() if case == 1]
    backends = [b for b in dict.fromkeys(name[0] for name, _ in rows) if b != "choice"]
    yield "TFLOP/s", *backends
    cells = {(tuple(name[1:]), name[0]): row.get("tflops") for name, row in rows}
    for title in dict.fromkeys(tuple(name[1:]) for name, _ in rows):
        yield ", ".join(title), *[_number(cells.get((title, b)), 0) for b in backends]


def _order(name: str) -> tuple[int, str]:
    window = int(re.findall(r"window (\d+)", name)[0])
    return window, name


def _variant(name: str) -> str:
    return name.partition(", window")[0]


def _number(value: float | None, digits: int | None) -> str:
    if value is None:
        return ""
    if digits is None:
        return f"{value:.1e}" if value else "0"
    return f"{value:.{digits}f}"


def main() -> int:
    """Rewrite the documents."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    cards = read_results()
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(filled(path.read_text("utf-8"), cards), "utf-8")
        logger.info("%s: results of %d", name, len(cards))
    return 0


if __name__ == "__main__":
    sys.exit(main())
