"""The round loop: release, offer, admit, step, evaluate, checkpoint, announce. Plain values; the channel does the I/O.

Follow one update here: it starts from `_release`, comes back in `_collect` as bytes, is admitted or counted as a rejection,
and enters the next global adapter in `Strategy.step`. The checkpoint is on disk before anything of a round is announced.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from lamina.protos import seeds
from lamina.protos.adapter import EMPTY, Adapter
from lamina.protos.codec import WireFormat, decode, encode
from lamina.protos.errors import QuorumNotReached, UpdateRejected
from lamina.protos.messages import Budget, Instruction, Rejection, Release, Update
from lamina.protos.spec import AdapterSpec
from lamina.server import admission, selection
from lamina.server.channel import Channel
from lamina.strategies.base import ServerState, Strategy, client_weights
from lamina.strategies.factors import pair


@dataclass(frozen=True)
class Campaign:
    """What is fixed over a run.

    Attributes:
        run_id: Its name.
        spec: The negotiated schema.
        strategy: The aggregation method.
        budgets: Client id -> what it can hold.
        joined: Client id -> first round.
        rounds: How many.
        fraction: Share of clients asked a round.
        quorum: Fewest accepted updates.
        wire: Number format of releases.
        weighting: See `strategies.base.client_weights`.
        seed: Of selection and rounding.
        deadline_s: Longest wait for a round's replies, or None.
        max_norm: See `admission.Expected`.
    """

    run_id: str
    spec: AdapterSpec
    strategy: Strategy
    budgets: Mapping[str, Budget]
    joined: Mapping[str, int]
    rounds: int
    fraction: float = 1.0
    quorum: int = 1
    wire: WireFormat = "fp32"
    weighting: Any = "num_examples"
    seed: int = 0
    deadline_s: float | None = None
    max_norm: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures of one adapter.

    Attributes:
        loss: Token-weighted mean over all clients, nats per token (per example for classification).
        accuracy: Share right, or None.
        per_client: Client id -> `loss`, `tokens` and, for classification, `accuracy`.
    """

    loss: float
    accuracy: float | None
    per_client: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Completed:
    """One finished round, for the store and for whoever watches.

    Attributes:
        state: After the round.
        record: The line of `rounds.jsonl`.
        updates: Accepted, in client-id order.
        releases: Client id -> decoded release.
        weights: Client id -> p_k.
        held: Client id -> version that it holds now.
        evaluation: Of the new global adapter, where this round is evaluated.
    """

    state: ServerState
    record: Mapping[str, Any]
    updates: Sequence[Update]
    releases: Mapping[str, Release]
    weights: Mapping[str, float]
    held: Mapping[str, int]
    evaluation: Evaluation | None


class Store(Protocol):
    """Where a completed round becomes durable."""

    def save(self, completed: Completed) -> None:
        """Return only when the round would survive a crash."""
        ...


Evaluate = Callable[[Adapter, int], Evaluation | None]


@dataclass(frozen=True)
class _Sent:
    """A release as it went to one client and as that client decodes it."""

    instruction: Instruction
    decoded: Release
    release_hash: str
    error: float
    num_bytes: int


@dataclass
class _Collected:
    updates: dict[str, Update] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)
    num_bytes: int = 0


def run(
    campaign: Campaign, channel: Channel, store: Store, evaluate: Evaluate, resumed: Completed | None = None
) -> ServerState:
    """Run a campaign to its last round.

    Args:
        campaign: What to do.
        channel: To the clients.
        store: Makes each round durable before the next begins.
        evaluate: Held-out figures of a global adapter after a round; None where the round is not evaluated.
        resumed: The last durable round of an interrupted run.

    Returns:
        The final state.

    Raises:
        QuorumNotReached: If a round has too few accepted updates. All earlier rounds are in the store.
    """
    state = resumed.state if resumed else campaign.strategy.init(campaign.spec)
    held: Mapping[str, int] = resumed.held if resumed else {}
    while state.round < campaign.rounds:
        completed = run_round(campaign, channel, state, held, evaluate)
        store.save(completed)
        state, held = completed.state, completed.held
    return state


def run_round(
    campaign: Campaign, channel: Channel, state: ServerState, held: Mapping[str, int], evaluate: Evaluate
) -> Completed:
    """One round from state to state.

    Args:
        campaign: What is fixed.
        channel: To the clients.
        state: Before the round.
        held: Client id -> version of the release that it holds; -1 or absent for none.
        evaluate: See `run`.

    Returns:
        The finished round; nothing is written yet.

    Raises:
        QuorumNotReached: If too few updates are accepted.
    """
    started, number = time.monotonic(), state.round + 1
    asked = selection.cohort(campaign.seed, number, campaign.joined, campaign.fraction)
    sent = _release(campaign, state, held, asked)
    channel.offer([one.instruction for one in sent.values()])
    collected = _collect(campaign, channel, sent)
    if len(collected.updates) < campaign.quorum:
        reasons = ", ".join(sorted({r.reason for r in collected.rejections})) or "no reply"
        raise QuorumNotReached(
            f"round {number}: expected at least {campaign.quorum} accepted updates of {len(asked)} asked, "
            f"got {len(collected.updates)} ({reasons}). Resume when more clients can answer, or lower clients.quorum."
        )
    updates = [collected.updates[client] for client in sorted(collected.updates)]
    releases = {client: sent[client].decoded for client in collected.updates}
    aggregate_started = time.monotonic()
    after = campaign.strategy.step(state, updates, releases, seeds.stream(campaign.seed, "step", number))
    aggregated = time.monotonic()
    evaluation = evaluate(after.adapter, number)
    train_losses = _claimed(updates, "train_loss")
    record = {
        "round": number,
        "clients": [u.client_id for u in updates],
        "asked": asked,
        "rejections": [{"client_id": r.client_id, "reason": r.reason} for r in collected.rejections],
        **evaluation_record(evaluation),
        "train_loss": float(np.mean(train_losses)) if train_losses else None,
        "bytes_up": collected.num_bytes,
        "bytes_down": sum(one.num_bytes for one in sent.values()),
        "relative_error": after.relative_error,
        "dropped_norm": max((layer.dropped_norm for layer in after.report.values()), default=0.0),
        "release_error": max((one.error for one in sent.values()), default=0.0),
        "release_error_by_client": {client: one.error for client, one in sent.items()},
        "seconds": time.monotonic() - started,
        "seconds_aggregate": aggregated - aggregate_started,
        "seconds_evaluate": time.monotonic() - aggregated,
        "seconds_train": sum(_claimed(updates, "seconds")),
        "epsilon": None,
    }
    now_held = dict(held) | dict.fromkeys(collected.updates, state.round)
    weights = client_weights(updates, campaign.weighting)
    return Completed(after, record, updates, releases, weights, now_held, evaluation)


def _claimed(updates: Sequence[Update], metric: str) -> list[float]:
    """What clients say of themselves, without what cannot be: it is shown, never used."""
    claims = [update.metrics[metric] for update in updates if metric in update.metrics]
    return [claim for claim in claims if 0 <= claim < 1e9]


def evaluation_record(evaluation: Evaluation | None) -> dict[str, Any]:
    """The held-out figures of a line of `rounds.jsonl`.

    Args:
        evaluation: The figures, or None where the round is not evaluated.

    Returns:
        `loss`, `accuracy`, `perplexity`, `loss_worst`, `loss_spread` and `per_client_loss`, null where unknown.
    """
    if evaluation is None:
        return {
            "loss": None,
            "accuracy": None,
            "perplexity": None,
            "loss_worst": None,
            "loss_spread": None,
            "per_client_loss": {},
        }
    losses = {client: figures["loss"] for client, figures in evaluation.per_client.items()}
    return {
        "loss": evaluation.loss,
        "accuracy": evaluation.accuracy,
        "perplexity": math.exp(min(evaluation.loss, 700.0)) if evaluation.accuracy is None else None,
        "loss_worst": max(losses.values()),
        "loss_spread": float(np.std(list(losses.values()))),
        "per_client_loss": losses,
    }


def _release(campaign: Campaign, state: ServerState, held: Mapping[str, int], asked: Sequence[str]) -> dict[str, _Sent]:
    """Build, encode and decode each asked client's release; equal budgets share one."""
    cache: dict[str, _Sent] = {}
    sent: dict[str, _Sent] = {}
    for client in asked:
        budget = replace(campaign.budgets[client], held_version=held.get(client, -1))
        key = repr(budget)
        if key not in cache:
            cache[key] = _encode_release(campaign, state, budget)
        one = cache[key]
        sent[client] = replace(one, instruction=replace(one.instruction, client_id=client))
    return sent


def _encode_release(campaign: Campaign, state: ServerState, budget: Budget) -> _Sent:
    release = campaign.strategy.release(state, budget)
    rng = seeds.stream(campaign.seed, "release", state.round)
    trainable = encode(release.trainable, campaign.wire, rng)
    frozen = None if release.frozen is None else encode(release.frozen, campaign.wire, rng)
    decoded = replace(release, trainable=decode(trainable), frozen=None if frozen is None else decode(frozen))
    instruction = Instruction(
        run_id=campaign.run_id,
        round=state.round + 1,
        client_id="",
        release=trainable,
        frozen=frozen,
        version=release.version,
        frozen_since=release.frozen_since,
        keep_frozen=release.keep_frozen,
        train=release.train,
    )
    num_bytes = len(trainable) + (0 if frozen is None else len(frozen))
    return _Sent(instruction, decoded, instruction.release_hash, release_error(state, release, decoded), num_bytes)


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
    for module, whole in state.adapter.lora.items():
        target, additive = [pair(whole)], sent.frozen_since is not None
        norm = _norm(target)
        if norm == 0.0:
            continue
        if additive and sent.frozen is not None:
            target = [pair(sent.frozen.lora[module])]
        parts = [decoded.frozen or EMPTY] if additive else [decoded.trainable, decoded.frozen or EMPTY]
        held = [pair(part.lora[module], -1.0) for part in parts if module in part.lora]
        worst = max(worst, _norm(target + held) / norm)
    return worst


def _norm(pairs: Sequence[tuple[Any, Any]]) -> float:
    """Norm of a sum of products from the Gram matrices, good to about 1e-8 of the largest term."""
    left = np.concatenate([one for one, _ in pairs], axis=1)
    right = np.concatenate([one for _, one in pairs])
    squared = float(((left.T @ left) * (right @ right.T)).sum())
    return float(np.sqrt(max(squared, 0.0)))


def _collect(campaign: Campaign, channel: Channel, sent: Mapping[str, _Sent]) -> _Collected:
    """Admit what arrives; a client's fault is a counted rejection."""
    collected = _Collected()
    for reply in channel.replies(campaign.deadline_s):
        if reply.update is None:
            collected.rejections.append(Rejection(reply.client_id, "failed", reply.failure))
            continue
        collected.num_bytes += len(reply.update)
        try:
            if reply.client_id not in sent:
                raise UpdateRejected("wrong-client", f"client {reply.client_id} was not asked in this round.")
            one = sent[reply.client_id]
            expected = admission.Expected(
                run_id=campaign.run_id,
                round=one.instruction.round,
                client_id=reply.client_id,
                parent_release_hash=one.release_hash,
                spec=campaign.spec,
                budget=campaign.budgets[reply.client_id],
                received=one.decoded.trainable,
                max_norm=campaign.max_norm,
            )
            collected.updates[reply.client_id] = admission.admit(reply.update, expected, collected.updates)
        except UpdateRejected as error:
            collected.rejections.append(Rejection(reply.client_id, error.reason, str(error)))
    return collected
