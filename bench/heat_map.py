"""A picture of many small tables as an SVG: sections of lines of panels, each cell its number on a colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

CELL_W, CELL_H = 44, 17
LABEL_W = 116
"""Of the rows' labels, at least."""
LETTER_W = 6.0
"""Of labels and notes, about."""
GAP = 14
HEAD = 34
"""Above a panel's cells: its title, and what the columns are."""

EVEN = (246, 248, 250)
MORE = (9, 82, 165)
LESS = (190, 30, 40)
NEAR_ONE = 0.01
"""Ratios this near to 1 have no colour."""

STYLE = """
    text { font: 10px system-ui, sans-serif; fill: #1f2328; text-anchor: middle; }
    .page { fill: #ffffff; }
    .section { font-size: 15px; font-weight: 600; text-anchor: start; }
    .note { font-size: 11px; fill: #57606a; text-anchor: start; }
    .panel { font-size: 11px; font-weight: 600; text-anchor: start; }
    .row { font-size: 11px; text-anchor: end; }
    .light { fill: #ffffff; }
"""


@dataclass(frozen=True)
class Panel:
    """`values[row, column]` are ratios above 0, 1 for no difference; a missing one leaves its place empty."""

    title: str
    values: Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Line:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Section:
    """Lines of panels that have the rows and columns in common. `top` is the ratio of the darkest colour."""

    title: str
    note: str
    rows: Sequence[str]
    columns: Sequence[str]
    lines: Sequence[Line]
    top: float = 8.0


@dataclass
class _Canvas:
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        kind = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:.0f}" y="{y:.0f}"{kind}>{escape(text)}</text>')

    def cells(self, x: float, y: float, count: int, colour: tuple[int, int, int]) -> None:
        """So many in a line, of one colour."""
        fill = "#{:02x}{:02x}{:02x}".format(*colour)
        size = f'width="{count * CELL_W - 1}" height="{CELL_H - 1}"'
        self.parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" {size} fill="{fill}"/>')


def heat_map(title: str, sections: Sequence[Section]) -> str:
    """The SVG's text. Raises ValueError for a value that is not a ratio."""
    canvas = _Canvas()
    label_w = max([LABEL_W, *(LETTER_W * len(row) + GAP for section in sections for row in section.rows)])
    width = 0.0
    y = 2 * GAP
    for section in sections:
        panel_w = CELL_W * len(section.columns) + GAP
        width = max(width, 2 * GAP + LETTER_W * len(section.note))
        canvas.text(GAP, y, section.title, "section")
        canvas.text(GAP, y + 18, section.note, "note")
        y += 18 + GAP
        for line in section.lines:
            canvas.text(GAP, y + 11, line.title, "panel")
            for r, row in enumerate(section.rows):
                canvas.text(GAP + label_w - 6, y + HEAD + CELL_H * (r + 0.5) + 3, row, "row")
            for i, panel in enumerate(line.panels):
                _panel(canvas, section, panel, GAP + label_w + i * panel_w, y)
            y += HEAD + CELL_H * len(section.rows) + GAP
            width = max(width, 2 * GAP + label_w + len(line.panels) * panel_w)
        y += GAP
    body = "\n".join(canvas.parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {y:g}" role="img" aria-labelledby="title">\n'
        f'<title id="title">{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f'<rect class="page" width="{width:g}" height="{y:g}"/>\n{body}\n</svg>\n'
    )


def _panel(canvas: _Canvas, section: Section, panel: Panel, x: float, y: float) -> None:
    canvas.text(x, y + 11, panel.title, "panel")
    for c, column in enumerate(section.columns):
        canvas.text(x + CELL_W * (c + 0.5), y + HEAD - 6, column)
    for r, row in enumerate(section.rows):
        top = y + HEAD + CELL_H * r
        values = [
            (c, panel.values[row, column]) for c, column in enumerate(section.columns) if (row, column) in panel.values
        ]
        if values:
            canvas.cells(x, top, len(section.columns), EVEN)
        for c, value in values:
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{panel.title}, {row}, {section.columns[c]}: {value} is not a ratio")
            shade = colour(value, section.top)
            if shade != EVEN:
                canvas.cells(x + CELL_W * c, top, 1, shade)
            dark = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 140
            canvas.text(x + CELL_W * (c + 0.5), top + 12, number(value), "light" if dark else "")


def colour(ratio: float, top: float) -> tuple[int, int, int]:
    """Even at 1, bluer above it up to `top`, redder below it down to 1 / top; by the logarithm."""
    if abs(ratio - 1) <= NEAR_ONE:
        return EVEN
    end = MORE if ratio > 1 else LESS
    # The first step is visible: what differs at all should look so.
    share = min(1.0, 0.12 + 0.88 * abs(math.log(ratio)) / math.log(top))
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(EVEN, end, strict=True))
    return red, green, blue


def number(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:.0f}"
