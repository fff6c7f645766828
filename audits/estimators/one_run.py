"""Lower bounds on epsilon from one run with canaries, of which each was in the training set by a fair coin.

An auditor who knows the scores guesses some of the coins and abstains from the others. Under a privacy claim there is a limit to
how many guesses are right; where more are, the claim is refuted, and the largest epsilon that is refuted is a lower bound with
confidence 1 - significance. A bound cannot be larger than its ceiling, that of the same number of guesses with all of them
right: few canaries can never refute a large epsilon.

What it rests on: independent fair coins, and guesses that are a function of the output alone. How well canaries are chosen or
scored does not matter to validity. Neighbours differ in one canary, in or out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import bdtrc, expit, ndtr, ndtri

from lamina.audits.estimators.gaussian import epsilon_of
from lamina.audits.estimators.scores import checked, probability
from lamina.protos import seeds
from lamina.protos.adapter import Array
from lamina.protos.errors import ConfigError

_PRECISION = 1e-9  # relative, of a bound; the end that is returned is refuted


@dataclass(frozen=True)
class OneRun:
    """What one run shows.

    Attributes:
        epsilon_lower: Bound that holds for any mechanism (Steinke et al.).
        epsilon_lower_fdp: Bound if the mechanism's curve is a Gaussian one (Mahloujifar et al.); None at delta 0, where such a
            curve has no epsilon.
        ceiling: Largest `epsilon_lower` that could have come out.
        ceiling_fdp: Largest `epsilon_lower_fdp` that could have come out.
        canaries: m.
        guesses: r, of the choices that which gives the largest bound.
        right: v, how many of these were right.
        significance: Of each bound: the probability with which it may be wrong, all choices of r together.
        delta: Of the claim.
        choices: How many values of r were tried, by which the significance of each is divided.
    """

    epsilon_lower: float
    epsilon_lower_fdp: float | None
    ceiling: float
    ceiling_fdp: float | None
    canaries: int
    guesses: int
    right: int
    significance: float
    delta: float
    choices: int = 1


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """A bound on the probability of so many right guesses under (epsilon, delta)-DP (arXiv:2305.08846, Theorem 5.2).

    Args:
        canaries: m.
        guesses: r.
        right: v.
        epsilon: >= 0.
        delta: >= 0.

    Returns:
        P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i for W ~ Binomial(r, e^epsilon / (1 + e^epsilon)), at most 1.
    """
    accuracy = float(expit(epsilon))
    # bdtrc(k, n, p) is P[W > k] for 0 <= k <= n; below 0 it is certain.
    tail = 1.0 if right == 0 else float(bdtrc(right - 1, guesses, accuracy))
    if delta == 0 or right == 0:
        return min(1.0, tail)
    fewer = np.arange(1, right + 1)
    at_least = np.ones(right)
    at_least[:-1] = bdtrc(right - fewer[:-1] - 1, guesses, accuracy)
    slope = float(((at_least - tail) / fewer).max())
    return min(1.0, tail + 2 * canaries * delta * max(0.0, slope))


@lru_cache(2**14)
def epsilon_lower(canaries: int, guesses: int, right: int, delta: float, significance: float) -> float:
    """The largest epsilon that is refuted, whatever the mechanism (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846).

    Args:
        canaries: m, in or out by a fair coin each.
        guesses: r of them, chosen by their scores.
        right: v of these.
        delta: Of the claim, in [0, 1).
        significance: Probability with which the bound may be wrong, in (0, 1).

    Returns:
        A lower bound on epsilon; 0 where nothing is refuted.

    Raises:
        ConfigError: If the counts are impossible, or a probability is.
    """
    _possible(canaries, guesses, right)
    probability(delta, "delta", zero=True)
    probability(significance, "significance")
    return _largest(lambda epsilon: p_value(canaries, guesses, right, epsilon, delta) < significance)


@lru_cache(2**14)
def mu_lower(canaries: int, guesses: int, right: int, significance: float) -> float:
    """The largest mu for which mu-GDP is refuted (Mahloujifar, Melis and Chaudhuri 2024, arXiv:2410.22235).

    Args:
        canaries: m.
        guesses: r.
        right: v.
        significance: In (0, 1).

    Returns:
        A lower bound on mu; 0 where nothing is refuted.

    Raises:
        ConfigError: If the counts are impossible, or the significance is.
    """
    _possible(canaries, guesses, right)
    probability(significance, "significance")
    return _largest(lambda mu: refuted(canaries, guesses, right, mu, significance))


def epsilon_lower_fdp(canaries: int, guesses: int, right: int, delta: float, significance: float) -> float:
    """The largest epsilon that is refuted of mechanisms whose trade-off curve is a Gaussian one (arXiv:2410.22235).

    Args:
        canaries: m, in or out by a fair coin each.
        guesses: r of them, chosen by their scores.
        right: v of these.
        delta: At which mu becomes an epsilon, in (0, 1).
        significance: Probability with which the bound may be wrong, in (0, 1).

    Returns:
        A lower bound on epsilon; 0 where nothing is refuted.

    Raises:
        ConfigError: If the counts are impossible, or a probability is.
    """
    probability(delta, "delta")
    return epsilon_of(mu_lower(canaries, guesses, right, significance), delta)


def refuted(canaries: int, guesses: int, right: int, mu: float, significance: float) -> bool:
    """Whether so many right guesses are too many for mu-GDP.

    With T right guesses, let R_i and H_i be the sums over t >= i of t P[T = t] / m and of (r - t) P[T = t] / m: the mean over
    canaries of the probability to guess one right, or wrong, with at least i right. To flip one canary's coin turns its right
    guess into a wrong one beside the same others, so H_i >= Phi(Phi^-1(R_{i+1}) - mu), the inverse of the curve, which is convex.
    R_i - R_{i+1} is i / (r - i) times H_i - H_{i+1}. If P[T >= v] is as much as the significance, R_v and H_v are at least
    what the recursion starts from, and R_0 + H_0 at least where it ends, which cannot be more than r / m.

    Args:
        canaries: m.
        guesses: r.
        right: v.
        mu: >= 0.
        significance: In (0, 1).

    Returns:
        True where P[T >= v] < significance for every mu-GDP mechanism.
    """
    hits, misses = significance * right / canaries, significance * (guesses - right) / canaries
    for at_least in range(right - 1, -1, -1):
        least = float(ndtr(ndtri(hits) - mu))
        if least <= misses:
            break  # and so in all that follows, as neither has moved
        hits = min(1.0, hits + at_least / (guesses - at_least) * (least - misses))
        misses = least
        if hits + misses > guesses / canaries * (1 + 1e-12):
            return True
    return False


def one_run(
    included: Any, scores: Any, delta: float, significance: float = 0.05, guesses: int | Sequence[int] = ()
) -> OneRun:
    """Guess, count, and bound.

    Half of the guesses are "in", for the highest scores, and half "out", for the lowest. Equal scores are ordered by a
    permutation that is fixed by m: neither the coins nor the order in which canaries are listed can decide.

    Args:
        included: (m,) booleans, the coins.
        scores: (m,), higher for more likely in. A function of the output of the run; NaN is refused.
        delta: Of the claim, in [0, 1).
        significance: Of each bound, in (0, 1).
        guesses: r, fixed before the coins are known; of several the best counts, at the price of a division of the significance
            by their number (Bonferroni). Default: all m.

    Returns:
        Both bounds with their ceilings.

    Raises:
        ConfigError: If shapes differ, there is no canary, an r is not in 1..m, a score is NaN, or a probability is impossible.
    """
    coins = np.asarray(included)
    if coins.dtype != np.bool_ or coins.ndim != 1 or not len(coins):
        raise ConfigError(
            f"one-run audit: expected at least one canary's coin, got {coins.dtype} of shape {coins.shape}."
        )
    values = checked(scores, "one-run audit: canary scores")
    if len(values) != len(coins):
        raise ConfigError(f"one-run audit: expected a score for each of {len(coins)} canaries, got {len(values)}.")
    count = len(coins)
    tried = sorted({guesses} if isinstance(guesses, int) else set(guesses)) or [count]
    if not 1 <= tried[0] <= tried[-1] <= count:
        raise ConfigError(f"one-run audit: expected 1 to {count} guesses, the number of canaries, got {tried}.")
    each = probability(significance, "significance") / len(tried)
    ranked = coins[_order(values)]
    results = [(r, int(ranked[: (r + 1) // 2].sum() + (~ranked[count - r // 2 :]).sum())) for r in tried]
    bounds = [(*_both(count, r, v, delta, each), r, v) for r, v in results]
    lower, lower_fdp, r, v = max(bounds, key=lambda one: (one[0], one[1] or 0.0))
    ceilings = [_both(count, r, r, delta, each) for r in tried]
    return OneRun(
        epsilon_lower=lower,
        epsilon_lower_fdp=lower_fdp,
        ceiling=max(one for one, _ in ceilings),
        ceiling_fdp=max((one for _, one in ceilings if one is not None), default=None),
        canaries=count,
        guesses=r,
        right=v,
        significance=significance,
        delta=delta,
        choices=len(tried),
    )


def json_of(found: OneRun) -> dict[str, float | int | None]:
    """The `one_run` of audit.json.

    Args:
        found: What one run shows.

    Returns:
        JSON values.
    """
    return dict(vars(found))


def _both(canaries: int, guesses: int, right: int, delta: float, significance: float) -> tuple[float, float | None]:
    any_curve = epsilon_lower(canaries, guesses, right, delta, significance)
    return any_curve, epsilon_lower_fdp(canaries, guesses, right, delta, significance) if delta else None


def _order(scores: Array) -> Array:
    """Places from the highest score to the lowest."""
    shuffled = seeds.stream(0, "audit", "ties", len(scores)).permutation(len(scores))
    order: Array = shuffled[np.argsort(-scores[shuffled], kind="stable")]
    return order


def _possible(canaries: int, guesses: int, right: int) -> None:
    if not 0 <= right <= guesses <= canaries:
        raise ConfigError(
            f"one-run audit: expected right <= guesses <= canaries, none negative, got {right}, {guesses} and {canaries}."
        )


def _largest(is_refuted: Callable[[float], bool]) -> float:
    """The end of the interval from 0 on that is refuted, 0 where nothing is."""
    if not is_refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while is_refuted(high):
        low, high = high, 2 * high
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if is_refuted(middle) else (low, middle)
    return low
