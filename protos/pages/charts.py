"""Charts as SVG text from plain values: no file, no clock, no plotting library.

`line_chart` draws in a fixed viewBox and scales with the page; what fits into a cell of a table is in `rows`. Colours are
CSS classes defined in `STYLE` for light, dark and print: `c0`…`c7` tell series apart, `d0`…`d3` dash them, `q0`…`q6` grow
with a magnitude. A line runs on over nulls and breaks at NaN. Nothing here knows what a run is.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

COLOURS, DASHES, STEPS = 8, 4, 7  # classes c0…, d0…, q0… in STYLE
_TINY, _HUGE = 1e-30, 1e30  # below and above these a value is 0 on a log axis, or not drawn
_GLYPH = 7.8  # width that a character is given, in viewBox units; holds the larger text of narrow pages too
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

STYLE = """
:root{color-scheme:light dark;--bg:#fdfdfb;--ink:#1e2328;--muted:#5a636d;--rule:#dfe2e5;--soft:#f3f4f3;
--c0:#1d5fa6;--c1:#b5480b;--c2:#177a57;--c3:#84409c;--c4:#856000;--c5:#ad2560;--c6:#4d5761;--c7:#74503a;
--q0:#d3e1ee;--q1:#b3cde4;--q2:#8eb4d8;--q3:#6698c8;--q4:#417cb3;--q5:#235e97;--q6:#0d3f70}
@media screen and (prefers-color-scheme:dark){:root{--bg:#15181b;--ink:#e4e6e8;--muted:#9ba5af;--rule:#31373d;
--soft:#1d2125;--c0:#7db5f2;--c1:#f2a06a;--c2:#62cda2;--c3:#cd9de0;--c4:#dcbc5c;--c5:#f291b8;--c6:#b6c0ca;--c7:#cfb39c;
--q0:#22303e;--q1:#2a4158;--q2:#345675;--q3:#437197;--q4:#5a90bb;--q5:#7fb3dc;--q6:#b5d9f7}}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.c6{--c:var(--c6)}.c7{--c:var(--c7)}.q0{--c:var(--q0)}.q1{--c:var(--q1)}.q2{--c:var(--q2)}.q3{--c:var(--q3)}
.q4{--c:var(--q4)}.q5{--c:var(--q5)}.q6{--c:var(--q6)}.none{--c:var(--soft)}.ref{--c:var(--muted)}
.d1{--dash:7 3}.d2{--dash:2 3}.d3{--dash:8 3 2 3}
svg{display:block;width:100%;overflow:visible;print-color-adjust:exact;-webkit-print-color-adjust:exact}
svg text{font-size:12px;fill:var(--muted);font-variant-numeric:tabular-nums}
svg text.end{fill:var(--c);font-weight:600}svg text.ref{font-weight:400}
svg .grid{stroke:var(--rule);stroke-width:1}svg .axis{stroke:var(--muted);stroke-width:1}
svg .line{fill:none;stroke:var(--c);stroke-width:2;stroke-dasharray:var(--dash,none);stroke-linejoin:round;stroke-linecap:round}
svg .thin .line{stroke-width:1.2}svg .thin .line:hover{stroke-width:3}
svg .ref.line{stroke-width:1;stroke-dasharray:5 4}svg .lead{stroke:var(--c);stroke-width:1;stroke-dasharray:1 3;fill:none}
svg .band{fill:var(--c);opacity:.14}svg .fill{fill:var(--c)}
svg .dot{fill:var(--c);stroke:transparent;stroke-width:12;pointer-events:all}svg .dot:hover{stroke:var(--c);stroke-width:4}
svg .open{fill:var(--bg);stroke:var(--c);stroke-width:1.6}svg .mark{stroke-width:2}svg .join{stroke:var(--c);stroke-width:2}
.dense .dot{opacity:0}.dense .dot:hover{opacity:1}
@media (max-width:560px){svg[viewBox] text{font-size:14px}}
"""


@dataclass(frozen=True)
class Series:
    """One line: `label` stands at its right end ("" for none), `tips` at its points, `tip` on the whole line."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: str
    tips: Sequence[str] = ()
    tip: str = ""


@dataclass(frozen=True)
class Band:
    """The area between `low` and `high`, in the units of the y axis."""

    x: Sequence[float]
    low: Sequence[float | None]
    high: Sequence[float | None]
    style: str


@dataclass(frozen=True)
class Axis:
    """What an axis shows: `label` holds the unit, `whole` allows integer ticks only, `hint` explains a tick on hover.

    `bounds` fixes the range, in the axis's units; without it the values decide.
    """

    label: str
    log: bool = False
    whole: bool = False
    bounds: tuple[float, float] | None = None
    hint: Callable[[float], str] | None = None


@dataclass(frozen=True)
class Scale:
    """Maps `low`…`high` to positions `start`…`stop`; `zero` says that a log axis has a floor for values <= 0."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    whole: bool = False
    zero: bool = False

    def at(self, value: float) -> float:
        """Position of a value; on a log axis values <= 0 lie on the floor.

        Args:
            value: Finite value, in the axis's units.

        Returns:
            The position, in the units of `start` and `stop`.
        """
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Round values inside the range, about `count` of them, with their text.

        Args:
            count: Number of ticks aimed at.

        Returns:
            Pairs of value and label, ascending.
        """
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            powers = list(range(first, last + 1, max(1, math.ceil((last - first) / count))))
            return [(10.0**p, "0" if self.zero and p == first else power(p)) for p in powers]
        rough = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(rough))
        step = min((m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999), default=10 * unit)
        step = float(max(1, math.ceil(step))) if self.whole else step
        places = next((p for p in range(16) if abs(round(step, p) - step) < step * 1e-6), 15)
        numbers = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return [(n * step, signed(f"{n * step:,.{places}f}")) for n in numbers]


def escape(value: object) -> str:
    """Text that is safe inside HTML and SVG, also in an attribute.

    Args:
        value: Anything; `str` of it is shown.

    Returns:
        The text with markup escaped and characters that XML forbids replaced by U+FFFD.
    """
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(value)), quote=True)


def signed(text: str) -> str:
    """The number with a true minus sign (U+2212).

    Args:
        text: A formatted number.

    Returns:
        The same with every hyphen-minus replaced.
    """
    return text.replace("-", "\u2212")


def power(exponent: int) -> str:
    """A power of ten as text: 10⁻³; 1, 10 and 100 are written out.

    Args:
        exponent: The power.

    Returns:
        Text without markup.
    """
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return str(10**exponent) if 0 <= exponent < 3 else f"10{digits}"


def usable(value: float | None) -> TypeGuard[float]:
    """Whether a chart can place the value.

    Args:
        value: A number, or None for what was not recorded.

    Returns:
        False for None, NaN, infinities and magnitudes above 1e30.
    """
    return value is not None and abs(value) < _HUGE


def fit(values: Iterable[float | None], axis: Axis, start: float, stop: float) -> Scale:
    """A scale that holds all usable values, with a little air on a linear axis.

    Args:
        values: What the axis must show, in its units.
        axis: Its kind and, where set, its bounds.
        start: Position of the low end.
        stop: Position of the high end.

    Returns:
        The scale; a range of 0…1 when there is no usable value.
    """
    kept = [value for value in (axis.bounds or values) if usable(value)] or [0.0, 1.0]
    if axis.log:
        above = [value for value in kept if value > _TINY] or [1.0]
        zero = any(value <= _TINY for value in kept)
        first = math.floor(math.log10(min(above)))
        last = max(math.ceil(math.log10(max(above))), first + 1 - zero)
        return Scale(10.0 ** (first - zero), 10.0**last, start, stop, log=True, zero=zero)
    low, high = min(kept), max(kept)
    room = 0.0 if axis.bounds or axis.whole else 0.06 * (high - low)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        room = 0.5 if axis.whole else max(0.02 * abs(low), 1e-3)
    return Scale(low - room, high + room, start, stop, whole=axis.whole)


def line_chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    title: str,
    references: Sequence[tuple[str, float]] = (),
    band: Band | None = None,
    size: tuple[int, int] = (500, 310),
) -> str:
    """Lines over a common axis, each labelled at its right end.

    Args:
        series: Lines, the most important first.
        x: Horizontal axis.
        y: Vertical axis.
        title: What the chart shows, for screen readers.
        references: Labelled horizontal lines (label, value in the units of y).
        band: An area behind the lines.
        size: Width and height of the viewBox; text is 12 units high.

    Returns:
        One `<svg>` element.
    """
    labels = [line.label for line in series] + [label for label, _ in references]
    width, height = size[0], max(size[1], 17 * len(labels) + 80 if any(labels) else 0)
    right = max((min(len(label), 26) * _GLYPH + 16 for label in labels if label), default=10.0)
    values = [v for line in series for v in line.y] + [v for _, v in references]
    up = fit([*values, *(band.low if band else ()), *(band.high if band else ())], y, height - 44, 30)
    left = max((len(text) for _, text in up.ticks()), default=1) * _GLYPH + 8
    along = fit([v for line in series for v in line.x], x, left, width - right)
    parts = [_frame(along, up, x, y)]
    if band:
        parts.append(_area(band, along, up))
    ends: list[tuple[float, float, str, str]] = []
    for label, value in references:
        if usable(value):
            parts.append(f'<path class="line ref" d="M{left:.1f} {up.at(value):.1f}H{width - right:.1f}"/>')
            ends.append((width - right, up.at(value), label, "ref"))
    for line in reversed(series):
        points = [(along.at(a), up.at(b)) for a, b in zip(line.x, line.y) if usable(a) and usable(b)]
        parts.append(_line(line, along, up))
        if points and line.label:
            ends.append((*points[-1], line.label, line.style))
    parts.append(_end_labels(ends, width - right, up.start))
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _frame(along: Scale, up: Scale, x: Axis, y: Axis) -> str:
    """Grid, ticks and the names of both axes."""
    parts, floor = [], up.start
    for value, text in up.ticks():
        at, hint = up.at(value), f"<title>{escape(y.hint(value))}</title>" if y.hint else ""
        parts.append(f'<path class="grid" d="M{along.start:.1f} {at:.1f}H{along.stop:.1f}"/>')
        parts.append(f'<text x="{along.start - 7:.1f}" y="{at + 4:.1f}" text-anchor="end">{text}{hint}</text>')
    for value, text in along.ticks(min(6, int((along.stop - along.start) / 45) or 1)):
        at = along.at(value)
        parts.append(f'<path class="axis" d="M{at:.1f} {floor:.1f}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{floor + 18:.1f}" text-anchor="middle">{text}</text>')
    parts.append(f'<path class="axis" d="M{along.start:.1f} {floor:.1f}H{along.stop:.1f}"/>')
    parts.append(f'<text x="0" y="14">{escape(y.label)}</text>')
    parts.append(f'<text x="{along.stop:.1f}" y="{floor + 37:.1f}" text-anchor="end">{escape(x.label)}</text>')
    return "".join(parts)


def _area(band: Band, along: Scale, up: Scale) -> str:
    rows = [(x, a, b) for x, a, b in zip(band.x, band.low, band.high) if usable(a) and usable(b)]
    low = [f"{along.at(x):.1f} {up.at(a):.1f}" for x, a, _ in rows]
    high = [f"{along.at(x):.1f} {up.at(b):.1f}" for x, _, b in reversed(rows)]
    return f'<path class="band {band.style}" d="M{"L".join(low + high)}Z"/>' if rows else ""


def _line(line: Series, along: Scale, up: Scale) -> str:
    """The path, and a dot with a tooltip for each point that has a tip."""
    path, dots, pen = [], [], "M"
    for index, (a, b) in enumerate(zip(line.x, line.y)):
        if not (usable(a) and usable(b)):
            pen = pen if b is None else "M"
            continue
        path.append(f"{pen}{along.at(a):.1f} {up.at(b):.1f}" + ("h.01" if pen == "M" else ""))
        pen = "L"
        if index < len(line.tips):
            tip = f"<title>{escape(line.tips[index])}</title>"
            dots.append(f'<circle class="dot" cx="{along.at(a):.1f}" cy="{up.at(b):.1f}" r="2.8">{tip}</circle>')
    kind = "thin" if not line.label else "dense" if len(dots) > 40 else ""
    title = f"<title>{escape(line.tip)}</title>" if line.tip else ""
    mark = f'<path class="line" d="{"".join(path)}">{title}</path>' if path else ""
    return f'<g class="{line.style} {kind}">{mark}{"".join(dots)}</g>'


def _end_labels(ends: Sequence[tuple[float, float, str, str]], edge: float, floor: float) -> str:
    """Labels right of the plot, pushed apart where they would overlap, with a leader where they moved."""
    order = sorted(ends, key=lambda end: end[1])
    places: list[float] = []
    for _, at, _, _ in order:
        places.append(max(at, places[-1] + 17) if places else at)
    limit = floor
    for index in reversed(range(len(places))):
        places[index] = limit = min(places[index], limit)
        limit -= 17
    parts = []
    for (x, at, label, style), place in zip(order, places):
        if abs(place - at) > 3 or edge - x > 8:
            parts.append(f'<path class="lead {style}" d="M{x + 5:.1f} {at:.1f}L{edge + 5:.1f} {place:.1f}"/>')
        short = label if len(label) <= 26 else label[:25] + "…"
        text = f"{escape(short)}<title>{escape(label)}</title>"
        parts.append(f'<text class="end {style}" x="{edge + 9:.1f}" y="{place + 4:.1f}">{text}</text>')
    return "".join(parts)
