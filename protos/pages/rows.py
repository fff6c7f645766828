"""Rows of charts as SVG text: everything lies in percent of the width, so that a table cell of any width holds them and their
text never shrinks. Colours are the classes of `charts.STYLE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lamina.protos.pages.charts import STEPS, Axis, Scale, escape, fit, usable


def _row(body: str, height: int, tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<svg height="{height}" role="img" aria-label="{escape(tip)}">{title}{body}</svg>'


def dot_row(dots: Sequence[tuple[float | None, str]], scale: Scale, tip: str, joined: bool = False) -> str:
    """One row of a dot chart; joined, a dumbbell from the first value (hollow) to the last (filled).

    Args:
        dots: Values in the scale's units, each with its classes.
        scale: From `fit`, with positions in percent of the row's width.
        tip: What the row says, shown on hover and read aloud.
        joined: Draw the line between the first and the last dot.

    Returns:
        One `<svg>` element as wide as what holds it.
    """
    parts = [_grid(scale)]
    kept = [(scale.at(value), style) for value, style in dots if usable(value)]
    if joined and len(kept) > 1:
        (a, _), (b, style) = kept[0], kept[-1]
        parts.append(f'<line class="join {style}" x1="{a:.2f}%" x2="{b:.2f}%" y1="15" y2="15"/>')
    for index, (at, style) in enumerate(kept):
        kind = "open" if joined and index == 0 and len(kept) > 1 else "fill"
        parts.append(f'<circle class="{kind} {style}" cx="{at:.2f}%" cy="15" r="4.5"/>')
    return _row("".join(parts), 30, tip)


def span_row(
    span: tuple[float | None, float | None],
    dots: Sequence[tuple[float | None, str]],
    marks: Sequence[float | None],
    scale: Scale,
    tip: str,
) -> str:
    """One row with an interval as a line, values as dots on it and levels as short upright strokes.

    Args:
        span: Low and high end of the interval, in the scale's units; drawn only where both are known.
        dots: Values, each with its classes; the first one colours the interval.
        marks: Levels to compare with, such as chance or a claim.
        scale: From `fit`, with positions in percent of the row's width.
        tip: What the row says, shown on hover and read aloud.

    Returns:
        One `<svg>` element as wide as what holds it.
    """
    parts = [_grid(scale)]
    low, high = span
    if usable(low) and usable(high) and dots:
        ends = f'x1="{scale.at(low):.2f}%" x2="{scale.at(high):.2f}%"'
        parts.append(f'<line class="join {dots[0][1]}" {ends} y1="15" y2="15"/>')
    for level in filter(usable, marks):
        at = f"{scale.at(level):.2f}%"
        parts.append(f'<line class="axis mark" x1="{at}" x2="{at}" y1="5" y2="25"/>')
    for value, style in reversed(dots):
        if usable(value):
            radius = 6 if "open" in style else 4.5  # a ring shows around a dot at the same place
            parts.append(f'<circle class="{style}" cx="{scale.at(value):.2f}%" cy="15" r="{radius}"/>')
    return _row("".join(parts), 30, tip)


def _grid(scale: Scale) -> str:
    places = [f"{scale.at(value):.2f}%" for value, _ in scale.ticks(4)]
    return "".join(f'<line class="grid" x1="{at}" x2="{at}" y1="0" y2="30"/>' for at in places)


def scaled(values: Iterable[float | None], title: str, axis: Axis | None = None) -> tuple[Scale, str]:
    """A scale for a column of rows that holds the values, and the head of the column.

    Args:
        values: What the rows show.
        title: What the axis shows, with its unit, for screen readers.
        axis: Its kind and bounds; linear and free without.

    Returns:
        The scale, in percent of the width, and its ticks as one `<svg>` element.
    """
    scale = fit(values, axis or Axis(""), 3, 97)
    return scale, tick_row([(scale.at(value), text) for value, text in scale.ticks(4)], title)


def tick_row(marks: Sequence[tuple[float, str]], title: str) -> str:
    """Tick labels for a column of `dot_row` or `heat_row`.

    Args:
        marks: Positions in percent of the width, each with its text.
        title: What the axis shows, with its unit, for screen readers.

    Returns:
        One `<svg>` element as wide as what holds it.
    """
    texts = [
        f'<text x="{at:.2f}%" y="13" text-anchor="{"start" if at < 2 else "end" if at > 98 else "middle"}">'
        f"{escape(text)}</text>"
        for at, text in marks
    ]
    return _row("".join(texts), 18, title)


def heat_row(values: Sequence[float | None], tips: Sequence[str], low: float, high: float) -> str:
    """One row of a heat map in seven steps.

    Args:
        values: One value a cell; None leaves the cell empty.
        tips: One tooltip a cell.
        low: Value of the palest step.
        high: Value of the strongest step.

    Returns:
        One `<svg>` element as wide as what holds it.
    """
    parts, width = [], 100 / max(1, len(values))
    for index, (value, tip) in enumerate(zip(values, tips)):
        step = int((value - low) / ((high - low) or 1) * STEPS) if usable(value) else 0
        style = f"q{min(max(step, 0), STEPS - 1)}" if usable(value) else "none"
        place = f'x="{index * width:.3f}%" width="{width * 0.93:.3f}%" height="20"'
        parts.append(f'<rect class="fill {style}" {place}><title>{escape(tip)}</title></rect>')
    return _row("".join(parts), 20)


def bar(value: float | None, longest: float, style: str, tip: str) -> str:
    """A horizontal bar that starts at zero.

    Args:
        value: Length, in the units of `longest`.
        longest: Value that fills the width.
        style: Colour class.
        tip: What the bar says, shown on hover and read aloud.

    Returns:
        One `<svg>` element as wide as what holds it.
    """
    share = 100 * max(0.0, value) / longest if usable(value) and longest > 0 else 0.0
    return _row(f'<rect class="fill {style}" y="3" width="{share:.2f}%" height="8" rx="1"/>', 14, tip)
