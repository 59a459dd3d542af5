"""The report's charts: matplotlib draws them, the page's colours and fonts dress them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 520
"""Units of every chart's view box; the page scales it to the column."""
_COLOURS = ("", "rule", "soft", "before", "after", "invert", "punish", "retain", "unjudged")
"""Colours of the page; matplotlib draws in the shade of blue that is a colour's place here."""
_STYLE = {
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.unicode_minus": False,
    "font.size": 12,
    "grid.color": "#000001",
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "xtick.bottom": False,
    "ytick.left": False,
}


def intervals(
    rows: Sequence[tuple[str, Sequence[tuple[str, Mapping[str, float]]]]],
    title: str = "agreement with the policy, before and after",
) -> Markup:
    """Draw estimates with their intervals on a scale of 0 to 100%.

    Args:
        rows: (label, [(colour, {value, ci_low, ci_high})]), one line each under their label.
        title: what the chart shows, for readers of the page without eyes on it.
    """
    height = sum(26 + 18 * len(marks) for _, marks in rows)

    def draw(axes: Axes) -> None:
        axes.set(xlim=(0, 1), ylim=(height, 0), xticks=np.linspace(0, 1, 5), yticks=[])
        axes.xaxis.set_major_formatter("{x:.0%}")
        y = 0
        for label, marks in rows:
            # A longer one would leave a phone's screen; its end tells the rows of a model apart.
            words = label if len(label) <= 52 else f"{label[:30]}…{label[-21:]}"
            axes.text(0, y + 12, words)
            y += 26
            for colour, value in marks:
                shade = _shade(colour)
                axes.plot((value["ci_low"], value["ci_high"]), (y, y), color=shade, lw=3)
                axes.plot((value["value"],) * 2, (y, y), color=shade, lw=10)
                words, end = f"{100 * value['value']:.0f}%", (value["ci_high"], y)
                axes.annotate(words, end, (9, -4), textcoords="offset points")
                y += 18

    return _svg(draw, height, title, (4, 60, 22, 20))


def flow(source: str, parts: Sequence[tuple[str, str, int]]) -> Markup:
    """Draw one bar and, under it, the parts it splits into, each from where the last one ends.

    Args:
        source: label of the whole.
        parts: (label, colour, count).
    """
    total = sum(count for _, _, count in parts)
    rows = [(source, "soft", total)]
    for label, colour, count in parts:
        rows.append((f"{label}: {count} ({100 * count / (total or 1):.0f}%)", colour, count))

    def draw(axes: Axes) -> None:
        axes.set(xlim=(0, total or 1), ylim=(40 * len(rows), 0), xticks=[], yticks=[])
        left = 0
        for place, (words, colour, count) in enumerate(rows):
            y, shade = 40 * place, _shade(colour)
            axes.text(0, y + 14, words)
            # The outline shows a part too small for its area to be seen.
            axes.barh(y + 27, count, 12, left, color=shade, ec=shade, lw=1 if count else 0)
            left += count if place else 0

    return _svg(draw, 40 * len(rows), "what became of each preference pair", (4, 1, 4, 1))


def histogram(groups: Sequence[tuple[str, str, Sequence[float]]], unit: str) -> Markup:
    """Draw stacked counts of values in 24 bins.

    Args:
        groups: (label, colour, values).
        unit: what the horizontal axis shows.
    """

    def draw(axes: Axes) -> None:
        values, shades = [each for _, _, each in groups], [_shade(name) for _, name, _ in groups]
        axes.hist(values, 24, stacked=True, histtype="stepfilled", color=shades)
        axes.set(title="count", xlabel=unit)
        axes.locator_params("y", nbins=3, integer=True)
        axes.yaxis.set_major_formatter("{x:g}")

    return _svg(draw, 120, unit)


def lines(series: Sequence[tuple[str, Sequence[float], Sequence[float]]], unit: str) -> Markup:
    """Draw curves over steps, each thicker than the one before it.

    Args:
        series: (colour, steps, values).
        unit: what the vertical axis shows.
    """

    def draw(axes: Axes) -> None:
        for place, (colour, at, found) in enumerate(series):
            shade = _shade(colour)
            axes.plot(at, found, color=shade, lw=1.5 + place)
            # A dot, for a curve of one step is a line of no length.
            axes.plot([at[-1]] * 2, [found[-1]] * 2, color=shade, lw=6)
        first, last = min(at[0] for _, at, _ in series), max(at[-1] for _, at, _ in series)
        axes.set(title=unit, xlabel="step", xlim=(first, max(last, first + 1)))
        axes.set_ylim(min(0, axes.dataLim.y0))
        axes.locator_params("x", integer=True)
        axes.locator_params("y", nbins=4)
        axes.yaxis.set_major_formatter("{x:g}")

    return _svg(draw, 140, unit)


def _shade(colour: str) -> str:
    return f"#0000{_COLOURS.index(colour):02x}"


def _svg(
    draw: Callable[[Axes], None],
    height: float,
    title: str,
    margins: tuple[float, float, float, float] = (24, 24, 40, 56),
) -> Markup:
    """Return the paths and texts of what matplotlib draws: no id, reference or font is left.

    Args:
        draw: what draws into axes.
        height: theirs.
        title: the chart's, for readers of the page without eyes on it.
        margins: around the axes: above, right, below, left.
    """
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    above, right, below, left = margins
    whole, file = above + height + below, io.StringIO()
    place = (left / WIDTH, below / whole, (WIDTH - left - right) / WIDTH, height / whole)
    with style.context(["default", _STYLE]):
        figure = Figure((WIDTH / 72, whole / 72), frameon=False)
        draw(figure.add_axes(place, frameon=False))
        for text in figure.findobj(Text):
            # In ASCII on its way: fonts lack glyphs, and XML has no control characters.
            text.set_text(text.get_text().encode("unicode_escape").decode())
        figure.savefig(file, format="svg")
    parts = []
    for element in ElementTree.fromstring(file.getvalue()).iter():
        css = element.get("style", "")
        if element.tag.endswith("}path"):
            css = re.sub(r"#0000(..)", lambda m: f"var(--{_COLOURS[int(m[1], 16)]})", css)
            path = " ".join(_short(element.get("d", "")).split())
            parts.append(Markup('<path style="{}" d="{}"/>').format(css, path))
        elif element.tag.endswith("}text"):
            words = (element.text or "").encode().decode("unicode_escape")
            at = (_short(element.get("x", "")), _short(element.get("y", "")))
            tag = '<text x="{}" y="{}" text-anchor="{}">{}</text>'
            parts.append(Markup(tag).format(*at, css.partition("text-anchor: ")[2], words))
    return Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, whole, title, Markup("").join(parts)
    )


def _short(numbers: str) -> str:
    return re.sub(r"\d+\.\d+", lambda m: f"{float(m[0]):.1f}", numbers)
