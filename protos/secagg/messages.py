"""What participants and coordinator say in an attempt, in its order. How it is written is `wire`'s business.

- `Advertisement`, answered by `Advertised`: keys, signed.
- `Shares`, answered by `Delivered`: shares of both secrets, sealed for each holder.
- `Masked`, answered by `Survivors`: the vector under its masks, and then whose vectors have come.
- `Agreement`, answered by `Agreed`: a signature over that set, and then at least the threshold of these.
- `Revealed`: of each participant a share of one secret or the other.

Before them comes `Opening`, in place of any of them `Declined`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lamina.protos.adapter import Array
from lamina.protos.identity import canonical
from lamina.protos.secagg.context import Context
from lamina.protos.secagg.coordinates import Rule

KEYS_DOMAIN, SURVIVORS_DOMAIN = "secagg-keys", "secagg-survivors"


@dataclass(frozen=True)
class Opening:
    """An attempt, as participants are told of it.

    Attributes:
        context: The attempt.
        ranks: Module -> rank of the global factors.
        scales: Module -> their scale.
        rule: How changes are weighed.
    """

    context: Context
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    rule: Rule


@dataclass(frozen=True)
class Declined:
    """A participant gives an attempt up; why stays in its own log."""

    name: str


@dataclass(frozen=True)
class Advertisement:
    """A participant's public keys in one attempt.

    Attributes:
        name: Whose.
        mask_key: X25519, for masks.
        share_key: X25519, for sealing shares.
        commitment: To the seed of its own mask.
        signature: Ed25519 of its identity over all of it and the attempt; empty without certificates.
    """

    name: str
    mask_key: bytes
    share_key: bytes
    commitment: bytes
    signature: bytes = b""

    def statement(self, digest: bytes) -> bytes:
        """What is signed.

        Args:
            digest: Of the attempt's context.

        Returns:
            Canonical JSON.
        """
        keys = {"mask_key": self.mask_key.hex(), "share_key": self.share_key.hex()}
        return canonical({"ctx": digest.hex(), "name": self.name, "commitment": self.commitment.hex(), **keys})


@dataclass(frozen=True)
class Advertised:
    """The keys of all who have sent some."""

    advertisements: tuple[Advertisement, ...]


@dataclass(frozen=True)
class Shares:
    """A participant's shares: holder -> sealed box."""

    name: str
    boxes: Mapping[str, bytes]


@dataclass(frozen=True)
class Delivered:
    """The boxes for one participant: owner -> sealed box."""

    boxes: Mapping[str, bytes]


@dataclass(frozen=True, eq=False)
class Masked:
    """A participant's vector under its masks: (n,), uint32."""

    name: str
    values: Array


@dataclass(frozen=True)
class Survivors:
    """Whose vectors have come, in the order of their names."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Agreement:
    """A survivor's signature over the set of survivors and all keys; empty without certificates."""

    name: str
    signature: bytes = b""


@dataclass(frozen=True)
class Agreed:
    """Survivor -> its signature over the set of survivors."""

    signatures: Mapping[str, bytes]


@dataclass(frozen=True)
class Revealed:
    """What one survivor holds of the others' secrets, of each participant one at most.

    Attributes:
        name: The survivor.
        seeds: Survivor -> a share of the seed of its own mask.
        keys: Dropout -> a share of its private mask key.
    """

    name: str
    seeds: Mapping[str, bytes]
    keys: Mapping[str, bytes]


def survivors_statement(digest: bytes, view: bytes, names: tuple[str, ...]) -> bytes:
    """What survivors sign.

    Args:
        digest: Of the attempt's context.
        view: SHA-256 over all keys and the names of those whose shares were delivered.
        names: The survivors, in order.

    Returns:
        Canonical JSON.
    """
    return canonical({"ctx": digest.hex(), "view": view.hex(), "survivors": list(names)})


def view_of(digest: bytes, advertised: Iterable[Advertisement], there: Iterable[str]) -> bytes:
    """A hash that two participants share only if they were told the same keys and the same names.

    Args:
        digest: Of the attempt's context.
        advertised: All keys.
        there: The names of those whose shares were delivered.

    Returns:
        32 bytes.
    """
    keys = sorted((one.name, one.statement(digest).decode()) for one in advertised)
    return hashlib.sha256(canonical({"ctx": digest.hex(), "keys": keys, "there": sorted(there)})).digest()
