"""Whether a private mechanism is what its claim says: noise, independence, sensitivity, sampling and cost, each measured.

An audit of what models remember has little power against mechanisms that are nearly right. These checks look at the mechanism
itself: at what every optimizer step of a campaign received (`witness`), at what one record moves in a step of the training code
without its noise, and at the cost of all that happened, computed by other code. Each holds or not, beyond chance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lamina.audits import accounting, witness
from lamina.audits.accounting import Steps
from lamina.audits.witness import Seen
from lamina.client.data import Example
from lamina.client.model import Base, put
from lamina.client.private.train import Private, train_privately
from lamina.client.train import Task
from lamina.protos.adapter import EMPTY, Adapter
from lamina.protos.errors import LaminaError

# How far chance moves what is measured, in standard deviations: one false alarm in two million.
_FAR = 5.0
_FAR_LEAST = 7.0  # of the least of some ten thousand sums of squares, which have no symmetric tails
_ALIKE = 0.5  # gradients of private steps are nearly all noise; of two independent draws nothing comes near
_PROBED, _ROUNDING = 6, 1e-3


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: A word.
        holds: Whether it is as it should be; None where it could not be looked at.
        expected: In words and numbers.
        measured: In words and numbers.
        text: What it means.
    """

    name: str
    holds: bool | None
    expected: str
    measured: str
    text: str


def noise(seen: list[Seen], claims: Mapping[str, Sequence[Mapping[str, Any]]], expected_units: float) -> Check:
    """Whether gradients hold at least the noise that the clients claim.

    What the data give is added to the noise and independent of it, so the numbers are never smaller than the noise alone.

    Args:
        seen: By a witness.
        claims: Client id -> its events.
        expected_units: By which a step's noised sum is divided.

    Returns:
        The check.
    """
    found = []
    for client, events in claims.items():
        unit = float(events[0]["noise_multiplier"]) * float(events[0]["clip"]) / expected_units
        if (one := witness.noise_of(seen, client, unit)) is not None:
            found.append(one)
    worst = max(found, key=lambda one: one.surprise, default=None)
    return Check(
        "noise",
        None if worst is None else worst.surprise <= _FAR_LEAST,
        "numbers no smaller than the claimed noise, 1 x, in every parameter and step",
        "no step was seen"
        if worst is None
        else f"{min(one.pooled for one in found):.4f} x over all, at least {worst.least:.4f} x ({worst.where}), "
        f"{worst.surprise:.1f} deviations below",
        "A gradient with less noise than the claim's would have smaller numbers than the noise alone.",
    )


def independence(seen: list[Seen]) -> Check:
    """Whether no noise is used twice, by two clients, rounds or steps.

    Args:
        seen: By a witness.

    Returns:
        The check.
    """
    found, where, pairs = witness.largest_correlation(seen)
    return Check(
        "independence",
        None if math.isnan(found) else found < _ALIKE,
        f"no two of {pairs:,} pairs of steps alike (correlation below {_ALIKE})" if pairs else "steps to compare",
        f"largest correlation {found:.3f}, {where}" if pairs else "too few steps were seen",
        "Noise that is used twice can be subtracted: whoever sees both sums sees their difference without it.",
    )


class _Silent:
    """A stream that draws everybody and adds nothing."""

    def uniform(self, count: int) -> np.ndarray:
        """Zeros: below any sample rate."""
        return np.zeros(count)

    def normal(self, count: int) -> np.ndarray:
        """Zeros."""
        return np.zeros(count)


def sensitivity(base: Base, adapter: Adapter, examples: Sequence[Example], private: Private, task: Task) -> Check:
    """How far one unit's data move a step's sum, in the code that clients train with, without its noise.

    The bound is made small, so that clipping must do something; the sum of all units is compared with the sum without one.

    Args:
        base: The frozen base; its slots are overwritten.
        adapter: At which the gradients are taken; not zero.
        examples: Of different units, canaries among them.
        private: A client's mechanism.
        task: Settings of its training.

    Returns:
        The check.
    """
    some = list(examples)[:_PROBED]
    tight = 1e-2 * private.mechanism.max_grad_norm
    worst = 0.0
    for bound in (private.mechanism.max_grad_norm, tight):
        mechanism = replace(private.mechanism, steps=1, max_grad_norm=bound)
        probe = Private(mechanism, private.nominal, lambda *_: _Silent())  # type: ignore[arg-type]
        whole = _sum(base, adapter, some, probe, task)
        for left_out in range(len(some)):
            rest = [one for number, one in enumerate(some) if number != left_out]
            moved = float((whole - _sum(base, adapter, rest, probe, task)).norm())
            worst = max(worst, moved * mechanism.expected_units / bound)
    put(base, EMPTY, None, trainable=False)
    return Check(
        "sensitivity",
        worst <= 1 + _ROUNDING,
        "one record moves a step's sum by at most 1 x the clipping norm",
        f"{worst:.4f} x, the largest of {len(some)} records at two norms",
        "What one record can move is what the noise is measured by. More, and the claim counts too little noise.",
    )


def _sum(base: Base, adapter: Adapter, examples: Sequence[Example], private: Private, task: Task) -> torch.Tensor:
    """What the optimizer receives in one step over these examples, float64."""
    found: list[torch.Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        found.append(torch.cat([one.flatten().double() for one in witness.gradients_of(optimizer)]))

    put(base, adapter, None)
    handle = register_optimizer_step_pre_hook(look)
    try:
        train_privately(base, examples, task, private, adapter)
    finally:
        handle.remove()
    return found[0]


def sampling(private: Private, units: int, client: str) -> Check:
    """Whether a client's stream draws units at the claimed rate, anew in each step.

    Args:
        private: The client's mechanism.
        units: How many are drawn from.
        client: Whose stream.

    Returns:
        The check.
    """
    stream, rate, steps = private.stream("sampling", client, 1), private.mechanism.sample_rate, 200
    drawn = np.stack([stream.uniform(units) < rate for _ in range(steps)])
    share = float(drawn.mean())
    spread = math.sqrt(rate * (1 - rate) / drawn.size)
    same = sum(bool((one == other).all()) for one, other in itertools.pairwise(drawn))
    # Two steps may draw the same units by chance where there are few.
    chance = (rate**2 + (1 - rate) ** 2) ** units
    repeated = same > (steps - 1) * chance + _FAR * math.sqrt((steps - 1) * chance * (1 - chance)) + 0.5
    return Check(
        "sampling",
        abs(share - rate) <= _FAR * spread + 1e-12 and not repeated,
        f"each record in a step with probability {rate:.4g}, drawn anew",
        f"{share:.4g} over {steps} steps of {units} records" + (", the same records again" if repeated else ""),
        "The claim counts on whoever is in a step being drawn at this rate, unknown to others.",
    )


def cost(
    claimed: Mapping[str, float], budget: float | None, happened: Mapping[str, Sequence[Steps]], delta: float
) -> tuple[Check, float]:
    """Whether what happened costs no more than was claimed and promised.

    Args:
        claimed: Client id -> epsilon as reported; the empty id for a central mechanism.
        budget: That the run promised, or None.
        happened: Client id -> steps.
        delta: Of epsilon.

    Returns:
        The check, and the largest epsilon computed anew.
    """
    cache: dict[tuple[Steps, ...], float] = {}
    worst, wrong = 0.0, []
    for client, steps in happened.items():
        key = tuple(steps)
        cache.setdefault(key, accounting.epsilon(steps, delta))
        worst = max(worst, cache[key])
        told = claimed.get(client)
        who = f"client {client}" if client else "the central mechanism"
        if told is not None and accounting.understated(told, cache[key]):
            wrong.append(f"{who}: {told:.4g} was reported")
        if budget is not None and accounting.understated(budget, cache[key]):
            wrong.append(f"{who}: {budget:g} was promised")
    known = list(claimed.values())
    expected = f"reported {max(known):.4g}" if known else "no client's epsilon is reported"
    return (
        Check(
            "accounting",
            not wrong if happened else None,
            expected + (f", promised {budget:g}" if budget is not None else ""),
            f"{worst:.4g} from all steps together" + (": " + "; ".join(wrong[:3]) if wrong else ""),
            "Epsilon of everything that happened, composed over all rounds by dp-accounting directly.",
        ),
        worst,
    )


def happened_in(
    history: Sequence[Mapping[str, Any]], seen: list[Seen] | None, config_steps: int, rounds: Mapping[str, int]
) -> dict[str, list[Steps]]:
    """What each client did: noise and rate as it claims, steps as they were seen, or as rounds and config say, if that is more.

    Args:
        history: Events of the run.
        seen: By a witness, or None.
        config_steps: Optimizer steps of a round.
        rounds: Client id -> rounds in which its update counted; of a central mechanism, whose id is empty, all rounds.

    Returns:
        Client id -> steps.
    """
    found = accounting.steps_of(history)
    counted = witness.steps_by_client(seen) if seen else {}
    for client, steps in found.items():
        by_round = config_steps if client else 1  # a central mechanism has one step a round
        truly = max(counted.get(client, 0), by_round * rounds.get(client, 0))
        missing = truly - sum(one.steps for one in steps)
        if missing > 0:
            found[client] = [*steps, replace(steps[0], steps=missing)]
    return found


def failed(check: str, error: LaminaError) -> Check:
    """A check that could not be made, as the code that it looks at refused.

    Args:
        check: Its name.
        error: What was said.

    Returns:
        One that neither holds nor fails.
    """
    return Check(check, None, "that the check could be made", str(error), "What could not be looked at says nothing.")
