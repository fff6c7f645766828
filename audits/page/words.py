"""Figures and claims as the words of a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lamina.audits.estimators import gaussian
from lamina.audits.page.reading import inline, number, plain
from lamina.protos.pages.charts import Axis, escape, signed, usable
from lamina.protos.pages.tables import num

# Who sees what, as `audit.json` names it.
VIEWS = {
    "peer": "another client",
    "coordinator": "the coordinator",
    "secagg-coordinator": "the coordinator under secure sums",
    "outsider": "whoever has the final adapter",
    "malicious-coordinator": "a coordinator that prepared the base model to remember",
}
# The same as the head of a narrow column.
_READERS = {
    "peer": "by a client",
    "coordinator": "by the coordinator",
    "secagg-coordinator": "from secure sums",
    "outsider": "from the final adapter",
    "malicious-coordinator": "through a prepared base",
}
UNITS = {
    "record": ("one record", "one row of a site's data, whatever its length"),
    "user": ("one user", "all rows of one user at a site"),
    "client": ("one client", "everything that one client has"),
}
_NEAR = 0.06  # as far above chance as recall comes under noise that hides the tokens
_LARGEST = 100.0  # epsilon up to which a curve is worth drawing; beyond it everything is allowed


def view(name: str) -> str:
    """A party in words, as markup."""
    return escape(VIEWS.get(name, plain(name)))


def client(ident: Any) -> str:
    """A client by its name, or by its number, as markup."""
    name = plain(ident)
    return f"client {name}" if name.isascii() and name.isdigit() else inline(ident)


def reader(name: str) -> str:
    """How a party reads, in few words, as markup."""
    return escape(_READERS.get(name, plain(name, 40)))


def leaking(recall: float | None, chance: float | None) -> str:
    """The colour of a share of recovered tokens: orange where it is clearly above chance."""
    return "c1" if recall is not None and recall > (chance or 0.0) + _NEAR else "c6"


def percent(share: float | None) -> str:
    """A share between 0 and 1 as a percentage."""
    if share is None:
        return "–"
    value = 100 * share
    if value and abs(value) < 0.01:
        return num(value) + "\u202f%"
    return signed(f"{value:.2f}".rstrip("0").rstrip(".") if abs(value) < 1 else f"{value:.3g}") + "\u202f%"


def spread(span: tuple[float, float] | None, places: int = 3) -> str:
    """An interval in brackets, or nothing."""
    return f" ({num(span[0], places)} to {num(span[1], places)})" if span else ""


def percents(span: tuple[float, float] | None) -> str:
    """An interval of shares in brackets, or nothing."""
    return f" ({percent(span[0])} to {percent(span[1])})" if span else ""


def under(note: str) -> str:
    """A note in small print on a line of its own, as markup."""
    return f'<br><small class="muted">{note.strip(" ()")}</small>' if note else ""


def epsilon(value: float | None) -> str:
    """A value of ε with as many places as it needs."""
    return num(value, 2) if value is None or value % 1 else num(value, 0)


def unit_of(document: Mapping[str, Any]) -> tuple[str, str]:
    """The unit that is protected, in short and in full, as markup."""
    name = plain((document.get("claim") or {}).get("unit")) if isinstance(document.get("claim"), Mapping) else ""
    return UNITS.get(name, (f"one {escape(name or 'unit')}", escape(name or "not recorded")))


def shift_of(document: Mapping[str, Any]) -> float | None:
    """The claim as a Gaussian curve: μ of the Gaussian mechanism that is exactly (ε, δ)-private, or None where it has none."""
    value, delta = claimed(document)
    if value is None or delta is None or not 0 <= value <= _LARGEST or not 0 < delta < 1:
        return None
    return gaussian.mu_of(value, delta)


def from_zero(values: Iterable[float | None]) -> Axis:
    """A linear axis from zero that holds the values, with a little air."""
    return Axis("", bounds=(0.0, 1.04 * max(filter(usable, values), default=1.0) or 1.0))


def claimed(document: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """ε and δ of the claim."""
    return number(document, "claim.epsilon"), number(document, "claim.delta")
