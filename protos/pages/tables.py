"""Numbers as text, and the small pieces of markup that every section is made of; "–" stands for what is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lamina.protos.pages.charts import power, signed, usable

_MANY = 60  # rows from which a table of clients scrolls inside its own frame


def num(value: float | None, places: int = 3) -> str:
    """A number for reading: fixed places, or a power of ten when it is very small or large."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else signed("∞" if value > 0 else "-∞")
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return signed(mantissa) + "\u202f×\u202f" + power(int(exponent))
    return signed(f"{value:,.{places}f}") if value else "0"


def change(before: float | None, after: float | None) -> str:
    """The difference, with its sign."""
    return signed(f"{after - before:+.3f}") if usable(before) and usable(after) else "–"


def perplexity(loss: float | None) -> str:
    """The exponential of a loss in nats per token."""
    if not usable(loss):
        return "–"
    value = math.exp(loss) if loss < 700 else math.inf
    return num(value, 2 if value < 100 else 0)


def perplexities(before: float | None, after: float | None) -> str:
    """Two perplexities side by side, with as many places in one as in the other."""
    most = max((loss for loss in (before, after) if usable(loss)), default=0.0)
    places = 2 if most < math.log(100) else 1
    return " → ".join(num(math.exp(loss), places) if usable(loss) and loss < 700 else "–" for loss in (before, after))


def unit(most: float) -> tuple[float, str]:
    """The decimal unit of bytes in which `most` reads well."""
    step = min(4, int(math.log10(most) // 3)) if usable(most) and most >= 1 else 0
    return 1000.0**step, ("B", "kB", "MB", "GB", "TB")[step]


def size(value: float | None) -> str:
    """A number of bytes."""
    if not usable(value):
        return "–"
    divisor, name = unit(value)
    return f"{value / divisor:.{0 if name == 'B' else 1}f} {name}"


def duration(value: float | None) -> str:
    """A number of seconds."""
    if not usable(value):
        return "–"
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: float, noun: str) -> str:
    """A number of things, with the noun in its plural where it needs one."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], kind: str = "ruled") -> str:
    """A table from finished cells; a head is (class, markup): t text, n number, o hidden when narrow, g graphic, b bar."""
    head = "".join(f'<th class="{css}" scope="col">{text}</th>' for css, text in heads)
    lines = ("".join(f'<td class="{css}">{cell}</td>' for (css, _), cell in zip(heads, row)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="wrap{" many" if len(rows) > _MANY else ""}"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(title: str, caption: str, body: str = "", tag: str = "section") -> str:
    """A titled part with its one caption; title, caption and body are markup."""
    return f'<{tag}><h2>{title}</h2><p class="caption">{caption}</p>{body}</{tag}>'


def pair(*parts: str) -> str:
    """Parts side by side where there is room."""
    return f'<section class="pair">{"".join(parts)}</section>'


def tiles(rows: Sequence[tuple[str, str, str]], css: str) -> str:
    """A list of (name, value, note), each of them markup."""
    cells = ((name, value, f"<small>{note}</small>" if note else "") for name, value, note in rows)
    items = "".join(f"<div><dt>{name}</dt><dd>{value}{note}</dd></div>" for name, value, note in cells)
    return f'<dl class="{css}">{items}</dl>'
