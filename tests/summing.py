"""Rounds whose updates are summed in memory, without torch: clients of `tests.deployment`, and who drops out where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lamina.client.summing import Part, answered
from lamina.protos.blobs import blob
from lamina.protos.codec import encode_update
from lamina.protos.errors import SecureSumRefused
from lamina.protos.messages import Instruction, Rejection, Reply
from lamina.protos.secagg.client import Me, State
from lamina.protos.secagg.messages import Declined
from lamina.server import campaign as campaigns
from lamina.server.campaign import Campaign
from lamina.server.channel import MemoryChannel, MemorySums
from lamina.server.rounds import Loop, run
from lamina.server.store.base import Completed, Store
from lamina.strategies.base import ServerState
from tests import deployment

SIX = ("amber", "birch", "cedar", "dune", "elm", "fern")


def words(*more: str, names: Sequence[str] = SIX, ranks: Sequence[int] = (4, 3, 2, 4, 1, 2)) -> list[str]:
    """The words of a run of six sites whose updates are summed; later words win."""
    settings = [
        f"clients.names=[{','.join(names)}]",
        f"clients.count={len(names)}",
        f"clients.ranks=[{','.join(map(str, ranks[: len(names)]))}]",
        "strategy=ffa",
        "privacy.secagg=true",
        "aggregation.full_weight=20",
        "rounds=3",
    ]
    found = {word.partition("=")[0]: word for word in settings}
    found.update({word.partition("=")[0]: word for word in more})
    return deployment.words(Path("spec.json"), *found.values())


@dataclass
class Watched(Store):
    """A store that remembers what was shown, and what came of each round."""

    shown: dict[int, tuple[str, ...]] = field(default_factory=dict)
    missed_rounds: list[int] = field(default_factory=list)
    rounds: list[Completed] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)

    def reject(self, round_number: int, rejection: Rejection) -> None:
        self.rejected.append(rejection)

    def refused(self, round_number: int) -> list[Rejection]:
        return [one for one in self.rejected if not one.final]

    def reveal(self, round_number: int, survivors: tuple[str, ...]) -> None:
        self.shown[round_number] = survivors

    def revealed(self, round_number: int) -> tuple[str, ...]:
        return self.shown.get(round_number, ())

    def miss(self, round_number: int) -> None:
        self.missed_rounds.append(round_number)

    def announce(self, completed: Completed) -> None:
        self.rounds.append(completed)


@dataclass
class Federation:
    """Clients in memory.

    Attributes:
        given: The run's words.
        dropped: (client, round) -> messages of a secure sum that it sends before it drops out, -1 for no training.
        change: (client, message) -> what it sends in its place; a liar's.
        told: Every (client, message) that the coordinator sent.
    """

    given: Sequence[str]
    dropped: Mapping[tuple[str, int], int] = field(default_factory=dict)
    change: Callable[[str, Any], Any] = lambda name, message: message
    told: list[tuple[str, Any]] = field(default_factory=list)
    said: list[Any] = field(default_factory=list)
    store: Watched = field(default_factory=Watched)
    parts: dict[str, Part] = field(default_factory=dict)
    states: dict[str, State | None] = field(default_factory=dict)
    sent: dict[tuple[str, int], int] = field(default_factory=dict)

    @cached_property
    def campaign(self) -> Campaign:
        config, schema = deployment.config_of(self.given), deployment.spec()
        return campaigns.campaign(config, schema, campaigns.budgets(config, schema), "in memory")

    def respond(self, instruction: Instruction) -> Reply | None:
        name, one = instruction.client_id, self.campaign
        if self.dropped.get((name, instruction.round)) == -1:
            return None
        update = deployment.trained(name, one.seed, one.budgets[name], one.spec, instruction)
        made = blob(encode_update(update, "fp32"))
        self.parts[name] = Part(instruction, made, one.spec, one.budgets[name], one.seed)
        return Reply(name, None, trained=True)

    def take(self, name: str, message: Any) -> Any:
        self.told.append((name, message))
        key = (name, self.parts[name].instruction.round)
        if self.sent.get(key, 0) >= self.dropped.get(key, 10**6):
            return None
        self.sent[key] = self.sent.get(key, 0) + 1
        try:
            found = answered(self.parts[name], Me(name), self.states.get(name), message)
        except SecureSumRefused:
            return Declined(name)
        self.parts[name], self.states[name], answer = found
        self.said.append(answer)
        return self.change(name, answer)

    def play(self, store: Store | None = None) -> ServerState:
        """Every round of the run."""
        names = list(self.campaign.budgets)
        sums = MemorySums({name: lambda message, name=name: self.take(name, message) for name in names})  # type: ignore[misc]
        channel = MemoryChannel(dict.fromkeys(names, self.respond))
        return run(Loop(self.campaign, channel, lambda state, held: None, store or self.store, sums=sums))
