"""Shamir's secret sharing (1979) over the field of 2**521 - 1: any t of n shares give the secret, fewer nothing.

Exact integers; a secret of 32 bytes and a share of 66.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lamina.protos.errors import SecureSumAborted

PRIME = 2**521 - 1
SECRET_BYTES, SHARE_BYTES = 32, 66

Draw = Callable[[int], bytes]


def split(secret: bytes, holders: int, threshold: int, draw: Draw) -> tuple[bytes, ...]:
    """A secret in shares.

    Args:
        secret: 32 bytes.
        holders: How many shares; that of holder i is the polynomial's value at i + 1.
        threshold: How many of them give the secret back.
        draw: Number of bytes to that many, unpredictable.

    Returns:
        A share of 66 bytes for each holder.
    """
    coefficients = [int.from_bytes(secret, "big"), *(_element(draw) for _ in range(threshold - 1))]
    return tuple(_value(coefficients, holder + 1).to_bytes(SHARE_BYTES, "big") for holder in range(holders))


def _element(draw: Draw) -> int:
    """A uniform element of the field: 521 bits, drawn again in the one case in 2**521 that is none."""
    while (found := int.from_bytes(draw(SHARE_BYTES), "big") >> (8 * SHARE_BYTES - 521)) >= PRIME:
        pass
    return found


def _value(coefficients: list[int], point: int) -> int:
    found = 0
    for coefficient in reversed(coefficients):
        found = (found * point + coefficient) % PRIME
    return found


def combined(shares: Mapping[int, bytes]) -> bytes:
    """The secret from just as many shares as its threshold.

    Args:
        shares: Holder -> its share.

    Returns:
        32 bytes. Whether they are the secret its owner shared is the caller's to check.

    Raises:
        SecureSumAborted: If the shares are of no secret of 32 bytes.
    """
    found = 0
    for holder, share in shares.items():
        numerator = denominator = 1
        for other in shares:
            if other != holder:
                numerator = numerator * (other + 1) % PRIME
                denominator = denominator * (other - holder) % PRIME
        found += int.from_bytes(share, "big") * numerator * pow(denominator, -1, PRIME)
    found %= PRIME
    if found >= 2 ** (8 * SECRET_BYTES):
        raise SecureSumAborted("expected shares of one secret of 32 bytes, got others. The attempt is given up.")
    return found.to_bytes(SECRET_BYTES, "big")
