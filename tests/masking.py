"""Attempts at a secure sum in one process: every participant's own state, a coordinator, and who drops out where."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lamina.protos.adapter import Array
from lamina.protos.errors import SecureSumRefused
from lamina.protos.identity.signing import sign_with
from lamina.protos.secagg import client, server
from lamina.protos.secagg.context import Context, Participant, default_threshold

# What a participant can fail to send, in order.
STAGES = ("keys", "shares", "vector", "signature", "reveal")


def drawn(name: str) -> Callable[[int], bytes]:
    """Bytes that are the same in every run of a test."""
    count = [0]

    def draw(size: int) -> bytes:
        count[0] += 1
        return hashlib.shake_256(f"{name} {count[0]}".encode()).digest(size)

    return draw


@dataclass
class Attempt:
    """An attempt and everyone in it.

    Attributes:
        context: The attempt.
        vectors: Name -> what it puts in.
        signing: Name -> its identity; empty without.
        states: Name -> where it is.
        sent: Everything that anyone has sent, in order.
        refused: Name -> why it gave up.
    """

    context: Context
    vectors: Mapping[str, Array]
    signing: Mapping[str, Ed25519PrivateKey]
    states: dict[str, client.State] = field(default_factory=dict)
    sent: list[Any] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def me(self, name: str, **more: Any) -> client.Me:
        key = self.signing.get(name)
        if key is None:
            return client.Me(name, draw=drawn(f"{name} {self.context.nonce.hex()}"), **more)
        public = key.public_key().public_bytes_raw()

        def sign(domain: str, statement: bytes) -> bytes:
            return sign_with(key, domain, statement)

        return client.Me(name, public, sign, draw=drawn(f"{name} {self.context.nonce.hex()}"), **more)

    def begin(self, name: str) -> Any:
        self.states[name], message = client.begin(self.context, self.me(name), self.vectors[name])
        self.sent.append(message)
        return message

    def advance(self, name: str, incoming: Any) -> Any:
        """A participant's next message, or None where it has given up."""
        if name in self.refused:
            return None
        try:
            self.states[name], message = client.advance(self.states[name], incoming)
        except SecureSumRefused as error:
            self.refused[name] = str(error)
            return None
        self.sent.append(message)
        return message

    def run(
        self,
        dropped: Mapping[str, str] | None = None,
        change: Callable[[str, Any], Any] = lambda name, message: message,
    ) -> tuple[Array, tuple[str, ...]]:
        """The sum and whose it is; `dropped` is name -> stage, `change` what a liar makes of a message down."""
        dropped = dropped or {}

        def here(name: str, stage: str) -> bool:
            return STAGES.index(dropped.get(name, "reveal")) > STAGES.index(stage) or name not in dropped

        state: Any = server.begin(self.context, len(next(iter(self.vectors.values()))))
        for name in self.context.names:
            if here(name, "keys"):
                state = server.receive(state, name, self.begin(name))
        for stage in STAGES[1:]:
            state, told = server.advance(state)
            for name, message in told.items():
                if here(name, stage) and (answer := self.advance(name, change(name, message))) is not None:
                    state = server.receive(state, name, answer)
        return server.total(state), state.before.survivors


def attempt(
    participants: int = 5,
    threshold: int | None = None,
    length: int = 40,
    signed: bool = True,
    seed: int = 0,
    **more: Any,
) -> Attempt:
    names = sorted(f"site{index}" for index in range(participants))
    rng = np.random.default_rng(seed)
    keys = {name: Ed25519PrivateKey.from_private_bytes(drawn(name)(32)) for name in names} if signed else {}
    publics = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    context = Context(
        "run",
        1,
        hashlib.sha256(str(seed).encode()).digest()[:16],
        "ab" * 32,
        "B",
        0,
        tuple(Participant(name, publics.get(name, b"")) for name in names),
        default_threshold(participants) if threshold is None else threshold,
    )
    vectors = {name: rng.integers(0, 2**20, length, dtype=np.uint32) for name in names}
    return Attempt(replace(context, **more) if more else context, vectors, keys)


def summed(one: Attempt, names: Sequence[str]) -> Array:
    """The oracle: what the named put in, added up in 64 bits."""
    total = np.zeros(one.vectors[names[0]].size, np.uint64)
    for name in names:
        total += one.vectors[name]
    return total
