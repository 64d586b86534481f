import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest

from tests.benchmark.test_cases import ARMS, MACHINE, SETTINGS, WORST, bench_of, run_of
from wancli.benchmark import report
from wancli.benchmark.cases import Arm, Bench, summarize
from wancli.benchmark.report import write_report
from wancli.cli.bench import _row
from wancli.errors import InputError, OutputError

HOSTILE = "<script>alert('x')</script> \"quoted\" {{ 7 * 7 }} </style>"


class Page(HTMLParser):
    """The text of a page, and its tags with their attributes."""

    VOID = frozenset({"meta", "input", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == [], "a tag is not closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write_page(bench: Bench, folder: Path, *, video: bytes = b"a small video") -> str:
    """The page of a bench, with placeholders for all of its videos."""
    for run in bench.runs:
        (folder / run.video).parent.mkdir(parents=True, exist_ok=True)
        (folder / run.video).write_bytes(video)
    page = write_report(bench, folder)
    assert sorted(entry.name for entry in folder.iterdir()) == ["report.html", "videos"]
    # So that tests can be typed
    return page.read_text(encoding="utf-8").replace("\N{MULTIPLICATION SIGN}", "x")


def test_a_page_shows_all_numbers(tmp_path):
    bench = bench_of()
    text = Page(write_page(bench, tmp_path)).text
    for arm in bench.arms:
        summary = arm.summary
        assert arm.name in text
        assert arm.flags in text
        assert f"{summary.denoise_s:.2f} s" in text
        assert f"{summary.total_s:.2f} s" in text
        assert f"{summary.blocks} of {summary.blocks_all}" in text
        assert f"{summary.forwards_reused} of {summary.forwards}" in text
        if arm.lossy:
            assert (
                f"{summary.ssim:.4f} {summary.ssim_worst:.4f} {summary.psnr_db:.2f} dB 2.12" in text
            )
            assert (
                f"{summary.denoise_speed_up.median:.2f}x {summary.denoise_speed_up.least:.2f} to"
                in text
            )
    for run in bench.runs:
        times = f"denoising {run.denoise_s:.2f} s decoding 1.25 s end to end {run.total_s:.2f} s"
        assert times in text
        if run.quality and not run.quality.equal:
            assert f"{run.quality.ssim.mean:.4f}" in text
            assert f"{run.quality.ssim.worst:.4f} 5" in text
            assert "7.77 % off" in text
    assert "another seed 0.7011 0.6022" in text
    assert "SSIM (11x11 Gaussian, per channel)" in text
    for name, value in (MACHINE | SETTINGS).items():
        assert f"{name.replace('_', ' ')} {value}" in text


def test_a_lossy_variant_is_a_different_sample_and_an_exact_one_is_equal(tmp_path):
    text = Page(write_page(bench_of(), tmp_path)).text
    assert "fast: denoising 1.97x as fast, 1.65x end to end; a different sample" in text
    assert "exact: denoising 1.07x as fast, 1.05x end to end; the latents are equal" in text
    assert "latents equal" in text
    assert text.count("worse") == 1  # the word occurs once, in an explanation


def test_an_exact_variant_that_differs_is_reported(tmp_path):
    bench = bench_of()
    warning = "An exact variant is not exact"
    assert bench.identity is True
    assert warning not in Page(write_page(bench, tmp_path)).text
    baseline, exact, *others = bench.arms
    exact = replace(exact, summary=replace(exact.summary, equal_latents=False))
    bench = replace(bench, arms=(baseline, exact, *others))
    assert bench.identity is False
    text = Page(write_page(bench, tmp_path)).text
    assert warning in text
    assert "the latents are equal" not in text


def test_missing_reuse_is_reported_for_lossy_variants_only(tmp_path):
    text = Page(write_page(bench_of(), tmp_path)).text
    assert re.findall(r"(\w+): nothing was reused", text) == ["slow"]


def test_what_only_did_the_work_of_the_baseline_has_no_speed_up(tmp_path):
    bench = bench_of()
    slow = bench.arms[-1]
    equal = replace(slow, summary=replace(slow.summary, equal_latents=True))
    text = Page(write_page(replace(bench, arms=(*bench.arms[:-1], equal)), tmp_path)).text
    speed_up = f"{equal.summary.denoise_speed_up.median:.2f}x"
    assert (speed_up in text, text.count("no reuse")) == (False, 2)
    assert "slow: nothing was reused; its times differ from the baseline's by chance." in text
    assert [_row(arm)[2] for arm in (slow, equal)] == [speed_up, "no reuse"]
    assert equal.as_json()["summary"]["denoise_speed_up"] is None
    assert slow.as_json()["summary"]["denoise_speed_up"]["median"] == 1 / slow.time_ratio
    assert equal.time_ratio == 1  # and not below 1 by chance


def test_prompts_names_and_flags_are_escaped(tmp_path):
    bench = bench_of(prompts=[HOSTILE])
    arms = [replace(arm, name=f"{arm.name}{HOSTILE}", flags=HOSTILE) for arm in bench.arms]
    runs = [replace(run, arm=f"{run.arm}{HOSTILE}") for run in bench.runs]
    bench = replace(
        bench,
        arms=tuple(arms),
        runs=tuple(runs),
        command=HOSTILE,
        model=HOSTILE,
        chosen=HOSTILE,
        machine={HOSTILE: HOSTILE},
    )
    text = write_page(bench, tmp_path)
    page, plain = Page(text), Page(write_page(bench_of(prompts=["x"]), tmp_path))
    assert text.count("<script") == 1
    assert page.text.count(HOSTILE) > 10
    assert {attributes["title"] for attributes in page.all("figcaption")} == {
        f"{a}{HOSTILE}" for a in ARMS
    }
    # As many tags as for a harmless bench
    for tag in ("script", "style", "video", "circle", "section", "figure", "svg"):
        assert len(page.all(tag)) == len(plain.all(tag)), tag
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_a_prompt_that_is_not_utf_8_does_not_stop_a_report(tmp_path):
    assert "caf?" in write_page(bench_of(prompts=["caf\udce9"]), tmp_path)


def test_a_page_loads_nothing_from_outside(tmp_path):
    text = write_page(bench_of(), tmp_path)
    page = Page(text)
    assert not re.search(r"https?:|//\w|@import|url\(|<link|<img|<iframe|fetch\(|import\(", text)
    assert {name for name, _ in page.tags if name in ("video", "audio", "source")} == {"video"}
    assert "prefers-color-scheme: dark" in text
    assert "name=viewport" in text.replace('"', "")


def test_small_videos_are_embedded_in_the_page(tmp_path):
    bench = bench_of()
    page = Page(write_page(bench, tmp_path, video=b"\0 bytes of a video"))
    videos = page.all("video")
    assert len(videos) == len(bench.runs)
    for video in videos:
        head, _, data = video["src"].partition(",")
        assert head == "data:video/mp4;base64"
        assert base64.b64decode(data) == b"\0 bytes of a video"
    assert "The videos are embedded in this page" in page.text


def test_large_videos_stay_beside_the_page(tmp_path, monkeypatch):
    bench = bench_of()
    odd = "videos/50% of #1?.mp4"
    bench = replace(bench, runs=(replace(bench.runs[0], video=odd), *bench.runs[1:]))
    size = len(bench.runs) * len(b"a small video")
    monkeypatch.setattr(report, "MAX_EMBEDDED", size)
    assert "data:video" in write_page(bench, tmp_path)
    monkeypatch.setattr(report, "MAX_EMBEDDED", size - 1)
    page = Page(write_page(bench, tmp_path))
    urls = [urlsplit(video["src"]) for video in page.all("video")]
    assert all(not url.scheme and not url.netloc and not url.query for url in urls)
    assert not any(url.fragment for url in urls)
    paths = [(tmp_path / unquote(url.path)).resolve() for url in urls]
    assert paths == [(tmp_path / run.video).resolve() for run in bench.runs]
    assert all(path.is_file() for path in paths)
    assert "keep them together" in page.text


def test_a_row_has_one_control_for_its_videos(tmp_path):
    page = Page(write_page(bench_of(), tmp_path))
    rows = [attributes for attributes in page.all("div") if attributes.get("class") == "row"]
    assert len(rows) == 4  # two prompts, two seeds
    assert {attributes["data-fps"] for attributes in rows} == {"16"}
    scrubs = [attributes for attributes in page.all("input") if attributes["type"] == "range"]
    assert [attributes["max"] for attributes in scrubs] == ["8"] * 4
    assert len(page.all("canvas")) == 4 * 3  # all but the baseline's
    assert all("muted" in video for video in page.all("video"))
    jumps = [
        attributes["data-frame"] for attributes in page.all("button") if "data-frame" in attributes
    ]
    assert jumps == ["5"] * 4 * len(WORST)


def test_a_strip_shows_what_each_forward_computed(tmp_path):
    bench = bench_of(prompts=["x"])
    bench = replace(bench, runs=tuple(run for run in bench.runs if run.arm != "exact"))
    text = write_page(bench, tmp_path)
    strips = [
        ElementTree.fromstring(svg)
        for svg in re.findall(r"<svg viewBox[^>]*preserveAspectRatio.*?</svg>", text, re.S)
    ]
    assert len(strips) == 2 * len(bench.runs)
    (cond, uncond) = strips[2:4]  # those of fast come after the baseline's
    cells, computed = list(cond)[::2], list(cond)[1::2]
    assert ["reused" in cell.attrib["class"] for cell in cells] == [False, False, True, True]
    assert [float(bar.attrib["height"]) for bar in computed] == [1, 1, 0.267, 0.267]
    assert [float(bar.attrib["y"]) for bar in computed] == [0, 0, 0.733, 0.733]
    tips = [cell[0].text for cell in cells]
    assert tips[0] == "step 1, cond: computed, 30 of 30 blocks"
    assert tips[2] == "step 3, cond: reused, 8 of 30 blocks\nresidual 0.0525"
    assert "reused" not in ElementTree.tostring(uncond).decode()
    assert "2 of 4 reused" in Page(text).text


def test_a_minimal_bench_has_a_page(tmp_path):
    alone = run_of("baseline", "x", 0)
    summary = summarize([alone], [alone])
    bench = replace(
        bench_of(),
        arms=(Arm("baseline", "", lossy=False, summary=replace(summary, blocks_all=0)),),
        runs=(replace(alone, uses=()),),
        floor=None,
    )
    text = write_page(bench, tmp_path)
    assert "nan" not in Page(text).text
    assert "another seed</" not in text
    assert text.count("<circle") == 1
    assert "all times are from a single run" in text
    assert "single run" not in write_page(bench_of(), tmp_path)


def test_a_missing_video_is_named(tmp_path):
    with pytest.raises(InputError, match="videos/baseline-0-12.mp4' not found"):
        write_report(bench_of(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_path_is_one_error(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="cannot write") as caught:
        write_page(bench_of(), tmp_path)
    assert caught.value.hint == "another `output`"
    assert not list(tmp_path.glob(".*"))
