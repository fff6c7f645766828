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
from numpy.typing import NDArray
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lamina.audits import accounting, witness
from lamina.audits.accounting import Steps
from lamina.audits.canaries import references
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
_ALIKE = 0.5  # of two independent draws nothing comes near
_PROBED, _ROUNDING = 6, 1e-3
_DRAWN, _DRAWS, _TOKENS, _LEAST_RATE = 48, 100, 8, 0.25
Drawn = NDArray[np.bool_]


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
    deviations = _deviations(claims, expected_units)
    looked = (witness.noise_of(seen, client, one) for client, one in deviations.items())
    found = [one for one in looked if one is not None]
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


def _deviations(claims: Mapping[str, Sequence[Mapping[str, Any]]], expected_units: float) -> dict[str, float]:
    """Client id -> deviation of the noise in its gradients, as it claims."""
    return {
        client: float(events[0]["noise_multiplier"]) * float(events[0]["clip"]) / expected_units
        for client, events in claims.items()
    }


def independence(seen: list[Seen], claims: Mapping[str, Sequence[Mapping[str, Any]]], expected_units: float) -> Check:
    """Whether no noise is used twice, by two clients, rounds or steps.

    What the data give is alike from step to step and may make gradients so: as much of a correlation as is explained by what two
    gradients hold beside the claimed noise is left out.

    Args:
        seen: By a witness.
        claims: Client id -> its events.
        expected_units: By which a step's noised sum is divided.

    Returns:
        The check.
    """
    found, where, pairs = witness.largest_correlation(seen, _deviations(claims, expected_units))
    return Check(
        "independence",
        None if math.isnan(found) else found < _ALIKE,
        f"no two of {pairs:,} pairs of steps alike (correlation below {_ALIKE} beside the data's)"
        if pairs
        else "steps to compare",
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
        examples: Canaries among them; under privacy.unit=user several are put together for one user.
        private: A client's mechanism.
        task: Settings of its training.

    Returns:
        The check.
    """
    some = _in_units(examples, private)
    tight = 1e-2 * private.mechanism.max_grad_norm
    worst = 0.0
    for bound in (private.mechanism.max_grad_norm, tight):
        mechanism = replace(private.mechanism, steps=1, max_grad_norm=bound)
        probe = Private(mechanism, private.nominal, lambda *_: _Silent())  # type: ignore[arg-type]
        whole = _sum(base, adapter, some, probe, task)
        for left_out in dict.fromkeys(one.user for one in some):
            rest = [one for one in some if one.user != left_out]
            moved = float((whole - _sum(base, adapter, rest, probe, task)).norm())
            worst = max(worst, moved * mechanism.expected_units / bound)
    put(base, EMPTY, None, trainable=False)
    return Check(
        "sensitivity",
        worst <= 1 + _ROUNDING,
        f"one {private.mechanism.unit} moves a step's sum by at most 1 x the clipping norm",
        f"{worst:.4f} x, the largest of {len({one.user for one in some})} {private.mechanism.unit}s at two norms",
        "What one unit can move is what the noise is measured by. More, and the claim counts too little noise.",
    )


def _in_units(examples: Sequence[Example], private: Private) -> list[Example]:
    """Some examples, a row each; of users several, of which the bound counts no more than `user_rows`."""
    each = 1 if private.mechanism.unit == "record" else 3
    return [replace(one, row=row, user=str(row // each)) for row, one in enumerate(examples[: _PROBED * each])]


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


def sampling(base: Base, adapter: Adapter, private: Private, task: Task, told: Sequence[float] = ()) -> Check:
    """Whether training draws units at the claimed rate, each by itself and anew in each step.

    The client's training is run on rows of random tokens, and what its model reads is looked at. A rate below a quarter is raised
    to it, or little would be seen: what is done with a rate does not depend on it.

    Args:
        base: The frozen base; its slots are overwritten.
        adapter: In the slots meanwhile.
        private: The client's mechanism.
        task: Settings of its training.
        told: Sample rates that the client's events claim.

    Returns:
        The check.
    """
    truly, steps = private.mechanism.sample_rate, _DRAWS
    rate = max(truly, _LEAST_RATE)
    rows = references(base, _DRAWN, _TOKENS, task.seed)
    distinct = {one.tokens.tobytes(): one for one in rows}.values()
    examples = [replace(one, row=number, user=str(number)) for number, one in enumerate(distinct)]
    mechanism = replace(private.mechanism, steps=steps, sample_rate=rate)
    probe = Private(mechanism, private.nominal, lambda *of: private.stream(*of) if of[0] == "sampling" else _Silent())  # type: ignore[arg-type]
    still = replace(task.config, local_steps=steps, batch_size=len(examples), micro_batch=None, learning_rate=1e-9)
    drawn = _drawn(base, examples, adapter, probe, replace(task, config=still))
    share, number = float(drawn.mean()), len(examples)
    spread = math.sqrt(rate * (1 - rate) / drawn.size)
    wrong = [] if abs(share - rate) <= _FAR * spread + 1e-12 else ["another rate"]
    # Two steps may draw the same units by chance where there are few.
    same = sum(bool((one == other).all()) for one, other in itertools.pairwise(drawn))
    chance = (rate**2 + (1 - rate) ** 2) ** number
    if same > (steps - 1) * chance + _FAR * math.sqrt((steps - 1) * chance * (1 - chance)) + 0.5:
        wrong.append("the same records again")
    # Of independent draws the numbers in a step vary as a binomial one, whose variance this estimates.
    if rate < 1:
        varied = float(drawn.sum(axis=1).var(ddof=1)) / (number * rate * (1 - rate))
        chance = math.sqrt(2 / (steps - 1) + 1 / (steps * number * rate * (1 - rate)))
        if not 1 - _FAR * chance <= varied <= 1 + _FAR_LEAST * chance:
            wrong.append(f"numbers in a step with {varied:.2f} x the variance of independent draws")
    if low := [one for one in told if one < truly * (1 - 1e-9)]:
        wrong.append(f"events claim {min(low):.4g} where it is {truly:.4g}")
    return Check(
        "sampling",
        not wrong,
        f"each record in a step with probability {rate:.4g}, by itself and drawn anew",
        f"{share:.4g} over {steps} steps of {number} records" + "".join(f"; {one}" for one in wrong),
        "The claim counts on whoever is in a step being drawn at this rate, unknown to others.",
    )


def _drawn(base: Base, examples: Sequence[Example], adapter: Adapter, private: Private, task: Task) -> Drawn:
    """(steps, examples): which of the examples the model read in each step of a round."""
    length, kind = len(examples[0].tokens), examples[0].tokens.dtype
    known = {one.tokens.tobytes(): place for place, one in enumerate(examples)}
    read: list[set[int]] = [set()]

    def look(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        rows = given[0][:, :length].cpu().numpy().astype(kind)
        read[-1].update(known[one] for row in rows if (one := row.tobytes()) in known)

    put(base, adapter, None)
    handles = [
        base.model.get_input_embeddings().register_forward_pre_hook(look),
        register_optimizer_step_pre_hook(lambda *_: read.append(set())),
    ]
    try:
        train_privately(base, examples, task, private, adapter)
    finally:
        for handle in handles:
            handle.remove()
        put(base, EMPTY, None, trainable=False)
    return np.array([[place in step for place in range(len(examples))] for step in read[:-1]])


def cost(
    claimed: Mapping[str, float],
    whole: float,
    budget: float | None,
    happened: Mapping[str, Sequence[Steps]],
    delta: float,
) -> tuple[Check, float]:
    """Whether what happened costs no more than was claimed and promised.

    Args:
        claimed: Client id -> epsilon as reported; the empty id for a central mechanism.
        whole: Epsilon of the run as reported, which no client may exceed.
        budget: That the run promised, or None.
        happened: Client id -> steps; none of a client that took part and that no event counts.
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
        told = min(claimed.get(client, whole), whole)
        who = f"client {client}" if client else "the central mechanism"
        if not steps:
            wrong.append(f"{who}: its rounds were counted nowhere")
        if accounting.understated(told, cache[key]):
            wrong.append(f"{who}: {told:.4g} was reported")
        if budget is not None and accounting.understated(budget, cache[key]):
            wrong.append(f"{who}: {budget:g} was promised")
    return (
        Check(
            "accounting",
            not wrong if happened else None,
            f"reported {whole:.4g}" + (f", promised {budget:g}" if budget is not None else ""),
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
        Client id -> steps; none of a client whose rounds no event counts, where others' are counted.
    """
    found = accounting.steps_of(history)
    counted = witness.steps_by_client(seen) if seen else {}
    for client, steps in found.items():
        by_round = config_steps if client else 1  # a central mechanism has one step a round
        truly = max(counted.get(client, 0), by_round * rounds.get(client, 0))
        missing = truly - sum(one.steps for one in steps)
        if missing > 0:
            found[client] = [*steps, replace(steps[0], steps=missing)]
    if any(found):  # which a central mechanism alone has not
        found |= {client: [] for client, number in rounds.items() if client and number and client not in found}
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
