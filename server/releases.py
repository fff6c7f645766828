"""What goes out in a round: each client's release, encoded, kept, and decoded as the client will have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lamina.protos import seeds
from lamina.protos.adapter import EMPTY
from lamina.protos.blobs import Blob
from lamina.protos.codec import encode, opened
from lamina.protos.messages import Budget, Instruction, Kind, Release, Update
from lamina.protos.sides import filled, whole
from lamina.server.campaign import Campaign
from lamina.strategies.base import ServerState
from lamina.strategies.factors import pair

Keep = Callable[[bytes], Blob]


@dataclass(frozen=True)
class Sent:
    """A release as it went to one client and as that client decodes it.

    Attributes:
        instruction: With the encoded release.
        budget: What it was cut to.
        decoded: As it arrives; see `started` for what the client has then.
    """

    instruction: Instruction
    budget: Budget
    decoded: Release

    @property
    def num_bytes(self) -> int:
        """Length of what a client has to fetch that keeps the release before: where factors take turns, that is half."""
        asked = self.instruction
        kept = asked.train != "AB" and self.budget.held_version == asked.version - 1
        return asked.release.num_bytes if kept else asked.num_bytes


def started(campaign: Campaign, sent: Sent) -> Release:
    """A release as its client has it: all factors in every module, where parts of one factor went out.

    Args:
        campaign: Schema and seed.
        sent: To whom.

    Returns:
        T_k, and what is beside it.
    """
    release, budget = sent.decoded, sent.budget
    if release.train == "AB":
        return release
    parts = (release.trainable, release.frozen)
    adapter = whole(parts, budget.train, budget.scale, campaign.spec.modules, campaign.seed, release.train)
    return replace(release, trainable=adapter, frozen=None)


def trained(update: Update, release: Release) -> Update:
    """An update with the factors that were not trained, and so not sent.

    Args:
        update: Admitted.
        release: See `started`.

    Returns:
        W_k, all factors in every module.
    """
    if release.train == "AB":
        return update
    return replace(update, adapter=filled(update.adapter, release.trainable, release.train))


def holding(budgets: Mapping[str, Budget], held: Mapping[str, int]) -> dict[str, Budget]:
    """Budgets with the version that each client holds already.

    Args:
        budgets: Client id -> what it can hold.
        held: Client id -> version; absent for none.

    Returns:
        Client id -> budget.
    """
    return {client: replace(budget, held_version=held.get(client, -1)) for client, budget in budgets.items()}


def released(
    campaign: Campaign, keep: Keep, state: ServerState, budgets: Mapping[str, Budget], kind: Kind = "train"
) -> dict[str, Sent]:
    """Each client's release, encoded, kept and decoded; equal budgets share one.

    Args:
        campaign: Strategy, wire format, seed.
        keep: Makes a blob of an encoded part.
        state: What is released.
        budgets: Client id -> what it can hold, with the version that it holds already.
        kind: What the client is asked to do with it.

    Returns:
        Client id -> what it is sent.
    """
    cache: dict[str, Sent] = {}
    sent: dict[str, Sent] = {}
    for client, budget in budgets.items():
        key = repr(budget)
        if key not in cache:
            cache[key] = _encode_release(campaign, keep, state, budget, kind)
        one = cache[key]
        sent[client] = replace(one, instruction=replace(one.instruction, client_id=client))
    return sent


def _encode_release(campaign: Campaign, keep: Keep, state: ServerState, budget: Budget, kind: Kind) -> Sent:
    release = campaign.strategy.release(state, budget)
    rng = seeds.stream(campaign.seed, "release", state.round)
    trainable = keep(encode(release.trainable, campaign.wire, rng))
    if release.train != "AB":  # the same bytes as a round ago: then its client need not fetch it again
        rng = seeds.stream(campaign.seed, "release", state.round - 1)
    frozen = None if release.frozen is None else keep(encode(release.frozen, campaign.wire, rng))
    decoded = replace(release, trainable=opened(trainable), frozen=None if frozen is None else opened(frozen))
    instruction = Instruction(
        run_id=campaign.run_id,
        round=state.round + (kind == "train"),
        client_id="",
        release=trainable,
        frozen=frozen,
        version=release.version,
        frozen_since=release.frozen_since,
        keep_frozen=release.keep_frozen,
        train=release.train,
        kind=kind,
    )
    return Sent(instruction, budget, decoded)


def release_errors(campaign: Campaign, state: ServerState, sent: Mapping[str, Sent]) -> dict[str, float]:
    """How far what each client holds is from the global adapter; see `release_error`.

    Args:
        campaign: Whose strategy made the releases.
        state: What was released.
        sent: Client id -> what it was sent; clients that were sent another state are left out.

    Returns:
        Client id -> error. Equal budgets share one computation.
    """
    known: dict[str, float] = {}
    found: dict[str, float] = {}
    for client, one in sent.items():
        if one.instruction.version != state.round:
            continue
        key = repr(one.budget)
        if key not in known:
            known[key] = release_error(state, campaign.strategy.release(state, one.budget), started(campaign, one))
        found[client] = known[key]
    return found


def release_error(state: ServerState, sent: Release, decoded: Release) -> float:
    """How far what a client holds is from the global adapter: truncation to its budget and rounding of the wire.

    Args:
        state: Whose adapter was released.
        sent: Before encoding.
        decoded: As the client has it.

    Returns:
        The largest Frobenius distance over modules, relative to the module's global product; 0 while that is 0.
    """
    worst = 0.0
    for module, everything in state.adapter.lora.items():
        additive = sent.frozen_since is not None
        parts = [decoded.frozen or EMPTY] if additive else [decoded.trainable, decoded.frozen or EMPTY]
        held = [pair(part.lora[module], -1.0) for part in parts if module in part.lora]
        if additive and sent.frozen is not None:
            norm, distance = _norms([pair(everything)])[0], _norms([pair(sent.frozen.lora[module]), *held])[1]
        else:
            norm, distance = _norms([pair(everything), *held])
        worst = max(worst, distance / norm if norm else 0.0)
    return worst


def _norms(pairs: Sequence[tuple[Any, Any]]) -> tuple[float, float]:
    """Norms of the first product and of the sum of all, from one Gram matrix; good to about 1e-8 of the largest term."""
    left = np.concatenate([one for one, _ in pairs], axis=1)
    right = np.concatenate([one for _, one in pairs])
    gram, first = (left.T @ left) * (right @ right.T), pairs[0][0].shape[1]
    return tuple(float(np.sqrt(max(part.sum(), 0.0))) for part in (gram[:first, :first], gram))  # type: ignore[return-value]
