"""What a campaign cost, computed again from what was seen to happen, by dp-accounting directly and not by the run's own code."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# By RDP, which is up to a half above the truth: a run's own accountant goes by loss distributions up to 100, and what is computed
# here must not be the looser bound of the two.
_MOST_EPSILON = 150.0
_INTERVAL = 1e-3
_SLACK = 0.02  # grids of accountants differ by less


@dataclass(frozen=True)
class Steps:
    """Some steps of a subsampled Gaussian mechanism.

    Attributes:
        noise_multiplier: Of the sum, in units of its clip; > 0.
        sample_rate: In (0, 1].
        steps: How many.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


def steps_of(history: Iterable[Mapping[str, Any]]) -> dict[str, list[Steps]]:
    """Events of a run by client.

    Args:
        history: As in a checkpoint.

    Returns:
        Client id -> steps; the id is empty for a central mechanism.
    """
    found: dict[str, list[Steps]] = {}
    for event in history:
        one = Steps(float(event["noise_multiplier"]), float(event["sample_rate"]), int(event["steps"]))
        found.setdefault(str(event["client_id"]), []).append(one)
    return found


def epsilon(parts: Iterable[Steps], delta: float) -> float:
    """Epsilon of all steps together.

    Args:
        parts: Steps.
        delta: In (0, 1).

    Returns:
        By privacy loss distributions, or by RDP where that is already large; 0 for no steps.
    """
    events: Counter[tuple[float, float]] = Counter()
    for one in parts:
        events[one.sample_rate, one.noise_multiplier] += one.steps
    return _epsilon(tuple(sorted(events.items())), delta) if events else 0.0


@lru_cache(4096)
def _epsilon(events: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    """That of steps by sample rate and noise multiplier; clients are often alike, and rounds follow rounds."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent, pld, rdp

    logging.getLogger("absl").setLevel(logging.ERROR)

    def composed(accountant: Any) -> float:
        for (rate, noise), count in events:
            accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), count))
        return float(accountant.get_epsilon(delta))

    by_rdp = composed(rdp.RdpAccountant())
    if not by_rdp <= _MOST_EPSILON:
        return by_rdp
    return min(by_rdp, composed(pld.PLDAccountant(value_discretization_interval=_INTERVAL)))


def understated(claimed: float, recomputed: float) -> bool:
    """Whether a claim is below what happened, by more than accountants differ.

    Args:
        claimed: Epsilon as reported.
        recomputed: Epsilon of what happened.

    Returns:
        True for a false claim.
    """
    return not recomputed <= claimed * (1 + _SLACK) + 1e-3  # nor where either is no number
