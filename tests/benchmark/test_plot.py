import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from tests.benchmark.test_cases import ARMS, bench_of
from tests.benchmark.test_report import Page, write_page
from wancli.benchmark.cases import NoiseFloor, SpeedUp


def plot_of(page: str) -> ElementTree.Element:
    svg = re.search(r'<svg class="plot".*?</svg>', page, re.S)
    assert svg
    return ElementTree.fromstring(svg[0])


def dots(page: str) -> dict[str, tuple[float, float]]:
    """Position of each variant in the plot, by the first line of its tooltip."""
    circles = list(plot_of(page).iter("circle"))
    return {
        str(circle[0].text).splitlines()[0]: (
            float(circle.attrib["cx"]),
            float(circle.attrib["cy"]),
        )
        for circle in circles
    }


def test_the_plot_shows_speed_against_the_worst_frame(tmp_path):
    at = dots(write_page(bench_of(), tmp_path))
    assert list(at) == list(ARMS)
    across = {name: x for name, (x, _) in at.items()}
    up = {name: -y for name, (_, y) in at.items()}
    assert across["slow"] < across["baseline"] < across["exact"] < across["fast"]
    assert up["fast"] < up["slow"] < up["exact"] < up["baseline"]
    # the axis is linear
    speed = {arm.name: arm.summary.denoise_speed_up.median for arm in bench_of().arms}
    one, two = across["exact"] - across["baseline"], across["fast"] - across["baseline"]
    assert one / two == pytest.approx((speed["exact"] - 1) / (speed["fast"] - 1), abs=0.005)


def test_the_pareto_front_passes_through_undominated_variants(tmp_path):
    bench = bench_of()
    page = write_page(replace(bench, arms=bench.arms[::-1]), tmp_path)
    (line,) = plot_of(page).iter("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    at = dots(page)
    assert points == [at["baseline"], at["exact"], at["fast"]]


def floor_line(page: str) -> float:
    (line,) = [line for line in plot_of(page).iter("line") if line.attrib["class"] == "dashed"]
    return float(line.attrib["y1"])


def test_another_seed_is_a_dashed_line_on_the_plot(tmp_path):
    page = write_page(replace(bench_of(), floor=NoiseFloor(0.8, 0.6, 2)), tmp_path)
    at = dots(page)
    assert "another seed" in plot_text(page)
    shares = (floor_line(page) - at["baseline"][1]) / (at["fast"][1] - at["baseline"][1])
    assert shares == pytest.approx((1 - 0.6) / (1 - 0.8123), abs=0.01)


def test_another_seed_far_below_is_shown_at_the_bottom(tmp_path):
    page = write_page(replace(bench_of(), floor=NoiseFloor(0.8, 0.1234, 2)), tmp_path)
    assert "another seed: 0.123, far below" in plot_text(page)
    assert dots(page)["fast"][1] < floor_line(page) < 380


def test_a_target_has_its_own_line(tmp_path):
    assert "target" not in plot_text(write_page(bench_of(), tmp_path))
    bench = replace(bench_of(), target_ssim=0.9, chosen="slow")
    page = write_page(bench, tmp_path)
    assert "target" in plot_text(page)
    assert "Chosen: slow." in Page(page).text


def plot_text(page: str) -> list[str]:
    return [text.text or "" for text in plot_of(page).iter("text")]


def test_labels_of_equal_variants_do_not_overlap(tmp_path):
    bench = bench_of()
    same = bench.arms[1]
    same = replace(same, summary=replace(same.summary, ssim_worst=1.0))  # at the top
    arms = (bench.arms[0], *(replace(same, name=f"copy {i} {'long ' * 9}") for i in range(4)))
    plot = plot_of(write_page(replace(bench, arms=arms), tmp_path))
    names = [text for text in plot.iter("text") if text.attrib.get("class", "").startswith("name")]
    heights = sorted(float(text.attrib["y"]) for text in names[1:])
    assert len(names) == 5
    assert heights[0] > 30  # below the heading
    assert all(b - a >= 15 for a, b in pairwise(heights))
    assert max(len(text.text or "") for text in names) < 25


@pytest.mark.parametrize("ratio", [0.001, 1.0, 40.0])
def test_the_plot_stays_in_its_frame_for_extreme_numbers(tmp_path, ratio):
    bench = bench_of()
    speed = SpeedUp(ratio, ratio / 2, ratio * 2)
    last = replace(bench.arms[3].summary, denoise_speed_up=speed, ssim_worst=-0.2)
    bench = replace(bench, arms=(*bench.arms[:3], replace(bench.arms[3], summary=last)))
    plot = plot_of(write_page(bench, tmp_path))
    _, _, width, height = map(float, plot.attrib["viewBox"].split())
    for circle in plot.iter("circle"):
        assert 0 < float(circle.attrib["cx"]) < width
        assert 0 < float(circle.attrib["cy"]) < height
    ticks = [text.text or "" for text in plot.iter("text") if (text.text or "").endswith("x")]
    assert len(set(ticks)) == len(ticks) > 2
