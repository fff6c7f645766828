"""Numbers as whole steps of a fixed range, so that sums modulo 2**32 are exact."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lamina.protos.adapter import Array
from lamina.protos.errors import SecureSumAborted, TrainingError

# Of the 32 bits, those that no honest sum reaches: a vector of garbage is noticed, with chance 1 - 16**-n over n numbers.
_GUARD_BITS = 4
_LEAST_LEVELS = 2**8


@dataclass(frozen=True)
class Encoding:
    """A grid of `levels` + 1 numbers from -bound to +bound.

    Attributes:
        bound: Largest magnitude, > 0.
        levels: Steps from end to end.
    """

    bound: float
    levels: int

    @property
    def step(self) -> float:
        """From one number to the next. An encoded number is off by half of it at most, a sum of K by K / 2 of it."""
        return 2 * self.bound / self.levels


def encoding(bound: float, participants: int) -> Encoding:
    """The finest grid on which a sum of all participants cannot wrap and leaves room to notice garbage.

    Args:
        bound: Largest magnitude of a number that is summed.
        participants: How many may be summed.

    Returns:
        participants * levels <= 2**28.

    Raises:
        SecureSumAborted: If so many leave no grid worth the name.
    """
    levels = 2 ** (32 - _GUARD_BITS - math.ceil(math.log2(participants)))
    if levels < _LEAST_LEVELS:
        raise SecureSumAborted(f"expected at most {2**20} participants in a secure sum, got {participants}.")
    return Encoding(bound, levels)


def encode(values: Array, grid: Encoding) -> Array:
    """Numbers to their nearest steps. A number out of range is refused, not clipped: a sum would be wrong and nobody would know.

    Args:
        values: (n,), any float type.
        grid: The grid.

    Returns:
        (n,), uint32, in [0, levels].

    Raises:
        TrainingError: If a number is not finite, or its magnitude is above the bound.
    """
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= grid.bound:
        raise TrainingError(
            f"expected changes within +-{grid.bound:g} for the secure sum, got a larger one. Raise privacy.secagg_range at the "
            "coordinator, or lower train.learning_rate."
        )
    steps = np.rint((values.astype(np.float64) + grid.bound) * (grid.levels / (2 * grid.bound)))
    return steps.astype(np.uint32)


def decode(total: Array, participants: int, grid: Encoding) -> Array:
    """A sum of encoded vectors to the sum of their numbers.

    Args:
        total: (n,), uint32: the sum.
        participants: How many vectors are in it.
        grid: The grid.

    Returns:
        (n,), float64, off by `participants` / 2 steps at most.

    Raises:
        SecureSumAborted: If it is no such sum: someone put something else in.
    """
    if int(total.max(initial=0)) > participants * grid.levels:
        raise SecureSumAborted(
            f"expected a sum of {participants} vectors within +-{grid.bound:g}, got numbers that no such sum has: a participant "
            "sent something else. The attempt is given up, and nothing is changed."
        )
    return total.astype(np.float64) * grid.step - participants * grid.bound
