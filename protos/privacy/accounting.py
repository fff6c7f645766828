"""What events cost: epsilon by privacy loss distributions, with Renyi divergences as a cross-check, both of dp-accounting.

Epsilon is always computed from all events, never added to: the sum of epsilons of rounds is no epsilon of their composition.
PLD (Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380) gives an upper bound that is tight to
about 1e-3; RDP (Mironov 2017, arXiv:1702.07476) one that is 8 to 43 % above it.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from lamina.protos.errors import ConfigError
from lamina.protos.privacy.events import LEAST_RATE, NOISE, Event

ACCOUNTANT = "pld"
# sample_rate and noise_multiplier -> steps, as a sorted tuple: equal mechanisms compose in any order.
Composed = tuple[tuple[float, float, int], ...]
# `noise_for` never gives less than the least: it would be private by arithmetic alone.
_MOST_NOISE, _LEAST_NOISE, _LITTLE_NOISE = 1e5, 0.1, 0.3
_PRECISION, _FINE, _COARSE, _COARSEST = 2e-3, 1e-4, 1e-3, 1e-2
# Beyond these, loss distributions take gigabytes or minutes, and no budget is so large: the bound by RDP, as safe, stands in.
_PLD_EPSILON, _PLD_STEPS = 100.0, 1_000_000
# Few orders of RDP for a first guess; all for a bound, the highest for budgets that are far below 1.
_ORDERS = (*range(2, 32), *range(32, 128, 8), 128, 256, 512, 2048, 8192)
_ALL_ORDERS = (*(1 + 0.1 * n for n in range(1, 100)), *range(11, 64), 128, 256, 512, 1024, 2048, 8192)


def composed(events: Iterable[Event]) -> Composed:
    """What events amount to, whatever their order and however they were cut.

    Args:
        events: Of one client, or of one central mechanism.

    Returns:
        (sample rate, noise multiplier, steps), each pair once.
    """
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[event.sample_rate, event.noise_multiplier] += event.steps
    return tuple(sorted((rate, noise, count) for (rate, noise), count in steps.items() if count))


def epsilon(events: Iterable[Event], target_delta: float) -> float:
    """The epsilon of everything that happened, by PLD.

    Args:
        events: Of one client, or of one central mechanism.
        target_delta: The delta of (epsilon, delta), in (0, 1).

    Returns:
        An upper bound for adding or removing one unit; 0 where nothing happened. Where the grid of PLD is too coarse to be the
        better bound (above 100, or for very many steps), that of `epsilon_rdp`.

    Raises:
        ConfigError: If delta or an event is impossible.
    """
    return _cost(composed(events), target_delta, _FINE)


def bound(events: Iterable[Event], target_delta: float) -> float:
    """No less than `epsilon`, by a hundredth or so, in a tenth of the time: for looking who has spent most.

    Args:
        events: Of one client, or of one central mechanism.
        target_delta: The delta of (epsilon, delta), in (0, 1).

    Returns:
        An upper bound; 0 where nothing happened.

    Raises:
        ConfigError: If delta or an event is impossible.
    """
    return _cost(composed(events), target_delta, _COARSE)


def epsilon_rdp(events: Iterable[Event], target_delta: float) -> float:
    """The same by RDP: never less than `epsilon` in truth, and computed in another way.

    Args:
        events: Of one client, or of one central mechanism.
        target_delta: The delta of (epsilon, delta), in (0, 1).

    Returns:
        An upper bound; 0 where nothing happened.

    Raises:
        ConfigError: If delta or an event is impossible.
    """
    return _by_rdp(composed(events), target_delta)


def _cost(parts: Composed, target_delta: float, interval: float) -> float:
    """The smaller of both bounds, which is that of PLD unless its grid is too coarse, or it is out of reach."""
    bound = _by_rdp(parts, target_delta)
    if not bound <= _PLD_EPSILON or sum(steps for _, _, steps in parts) > _PLD_STEPS:
        return bound
    return min(bound, _by_pld(parts, target_delta, interval))


@lru_cache(4096)
def _by_pld(parts: Composed, target_delta: float, interval: float) -> float:
    from dp_accounting import pld

    # Little noise makes losses large, and a fine grid of them takes minutes; a coarse one is an upper bound, too.
    little = min((noise for _, noise, _ in parts), default=1.0) < _LITTLE_NOISE
    accountant = pld.PLDAccountant(value_discretization_interval=max(interval, _COARSEST) if little else interval)
    return _of(accountant, parts, target_delta)


@lru_cache(4096)
def _by_rdp(parts: Composed, target_delta: float, orders: tuple[float, ...] = _ALL_ORDERS) -> float:
    from dp_accounting import rdp

    return _of(rdp.RdpAccountant(orders), parts, target_delta)


def _of(accountant: Any, parts: Composed, target_delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

    # It warns of each order of RDP whose series does not converge, and leaves that order out, which is safe.
    logging.getLogger("absl").setLevel(logging.ERROR)
    if not 0 < target_delta < 1:
        raise ConfigError(f"privacy.delta={target_delta}: expected a number in (0, 1).")
    for rate, noise, steps in parts:
        if not (NOISE[0] <= noise <= NOISE[1] and LEAST_RATE <= rate <= 1 and steps > 0):
            raise ConfigError(
                f"expected steps with a noise multiplier from {NOISE[0]:g} to {NOISE[1]:g} and a sample rate from "
                f"{LEAST_RATE:g} to 1, got {steps} steps with noise {noise:g} at rate {rate:g}: they have no epsilon."
            )
        step = PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
        accountant.compose(SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(target_delta)) if parts else 0.0


@lru_cache(1024)
def noise_for(target_epsilon: float, target_delta: float, sample_rate: float, steps: int) -> float:
    """The least noise with which all steps of a campaign cost no more than a budget.

    Args:
        target_epsilon: > 0.
        target_delta: In (0, 1).
        sample_rate: Of a step, in (0, 1].
        steps: Of the whole campaign, all rounds.

    Returns:
        A noise multiplier, 0.1 or more, whose epsilon by `epsilon` is at most the target, and within about 0.3 % of it.

    Raises:
        ConfigError: If no noise is enough.
    """
    if not 0 < target_epsilon < math.inf:
        raise ConfigError(f"privacy.epsilon={target_epsilon}: expected a number > 0.")
    grid = max(_FINE, min(_COARSE, _COARSE * target_epsilon))

    def excess(noise: float) -> float:
        # An epsilon of 0 is as far below any target as need be.
        return math.log(max(_cost(((sample_rate, noise, steps),), target_delta, grid), 1e-12) / target_epsilon)

    high = _enough_by_rdp(target_epsilon, target_delta, sample_rate, steps)
    low, above = high, excess(high)
    below = above
    while (
        above <= 0 and high > _LEAST_NOISE
    ):  # PLD needs less noise than RDP says, by a third at most where it was looked at
        high, below, low = low, above, max(_LEAST_NOISE, 0.75 * low)
        above = excess(low)
    # Regula falsi on logarithms, where the curve is nearly straight.
    while below < -_PRECISION and above > 0 and high / low > 1 + 0.1 * _PRECISION:
        share = min(0.9, max(0.1, above / (above - below)))
        middle = low * (high / low) ** share
        found = excess(middle)
        low, above, high, below = (low, above, middle, found) if found <= 0 else (middle, found, high, below)
    while _cost(((sample_rate, high, steps),), target_delta, _FINE) > target_epsilon:
        high *= 1 + _PRECISION / 2  # the grids differ by less than that
    return high


def _enough_by_rdp(target_epsilon: float, target_delta: float, sample_rate: float, steps: int) -> float:
    """Noise that is enough by RDP, which is quick to compute, and about the least such."""
    low, high = _MOST_NOISE, _MOST_NOISE

    def cost(noise: float) -> float:
        return _by_rdp(((sample_rate, noise, steps),), target_delta, _ORDERS)

    if not cost(high) <= target_epsilon:
        raise ConfigError(
            f"privacy.epsilon={target_epsilon:g}: no noise is enough for {steps} steps at delta {target_delta:g}. "
            "Raise privacy.epsilon or privacy.delta, or lower rounds or train.local_steps."
        )
    while cost(low) <= target_epsilon and low > _LEAST_NOISE:
        high, low = low, max(_LEAST_NOISE, low / 2)
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= target_epsilon else (middle, high)
    return high
