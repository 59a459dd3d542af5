"""Small SVG charts for the report: plain elements, classes for colour, every text escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

WIDTH = 520
"""Units of every chart's view box; the page scales it to the column."""
_LEFT, _RIGHT = 126, 16


def intervals(
    rows: Sequence[tuple[str, Sequence[tuple[str, Mapping[str, float]]]]],
    title: str = "agreement with the policy, before and after",
) -> Markup:
    """Draw estimates with their intervals on a scale of 0 to 100%.

    Args:
        rows: (label, [(css class, {value, ci_low, ci_high})]), one line each.
        title: what the chart shows, for readers of the page without eyes on it.
    """
    span = WIDTH - _LEFT - _RIGHT - 40
    parts, y = [], 8
    for label, marks in rows:
        middle = y + 9 * len(marks)
        parts.append(_text(_LEFT - 10, middle + 4, label, "end"))
        for css, value in marks:
            at, low, high = (_LEFT + span * value[key] for key in ("value", "ci_low", "ci_high"))
            y += 9
            parts.append(_line(low, y, high, y, f"{css} thick"))
            parts.append(
                Markup('<circle class="{}" cx="{:.1f}" cy="{}" r="5"/>').format(css, at, y)
            )
            parts.append(_text(high + 8, y + 4, f"{100 * value['value']:.0f}%"))
            y += 9
        y += 10
    grid = [
        _line(_LEFT + span * share, 4, _LEFT + span * share, y - 4, "grid")
        + _text(_LEFT + span * share, y + 10, f"{100 * share:.0f}%", "middle")
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    return _svg([*grid, *parts], y + 18, title)


def flow(source: str, parts: Sequence[tuple[str, str, int]]) -> Markup:
    """Draw one bar that splits into parts, as wide as their counts.

    Args:
        source: label of the whole.
        parts: (label, css class, count).
    """
    total = sum(count for _, _, count in parts) or 1
    height, gap, top = 170, 10, 10
    scale = (height - gap * (len(parts) - 1)) / total
    left, right = _LEFT, WIDTH - 160
    y_from = top + (height - total * scale) / 2
    drawn = [_text(left - 10, top + height / 2, source, "end")]
    y_to = float(top)
    for label, css, count in parts:
        thick = count * scale
        middle = (left + right) / 2
        path = (
            f"M{left},{y_from:.1f} C{middle},{y_from:.1f} {middle},{y_to:.1f} {right},{y_to:.1f} "
            f"v{thick:.1f} C{middle},{y_to + thick:.1f} {middle},{y_from + thick:.1f} "
            f"{left},{y_from + thick:.1f} Z"
        )
        drawn.append(Markup('<path class="{} flow" d="{}"/>').format(css, path))
        words = f"{label}: {count} ({100 * count / total:.0f}%)"
        drawn.append(_text(right + 10, y_to + thick / 2 + 4, words))
        y_from, y_to = y_from + thick, y_to + max(thick, 8) + gap
    return _svg(drawn, max(y_to, top + height) + 6, "what became of each preference pair")


def histogram(groups: Sequence[tuple[str, str, Sequence[float]]], unit: str) -> Markup:
    """Draw stacked counts of values in 24 bins.

    Args:
        groups: (label, css class, values).
        unit: what the horizontal axis shows.
    """
    values = np.concatenate([np.asarray(each, float) for _, _, each in groups])
    edges = np.histogram_bin_edges(values, bins=24)
    counts = [np.histogram(each, edges)[0] for _, _, each in groups]
    height, top, left = 110, 10, 40
    tallest = max(1, int(np.sum(counts, axis=0).max()))
    width = (WIDTH - left - _RIGHT) / (len(edges) - 1)
    below = np.zeros(len(edges) - 1)
    parts = [
        _text(left - 6, top + 8, str(tallest), "end"),
        _text(left - 6, top + height, "0", "end"),
    ]
    for (_, css, _), count in zip(groups, counts, strict=True):
        for place, number in enumerate(count):
            tall = height * number / tallest
            y = top + height - tall - height * below[place] / tallest
            parts.append(
                Markup(
                    '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
                ).format(css, left + place * width, y, width - 1, tall)
            )
        below += count
    parts.append(_line(left, top + height, WIDTH - _RIGHT, top + height, "grid"))
    for place in (0, 12, 24):
        x = left + place * width
        parts.append(_text(x, top + height + 14, f"{edges[place]:.2g}", "middle"))
    parts.append(_text(WIDTH / 2, top + height + 30, unit, "middle"))
    return _svg(parts, top + height + 36, unit)


def lines(series: Sequence[tuple[str, Sequence[float], Sequence[float]]], unit: str) -> Markup:
    """Draw curves over steps.

    Args:
        series: (css class, steps, values).
        unit: what the vertical axis shows.
    """
    steps = np.concatenate([np.asarray(each, float) for _, each, _ in series])
    values = np.concatenate([np.asarray(each, float) for _, _, each in series])
    height, top, left = 130, 18, 48
    low, high = min(0.0, float(values.min())), float(values.max()) or 1.0
    first, last = float(steps.min()), max(float(steps.max()), float(steps.min()) + 1)

    def y_of(value: float) -> float:
        return top + height * (high - value) / (high - low or 1)

    parts = [_line(left, y_of(v), WIDTH - _RIGHT, y_of(v), "grid") for v in (low, high)]
    parts += [_text(left - 6, y_of(v) + 4, f"{v:.3g}", "end") for v in (low, high)]
    parts += [_text(left, 12, unit)]
    for css, at, found in series:
        points = " ".join(
            f"{left + (WIDTH - left - _RIGHT) * (step - first) / (last - first):.1f},{y_of(v):.1f}"
            for step, v in zip(at, found, strict=True)
        )
        parts.append(Markup('<polyline class="{}" points="{}"/>').format(css, points))
    parts += [_text(left, top + height + 16, f"step {first:.0f}")]
    parts += [_text(WIDTH - _RIGHT, top + height + 16, f"{last:.0f}", "end")]
    return _svg(parts, top + height + 22, unit)


def _svg(parts: Sequence[Markup], height: float, title: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, title, Markup("").join(parts)
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        x, y, anchor, text
    )


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        css, x1, y1, x2, y2
    )
