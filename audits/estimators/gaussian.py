"""Gaussian differential privacy (Dong, Roth and Su 2019, arXiv:1905.02383): the curve of one normal shifted by mu.

Compositions of many steps come close to such a curve, so the one that goes through a claimed (epsilon, delta) says what an attack
may reach at most where the claim holds with nothing to spare.
"""

from __future__ import annotations

import math
from typing import Any

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

from lamina.audits.estimators.scores import probability
from lamina.protos.errors import ConfigError

# exp(1e5) or a shift of 1e3 deviations: beyond these nothing is private, and floats end.
_MOST_EPSILON, _MOST_MU = 1e6, 1e3


def log_delta(mu: float, epsilon: float) -> float:
    """The logarithm of the delta that mu-GDP has at an epsilon (Corollary 2.13).

    Args:
        mu: > 0.
        epsilon: >= 0.

    Returns:
        log(Phi(-epsilon/mu + mu/2) - exp(epsilon) Phi(-epsilon/mu - mu/2)); -inf where it vanishes in float64.
    """
    first = float(log_ndtr(-epsilon / mu + mu / 2))
    second = epsilon + float(log_ndtr(-epsilon / mu - mu / 2))
    return first + math.log(-math.expm1(second - first)) if second < first else -math.inf


def epsilon_of(mu: float, delta: float) -> float:
    """The exact epsilon of mu-GDP.

    Args:
        mu: >= 0; infinite where one normal is shifted beyond doubt.
        delta: In (0, 1).

    Returns:
        The least epsilon >= 0 at which mu-GDP has no more than this delta.

    Raises:
        ConfigError: If delta is not in (0, 1), or mu is negative.
    """
    goal = math.log(probability(delta, "delta"))
    if not mu >= 0:
        raise ConfigError(f"mu={mu}: expected a number >= 0.")
    if mu > _MOST_MU:
        return math.inf
    if mu == 0 or log_delta(mu, 0.0) <= goal:
        return 0.0
    # Phi(-epsilon/mu + mu/2) alone is delta here, and more than delta anywhere below.
    high = mu * (mu / 2 - float(ndtri(delta))) + 1e-9
    return float(brentq(lambda epsilon: max(log_delta(mu, epsilon), 2 * goal - 1) - goal, 0.0, high, xtol=1e-12))


def mu_of(epsilon: float, delta: float) -> float:
    """The mu of the Gaussian curve that goes through (epsilon, delta).

    Args:
        epsilon: >= 0.
        delta: In (0, 1).

    Returns:
        The only mu with `epsilon_of(mu, delta) == epsilon`; at epsilon 0 the largest of those.

    Raises:
        ConfigError: If epsilon is negative or infinite, or delta not in (0, 1).
    """
    goal = math.log(probability(delta, "delta"))
    if not 0 <= epsilon <= _MOST_EPSILON:
        raise ConfigError(f"epsilon={epsilon}: expected a number from 0 to {_MOST_EPSILON:g}.")
    low, high = 1e-9, 1.0
    while log_delta(high, epsilon) < goal:
        low, high = high, 2 * high
    while log_delta(low, epsilon) > goal:
        low /= 2
    return float(brentq(lambda mu: max(log_delta(mu, epsilon), 2 * goal - 1) - goal, low, high, xtol=1e-12))


def largest_auc(mu: float) -> float:
    """The area under the ROC curve beyond which no attack gets in expectation.

    Args:
        mu: >= 0.

    Returns:
        Phi(mu / sqrt 2).
    """
    return float(ndtr(mu / math.sqrt(2)))


def largest_tpr(mu: float, fpr: Any) -> Any:
    """The true positive rate beyond which no attack gets in expectation.

    An attack on many rows has the mean of their rates, which lies below the curve too, as that is concave.

    Args:
        mu: >= 0.
        fpr: False positive rate, a number or an array.

    Returns:
        Phi(Phi^-1(fpr) + mu), of the same shape.
    """
    return ndtr(ndtri(fpr) + mu)
