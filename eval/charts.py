"""Small charts as HTML: shapes in an SVG that stretches, words beside it that do not.

So they read alike at any width, follow the page's colours, and take a few kilobytes. The shapes of a series have the
class `s1` or `s2` of page.css, which colours them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

SIZE = 1000
"""Width and height of the SVG in its own units."""
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """What the ends of a side stand for, and the values and labels of its ticks."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high one; what lies beyond is put there."""
        value = min(self.high, max(self.low, value))
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return (value - low) / ((high - low) or 1)


def linear_axis(low: float, high: float, most: int = 5) -> Axis:
    """An axis with round labels, so many at most."""
    span = (high - low) or 1
    rough = 10.0 ** math.floor(math.log10(span / most))
    step = next(rough * factor for factor in (1, 2, 5, 10, 20) if span / (rough * factor) <= most)
    values = [step * index for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, [(value, f"{value:.6g}") for value in values])


def log_axis(low: float, high: float, most: int = 4) -> Axis:
    """A logarithmic axis labelled at powers of ten, so many at most."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    step = max(1, math.ceil(len(powers) / most))
    ticks = [(10.0**power, f"10{str(power).translate(RAISED)}" if power else "1") for power in powers[::-step]]
    return Axis(low, high, ticks, log=True)


def plot(title: str, x: Axis, y: Axis, shapes: Iterable[str], x_title: str = "", y_title: str = "") -> str:
    """A chart; title: what it shows, for those who cannot see it."""
    rules = "".join(
        f'<line class="rule" x1="0" x2="{SIZE}" y1="{_y(y, value)}" y2="{_y(y, value)}"/>' for value, _ in y.ticks
    )
    labels = "".join(
        [f'<i class="y" style="bottom:{100 * y.at(value):.4g}%">{escape(label)}</i>' for value, label in y.ticks]
        + [f'<i class="x" style="left:{100 * x.at(value):.4g}%">{escape(label)}</i>' for value, label in x.ticks]
    )
    names = f'<i class="y-title">{escape(y_title)}</i>' * bool(y_title)
    names += f'<i class="x-title">{escape(x_title)}</i>' * bool(x_title)
    return (
        f'<div class="plot" role="img" aria-label="{escape(title)}"><svg viewBox="0 0 {SIZE} {SIZE}" '
        f'preserveAspectRatio="none">{rules}{"".join(shapes)}</svg>{labels}{names}</div>'
    )


def bar(x: Axis, y: Axis, left: float, right: float, bottom: float, top: float, series: str, tip: str = "") -> str:
    """A bar between values of both axes; tip: shown where a pointer rests on it."""
    x1, x2, y1, y2 = SIZE * x.at(left), SIZE * x.at(right), SIZE * y.at(bottom), SIZE * y.at(top)
    inside = f"<title>{escape(tip)}</title>" * bool(tip)
    place = f'x="{x1:.4g}" y="{SIZE - y2:.4g}" width="{x2 - x1:.4g}" height="{y2 - y1:.4g}"'
    return f'<rect class="{series}" {place}>{inside}</rect>'


def steps(x: Axis, y: Axis, first: float, values: Sequence[float], series: str) -> str:
    """A line that holds values[i] from first + i to first + i + 1."""
    path = "".join(
        f"{'L' if index else 'M'}{_x(x, first + index)} {_y(y, value)}H{_x(x, first + index + 1)}"
        for index, value in enumerate(values)
    )
    return f'<path class="{series} line" d="{path}"/>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Series and what each is."""
    items = "".join(f'<li class="{series}">{escape(words)}</li>' for series, words in entries)
    return f'<ul class="legend">{items}</ul>'


def shares(rows: Sequence[tuple[str, str, Sequence[tuple[str, float]]]]) -> str:
    """Bars across, each a stack of parts; the longest is as wide as the page.

    Args:
        rows: what a bar is, its label, and series and size of its parts.
    """
    most = max((sum(size for _, size in parts) for *_, parts in rows), default=0) or 1
    made = []
    for words, label, parts in rows:
        stack = "".join(f'<b class="{series}" style="width:{100 * size / most:.4g}%"></b>' for series, size in parts)
        made.append(f"<li><span>{escape(words)}<em>{escape(label)}</em></span><div>{stack}</div></li>")
    return f'<ul class="shares">{"".join(made)}</ul>'


def _x(axis: Axis, value: float) -> str:
    return f"{SIZE * axis.at(value):.4g}"


def _y(axis: Axis, value: float) -> str:
    return f"{SIZE * (1 - axis.at(value)):.4g}"
