"""A lower bound on epsilon from the outputs of many runs on two neighbouring data sets (Nasr et al. 2021, arXiv:2101.04535).

For mechanisms that are quick to run again. It holds for any mechanism, and is tight where an event of the output tells the
neighbours apart as well as the claim allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lamina.audits.estimators.roc import clopper_pearson
from lamina.audits.estimators.scores import checked, probability
from lamina.protos.adapter import Array

_THRESHOLDS = 1000


@dataclass(frozen=True)
class ManyRun:
    """What the runs show.

    Attributes:
        epsilon_lower: The bound; 0 where nothing is refuted.
        ceiling: Largest bound that so many runs could have given.
        hits: Runs of the one data set that had the event.
        alarms: Runs of the other that had it.
        tested: Runs of each that were looked at; as many chose the event.
        significance: Probability with which the bound may be wrong.
        delta: Of the claim.
    """

    epsilon_lower: float
    ceiling: float
    hits: int
    alarms: int
    tested: tuple[int, int]
    significance: float
    delta: float


def many_run(one: Any, other: Any, delta: float, significance: float = 0.05) -> ManyRun:
    """Choose an event on half of the runs, and bound its probabilities on the other half.

    The event is that the output is above a threshold, or that it is not, and more likely on the one data set, or on the other. As
    it is chosen on runs that are then left out, it may be chosen as one likes.

    Args:
        one: (n,) outputs on one data set, independent of each other; NaN is refused.
        other: (k,) outputs on its neighbour.
        delta: Of the claim, in [0, 1).
        significance: In (0, 1).

    Returns:
        log((p - delta) / q) for the event's probability on one data set, p at least, and on the other, q at most.

    Raises:
        ConfigError: If there are fewer than two runs of either, an output is NaN, or a probability is impossible.
    """
    samples = checked(one, "runs of one data set", least=2), checked(other, "runs of the other", least=2)
    probability(delta, "delta", zero=True)
    probability(significance, "significance")
    chosen_on, tested_on = ([sample[start::2] for sample in samples] for start in (1, 0))
    everything = np.concatenate(chosen_on)
    thresholds = np.unique(np.quantile(everything, np.linspace(0, 1, _THRESHOLDS), method="nearest"))
    # As strict as if each threshold were tested: events that are few and stand out by chance are not chosen.
    best = max(
        (float(bounds.max()), float(thresholds[bounds.argmax()]), above, swapped)
        for above in (True, False)
        for swapped in (True, False)
        for bounds in [
            _bounds(
                _pair(chosen_on, thresholds, above, swapped),
                _sizes(chosen_on, swapped),
                delta,
                significance / _THRESHOLDS,
            )
        ]
    )
    _, threshold, above, swapped = best
    counts = _pair(tested_on, np.array([threshold]), above, swapped)
    sizes = _sizes(tested_on, swapped)
    perfect = np.array([sizes[0]]), np.array([0])
    return ManyRun(
        epsilon_lower=float(_bounds(counts, sizes, delta, significance)[0]),
        ceiling=float(_bounds(perfect, sizes, delta, significance)[0]),
        hits=int(counts[0][0]),
        alarms=int(counts[1][0]),
        tested=sizes,
        significance=significance,
        delta=delta,
    )


def _pair(samples: list[Array], thresholds: Array, above: bool, swapped: bool) -> tuple[Array, Array]:
    """How many outputs of each data set have the event, by threshold; first those of the one that it speaks for."""
    lower = [np.searchsorted(np.sort(sample), thresholds, side="right") for sample in samples]
    first, second = ((len(s) - n if above else n) for s, n in zip(samples, lower, strict=True))
    return (second, first) if swapped else (first, second)


def _sizes(samples: list[Array], swapped: bool) -> tuple[int, int]:
    first, second = (len(sample) for sample in samples)
    return (second, first) if swapped else (first, second)


def _bounds(counts: tuple[Array, Array], sizes: tuple[int, int], delta: float, significance: float) -> Array:
    """What is refuted by each pair of counts; half of the significance for either of both one-sided bounds."""
    least = clopper_pearson(counts[0], sizes[0], significance)[0] - delta
    most = clopper_pearson(counts[1], sizes[1], significance)[1]
    with np.errstate(divide="ignore"):
        found: Array = np.log(np.maximum(least, 0) / most)
    return np.maximum(found, 0)
