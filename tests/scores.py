"""How well scores tell two groups apart, by definition."""

from __future__ import annotations

import numpy as np


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Chance that a member scores above another, ties counting half."""
    above = members[:, None] > others[None]
    return float((above + 0.5 * (members[:, None] == others[None])).mean())
