"""Line charts side by side as an SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 300, 150
"""Of a chart's axes."""
LEFT, TOP, BOTTOM, GAP = 46, 64, 40, 24
ACROSS = 3
COLOURS = ("#0952a5", "#c2571a", "#2a7f3f", "#8a3ea8", "#57606a")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2")
"""Lines differ by more than colour."""

STYLE = """
    text { font: 10px system-ui, sans-serif; fill: #1f2328; }
    .page { fill: #ffffff; }
    .chart { font-size: 13px; font-weight: 600; }
    .note { fill: #57606a; }
    .x { text-anchor: middle; }
    .y { text-anchor: end; }
    .grid { stroke: #d0d7de; stroke-width: 1; }
    .line { fill: none; stroke-width: 1.8; }
"""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """`lines[name]` has a number from 0 for each of `columns`; None leaves a gap. `top` is the axis' end."""

    title: str
    note: str
    columns: Sequence[str]
    lines: Mapping[str, Sequence[float | None]]
    top: float | None = None


def line_charts(title: str, charts: Sequence[Chart]) -> str:
    """The SVG's text."""
    cell_w, cell_h = LEFT + WIDTH + GAP, TOP + HEIGHT + BOTTOM
    parts = []
    for i, chart in enumerate(charts):
        parts += _draw(chart, LEFT + i % ACROSS * cell_w, TOP + i // ACROSS * cell_h)
    width = min(len(charts), ACROSS) * cell_w + GAP
    height = -(-len(charts) // ACROSS) * cell_h
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title">\n'
        f'<title id="title">{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f'<rect class="page" width="{width}" height="{height}"/>\n{body}\n</svg>\n'
    )


def _draw(chart: Chart, x: float, y: float) -> list[str]:
    values = [value for line in chart.lines.values() for value in line if value is not None]
    top = chart.top or nice(max(values, default=1.0))
    parts = [_text(x, y - 46, chart.title, "chart"), _text(x, y - 31, chart.note, "note")]
    for share in (0.0, 0.5, 1.0):
        at = y + HEIGHT * (1 - share)
        parts.append(f'<line class="grid" x1="{x:.0f}" y1="{at:.0f}" x2="{x + WIDTH:.0f}" y2="{at:.0f}"/>')
        parts.append(_text(x - 6, at + 3, f"{top * share:.3g}", "y"))
    step = WIDTH / max(1, len(chart.columns))
    shown = -(-len(chart.columns) // 12)  # no more labels than there is room for
    for c, column in enumerate(chart.columns):
        if c % shown == 0:
            parts.append(_text(x + step * (c + 0.5), y + HEIGHT + 14, column, "x"))
    legend = x
    for number, (name, line) in enumerate(chart.lines.items()):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        pen = f'class="line" stroke="{colour}" stroke-dasharray="{dash}"'
        parts.append(f'<path {pen} d="M{legend:.0f} {y - 15:.0f}h18"/>')
        parts.append(_text(legend + 22, y - 12, name))
        legend += 36 + 6 * len(name)
        path, pen_down = "", False
        for c, value in enumerate(line):
            if value is None:
                pen_down = False
                continue
            at_x, at_y = x + step * (c + 0.5), y + HEIGHT * (1 - min(value, top) / top)
            path += f"{'L' if pen_down else 'M'}{at_x:.1f} {at_y:.1f}"
            pen_down = True
            parts.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="2.2" fill="{colour}"/>')
        parts.append(f'<path {pen} d="{path}"/>')
    return parts


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.0f}" y="{y:.0f}"{kind}>{escape(text)}</text>'


def nice(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... that is not below.

    >>> nice(3.2), nice(0.7), nice(10)
    (5.0, 1.0, 10.0)
    """
    if not value > 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * n for n in (1, 2, 5, 10) if unit * n >= value)
