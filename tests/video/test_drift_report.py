import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.video.test_drift import measure, moving
from wancli.errors import OutputError
from wancli.video.drift import DriftMeter
from wancli.video.drift_report import Axis, write_report


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    """Drift summary of a clip that jumps at chunk 5 and stops after chunk 7."""
    clip = moving(180)
    clip[60:] = np.roll(clip[60:], 17, 2)
    clip[96:] = clip[95]
    return measure(clip).summary()


def page_of(summary: dict[str, Any], folder: Path, *, title: str = "a red circle") -> str:
    write_report(summary, folder / "drift.html", title=title, overwrite=True)
    assert [entry.name for entry in folder.iterdir()] == ["drift.html"]
    return (folder / "drift.html").read_text(encoding="utf-8")


def drawings(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]


def with_columns(summary: dict[str, Any], **columns: list[float | None]) -> dict[str, Any]:
    """The summary with its chunks replaced by these columns."""
    count = len(next(iter(columns.values())))
    chunk = summary["chunks"][1]
    chunks = [
        {**chunk, "index": i, "start_s": i * 0.75, **{k: v[i] for k, v in columns.items()}}
        for i in range(count)
    ]
    return {**summary, "chunks": chunks, "duration_s": count * 0.75, "frames": count * 12}


def test_a_page_shows_the_summary(summary, tmp_path):
    page = page_of(summary, tmp_path)
    for note in summary["notes"]:
        assert note in page
    assert "a red circle" in page
    assert "first 5 s" in page
    assert len(drawings(page)) == 5


def test_a_page_loads_nothing_and_runs_nothing(summary, tmp_path):
    page = page_of(summary, tmp_path)
    assert not re.search(r"http|//|<script|<link|<img|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page


def test_a_title_is_text(summary, tmp_path):
    page = page_of(summary, tmp_path, title="<script>alert('&')</script>\n\"x\"")
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;") == 2


def test_a_title_that_is_not_utf_8_does_not_stop_a_report(summary, tmp_path):
    assert "caf?" in page_of(summary, tmp_path, title="caf\udce9")


def test_every_drawing_stays_in_its_frame(summary, tmp_path):
    for svg in drawings(page_of(summary, tmp_path)):
        width, height = map(float, svg.attrib["viewBox"].split()[2:])
        for circle in svg.iter("circle"):
            assert 0 < float(circle.attrib["cx"]) < width
            assert 0 < float(circle.attrib["cy"]) < height
        bands = list(svg.iter("rect"))
        assert 0 < len(bands) <= len(summary["chunks"])
        assert sum(float(band.attrib["width"]) for band in bands) == pytest.approx(width - 60, 0.01)


def test_an_axis_names_both_of_its_ends():
    low = 6 * 0.05  # a little over 0.3
    assert Axis(low, 0.45, 90.0, 0.0, 0.05).ticks == [
        (90.0, "0.30"),
        (60.0, "0.35"),
        (30.0, "0.40"),
        (0.0, "0.45"),
    ]


def test_the_worst_chunks_have_a_ring(summary, tmp_path):
    exposure_and_motion, *_, seams, latents = drawings(page_of(summary, tmp_path))
    rings = [
        [c for c in svg.iter("circle") if c.attrib["class"] == "ring"]
        for svg in (exposure_and_motion, seams, latents)
    ]
    assert [len(marks) for marks in rings] == [1, 1, 0]
    assert "chunk 5" in [text.text for text in seams.iter("text")]


def test_hovering_shows_the_chunk(summary, tmp_path):
    tips = [title.text for title in drawings(page_of(summary, tmp_path))[0].iter("title")]
    assert tips[8] == "chunk 8, from 6.0 s\nexposure: 0.314\nmotion: 0.00"


def test_a_line_has_gaps_where_values_are_missing(summary, tmp_path):
    seams = drawings(page_of(summary, tmp_path))[3]
    (path,) = seams.iter("path")
    assert path.attrib["d"].count("M") == 1
    gap = with_columns(summary, seam=[None, 1.0, 1.1, None, 0.9, 1.0])
    (path,) = drawings(page_of(gap, tmp_path))[3].iter("path")
    assert path.attrib["d"].count("M") == 2


@pytest.mark.slow
def test_hours_of_chunks_are_a_small_page_that_keeps_every_peak(summary, tmp_path):
    seams: list[float | None] = [1.0] * 20_000
    seams[12_345] = 9.0
    page = page_of(with_columns(summary, seam=seams), tmp_path)
    assert len(page) < 200_000
    (path,) = drawings(page)[3].iter("path")
    heights = [float(y) for y in re.findall(r",([\d.]+)h", path.attrib["d"])]
    assert max(heights) - min(heights) > 200
    assert "minutes" in page


@pytest.mark.parametrize("frames", [0, 1, 30])
def test_a_very_short_video_has_a_page(frames, tmp_path):
    meter = DriftMeter(16)
    if frames:
        meter.add(np.zeros((frames, 16, 16, 3), np.uint8), np.zeros((1, 4, 1, 2, 2)), index=0)
    page = page_of(meter.summary(), tmp_path)
    assert len(drawings(page)) == (5 if frames else 0)
    assert "nan" not in page


@pytest.mark.parametrize("place", ["file/drift.html", "folder.html"])
def test_an_unwritable_path_is_one_error(place, summary, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OutputError, match="cannot write") as caught:
        write_report(summary, tmp_path / place, title="")
    assert "`report FILE.html`" in caught.value.hint
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder.html"]
