"""What a store keeps of a round, step by step, and the store that keeps nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lamina.protos.adapter import Adapter
from lamina.protos.blobs import Blob, blob
from lamina.protos.messages import Rejection, Release, Reply, Update
from lamina.server.releases import Sent
from lamina.strategies.base import ServerState


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


@dataclass(frozen=True)
class Opened:
    """A round that has begun.

    Attributes:
        round: From 1.
        sent: Client id -> what it was sent, stragglers of earlier rounds included.
        wanted: Accepted updates at which the round is full.
    """

    round: int
    sent: Mapping[str, Sent]
    wanted: int


@dataclass(frozen=True)
class Summed:
    """What is known of a round's updates where only their sum is seen.

    Attributes:
        survivors: Whose updates are in it, in order.
        change: The weighted mean of their changes; see `secagg.coordinates.mean`.
    """

    survivors: tuple[str, ...]
    change: Adapter


@dataclass
class Collected:
    """What has come of a round so far.

    Attributes:
        updates: Client id -> admitted update.
        rejections: What was refused, and what clients reported as failed.
        num_bytes: Of all that arrived.
        closed: Whether no further update counts.
        judged: Client id -> SHA-256 of its update that the store had before the round was offered.
        sum: What a secure sum gave, in place of updates.
        errors: Client id -> how far its release is from the global adapter.
        seconds: From the round's opening to its last update.
    """

    updates: dict[str, Update] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)
    num_bytes: int = 0
    closed: bool = False
    judged: dict[str, str] = field(default_factory=dict)
    sum: Summed | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def clients(self) -> list[str]:
        """Whose updates count, in order."""
        return list(self.sum.survivors) if self.sum is not None else sorted(self.updates)


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
        announced: Whether its record is written; a loop that was killed before that evaluates again.
    """

    state: ServerState
    record: Mapping[str, Any]
    updates: Sequence[Update]
    releases: Mapping[str, Release]
    weights: Mapping[str, float]
    held: Mapping[str, int]
    evaluation: Evaluation | None = None
    announced: bool = True


class Store:
    """Where a round becomes durable. This one forgets all: a round that is interrupted is begun again."""

    def keep(self, content: bytes) -> Blob:
        """Keep an encoded release for as long as a client may ask for it."""
        return blob(content)

    def opened(self, round_number: int) -> Opened | None:
        """A round that was opened before, with the releases that went out."""
        return None

    def stragglers(self, round_number: int) -> Mapping[str, Sent]:
        """Clients that were asked in a round and have not answered."""
        return {}

    def open(self, opened: Opened) -> None:
        """Return only when a restarted loop would find the round open."""

    def miss(self, round_number: int) -> None:
        """The round had too few updates: a loop that is started again asks again."""

    def missed(self, round_number: int) -> bool:
        """Whether the open round had too few updates."""
        return False

    def open_again(self, opened: Opened) -> None:
        """As `open`, of a round that was missed: what failed or was refused in it is no answer any more."""

    def collected(self, round_number: int) -> Collected:
        """What had been admitted and rejected before an interruption."""
        return Collected()

    def admit(self, round_number: int, reply: Reply) -> None:
        """Return only when the admitted update would survive a crash."""

    def reject(self, round_number: int, rejection: Rejection) -> None:
        """Count a refusal."""

    def refused(self, round_number: int) -> Sequence[Rejection]:
        """Refusals that did not pass through the loop: of messages that were no answer, or came as the round closed."""
        return ()

    def unjudged(self, round_number: int) -> Sequence[Reply]:
        """Updates that had been received and not judged when the loop was interrupted."""
        return ()

    def held(self, held: Mapping[str, int]) -> Mapping[str, int]:
        """The versions that clients still hold, of those that they were given."""
        return held

    def reveal(self, round_number: int, survivors: tuple[str, ...]) -> None:
        """Return only when a restarted loop would ask for no sum of this round but that of these clients.

        They are about to show it; a sum of others of them would show the difference.
        """

    def revealed(self, round_number: int) -> tuple[str, ...]:
        """What `reveal` was told of a round, empty where no sum was shown."""
        return ()

    def summed(self, round_number: int, survivors: tuple[str, ...]) -> None:
        """These clients have answered in a round; their updates nobody has."""

    def close(self, round_number: int) -> None:
        """Return only when a restarted loop would aggregate the updates admitted so far, and no others."""

    def save(self, completed: Completed) -> None:
        """Return only when the round's result would survive a crash. Nothing of it is announced before."""

    def announce(self, completed: Completed) -> None:
        """Write the round's record and tell whoever watches."""
