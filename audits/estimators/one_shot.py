"""Epsilon of a client-level mechanism from one run with canary clients (Andrew et al. 2023, arXiv:2302.03098).

Each canary client sends the same random direction in every round. If the mechanism is right, the cosine of a direction with the
whole change of the model is N(0, 1/d) where the client was not there, and a normal of nearly the same deviation about something
larger where it was; how far apart they are, in deviations, is the mu of the run as a Gaussian mechanism. This is an estimate, and
no bound: it is for finding mechanisms that are wrong by a factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lamina.audits.estimators.gaussian import epsilon_of
from lamina.audits.estimators.scores import checked
from lamina.protos import seeds
from lamina.protos.adapter import Array
from lamina.protos.errors import ConfigError


@dataclass(frozen=True)
class OneShot:
    """What canary clients show.

    Attributes:
        epsilon: Estimate at delta.
        interval: Percentiles of a bootstrap over canaries; it does not cover the noise that they share.
        mu: Estimate, in deviations.
        mean: Of the cosines.
        deviation: Of the cosines.
        null_deviation: 1 / sqrt d, that of a direction which was not there.
        canaries: k.
        dimension: d.
        delta: At which mu becomes an epsilon.
    """

    epsilon: float
    interval: tuple[float, float]
    mu: float
    mean: float
    deviation: float
    null_deviation: float
    canaries: int
    dimension: int
    delta: float


def one_shot(cosines: Any, dimension: int, delta: float, seed: int = 0, resamples: int = 1000) -> OneShot:
    """Fit the cosines of canaries that were in every round.

    mu is their mean over their deviation, which also holds what canaries do to each other and so lessens the estimate where noise
    is small. One canary, or canaries that all have one cosine, take the known deviation of the null.

    Args:
        cosines: (k,) cosines of a canary's direction with the change of the model over the run.
        dimension: d, numbers that the run can change.
        delta: In (0, 1).
        seed: Of the bootstrap.
        resamples: Of the bootstrap.

    Returns:
        The estimate with its 95 % interval.

    Raises:
        ConfigError: If there is no canary, a cosine is not in [-1, 1], or d or delta is impossible.
    """
    found = checked(cosines, "canary clients", least=1)
    if np.abs(found).max() > 1 + 1e-9 or dimension < 2:
        raise ConfigError(
            f"canary clients: expected cosines in [-1, 1] of at least 2 numbers, got {dimension} numbers."
        )
    null = 1 / math.sqrt(dimension)
    drawn = seeds.stream(seed, "audit", "one-shot").integers(len(found), size=(resamples, len(found)))
    low, high = np.quantile(_mus(found[drawn], null), [0.025, 0.975])
    mu = float(_mus(found[None], null)[0])
    return OneShot(
        epsilon=epsilon_of(mu, delta),
        interval=(epsilon_of(float(low), delta), epsilon_of(float(high), delta)),
        mu=mu,
        mean=float(found.mean()),
        deviation=float(found.std(ddof=1)) if len(found) > 1 else null,
        null_deviation=null,
        canaries=len(found),
        dimension=dimension,
        delta=delta,
    )


def beyond(found: OneShot, analytic: float) -> bool:
    """Whether the estimate is too large for the claim to be right.

    A correct mechanism is estimated within half of its epsilon or so, from 50 canaries on; a wrong one at twice and more.

    Args:
        found: The estimate.
        analytic: The epsilon that the run's plan claims.

    Returns:
        True if it is more than twice the claim, and the interval is above it.
    """
    return found.epsilon > 2 * analytic and found.interval[0] > analytic


def _mus(cosines: Array, null: float) -> Array:
    """Means in deviations, of each row, 0 where negative."""
    deviation = cosines.std(axis=1, ddof=1) if cosines.shape[1] > 1 else np.zeros(len(cosines))
    mu: Array = np.maximum(cosines.mean(axis=1), 0) / np.where(deviation > 1e-6 * null, deviation, null)
    return mu
