"""The jobs of a batch as one HTML page: a gallery with filters, failures and records."""

import base64
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wancli.errors import InputError, UsageError
from wancli.records.batch_export import export_row
from wancli.records.ledger import DONE, SKIPPED, STATES, Ledger
from wancli.records.ledger_file import batch_command
from wancli.utils.html import is_page, page_mark, templates
from wancli.utils.units import duration, gib
from wancli.video.read import VideoInfo, probe
from wancli.video.sheet import thumbnail

_KIND = "batch report"
MOST_EMBEDDED = 2 * 2**20  # bytes of a video that is embedded
MOST_JOBS = 20_000
MISSING = "missing"  # done, and the video is gone or damaged
_WIDTH = 240  # pixels of a thumbnail
_LONG = 64  # values of a list that a record on the page keeps


def is_report(path: Path) -> bool:
    """Whether a file is such a page, and may be replaced by a newer one."""
    return is_page(path, _KIND)


def render_report(
    ledger: Ledger, page: Path, *, embed: bool = False, in_words: Callable[[str], str] = str
) -> bytes:
    """The page that will be at `page`, with pictures, and videos as files seen from there.

    `embed` puts videos of up to 2 MiB into the page; `in_words` spells settings in errors. Raises
    UsageError for more jobs than a browser can show.
    """
    if (count := sum(ledger.counts().values())) > MOST_JOBS:
        raise UsageError(
            f"a page of {count:,} jobs is too large; {MOST_JOBS:,} is the limit.",
            hint=batch_command("export", ledger.path),
        )
    settings = ledger.settings()
    jobs = [export_row(row, settings) for row in ledger.rows()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        thumbnails = list(pool.map(_thumbnail, jobs))
    models = _models(ledger, jobs)
    cards = [
        {
            **_card(job, models[number]),
            **_shown(job, image, ledger.path, in_words),
            "source": _source(Path(job["output"]), page.parent, embed=embed) if image else "",
        }
        for number, (job, image) in enumerate(zip(jobs, thumbnails, strict=True))
    ]
    details = json.dumps([_details(job) for job in jobs], ensure_ascii=False)
    text = (
        templates(Path(__file__).parent)
        .get_template("batch_report.html.jinja")
        .render(
            mark=page_mark(_KIND),
            title=ledger.path.name.removesuffix(ledger.path.suffix),
            cards=cards,
            # In a script only this could end it.
            details=details.replace("<", "\\u003c"),
            states=_counts(cards, "state", [*STATES, MISSING]),
            models=sorted({card["model"] for card in cards}),
            seeds=sorted({card["seed"] for card in cards if card["seed"] is not None}),
            facts=_facts(jobs),
            ledger=str(ledger.path),
            embedded=embed,
            shape=_shape(jobs),
        )
    )
    return text.encode(errors="replace")  # a prompt from a shell may not be valid UTF-8


def _thumbnail(job: Mapping[str, Any]) -> bytes | None:
    """A WebP of a video that is done; None if it cannot be read."""
    video = Path(job["output"])
    if not _is_made(job):
        return None
    try:
        return thumbnail(video, _info(job["record"]) or probe(video), width=_WIDTH)
    except InputError:
        return None


def _info(record: Mapping[str, Any] | None) -> VideoInfo | None:
    """Size and length by the record: probing would decode the whole video."""
    try:
        video, frames = (record or {})["request"]["video"], (record or {})["output"]["frames"]
        return VideoInfo(video["width"], video["height"], video["fps"], frames)
    except (KeyError, TypeError):
        return None


def _models(ledger: Ledger, jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of each job's model: its setting, or that of a record on the same model."""
    numbers = [row["model"] for row in ledger.rows()]
    known: dict[int, str] = {}
    for number, job in zip(numbers, jobs, strict=True):
        name = (job["record"] or {}).get("request", {}).get("model") or job["settings"].get("model")
        if name:
            known.setdefault(number, str(name))
    return [known.get(number, "default model") for number in numbers]


def _card(job: Mapping[str, Any], model: str) -> dict[str, Any]:
    return {
        "line": job["line"],
        "id": job["id"] or "",
        "prompt": job["prompt"] or "",
        "seed": job["seed"],
        "model": model,
        "name": Path(job["output"]).name,
        "seconds": "" if job["seconds"] is None or not _is_made(job) else duration(job["seconds"]),
    }


def _shown(
    job: Mapping[str, Any], image: bytes | None, ledger: Path, in_words: Callable[[str], str]
) -> dict[str, Any]:
    """The picture of a job that is done; else its state, and what to do about it."""
    if image:
        picture = f"data:image/webp;base64,{base64.b64encode(image).decode()}"
        return {"state": job["state"], "thumbnail": picture}
    error, state = job["error"] or {}, job["state"]
    if _is_made(job):
        hint = batch_command("retry", ledger, "--missing")
        error, state = {"message": "The video is gone or damaged.", "hint": hint}, MISSING
    texts = {name: in_words(error.get(name, "")) for name in ("message", "hint")}
    return {"state": state, "thumbnail": None, **texts}


def _is_made(job: Mapping[str, Any]) -> bool:
    return job["state"] in (DONE, SKIPPED)


def _source(video: Path, folder: Path, *, embed: bool) -> str:
    """The `src` of a video, from the folder of the page."""
    if embed and video.stat().st_size <= MOST_EMBEDDED:
        return f"data:video/mp4;base64,{base64.b64encode(video.read_bytes()).decode()}"
    return quote(os.path.relpath(video, folder.absolute()))


def _shape(jobs: Sequence[Mapping[str, Any]]) -> str:
    """The aspect ratio that most videos have."""
    videos = [info for job in jobs if (info := _info(job["record"]))]
    shapes = Counter(f"{info.width} / {info.height}" for info in videos)
    return shapes.most_common(1)[0][0] if shapes else "4 / 3"


def _details(job: Mapping[str, Any]) -> dict[str, Any]:
    """What a click shows: settings, and the record without its long lists."""
    names = ("line", "id", "attempt", "output", "settings", "began", "ended", "error")
    return {name: job[name] for name in names} | {"record": _short(job["record"])}


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list) and len(value) > _LONG:
        return f"{len(value)} values"
    return value


def _counts(cards: Sequence[Mapping[str, Any]], key: str, order: Sequence[str]) -> dict[str, int]:
    values = [card[key] for card in cards]
    return {name: values.count(name) for name in order if name in values}


def _facts(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The batch in figures."""
    made = [job for job in jobs if job["state"] == DONE]
    seconds = sum(job["seconds"] or 0 for job in made)
    size = sum(job["bytes"] or 0 for job in made)
    facts = [f"{len(jobs):,} jobs"]
    if made:
        facts += [f"{duration(seconds)} of work", gib(size)]
    return facts
