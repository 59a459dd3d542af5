"""The page's charts: matplotlib's paths and texts, in the page's colours."""

import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from trace_ray.rollout import charts

CSS = (Path(charts.__file__).with_name("page.css.j2")).read_text()
HOSTILE = "<script>$x^2$ & \\n #000003 模型"


def mark(value, low=None, high=None):
    return {"value": value, "ci_low": low or value, "ci_high": high or value}


BOTH = [("before", mark(0.3, 0.2, 0.4)), ("after", mark(0.8, 0.7, 0.9))]
CHARTS = {
    "intervals": lambda: charts.intervals([("one", BOTH), ("two", BOTH[1:])]),
    "one row, at the ends": lambda: charts.intervals(
        [("m", [("before", mark(0)), ("after", mark(1))])]
    ),
    "flow": lambda: charts.flow(
        "8 pairs", [("invert", "invert", 1), ("retain", "retain", 6), ("no", "unjudged", 1)]
    ),
    "flow of nothing": lambda: charts.flow("0 pairs", [("invert", "invert", 0)]),
    "flow without parts": lambda: charts.flow("0 pairs", []),
    "histogram": lambda: charts.histogram(
        [("a", "invert", [0.1, 0.2, 0.2]), ("b", "punish", [0.2, 1])], "weight"
    ),
    "equal values": lambda: charts.histogram(
        [("a", "invert", [0.5] * 9), ("b", "punish", [])], "weight"
    ),
    "no values": lambda: charts.histogram([("a", "invert", [])], "weight"),
    "lines": lambda: charts.lines(
        [("after", [1, 2, 3], [3.5, 1, 0.25]), ("before", [1, 2, 3], [3, 2, 1])], "loss"
    ),
    "one step": lambda: charts.lines([("after", [7], [0.7]), ("before", [7], [0.7])], "loss"),
    "zeros": lambda: charts.lines([("after", [1, 2], [0, 0])], "loss"),
    "below zero": lambda: charts.lines([("after", [1, 2], [-1, -2])], "loss"),
    "no number": lambda: charts.lines([("after", [1, 2], [float("nan"), float("inf")])], "loss"),
}


def words(svg):
    return [each.text for each in ElementTree.fromstring(svg).iter("text")]


@pytest.mark.parametrize("draw", CHARTS.values(), ids=CHARTS)
@pytest.mark.filterwarnings("error")
def test_a_chart_is_paths_and_texts_in_the_colours_of_the_page(draw):
    svg = draw()
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "svg.fonttype": "path"}):
        assert draw() == svg, "not of the input alone"
    root = ElementTree.fromstring(svg)
    assert root.attrib.keys() == {"viewBox", "role", "aria-label"}
    assert root.get("role") == "img"
    _, _, width, height = map(float, root.get("viewBox").split())
    for each in root:
        assert each.tag in ("path", "text")
        if each.tag == "text":
            assert each.attrib.keys() == {"x", "y", "text-anchor"}
            x, y = float(each.get("x")), float(each.get("y"))
        else:
            assert each.attrib.keys() == {"style", "d"}
            for colour in re.findall(r"(?:fill|stroke): ([^;]*)", each.get("style")):
                name = re.fullmatch(r"var\((--\w+)\)", colour)
                assert colour == "none" or f"{name[1]}: #" in CSS
            x, y = 0, 0
            for pair in re.findall(r"(\S+) (\S+)(?= [A-Zz]|$)", each.get("d")):
                x, y = max(x, float(pair[0])), max(y, float(pair[1]))
        assert 0 <= x <= width
        assert 0 <= y <= height


def test_a_label_is_text_whatever_it_holds():
    assert HOSTILE in words(charts.intervals([(HOSTILE, BOTH)], HOSTILE))
    assert HOSTILE in words(charts.flow(HOSTILE, []))
    assert HOSTILE in words(charts.histogram([("", "invert", [1])], HOSTILE))
    assert HOSTILE in words(charts.lines([("after", [1], [1])], HOSTILE))
    assert "\x00\x1b" in charts.intervals([("\x00\x1b", BOTH)])


def test_a_long_label_keeps_its_start_and_its_end():
    found = words(charts.intervals([(f"{'long-' * 30}name: invert", BOTH)]))
    (label,) = [each for each in found if "…" in each]
    assert len(label) <= 52
    assert label.startswith("long-")
    assert label.endswith("name: invert")


def test_counts_and_shares_are_written_and_the_smallest_part_is_seen():
    svg = charts.flow("10000 pairs", [("few", "punish", 1), ("most", "retain", 9999)])
    assert words(svg) == ["10000 pairs", "few: 1 (0%)", "most: 9999 (100%)"]
    assert svg.count("stroke: var(--punish)") == 1
    assert "stroke" not in charts.flow("0 pairs", [("none", "punish", 0)])


def test_one_step_is_a_dot():
    assert re.search(r'stroke-linecap: round" d="M ([\d. ]+) L \1"', CHARTS["one step"]())
    assert {"7", "8", "loss", "step"} <= set(words(CHARTS["one step"]()))
