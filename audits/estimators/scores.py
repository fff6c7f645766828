"""The one check that every estimator makes of its scores."""

from __future__ import annotations

from typing import Any

import numpy as np

from lamina.protos.adapter import Array
from lamina.protos.errors import ConfigError


def checked(scores: Any, what: str, least: int = 0) -> Array:
    """Scores as float64. Higher means more likely a member; infinities are scores, NaN is none.

    Args:
        scores: (n,) numbers.
        what: Whose scores they are, for messages.
        least: Fewest that are of use.

    Returns:
        (n,) float64.

    Raises:
        ConfigError: If they are of another shape, fewer than `least`, or one is NaN.
    """
    found = np.asarray(scores, np.float64)
    if found.ndim != 1 or len(found) < least:
        raise ConfigError(f"{what}: expected at least {least} scores in one dimension, got shape {found.shape}.")
    unknown = int(np.isnan(found).sum())
    if unknown:
        raise ConfigError(
            f"{what}: expected a number for each, got NaN for {unknown} of {len(found)}. The attacked model gives no loss there: "
            "look whether the run diverged."
        )
    return found


def probability(value: float, what: str, zero: bool = False) -> float:
    """A probability that is not certain.

    Args:
        value: The number.
        what: Its name, for messages.
        zero: Whether it may be 0.

    Returns:
        The number, in (0, 1), or [0, 1).

    Raises:
        ConfigError: If it is not.
    """
    if not (0 < value < 1 or (zero and value == 0)):
        raise ConfigError(f"{what}={value}: expected a number in {'[' if zero else '('}0, 1).")
    return float(value)
