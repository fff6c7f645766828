"""Who is asked in a round. Seeded by round, so that a restart asks the same clients."""

from __future__ import annotations

from collections.abc import Mapping

from lamina.protos import seeds


def cohort(seed: int, round_number: int, joined: Mapping[str, int], fraction: float) -> list[str]:
    """A uniform sample, without replacement, of the clients that have joined.

    Args:
        seed: The run's seed.
        round_number: From 1.
        joined: Client id -> first round in which it takes part.
        fraction: Share of them, in (0, 1]; at least one is asked where anyone has joined.

    Returns:
        Client ids, sorted.
    """
    present = sorted(client for client, first in joined.items() if first <= round_number)
    if not present:
        return []
    size = max(1, round(fraction * len(present)))
    chosen = seeds.stream(seed, "cohort", round_number).choice(len(present), size=size, replace=False)
    return sorted(present[index] for index in chosen)
