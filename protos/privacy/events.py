"""What a private mechanism did, as a value: one event is one charge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lamina.protos.errors import ConfigError

Unit = Literal["record", "user", "client"]
MECHANISM, RELATION = "poisson-gaussian", "add-or-remove-one"


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
        if (document["mechanism"], document["relation"]) != (MECHANISM, RELATION):
            raise ValueError("another mechanism or relation")
        numbers = {name: _number(document[name]) for name in ("noise_multiplier", "sample_rate", "clip")}
        counts = {name: _count(document[name]) for name in ("round", "steps")}
        event = Event(client_id=document["client_id"], unit=document["unit"], **numbers, **counts)  # type: ignore[arg-type]
        if not isinstance(event.client_id, str) or event.unit not in ("record", "user", "client"):
            raise ValueError("another client_id or unit")
        if not (event.noise_multiplier > 0 and 0 < event.sample_rate <= 1 and event.clip > 0):
            raise ValueError("another noise_multiplier, sample_rate or clip")
        return event
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: expected an event of a private mechanism, got {error}.") from None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("no finite number")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("no count")
    return value
