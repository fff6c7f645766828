"""What one attempt at a secure sum is about. Every key, share and signature of the attempt is bound to its digest."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

from lamina.protos.errors import SecureSumRefused
from lamina.protos.identity import canonical, verify
from lamina.protos.messages import Trainable

# Of two, each learns the other's update by subtracting its own from the sum.
LEAST = 3
NONCE_BYTES = 16


@dataclass(frozen=True)
class Participant:
    """One of those whose updates are summed.

    Attributes:
        name: Its client id.
        signing_key: Its raw Ed25519 public key; empty in a run without certificates, where nothing is signed.
    """

    name: str
    signing_key: bytes = b""


@dataclass(frozen=True)
class Context:
    """An attempt.

    Attributes:
        run_id: The run.
        round: From 1.
        nonce: Of the attempt, 16 bytes; no two attempts share one.
        layout: SHA-256 (hex) over what the numbers of the vector mean; see `coordinates.Layout.digest`.
        train: What was trained.
        version: Of the release that training started from.
        participants: By name, at least three.
        threshold: How many must stay to the end; more than half of the participants, at least three.
        digest: SHA-256 over all of it.
    """

    run_id: str
    round: int
    nonce: bytes
    layout: str
    train: Trainable
    version: int
    participants: tuple[Participant, ...]
    threshold: int
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        check_size(len(self.participants), self.threshold, f"round {self.round}")
        names = self.names
        if list(names) != sorted(set(names)):
            raise SecureSumRefused(f"round {self.round}: expected different participants, in the order of their names.")
        if len({bool(one.signing_key) for one in self.participants}) > 1:
            raise SecureSumRefused(f"round {self.round}: expected a signing key of every participant, or of none.")
        if len(self.nonce) != NONCE_BYTES:
            raise SecureSumRefused(f"round {self.round}: expected a nonce of {NONCE_BYTES} bytes.")
        document = {
            "run_id": self.run_id,
            "round": self.round,
            "nonce": self.nonce.hex(),
            "layout": self.layout,
            "train": self.train,
            "version": self.version,
            "participants": [[one.name, one.signing_key.hex()] for one in self.participants],
            "threshold": self.threshold,
        }
        object.__setattr__(self, "digest", hashlib.sha256(b"lamina secagg\0" + canonical(document)).digest())

    @property
    def names(self) -> tuple[str, ...]:
        """Of the participants, in order; a name's place is its share's."""
        return tuple(one.name for one in self.participants)

    def signing_key(self, name: str) -> bytes:
        """A participant's key; empty without certificates."""
        return next(one.signing_key for one in self.participants if one.name == name)

    def signed(self, name: str, domain: str, statement: bytes, signature: bytes) -> bool:
        """Whether a participant has signed a statement; without certificates, whether it says that it signs nothing."""
        if name not in self.names:
            return False
        key = self.signing_key(name)
        return verify(key, domain, statement, signature) if key else signature == b""


def default_threshold(participants: int) -> int:
    """More than two thirds: while fewer than a third lie, no two sets of survivors can both be answered.

    Args:
        participants: How many.

    Returns:
        floor(2 n / 3) + 1, and all of three.
    """
    return 2 * participants // 3 + 1


def check_size(participants: int, threshold: int, where: str) -> None:
    """Raise where a sum would show too much, or a coordinator could have two of it.

    Args:
        participants: How many.
        threshold: How many must stay.
        where: Put before the message.

    Raises:
        SecureSumRefused: Below three participants; or with a threshold below three, not above one half, or out of reach.
    """
    if participants < LEAST:
        raise SecureSumRefused(
            f"{where}: expected at least {LEAST} participants in a secure sum, got {participants}: of two, each learns the "
            "other's update by subtracting its own. Have more sites take part, or set privacy.secagg=false."
        )
    least = max(LEAST, math.floor(participants / 2) + 1)
    if not least <= threshold <= participants:
        raise SecureSumRefused(
            f"{where}: expected a threshold of {least} to {participants} of {participants} participants, got {threshold}. "
            f"The default is {default_threshold(participants)}."
        )
