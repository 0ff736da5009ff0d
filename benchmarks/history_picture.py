"""Draw benchmarks/history.jsonl: how each ratio moved from release to release.

Every text stands on the picture's own colour, so that light and dark pages both show it.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

Line = dict[str, Any]

_FONT = "system-ui, -apple-system, 'Segoe UI', 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif"
_WIDTH, _LEFT, _RIGHT, _ROW = 1000, 390, 40, 22
_PAPER, _INK, _SOFT, _RULE = "#1e293b", "#f1f5f9", "#a8b5c7", "#475569"
# The newest release stands out; those before it are rings, each as light as it is old.
_NEWEST, _EARLIER = "#2dd4bf", "#fbbf24"
# Panel -> kinds of ratios, and whether more of them is better.
_PANELS = {"speed": ("prompts", "answers", "all"), "KL": ("KL",)}
WORDS = {
    "en": {
        "title": "Ratios of each release",
        "speed": "times as fast as another program with the same weights, more is better",
        "KL": "KL divergence to the float model in nats, less is better",
        "prompts": "prompts",
        "answers": "answers",
        "all": "all",
    },
    "zh": {
        "title": "各版本的比值",
        "speed": "相同权重下与其他程序的速度之比，越大越好",
        "KL": "与浮点模型的 KL 散度（nat），越小越好",
        "prompts": "prefill",
        "answers": "decode",
        "all": "总计",
    },
}


def _rows(lines: list[Line], kinds: tuple[str, ...], words: dict[str, str]) -> dict[str, list[tuple[str, float]]]:
    """Return for each ratio that at least two releases have: its name, and (version, median), oldest first."""
    found: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for line in lines:
        for what, kind, to, middle, *_ in line["ratios"]:
            if kind in kinds:
                found.setdefault((what, kind, to), []).append((line["version"], middle))
    several = {key: values for key, values in found.items() if len(values) > 1}
    return {
        what.removeprefix("SmolLM2-135M, ") + ("" if kind == "KL" else f", {words[kind]} / {to}"): values
        for (what, kind, to), values in several.items()
    }


def _text(x: float, y: float, text: str, anchor: str = "start", fill: str = _INK, size: float = 13) -> str:
    look = f'fill="{fill}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(text)}</text>'


def _marks(low: float, high: float) -> list[float]:
    """Return numbers for a logarithmic scale: those of 1, 2 and 5 times a power of ten within it, or powers alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    return [mark for power in powers for factor in factors if low <= (mark := float(f"{factor}e{power}")) <= high]


def _panel(rows: dict[str, list[tuple[str, float]]], head: str, top: float, newest: str) -> tuple[list[str], float]:
    """Return a panel's lines, and where it ends: a row for each ratio, over a logarithmic scale."""
    values = [value for row in rows.values() for _, value in row]
    low, high = min(values) / 1.2, max(values) * 1.2

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log(value / low) / math.log(high / low)

    bottom = top + 18 + _ROW * len(rows)
    parts = [_text(20, top, head, size=14)]
    for mark in _marks(low, high):
        stroke = f'stroke="{_SOFT}" stroke-dasharray="4 4"' if mark == 1 else f'stroke="{_RULE}"'
        parts.append(f'<line x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{top + 12:.1f}" y2="{bottom:.1f}" {stroke}/>')
        parts.append(_text(x(mark), bottom + 15, f"{mark:g}", "middle", _SOFT, 12))
    for at, (name, row) in enumerate(rows.items()):
        y = top + 18 + _ROW * (at + 0.5)
        parts.append(_text(_LEFT - 12, y + 4.5, name, "end"))
        ends = [x(value) for _, value in row]
        span = f'x1="{min(ends):.1f}" x2="{max(ends):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line {span} stroke="{_SOFT}" stroke-width="2"/>')
        for age, (version, value) in reversed(list(enumerate(reversed(row)))):
            is_newest = version == newest
            look = f'fill="{_NEWEST}"' if is_newest else f'fill="{_PAPER}" stroke="{_EARLIER}" stroke-width="2.5"'
            faint = "" if age < 2 else f' opacity="{1 / age:.2f}"'
            title = f"<title>{escape(f'{name}, {version}: {value:.3g}')}</title>"
            parts.append(f'<circle cx="{x(value):.1f}" cy="{y:.1f}" r="5.5" {look}{faint}>{title}</circle>')
    return parts, bottom + 44


def picture(lines: list[Line], language: str) -> str:
    """Return the picture of all releases, oldest first."""
    words, newest = WORDS[language], lines[-1]["version"]
    parts, top = [], 66.0
    for panel, kinds in _PANELS.items():
        rows = _rows(lines, kinds, words)
        if rows:
            drawn, top = _panel(rows, words[panel], top, newest)
            parts += drawn
    head = [_text(20, 30, words["title"], size=18)]
    for at, line in enumerate(reversed(lines)):
        look = f'fill="{_NEWEST}"' if at == 0 else f'fill="none" stroke="{_EARLIER}" stroke-width="2.5"'
        left = _WIDTH - _RIGHT - 70 - 90 * at
        head += [f'<circle cx="{left}" cy="25" r="5.5" {look}/>', _text(left + 12, 30, line["version"])]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top - 20:.0f}" role="img" '
            f'font-family="{_FONT}">',
            f"<title>{escape(words['title'])}</title>",
            f'<rect width="{_WIDTH}" height="{top - 20:.0f}" rx="10" fill="{_PAPER}"/>',
            *head,
            *parts,
            "</svg>",
            "",
        ]
    )
