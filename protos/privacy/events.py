"""What a private mechanism did, as a value: one event is one charge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from lamina.protos.errors import ConfigError

Unit = Literal["record", "user", "client"]
UNITS: tuple[Unit, ...] = ("record", "user", "client")
MAX_COUNT = 2**53
# Beyond these the accountants' own arithmetic overflows. No mechanism has such noise or such a rate; a client's claim might.
NOISE, LEAST_RATE = (1e-9, 1e9), 1e-300
MECHANISM, RELATION = "poisson-gaussian", "add-or-remove-one"
CLAIMED = ("noise_multiplier", "sample_rate", "steps", "clip", "delta", "epsilon")


@dataclass(frozen=True)
class Event:
    """Some steps of one subsampled Gaussian mechanism: each unit is in a step with a probability of its own, the sum of what
    the units give is bounded by `clip` for each, and Gaussian noise is added to the sum.

    Attributes:
        client_id: Whose data; under client-dp empty, as it is everybody's.
        round: In which round.
        noise_multiplier: Standard deviation of the noise, in units of `clip`; > 0.
        sample_rate: Probability with which a unit is in a step; in (0, 1].
        steps: How many, each with fresh noise.
        clip: Largest L2 norm of what one unit gives to a step.
        unit: What one unit is: a record, a user with all its records, or a client.
    """

    client_id: str
    round: int
    noise_multiplier: float
    sample_rate: float
    steps: int
    clip: float
    unit: Unit = "record"


def to_json(event: Event) -> dict[str, Any]:
    """An event as JSON values.

    Args:
        event: Any.

    Returns:
        Its fields, the kind of mechanism and the neighbouring relation.
    """
    return {**asdict(event), "mechanism": MECHANISM, "relation": RELATION}


def from_json(document: Mapping[str, Any], where: str) -> Event:
    """The inverse of `to_json`; nothing of the document is believed.

    Args:
        document: JSON values.
        where: Put before the message.

    Returns:
        The event.

    Raises:
        ConfigError: If it is of another mechanism, or no event that can be charged.
    """
    try:
        if set(document) != _FIELDS or (document["mechanism"], document["relation"]) != (MECHANISM, RELATION):
            raise ValueError("another mechanism or relation")
        if not isinstance(document["client_id"], str) or document["unit"] not in UNITS:
            raise ValueError("another client_id or unit")
        numbers = {name: _number(document[name]) for name in ("noise_multiplier", "sample_rate", "clip")}
        counts = {name: _count(document[name]) for name in ("round", "steps")}
        event = Event(client_id=document["client_id"], unit=document["unit"], **numbers, **counts)  # type: ignore[arg-type]
        if not (
            NOISE[0] <= event.noise_multiplier <= NOISE[1] and LEAST_RATE <= event.sample_rate <= 1 and event.clip > 0
        ):
            raise ValueError("another noise_multiplier, sample_rate or clip")
        return event
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{where}: expected an event of a private mechanism, got {error}.") from None


_FIELDS = {*(one.name for one in fields(Event)), "mechanism", "relation"}


@dataclass(frozen=True)
class Claim:
    """What a client says of its own mechanism, in `Update.privacy`.

    Attributes:
        event: What made the update.
        target_delta: The delta of its epsilon.
        epsilon: What the client has spent in this run so far, this event and rounds that it trained again included.
    """

    event: Event
    target_delta: float
    epsilon: float


def to_claim(claim: Claim) -> dict[str, float]:
    """A claim as the numbers that an update carries.

    Args:
        claim: Any.

    Returns:
        `noise_multiplier`, `sample_rate`, `steps`, `clip`, `delta` and `epsilon`; who, which round and which unit are known.
    """
    event = claim.event
    numbers = (event.noise_multiplier, event.sample_rate, event.steps, event.clip, claim.target_delta, claim.epsilon)
    return dict(zip(CLAIMED, map(float, numbers), strict=True))


def from_claim(numbers: Mapping[str, float], client_id: str, round_number: int, unit: Unit) -> Claim:
    """The inverse of `to_claim`; nothing of the numbers is believed.

    Args:
        numbers: Of an update.
        client_id: Whose update it is.
        round_number: Of the update.
        unit: Of the run.

    Returns:
        The claim.

    Raises:
        ConfigError: If a number is absent or cannot be.
    """
    where = f"client {client_id}, round {round_number}, privacy"
    if set(numbers) != set(CLAIMED):
        raise ConfigError(f"{where}: expected the numbers {', '.join(CLAIMED)}, got others. Update the older side.")
    steps, delta, epsilon = (numbers[name] for name in ("steps", "delta", "epsilon"))
    # What is not finite fails these comparisons, too.
    if not (steps >= 1 and steps == steps // 1 <= MAX_COUNT and 0 < delta < 1 and 0 <= epsilon < math.inf):
        raise ConfigError(f"{where}: expected whole steps >= 1, a delta in (0, 1) and an epsilon >= 0, got others.")
    names = ("noise_multiplier", "sample_rate", "clip")
    document = {name: numbers[name] for name in names} | {"client_id": client_id, "round": round_number, "unit": unit}
    document |= {"steps": int(steps), "mechanism": MECHANISM, "relation": RELATION}
    return Claim(from_json(document, where), delta, epsilon)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("no finite number")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise ValueError("no count")
    return value
