"""Who is asked in a round. Seeded by round, so that a restart asks the same clients."""

from __future__ import annotations

from collections.abc import Iterable

from lamina.protos import seeds
from lamina.protos.privacy.noise import Stream


def size(present: int, fraction: float) -> int:
    """How many of the clients that are present are asked.

    Args:
        present: How many there are.
        fraction: Share of them; above 1 all.

    Returns:
        At least one where anyone is present.
    """
    return min(present, max(1, round(fraction * present)))


def cohort(seed: int, round_number: int, present: Iterable[str], fraction: float) -> list[str]:
    """A uniform sample, without replacement, of the clients that are present.

    Args:
        seed: The run's seed.
        round_number: From 1.
        present: Client ids, in any order.
        fraction: See `size`.

    Returns:
        Client ids, sorted.
    """
    pool = sorted(present)
    if not pool:
        return []
    chosen = seeds.stream(seed, "cohort", round_number).choice(len(pool), size=size(len(pool), fraction), replace=False)
    return sorted(pool[index] for index in chosen)


def sampled(stream: Stream, present: Iterable[str], rate: float) -> list[str]:
    """Each client by a coin of its own, as the cost of client-dp is computed for.

    Args:
        stream: Of the coins, which nobody else may know.
        present: Client ids, in any order.
        rate: Chance of each.

    Returns:
        Client ids, sorted; perhaps none.
    """
    pool = sorted(present)
    return [client for client, coin in zip(pool, stream.uniform(len(pool)), strict=True) if coin < rate]
