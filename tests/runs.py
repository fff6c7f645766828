"""Running the engine in this process: configs from words, rounds in memory, and what came out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lamina.protos import compose
from lamina.protos.adapter import Adapter
from lamina.protos.config import Config
from lamina.protos.messages import Instruction, Reply
from lamina.server import campaign as campaigns
from lamina.server import rounds
from lamina.server.campaign import Campaign
from lamina.server.store import base
from lamina.server.store.base import Completed, Evaluation
from lamina.simulations import engine
from lamina.simulations.engine import Cohort
from lamina.simulations.prepare import Prepared, prepare
from lamina.strategies.base import ServerState

SMALL = (
    "partition.column=silo",
    "clients.count=3",
    "clients.ranks=[4,2,1]",
    "rounds=2",
    "train.local_steps=2",
    "train.batch_size=4",
    "train.max_length=24",
    "train.learning_rate=0.02",
    "evaluate.max_examples=2",
    "data.generate=0",
    "train.device=cpu",
)


def config_of(*words: str) -> Config:
    """A checked config from command-line words."""
    return compose.composed(compose.sweeps(list(words), False)[0])


def small(llama: Path, notes: Path, *words: str) -> Config:
    """The smallest useful causal-lm run; later words win."""
    return config_of(*merged([f"model={llama}", f"data={notes}", *SMALL], words))


def classification(bert: Path, questions: Path, *words: str) -> Config:
    """The smallest useful classification run."""
    settings = [
        f"model={bert}",
        f"data={questions}",
        "task=sequence-classification",
        "data.label_column=category",
        "partition=iid",
        *SMALL[1:],
    ]
    return config_of(*merged(settings, words))


def merged(first: Iterable[str], second: Iterable[str]) -> list[str]:
    """Words by key, the later ones winning."""
    found = {word.partition("=")[0]: word for word in first}
    found.update({word.partition("=")[0]: word for word in second})
    return list(found.values())


@dataclass
class Quiet:
    """A watcher that shows nothing; `after` may raise to interrupt a run between two rounds."""

    after: Callable[[Completed], None] = lambda completed: None
    said: list[str] = field(default_factory=list)

    def begin(self, rounds: int, names: Mapping[str, str], done: int) -> None:
        pass

    def step(self, client_id: str, round_number: int, step: int, steps: int, loss: float) -> None:
        pass

    def completed(self, completed: Completed) -> None:
        self.after(completed)

    def say(self, text: str) -> None:
        self.said.append(text)


@dataclass
class Memory(base.Store):
    """A store that keeps every completed round."""

    completed: list[Completed] = field(default_factory=list)

    def announce(self, completed: Completed) -> None:
        self.completed.append(completed)


@dataclass
class Listening:
    """A channel that passes everything on and remembers it."""

    cohort: Cohort
    instructions: list[Instruction] = field(default_factory=list)
    replied: list[tuple[int, Reply]] = field(default_factory=list)

    def offer(self, instructions: Sequence[Instruction]) -> None:
        self.instructions.extend(instructions)
        self._channel = self.cohort.channel()
        self._channel.offer(instructions)

    def replies(self, until_s: float | None) -> Iterable[Reply]:
        for reply in self._channel.replies(until_s):
            self.replied.append((self.instructions[-1].round, reply))
            yield reply


@dataclass
class Outcome:
    """Everything about a run in memory."""

    prepared: Prepared
    campaign: Campaign
    cohort: Cohort
    channel: Listening
    rounds: list[Completed]

    @property
    def state(self) -> ServerState:
        return self.rounds[-1].state

    @property
    def adapters(self) -> list[Adapter]:
        return [completed.state.adapter for completed in self.rounds]


def no_evaluation(state: ServerState, held: Mapping[str, int]) -> Evaluation | None:
    return None


def play(config: Config, prepared: Prepared | None = None) -> Outcome:
    """Run a config in memory, without evaluation and without a directory."""
    prepared = prepared or prepare(config)
    found = campaigns.budgets(config, prepared.base.spec)
    campaign = campaigns.campaign(config, prepared.base.spec, found, "run")
    cohort = engine.cohort(config, prepared, found, Quiet())
    channel, store = Listening(cohort), Memory()
    rounds.run(rounds.Loop(campaign, channel, no_evaluation, store))
    return Outcome(prepared, campaign, cohort, channel, store.completed)


def go_on(outcome: Outcome, more: int, learning_rate: float) -> Outcome:
    """Further rounds of the same clients at another learning rate."""
    cohort, last = outcome.cohort, outcome.rounds[-1]
    sites = {
        client: replace(site, train=replace(site.train, learning_rate=learning_rate), rounds=last.state.round + more)
        for client, site in cohort.sites.items()
    }
    again = replace(cohort, sites=sites, states=dict(cohort.states), shared=dict(cohort.shared))
    campaign = replace(outcome.campaign, rounds=last.state.round + more)
    channel, store = Listening(again), Memory()
    rounds.run(rounds.Loop(campaign, channel, no_evaluation, store), last)
    return Outcome(outcome.prepared, campaign, again, channel, store.completed)


def same_bits(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters agree in every bit."""
    if set(one.lora) != set(other.lora) or set(one.dense) != set(other.dense):
        return False
    lora = all(
        one.lora[m].A.tobytes() == other.lora[m].A.tobytes()
        and one.lora[m].B.tobytes() == other.lora[m].B.tobytes()
        and _bits(one.lora[m].core) == _bits(other.lora[m].core)
        and one.lora[m].scale == other.lora[m].scale
        for m in one.lora
    )
    return lora and all(one.dense[name].tobytes() == other.dense[name].tobytes() for name in one.dense)


def _bits(values: np.ndarray | None) -> bytes | None:
    return None if values is None else values.tobytes()
