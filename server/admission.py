"""Untrusted bytes to an update, or the reason why not. Every check on what a client sends is here.

Reasons: `too-large`, `malformed`, `wrong-run`, `wrong-round`, `wrong-client`, `wrong-parent`, `duplicate`, `schema`,
`rank`, `non-finite`, `weight`, `norm`, `privacy`, `failed`.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from lamina.protos.adapter import Adapter, Array, folded, is_finite
from lamina.protos.blobs import Blob
from lamina.protos.codec import opened_update
from lamina.protos.errors import AdapterMismatch, UpdateRejected
from lamina.protos.messages import Budget, Trainable, Update
from lamina.protos.ranks import numbers
from lamina.protos.sides import filled
from lamina.protos.spec import AdapterSpec
from lamina.server.spending import Promise, check_claim
from lamina.strategies.factors import change

HEADER_BYTES = 1024**2
BYTES_PER_MODULE = 1024
MAX_EXAMPLES = 1_000_000_000
# Beyond it a number is no training's: sums of such updates would overflow the float32 or float16 of later releases.
MAX_MAGNITUDE = 1e6


@dataclass(frozen=True)
class Expected:
    """What an admissible update must agree with.

    Attributes:
        run_id: Of the run.
        round: Of now.
        client_id: Whose turn it is, as the channel authenticated it.
        parent_release_hash: Of the release that the client was given.
        spec: The negotiated schema.
        budget: The client's ranks and scales.
        received: The trainable part of its release as the client has it.
        max_norm: Largest Frobenius norm of the whole change, or None.
        train: The factors that it was to train and send.
        promise: Of privacy, which its claim must keep, or None.
    """

    run_id: str
    round: int
    client_id: str
    parent_release_hash: str
    spec: AdapterSpec
    budget: Budget
    received: Adapter
    max_norm: float | None = None
    train: Trainable = "AB"
    promise: Promise | None = None


def size_cap_bytes(spec: AdapterSpec, budget: Budget, train: Trainable = "AB") -> int:
    """Most bytes that an update of this budget can take in any wire format, headers included.

    Args:
        spec: The schema.
        budget: The client's ranks.
        train: The factors that are sent.

    Returns:
        Bytes; checked before anything is parsed.
    """
    sent = numbers(spec, budget.train, train) + sum(value.size for value in spec.dense.values())
    return 4 * sent + HEADER_BYTES + BYTES_PER_MODULE * (len(spec.modules) + len(spec.dense))


def admit(payload: Blob, expected: Expected, seen: Container[str]) -> Update:
    """Decode and check one update, layer by layer; nothing is changed by a refusal.

    Args:
        payload: Untrusted content, in memory or in a file.
        expected: What it must agree with.
        seen: Ids of the clients whose update of this round is accepted already.

    Returns:
        The update.

    Raises:
        UpdateRejected: With the reason's code.
    """
    where = f"client {expected.client_id}, round {expected.round}"
    update = opened_update(payload, size_cap_bytes(expected.spec, expected.budget, expected.train))
    claims = [
        ("wrong-run", update.run_id, expected.run_id),
        ("wrong-round", update.round, expected.round),
        ("wrong-client", update.client_id, expected.client_id),
        ("wrong-parent", update.parent_release_hash, expected.parent_release_hash),
    ]
    for reason, got, wanted in claims:
        if got != wanted:
            raise UpdateRejected(reason, f"{where}: expected {wanted!r}, got {got!r}. Train from the current release.")
    if update.client_id in seen:
        raise UpdateRejected("duplicate", f"{where}: an update is accepted already. Wait for the next round.")
    if not 1 <= update.num_examples <= MAX_EXAMPLES:
        raise UpdateRejected(
            "weight", f"{where}: expected 1 <= num_examples <= {MAX_EXAMPLES}, got {update.num_examples}."
        )
    if expected.promise is not None:
        check_claim(expected.promise, update)
    _check_adapter(update.adapter, expected, where)
    return update


def _check_adapter(adapter: Adapter, expected: Expected, where: str) -> None:
    try:
        expected.spec.check(adapter, where, expected.train)
    except AdapterMismatch as error:
        raise UpdateRejected("schema", str(error)) from None
    if set(adapter.dense) != set(expected.spec.dense) or set(adapter.lora) != set(expected.budget.train):
        raise UpdateRejected("schema", f"{where}: expected the modules of its budget and every dense parameter.")
    for module, factors in adapter.lora.items():
        rank, scale = expected.budget.train[module], expected.budget.scale[module]
        if factors.rank != rank or factors.scale != scale:
            raise UpdateRejected(
                "rank",
                f"{where}: expected rank {rank} and scale {scale:g} for {module}, got {factors.rank} and {factors.scale:g}. "
                "Register the new rank before training with it.",
            )
    if expected.train != "AB":  # products from here on
        adapter = filled(adapter, expected.received, expected.train)
    found = _magnitude(adapter)
    if not found <= MAX_MAGNITUDE:
        if not is_finite(adapter):
            raise UpdateRejected("non-finite", f"{where}: expected finite numbers. Lower the learning rate.")
        raise UpdateRejected(
            "norm", f"{where}: expected factors and products of norm <= {MAX_MAGNITUDE:g}, got {found:g}."
        )
    if expected.max_norm is not None:
        norm = change_norm(adapter, expected.received, expected.spec)
        if norm > expected.max_norm:
            raise UpdateRejected("norm", f"{where}: expected a change of norm <= {expected.max_norm:g}, got {norm:g}.")


def _magnitude(adapter: Adapter) -> float:
    """The largest of all norms of factors and dense parameters and of bounds on the products' norms.

    Infinite where a number is not finite, or its square in float32.
    """
    found = [_norm(value) for value in adapter.dense.values()]
    for factors in adapter.lora.values():
        plain = folded(factors)
        a, b = _norm(plain.A), _norm(plain.B)
        found += [a, b, factors.scale * a * b, *([] if factors.core is None else [_norm(factors.core)])]
    return max(found, default=0.0) if all(map(math.isfinite, found)) else math.inf


def _norm(value: Array) -> float:
    flat = value.ravel()
    return math.sqrt(float(np.vdot(flat, flat)))


def change_norm(adapter: Adapter, received: Adapter, spec: AdapterSpec) -> float:
    """Frobenius norm of a client's whole change, over the products of all modules and all dense parameters.

    Args:
        adapter: What the client sent.
        received: What it started from.
        spec: For the initial values of dense parameters that were not released.

    Returns:
        The norm, from the factors alone.
    """
    squared = 0.0
    for module, factors in adapter.lora.items():
        left, right = change(factors, received.lora.get(module))
        squared += max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))
    for name, value in adapter.dense.items():
        start = received.dense.get(name, spec.dense[name])
        squared += float(np.square(value.astype(np.float64) - start).sum())
    return float(np.sqrt(squared))
