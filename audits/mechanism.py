"""Whether a private mechanism is what its claim says: noise, independence, sensitivity, sampling and cost, each measured.

An audit of what models remember has little power against mechanisms that are nearly right. These checks look at the mechanism
itself: at what every optimizer step of a campaign received (`witness`), at what one record moves in a step of the training code
without its noise, and at the cost of all that happened, computed by other code. Each holds or not, beyond chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lamina.audits import accounting, witness
from lamina.audits.accounting import Steps
from lamina.audits.witness import Seen
from lamina.protos.errors import LaminaError

# Deviations by which chance moves the least of some ten thousand sums of squares, which have no symmetric tails.
_FAR_LEAST = 7.0
_ALIKE = 0.5  # of two independent draws nothing comes near
# Relative, of numbers that went through the wire's format and back.
_WIRE = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2, "int8": 5e-2}


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


def deviations(claims: Mapping[str, Sequence[Mapping[str, Any]]], expected_units: float) -> dict[str, float]:
    """How large the noise in each client's gradients is, as the client claims.

    Args:
        claims: Client id -> its events.
        expected_units: By which a step's noised sum is divided.

    Returns:
        Client id -> deviation.
    """
    return {
        client: float(events[0]["noise_multiplier"]) * float(events[0]["clip"]) / expected_units
        for client, events in claims.items()
    }


def noise(seen: list[Seen], claimed: Mapping[str, float]) -> Check:
    """Whether gradients hold at least the noise that the clients claim.

    What the data give is added to the noise and independent of it, so the numbers are never smaller than the noise alone.

    Args:
        seen: By a witness.
        claimed: See `deviations`.

    Returns:
        The check.
    """
    looked = (witness.noise_of(seen, client, one) for client, one in claimed.items())
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


def independence(seen: list[Seen], claimed: Mapping[str, float]) -> Check:
    """Whether no noise is used twice, by two clients, rounds or steps.

    What the data give is alike from step to step and may make gradients so: as much of a correlation as is explained by what two
    gradients hold beside the claimed noise is left out.

    Args:
        seen: By a witness.
        claimed: See `deviations`.

    Returns:
        The check.
    """
    found, where, pairs = witness.largest_correlation(seen, claimed)
    return Check(
        "independence",
        None if math.isnan(found) else found < _ALIKE,
        f"no two of {pairs:,} pairs of steps alike (correlation below {_ALIKE} beside the data's)"
        if pairs
        else "steps to compare",
        f"largest correlation {found:.3f}, {where}" if pairs else "too few steps were seen",
        "Noise that is used twice can be subtracted: whoever sees both sums sees their difference without it.",
    )


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
    worst, wrong = 0.0, []
    for client, steps in happened.items():
        truly = accounting.epsilon(steps, delta)
        worst = max(worst, truly)
        told = min(claimed.get(client, whole), whole)
        who = f"client {client}" if client else "the central mechanism"
        if not steps:
            wrong.append(f"{who}: its rounds were counted nowhere")
        if accounting.understated(told, truly):
            wrong.append(f"{who}: {told:.4g} was reported")
        if budget is not None and accounting.understated(budget, truly):
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


def update(seen: list[Seen], wire: str) -> Check:
    """Whether what a client sent is what its last step left behind, and nothing that was added or exchanged after it.

    Args:
        seen: By a witness, with updates that were admitted.
        wire: Number format of updates.

    Returns:
        The check.
    """
    found = [one for one in seen if not math.isnan(one.sent)]
    worst = max(found, key=lambda one: one.sent, default=None)
    return Check(
        "update",
        None if worst is None else worst.sent <= _WIRE[wire],
        f"updates as the last step left them, within {_WIRE[wire]:g}, the rounding of {wire}",
        "no update was seen by itself"
        if worst is None
        else f"at most {worst.sent:.2g} apart (client {worst.client}, round {worst.round})",
        "The claim is about what the optimizer made of noised gradients. What is added to it afterwards has no noise.",
    )


def figures(rounds: Sequence[Mapping[str, Any]]) -> Check:
    """Whether no figure of the clients' training, which no noise covers, left them.

    Args:
        rounds: The objects of rounds.jsonl.

    Returns:
        The check.
    """
    told = [record["round"] for record in rounds if record.get("train_loss") is not None]
    return Check(
        "figures",
        not told,
        "no training loss in any round",
        f"a training loss in {len(told)} of {len(rounds)} rounds",
        "A loss over a client's rows moves with each of them, and has no noise.",
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
