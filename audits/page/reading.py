"""What the page takes out of an audit document. Every function is total: what is missing, not finite, of another type or far
too long gives None, an empty list or a clipped text, so that no document can break the page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lamina.protos.pages.charts import escape, usable

SHORT, LONG = 160, 1500  # characters shown of a name, and of a piece of the audited text
MANY = 200  # entries shown of a list or an object

# They turn the direction of all text after them, or hide; they are spelt out instead.
_DIRECTIONS = re.compile("[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def at(document: Any, key: str) -> Any:
    """The value at a dotted key, or None."""
    for part in key.split("."):
        document = document.get(part) if isinstance(document, Mapping) else None
    return document


def number(document: Any, key: str) -> float | None:
    """The number at a dotted key that a page can show, or None."""
    return real(at(document, key))


def real(value: Any) -> float | None:
    """The value itself where it is a finite number of ordinary size, or None."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and usable(value) else None


def interval(document: Any, key: str) -> tuple[float, float] | None:
    """The two numbers at a dotted key, in order, or None."""
    found = [real(value) for value in listed(document, key)]
    if len(found) != 2 or found[0] is None or found[1] is None:
        return None
    return min(found[0], found[1]), max(found[0], found[1])


def listed(document: Any, key: str) -> list[Any]:
    """The list at a dotted key, or an empty one."""
    value = at(document, key)
    return list(value) if isinstance(value, list | tuple) else []


def entries(document: Any, key: str) -> list[tuple[str, Any]]:
    """Name and value of every entry of the object at a dotted key."""
    value = at(document, key)
    return [(str(name), one) for name, one in value.items()] if isinstance(value, Mapping) else []


def objects(document: Any, key: str) -> list[Mapping[str, Any]]:
    """The objects of the list at a dotted key."""
    return [one for one in listed(document, key) if isinstance(one, Mapping)]


def plain(value: Any, limit: int = SHORT) -> str:
    """A text for reading, clipped; characters that steer the direction of text stand as their code points."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = "" if real(value) is None else str(value)
    if not isinstance(value, str):
        return ""
    more = f"… ({len(value) - limit:,} characters more)" if len(value) > limit else ""
    return _DIRECTIONS.sub(lambda found: f"‹U+{ord(found[0]):04X}›", value[:limit]) + more


def inline(value: Any, limit: int = SHORT) -> str:
    """The same as markup within a sentence or a cell, its direction kept to itself; "–" for none."""
    text = plain(value, limit)
    return f"<bdi>{escape(text)}</bdi>" if text else "–"
