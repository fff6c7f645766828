"""Whose gradients are in a step: each unit with one probability, whatever the others, and what of it.

A record is a row of the site's data, whatever number of examples a long text gives: it takes part with one of them, drawn anew
in each step. A user takes part with up to `user_rows` of its rows, drawn anew, one example of each. What a unit gives depends on
that unit and its own draws alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lamina.client.data import Example
from lamina.protos.errors import DataError
from lamina.protos.privacy.events import Unit
from lamina.protos.privacy.noise import Stream

# Rows of a unit, each with the examples that it gives.
Rows = tuple[tuple[Example, ...], ...]


@dataclass(frozen=True, eq=False)
class Share:
    """What one unit gives to a step.

    Attributes:
        examples: At least one.
        weights: By which the summed loss of each is multiplied, so that the unit's is the mean over its examples of the mean
            over the targets of each.
    """

    examples: Sequence[Example]
    weights: Sequence[float]


@dataclass(frozen=True, eq=False)
class Piece:
    """What is computed at one time.

    Attributes:
        examples: Of one unit or several, each unit's following each other.
        weights: See `Share`.
        units: Number of each example's unit in the step.
        goes_on: Whether the last unit has examples in the next piece.
    """

    examples: Sequence[Example]
    weights: Sequence[float]
    units: Sequence[int]
    goes_on: bool


def units_of(examples: Sequence[Example], unit: Unit) -> list[Rows]:
    """A site's examples by unit.

    Args:
        examples: Of all rows.
        unit: `record` or `user`.

    Returns:
        The units, in the order in which they first appear.

    Raises:
        DataError: If a row has no user.
    """
    found: dict[int | str, dict[int, list[Example]]] = {}
    for example in examples:
        if unit == "user" and not example.user:
            raise DataError(
                f"data.user_column: expected a user in every row, training row {example.row + 1} has none. "
                "Set data.user_column, or privacy.unit=record."
            )
        found.setdefault(example.user if unit == "user" else example.row, {}).setdefault(example.row, []).append(
            example
        )
    return [tuple(tuple(row) for row in rows.values()) for rows in found.values()]


def drawn(units: Sequence[Rows], rate: float, most_rows: int, stream: Stream) -> list[Share]:
    """Who takes part in a step, by Poisson sampling, and with what.

    Args:
        units: Of the site.
        rate: Probability of each.
        most_rows: Rows of one unit.
        stream: Of the draws.

    Returns:
        A share of each unit that was drawn; often more or fewer than expected, and maybe none.
    """
    chosen = np.flatnonzero(stream.uniform(len(units)) < rate)
    return [_share(units[int(index)], most_rows, stream) for index in chosen]


def _share(rows: Rows, most_rows: int, stream: Stream) -> Share:
    if len(rows) > most_rows:
        order = np.argsort(stream.uniform(len(rows)), kind="stable")[:most_rows]
        rows = tuple(rows[int(index)] for index in order)
    places = stream.uniform(len(rows))
    examples = [row[int(place * len(row))] for row, place in zip(rows, places, strict=True)]
    return Share(examples, [1.0 / (_targets(example) * len(rows)) for example in examples])


def _targets(example: Example) -> int:
    return 1 if example.label >= 0 else max(1, int(example.targets.sum()))


def pieces(shares: Sequence[Share], size: int) -> Iterator[Piece]:
    """A step's examples in pieces that fit into memory.

    Args:
        shares: Of its units.
        size: Most examples of a piece.

    Yields:
        The pieces; none where there are no units.
    """
    flat = [
        (example, weight, number)
        for number, share in enumerate(shares)
        for example, weight in zip(share.examples, share.weights, strict=True)
    ]
    for start in range(0, len(flat), size):
        examples, weights, numbers = zip(*flat[start : start + size], strict=True)
        goes_on = start + size < len(flat) and flat[start + size][2] == numbers[-1]
        yield Piece(examples, weights, numbers, goes_on)
