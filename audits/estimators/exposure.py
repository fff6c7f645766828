"""Exposure of a secret (Carlini et al. 2018, arXiv:1802.08232): how far up it is among all that it could have been."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import gammaln

from lamina.audits.estimators.scores import checked
from lamina.protos.adapter import Array
from lamina.protos.errors import ConfigError


@dataclass(frozen=True)
class Exposure:
    """The exposures of canaries of one kind.

    Attributes:
        values: (n,) bits, one a canary.
        candidates: R, how many there are for each, itself among them.
    """

    values: Array
    candidates: int

    @property
    def ceiling(self) -> float:
        """The exposure of a canary that no other candidate comes up to: log2 R, in bits."""
        return math.log2(self.candidates)

    @property
    def extracted(self) -> int:
        """How many canaries are ahead of every other candidate."""
        return int((self.values >= self.ceiling).sum())

    @property
    def chance(self) -> float:
        """The expected exposure of a canary that was never trained on, in bits: log2 R - log2(R!) / R, about 1.44."""
        return self.ceiling - float(gammaln(self.candidates + 1)) / (self.candidates * math.log(2))


def exposure(canaries: Any, others: Any) -> Exposure:
    """Rank canaries among the candidates that were drawn as they were, and never trained on.

    Exposure is log2 R - log2 rank, where the rank is exact: one more than the candidates that score as high or higher. Ties count
    against the canary, as who cannot tell candidates apart has not found it.

    Args:
        canaries: (n,) scores, higher for more likely a member; NaN is refused.
        others: (R - 1,) scores of the other candidates of every canary, or (n, R - 1) of each one's own.

    Returns:
        The exposures.

    Raises:
        ConfigError: If there is no other candidate, shapes do not fit, or a score is NaN.
    """
    scores = checked(canaries, "canaries")
    table = np.asarray(others, np.float64)
    if table.ndim not in (1, 2) or not table.shape[-1] or (table.ndim == 2 and len(table) != len(scores)):
        raise ConfigError(
            f"exposure: expected other candidates for all or for each of {len(scores)} canaries, got shape {table.shape}."
        )
    checked(table.ravel(), "exposure: other candidates")
    if table.ndim == 1:
        ordered = np.sort(table)
        ranks = 1 + len(ordered) - np.searchsorted(ordered, scores, side="left")
    else:
        ranks = 1 + (table >= scores[:, None]).sum(axis=1)
    candidates = table.shape[-1] + 1
    return Exposure(math.log2(candidates) - np.log2(ranks), candidates)


def json_of(found: Exposure) -> dict[str, float | int | None]:
    """The figures of one kind of canaries in the `exposure` of audit.json.

    Args:
        found: Their exposures.

    Returns:
        JSON values; mean and largest are null where there is no canary.
    """
    there = len(found.values) > 0
    return {
        "mean": float(found.values.mean()) if there else None,
        "max": float(found.values.max()) if there else None,
        "extracted": found.extracted,
        "count": len(found.values),
        "chance": found.chance,
    }
