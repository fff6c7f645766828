"""How well scores tell members from others: the ROC curve, its area, and what it gives where false alarms are rare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import beta, norm

from lamina.audits.estimators import gaussian
from lamina.audits.estimators.scores import checked
from lamina.protos import seeds
from lamina.protos.adapter import Array

RATES = (0.01, 0.001)
_POINTS = 200
Interval = tuple[float, float]


@dataclass(frozen=True)
class Tpr:
    """The true positive rate at a false positive rate.

    Attributes:
        value: Share of members above the lowest threshold that no more than this share of others is above.
        interval: Of `value`; see `roc`.
        measurable: Whether there are others enough for one of them to be that share; if not, `value` is at no false positive.
    """

    value: float
    interval: Interval
    measurable: bool


@dataclass(frozen=True)
class Roc:
    """How well scores tell members from others.

    Attributes:
        auc: Probability that a member scores higher than another, ties counted half.
        auc_interval: See `roc`.
        tpr_at_fpr: False positive rate -> true positive rate.
        curve: (fpr, tpr) from (0, .) to (1, 1), at most 200, dense where fpr is small.
        members: How many.
        others: How many.
    """

    auc: float
    auc_interval: Interval
    tpr_at_fpr: Mapping[float, Tpr]
    curve: tuple[tuple[float, float], ...]
    members: int
    others: int


def roc(members: Any, others: Any, seed: int = 0, resamples: int = 1000, confidence: float = 0.95) -> Roc:
    """Measure an attack by its scores.

    Intervals are percentiles of a bootstrap that draws members and others anew, each as many as there are. They cover which rows
    were looked at, as if drawn one by one from more of their kind; they do not cover that another training run would give
    other scores. Where all resamples agree, as with scores that are wholly apart, they would have no width: the interval is then
    that of Clopper and Pearson, of `members` for a rate, and for the area of whichever kind is rarer.

    Args:
        members: (n,) scores of what was trained on, higher for more likely a member; NaN is refused.
        others: (k,) scores of the rest.
        seed: Of the resamples.
        resamples: How many.
        confidence: Of each interval.

    Returns:
        The figures.

    Raises:
        ConfigError: If there are no members or no others, or a score is NaN.
    """
    inside = checked(members, "members", least=1)
    outside = checked(others, "others", least=1)
    grid = np.unique(np.concatenate([inside, outside]))
    places = np.searchsorted(grid, inside), np.searchsorted(grid, outside)
    counts = tuple(np.bincount(one, minlength=len(grid)).astype(np.float64) for one in places)
    rng = seeds.stream(seed, "audit", "bootstrap")
    drawn = np.empty((resamples, 1 + len(RATES)))
    for row in drawn:
        again = (one[rng.integers(len(one), size=len(one))] for one in places)
        row[:] = _figures(*(np.bincount(one, minlength=len(grid)).astype(np.float64) for one in again))
    values = _figures(*counts)
    sizes = [min(len(inside), len(outside)), *[len(inside)] * len(RATES)]
    intervals = [
        _interval(value, column, size, confidence) for value, column, size in zip(values, drawn.T, sizes, strict=True)
    ]
    rates = {
        rate: Tpr(float(value), interval, len(outside) * rate >= 1 - 1e-9)
        for rate, value, interval in zip(RATES, values[1:], intervals[1:], strict=True)
    }
    return Roc(float(values[0]), intervals[0], rates, _curve(*counts), len(inside), len(outside))


def beyond(found: Roc, mu: float, significance: float = 0.01) -> bool:
    """Whether an attack did better than a Gaussian curve allows, by more than chance would explain.

    The area of n members and k others has a variance of at most A (1 - A) / min(n, k) (Birnbaum and Klose 1957). Scores
    of one run are not independent of each other, so this is an alarm that calls for a look, and no refutation of a claim; the
    bounds of `one_run` are.

    Args:
        found: Of an attack.
        mu: Of the curve through the claim, see `gaussian.mu_of`.
        significance: Of the alarm.

    Returns:
        True if the area is too large.
    """
    return found.auc > gaussian.largest_auc(mu) + luck(mu, found.members, found.others, significance)


def luck(mu: float, members: int, others: int, significance: float) -> float:
    """How far an area may lie above the largest that a Gaussian curve allows, by the luck of the sample; see `beyond`.

    Args:
        mu: Of the curve.
        members: n.
        others: k.
        significance: Chance of lying further above, at most.

    Returns:
        That many deviations of an area of this size.
    """
    most = gaussian.largest_auc(mu)
    return float(norm.isf(significance)) * math.sqrt(most * (1 - most) / min(members, others))


def json_of(found: Roc, needs: str) -> dict[str, Any]:
    """One of the `attacks` of audit.json.

    Args:
        found: The figures.
        needs: What an attacker needs, in words.

    Returns:
        JSON values.
    """
    return {
        "auc": found.auc,
        "auc_interval": list(found.auc_interval),
        "tpr_at_fpr": {
            f"{rate:g}": {"value": one.value, "interval": list(one.interval), "measurable": one.measurable}
            for rate, one in found.tpr_at_fpr.items()
        },
        "roc": [list(point) for point in found.curve],
        "members": found.members,
        "others": found.others,
        "needs": needs,
    }


def clopper_pearson(hits: Any, trials: Any, significance: float) -> tuple[Any, Any]:
    """The exact two-sided interval of a binomial probability (Clopper and Pearson 1934).

    Args:
        hits: Successes, a number or an array.
        trials: Of how many.
        significance: Probability with which the truth is outside, half on either side at most.

    Returns:
        Its ends, of the shape of `hits`.
    """
    hits = np.asarray(hits, np.float64)
    low = np.where(hits > 0, beta.ppf(significance / 2, np.maximum(hits, 1), trials - hits + 1), 0.0)
    high = np.where(hits < trials, beta.isf(significance / 2, hits + 1, np.maximum(trials - hits, 1)), 1.0)
    return low, high


def _figures(inside: Array, outside: Array) -> tuple[float, ...]:
    """The area and the rates, of counts by score in rising order."""
    members, others = inside.sum(), outside.sum()
    below = np.cumsum(outside) - outside
    auc = float(inside @ (below + outside / 2)) / (members * others)
    # How many of each kind score higher than the score at each place.
    alarms, hits = others - np.cumsum(outside), members - np.cumsum(inside)
    rates = []
    for rate in RATES:
        allowed = math.floor(rate * others + 1e-9)
        # Alarms fall from place to place: the first that is allowed has the lowest threshold.
        rates.append(float(hits[int(np.searchsorted(-alarms, -allowed))] / members))
    return (auc, *rates)


def _interval(value: float, drawn: Array, size: int, confidence: float) -> Interval:
    if np.ptp(drawn) > 0:
        low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    else:
        low, high = clopper_pearson(value * size, size, 1 - confidence)
    return float(min(low, value)), float(max(high, value))


def _curve(inside: Array, outside: Array) -> tuple[tuple[float, float], ...]:
    """Corners of the curve: all, or so many that the steps of log fpr are even."""
    tpr = np.concatenate([[0.0], np.cumsum(inside[::-1]) / inside.sum()])
    fpr = np.concatenate([[0.0], np.cumsum(outside[::-1]) / outside.sum()])
    # Of points with one fpr the highest is the corner.
    last = np.flatnonzero(np.append(np.diff(fpr) > 0, True))
    fpr, tpr = fpr[last], tpr[last]
    if len(fpr) > _POINTS:
        wanted = np.geomspace(fpr[1], 1.0, _POINTS - 1)
        kept = np.unique(np.concatenate([[0], np.searchsorted(fpr, wanted, side="right") - 1, [len(fpr) - 1]]))
        fpr, tpr = fpr[kept], tpr[kept]
    return tuple(zip(fpr.tolist(), tpr.tolist(), strict=True))
