"""Held-out figures of a deployment: each client measures its own release at its own site and reports sums, never examples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from lamina.protos.clock import Clock
from lamina.server.campaign import Campaign
from lamina.server.port.mailbox import Mailbox
from lamina.server.port.roster import Roster
from lamina.server.releases import holding, released
from lamina.server.store.base import Evaluation
from lamina.server.store.database import set_fact
from lamina.server.store.deployment import DeploymentStore
from lamina.strategies.base import ServerState

# A client that is silent for so many heartbeats is not waited for: a figure less changes no adapter.
_MISSED_HEARTBEATS = 3


@dataclass(frozen=True)
class Measuring:
    """Who is asked for figures, and when.

    Attributes:
        campaign: What is released.
        store: Where releases are kept.
        roster: Who is there.
        mailbox: To the clients.
        every: Rounds between evaluations; None for no evaluation, as under privacy, where clients' figures would leave it.
        classes: Whether accuracy is wanted.
        heartbeat_s: See `wire.heartbeat_s`.
        deadline_s: Longest wait.
        clock: For silences.
        started: When this coordinator was, on its monotonic scale.
        missed: Clients that lived and did not answer the last time: they are asked, and not waited for.
    """

    campaign: Campaign
    store: DeploymentStore
    roster: Roster
    mailbox: Mailbox
    every: int | None
    classes: bool
    heartbeat_s: float
    deadline_s: float
    clock: Clock
    started: float = field(kw_only=True)
    missed: set[str] = field(default_factory=set, kw_only=True)

    def evaluate(self, state: ServerState, held: Mapping[str, int]) -> Evaluation | None:
        """Figures of a state, from whoever is there and may tell.

        Args:
            state: After a round; round 0 is the base.
            held: Client id -> version that it holds.

        Returns:
            The figures, or None where the round is not evaluated or nobody answered.
        """
        if self.every is None or (state.round % self.every and state.round != self.campaign.rounds):
            return None
        patience = _MISSED_HEARTBEATS * self.heartbeat_s
        self._await_return(patience)
        busy = self.store.stragglers(state.round)
        there = {client: budget for client, budget in self.roster.heard(patience).items() if client not in busy}
        budgets = holding(there, self.store.held(held))
        sent = released(self.campaign, self.store.keep, state, budgets, "evaluate")
        carried = [one.instruction for one in busy.values()] if self.campaign.carry_rounds else []
        self.mailbox.offer([one.instruction for one in sent.values()], carried)

        def worth(waiting: frozenset[str]) -> bool:
            return any(self.roster.silent_s(client) <= patience for client in waiting - self.missed)

        figures, answered = {}, set()
        for reply in self.mailbox.replies_while(self.deadline_s, worth):
            answered.add(reply.client_id)
            if reply.figures:
                figures[reply.client_id] = reply.figures
        self.missed.update(sent.keys() - answered)
        self.missed.difference_update(answered)
        found = summed(figures, self.classes)
        self._remember("base" if state.round == 0 else "last", state.round, found)
        return found

    def _await_return(self, patience: float) -> None:
        """After a restart, give the clients of before a moment to dial again."""
        while self.clock.monotonic() < self.started + patience:
            if set(self.roster.registered()) <= set(self.roster.heard(patience)):
                return
            self.mailbox.wait(0.2)

    def _remember(self, which: str, round_number: int, found: Evaluation | None) -> None:
        document = None if found is None else asdict(found) | {"round": round_number}
        with self.store.db.change() as connection:
            set_fact(connection, f"evaluation {which}", json.dumps(document))

    def known(self, which: str) -> Evaluation | None:
        """Figures that were measured before, also by a coordinator that was killed since.

        Args:
            which: `base`, or `last` for those of the last evaluated round.

        Returns:
            The figures, or None where there are none.
        """
        found = json.loads(self.store.db.fact(f"evaluation {which}") or "null")
        return found and Evaluation(found["loss"], found["accuracy"], found["per_client"])


def summed(figures: Mapping[str, Mapping[str, float]], classes: bool) -> Evaluation | None:
    """Token-weighted means over clients.

    Args:
        figures: Client id -> `nats`, `targets` (> 0), `hits`.
        classes: Whether accuracy is wanted.

    Returns:
        The figures, or None where there are none.
    """
    if not figures:
        return None
    targets = sum(one["targets"] for one in figures.values())
    per_client = {
        client: {"loss": one["nats"] / one["targets"], "tokens": one["targets"]}
        | ({"accuracy": one["hits"] / one["targets"]} if classes else {})
        for client, one in sorted(figures.items())
    }
    accuracy = sum(one["hits"] for one in figures.values()) / targets if classes else None
    return Evaluation(sum(one["nats"] for one in figures.values()) / targets, accuracy, per_client)
