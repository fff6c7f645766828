"""Two texts beside each other with what they share marked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from lamina.audits.page.reading import LONG, plain
from lamina.protos.pages.charts import escape

_PIECES = 400  # pieces of a text that are looked at
_WORD = re.compile(r"\s+|[^\W_]+|.", re.DOTALL)  # a space, a word, or a sign


def pieces(value: Any) -> list[str]:
    """A text as pieces: its tokens where the audit gives them as a list, else words and what is between them."""
    if isinstance(value, list | tuple):
        return [plain(one, 80) for one in value[:_PIECES]]
    return _WORD.findall(plain(value, LONG))


def marked(parts: Sequence[str], shared: Iterable[bool]) -> str:
    """Pieces as markup, runs of shared ones marked."""
    runs = groupby(zip(parts, shared), key=lambda one: one[1])
    return "".join(
        f"<mark>{text}</mark>" if inside else text
        for inside, run in runs
        for text in [escape("".join(part for part, _ in run))]
    )


def side_by_side(original: Any, recovered: Any) -> tuple[str, str]:
    """Both texts as markup; a piece is marked as often as both have it."""
    left, right = pieces(original), pieces(recovered)
    common = Counter(_folded(left)) & Counter(_folded(right))
    return marked(left, _taken(left, common)), marked(right, _taken(right, common))


def continued(original: Any, found: Any) -> tuple[str, str]:
    """An original and a model's continuation as markup, marked up to where they part."""
    left, right = pieces(original), pieces(found)
    same = next((n for n, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))
    return marked(left, (n < same for n in range(len(left)))), marked(right, (n < same for n in range(len(right))))


def containing(text: Any, shared: Sequence[Any]) -> str:
    """A text as markup with every occurrence of some passages marked."""
    shown = plain(text, LONG)
    passages = [passage for one in shared[:20] if len(passage := plain(one, LONG)) > 1]
    inside = [False] * len(shown)
    for passage in passages:
        start = shown.find(passage)
        while start >= 0:
            inside[start : start + len(passage)] = [True] * len(passage)
            start = shown.find(passage, start + len(passage))
    return marked(shown, inside)


def block(title: str, body: str) -> str:
    """A titled piece of audited text; both are markup."""
    return f'<div><h3>{title}</h3><pre dir="auto">{body or "–"}</pre></div>'


def listing(shown: Sequence[str], first: int, noun: str, total: int) -> str:
    """Blocks, the first few at once and the others behind a summary; what is left out is said."""
    blocks = [f'<div class="talk">{one}</div>' for one in shown]
    rest = "".join(blocks[first:])
    more = f"<details><summary>{len(blocks) - first:,} more {noun}</summary>{rest}</details>" if rest else ""
    left = f'<p class="muted">{total - len(blocks):,} more are in audit.json.</p>' if total > len(blocks) else ""
    return "".join(blocks[:first]) + more + left


def _folded(parts: Sequence[str]) -> list[str]:
    """Pieces as they are compared: without case and space around them; what is left of nothing counts for nothing."""
    return [key for part in parts if (key := part.strip().casefold())]


def _taken(parts: Sequence[str], common: Counter[str]) -> list[bool]:
    """Which pieces are shared; the space between two shared ones belongs to them."""
    left = common.copy()
    found: list[bool | None] = []
    for part in parts:
        key = part.strip().casefold()
        found.append(left[key] > 0 if key else None)
        left[key] -= 1
    return [
        one if one is not None else bool(0 < n < len(found) - 1 and found[n - 1] and found[n + 1])
        for n, one in enumerate(found)
    ]
