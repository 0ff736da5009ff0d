"""Pictures of numbers as inline SVG.

Places along x are shares of the width, so that texts keep their size and a picture fits a phone as it fits a page;
places along y are pixels. Every mark has a title, which is shown where the pointer is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eightfold.report.page import joined, rounded, visible

ROW = 20  # pixels of a row of cells
_TICKS = 8  # at most so many numbers below a picture
_COLOURS = 7  # of squares: s0 to s6 of the style
_FEW = 48  # columns that leave room for a mark of the usual size


@dataclass(frozen=True)
class Cell:
    """A square of a grid."""

    style: str
    title: str
    is_marked: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a grid: None for a square that there is not."""

    label: str
    cells: Sequence[Cell | None]


@dataclass(frozen=True)
class Reach:
    """A column of reaches(): what is usual, the most there was, and what to say about it; None where nothing is."""

    usual: float
    most: float
    title: str


@dataclass(frozen=True)
class Bar:
    """A bar of bars()."""

    label: str
    value: float
    text: str  # the value, as people read it
    note: str = ""
    style: str = "accent"
    most: float | None = None  # a limit, which is drawn behind it


def svg(content: Markup, label: str, height: float, style: str = "") -> Markup:
    """Return a picture; `label` says what it shows to those who do not see it."""
    return Markup('<svg class="{}" role="img" aria-label="{}" height="{}">\n{}\n</svg>').format(
        style, visible(label), _px(height), content
    )


def grid(rows: Sequence[Row], columns: Sequence[str], label: str, unit: str, style: str = "left-m") -> Markup:
    """Return rows of squares over numbered columns.

    Args:
        rows: each with as many squares as there are columns.
        columns: what each is called, usually a number.
        label: what it shows.
        unit: what a column is, for the axis.
        style: how much room row labels have: left-s, left-m or left-l.
    """
    width, radius = 100 / max(len(columns), 1), 2.6 if len(columns) <= _FEW else 1.6
    parts: list[Markup] = []
    for at, row in enumerate(rows):
        middle = at * ROW + ROW / 2
        parts.append(_text("-8px", middle + 4, row.label, "end", "name"))
        for column, cell in enumerate(row.cells):
            if cell is None:
                continue
            parts.append(
                Markup('<rect class="cell {}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                    cell.style, _share(column * width), at * ROW, _share(width), ROW, visible(cell.title)
                )
            )
            if cell.is_marked:
                parts.append(
                    Markup('<circle class="dot" cx="{}" cy="{}" r="{}"/>').format(
                        _share((column + 0.5) * width), _px(middle), radius
                    )
                )
    parts += _ticks(columns, len(rows) * ROW + 14, unit)
    return svg(joined(parts, "\n"), label, len(rows) * ROW + 18, style)


def reaches(columns: Sequence[Reach | None], names: Sequence[str], ends: tuple[int, int], label: str) -> Markup:
    """Return for each column a bar of what is usual and a line to the most, over a scale of powers of ten.

    Args:
        columns: in order.
        names: of the columns.
        ends: the powers of ten between which the scale lies.
        label: what it shows.
    """
    height, width = 110, 100 / max(len(columns), 1)
    low, high = ends

    def y(value: float) -> float:
        share = (math.log10(max(value, 10.0**low)) - low) / max(high - low, 1)
        return height * (1 - min(share, 1.0))

    parts = [_rule(y(10.0**power), _plain_power(power)) for power in range(low, high + 1, max(1, (high - low) // 4))]
    for at, each in enumerate(columns):
        if each is None:
            continue
        usual, most, middle = y(each.usual), y(each.most), _share((at + 0.5) * width)
        parts += [
            Markup('<rect class="ordinary" x="{}" y="{}" width="{}" height="{}"/>').format(
                _share((at + 0.14) * width), _px(usual), _share(0.72 * width), _px(height - usual)
            ),
            Markup('<line class="reach" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(middle, _px(usual), _px(most)),
            Markup('<circle class="outlier" cx="{}" cy="{}" r="{}"/>').format(
                middle, _px(most), 2.8 if len(columns) <= _FEW else 1.8
            ),
            _zone(at, width, height, each.title),
        ]
    parts += _ticks(names, height + 16, "layer")
    return svg(joined(parts, "\n"), label, height + 20, "left-s")


def bars(entries: Sequence[Bar], label: str, most: float | None = None) -> Markup:
    """Return bars, each below what it says; the longest fills the width unless `most` does."""
    longest = most or max((max(each.value, each.most or 0.0) for each in entries), default=0.0) or 1.0
    found = []
    for each in entries:
        whole = 100 if each.most is None else 100 * each.most / longest
        picture = Markup(
            '<svg aria-hidden="true" height="9"><rect class="track" width="{}" height="9" rx="2"/>'
            '<rect class="{}" width="{}" height="9" rx="2"/></svg>'
        ).format(_share(whole), each.style, _share(100 * min(each.value / longest, 1.0)))
        note = Markup("<small>{}</small>").format(visible(each.note)) if each.note else ""
        found.append(
            Markup('<li><div class="line"><b>{}</b><span class="value">{}</span></div>{}{}</li>').format(
                visible(each.label), visible(each.text), picture, note
            )
        )
    return Markup('<ol class="bars" aria-label="{}">\n{}\n</ol>').format(visible(label), joined(found, "\n"))


def stack(parts: Sequence[tuple[str, float, str]], whole: float, label: str) -> Markup:
    """Return one bar made of parts: (style, size, title), where `whole` fills the width."""
    at, found = 0.0, [Markup('<rect class="track" width="100%" height="22" rx="3"/>')]
    for style, size, title in parts:
        width = 100 * size / whole if whole else 0.0
        found.append(
            Markup('<rect class="cell {}" x="{}" width="{}" height="22"><title>{}</title></rect>').format(
                style, _share(at), _share(width), visible(title)
            )
        )
        at += width
    return svg(joined(found), label, 22)


def columns(values: Sequence[float], titles: Sequence[str], names: Sequence[str], label: str, unit: str) -> Markup:
    """Return columns over a linear scale that begins at 0: a histogram, or values by place."""
    height, width = 120, 100 / max(len(values), 1)
    top = _round_above(max(values, default=0.0))
    parts = [_rule(height * (1 - share), rounded(top * share)) for share in (0, 0.5, 1)]
    for at, (value, title) in enumerate(zip(values, titles, strict=True)):
        tall = height * value / top
        parts += [
            Markup('<rect class="accent" x="{}" y="{}" width="{}" height="{}"/>').format(
                _share((at + 0.1) * width), _px(height - tall), _share(0.8 * width), _px(tall)
            ),
            _zone(at, width, height, title),
        ]
    parts += _ticks(names, height + 16, unit)
    return svg(joined(parts, "\n"), label, height + 20, "left-s")


def _round_above(value: float) -> float:
    """Return the next of 1, 2, 4, 6, 8 or 10 times a power of ten, at least the value."""
    if value <= 0:
        return 1.0
    power = math.floor(math.log10(value))
    return next(top for factor in (1, 2, 4, 6, 8, 10, 20) if (top := float(f"{factor}e{power}")) >= value)


def steps(values: Sequence[float]) -> list[float]:
    """Return thresholds of colours, least first, the last below the largest value.

    They are 1, 3, 10, 30 ... times a power of ten, or powers of ten where more than a third of the values would lie
    below the first.
    """
    most = max(values, default=0.0) or 1e-2
    fine, coarse = (_below(most, factors) for factors in ((3, 1), (1,)))
    return fine if sum(value < fine[0] for value in values) <= len(values) / 3 else coarse


def _below(most: float, factors: Sequence[int]) -> list[float]:
    power = math.floor(math.log10(most))
    found = [float(f"{factor}e{power - at}") for at in range(_COLOURS) for factor in factors]
    return sorted([value for value in found if value <= most][: _COLOURS - 1])


def step_of(value: float, thresholds: Sequence[float]) -> int:
    """Return how many thresholds a value reaches."""
    return sum(value >= each for each in thresholds)


def _ticks(names: Sequence[str], y: float, unit: str) -> list[Markup]:
    """Name some columns, evenly spaced; before them stands what a column is."""
    stride = next(each for each in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if len(names) / each <= _TICKS)
    width = 100 / max(len(names), 1)
    places = range(0, len(names), stride)
    return [
        _text("-8px", y, unit, "end"),
        *(_text(_share((at + 0.5) * width), y, names[at], "middle") for at in places),
    ]


def _rule(y: float, name: str) -> Markup:
    line = Markup('<line class="rule" x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(_px(y))
    return line + _text("-8px", y + 4, name, "end")


def _zone(at: int, width: float, height: float, title: str) -> Markup:
    """Return the place of a column, where the pointer shows its title."""
    return Markup('<rect class="zone" x="{}" width="{}" height="{}"><title>{}</title></rect>').format(
        _share(at * width), _share(width), height, visible(title)
    )


def _text(x: str, y: float, text: str, anchor: str, style: str = "") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>').format(
        x, _px(y), anchor, style, visible(text)
    )


def _plain_power(power: int) -> str:
    return f"{10**power:,}" if power >= 0 else f"{10.0**power:.{-power}f}"


def _share(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") + "%"


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
