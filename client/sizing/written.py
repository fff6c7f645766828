"""A plan as JSON values, for a program and for the site that keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lamina.client.sizing.memory import COMPUTE_BYTES, OPTIMIZER_BYTES
from lamina.client.sizing.planner import Plan
from lamina.protos.config import FORMATS


def plan_of(found: Mapping[str, Any]) -> Plan:
    """The inverse of `document`.

    Args:
        found: What `document` gave, as it was read from a file.

    Returns:
        The plan.

    Raises:
        TypeError: If a field is missing, or not of its type.
        ValueError: If one is none that a plan can have.
    """
    made = Plan(**{**found, "reasons": tuple(found["reasons"])})
    counts = (
        made.rank if made.ranks else 1,
        made.micro_batch,
        made.accumulation,
        made.max_length,
        made.peak_bytes,
        made.budget_bytes,
    )
    numbers = [*counts, *made.ranks.values(), *(value + 1 for value in made.terms.values())]
    if not all(type(one) is int and 1 <= one < 2**53 for one in numbers):
        raise ValueError("a number that is none")
    right = made.format in FORMATS and made.compute in COMPUTE_BYTES and made.optimizer in OPTIMIZER_BYTES
    right &= bool(made.rank) == bool(made.ranks)
    right &= type(made.checkpointing) is bool and isinstance(made.modules, str)
    right &= made.seconds is None or (isinstance(made.seconds, float) and 0 <= made.seconds < math.inf)
    if not right:
        raise ValueError("a way to train that is none")
    return made


def document(one: Plan) -> dict[str, Any]:
    """A plan for a program.

    Args:
        one: The plan.

    Returns:
        What `lamina plan --json` prints; ranks by module and terms by name.
    """
    return {
        "format": one.format,
        "compute": one.compute,
        "rank": one.rank,
        "modules": one.modules,
        "ranks": dict(one.ranks),
        "micro_batch": one.micro_batch,
        "accumulation": one.accumulation,
        "max_length": one.max_length,
        "checkpointing": one.checkpointing,
        "optimizer": one.optimizer,
        "terms": dict(one.terms),
        "peak_bytes": one.peak_bytes,
        "budget_bytes": one.budget_bytes,
        "seconds": one.seconds,
        "reasons": list(one.reasons),
    }
