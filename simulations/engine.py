"""The one-machine engine: the coordinator's round loop over clients in this process, one frozen base for all.

Nothing of the method is here: clients answer through the same messages, bytes and checks as over a network.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from lamina.client.evaluate import score
from lamina.client.frozen import Frozen, from_files, to_files
from lamina.client.model import Base, put
from lamina.client.participant import ClientState, Shared, Site, respond, update_format
from lamina.client.sizing import importance
from lamina.client.summing import Part, answered
from lamina.protos import seeds
from lamina.protos.adapter import Adapter
from lamina.protos.config import Config, client_names, per_client
from lamina.protos.errors import CheckpointError, SecureSumRefused, TrainingError
from lamina.protos.files import sha256
from lamina.protos.messages import Budget, Instruction, Reply
from lamina.protos.secagg.client import Me
from lamina.protos.secagg.client import State as SumState
from lamina.protos.secagg.messages import Declined
from lamina.protos.secagg.server import Down, Up
from lamina.server.campaign import fixed_settings
from lamina.server.channel import MemoryChannel, MemorySums
from lamina.server.store.base import Completed, Evaluation
from lamina.simulations.prepare import Prepared
from lamina.simulations.private import mechanisms

# What answers in the place of a client: its site, its base, and what it is asked.
Answer = Callable[[Site, Base, Instruction], Reply]

# What a client may have sent in a secure sum before it drops out: nothing, keys, shares, or its vector. Who is lost later than
# that, when a sum is being shown, must come back for the round to end; see docs/secure-aggregation.md.
MESSAGES = 4


class Watcher(Protocol):
    """Whoever shows progress."""

    def begin(self, rounds: int, names: Mapping[str, str], done: int) -> None:
        """A run begins or goes on."""
        ...

    def step(self, client_id: str, round_number: int, step: int, steps: int, loss: float) -> None:
        """A client took an optimizer step."""
        ...

    def completed(self, completed: Completed) -> None:
        """A round is durable."""
        ...

    def say(self, text: str) -> None:
        """A line worth reading."""
        ...


class Quiet:
    """A watcher that shows nothing."""

    def begin(self, rounds: int, names: Mapping[str, str], done: int) -> None:
        """Nothing."""

    def step(self, client_id: str, round_number: int, step: int, steps: int, loss: float) -> None:
        """Nothing."""

    def completed(self, completed: Completed) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


def identity(
    config: Config, prepared: Prepared, chosen: Mapping[str, Mapping[str, int]] | None = None
) -> dict[str, Any]:
    """What must be the same when a run is resumed.

    Args:
        config: The config.
        prepared: Base and data.
        chosen: What `chosen_ranks` gives.

    Returns:
        See `campaign.fixed_settings`, the corpus hash, and a hash of the chosen ranks where there are some, as they depend on
        text besides: `lora.public_data`.
    """
    fixed = fixed_settings(config, prepared.base.spec) | {"corpus hash": prepared.corpus["hash"]}
    if chosen is None:
        return fixed
    return fixed | {"ranks by importance, hash": sha256(json.dumps(chosen, sort_keys=True).encode())}


@dataclass
class Summer:
    """A client in a round's secure sums, in this process.

    Attributes:
        client_id: Its name.
        part: What it puts in.
        steps: Messages until it drops out, or None.
        state: Where it is in the attempt under way.
    """

    client_id: str
    part: Part
    steps: int | None
    state: SumState | None = None

    def take(self, message: Down) -> Up | None:
        """The client's answer, None once it has dropped out."""
        if self.steps == 0:
            return None
        self.steps = None if self.steps is None else self.steps - 1
        try:
            self.part, self.state, answer = answered(self.part, Me(self.client_id), self.state, message)
        except SecureSumRefused:
            return Declined(self.client_id)
        return answer


@dataclass
class Cohort:
    """The clients of a simulation and what each carries from round to round.

    Attributes:
        sites: Client id -> what it is.
        bases: Client id -> the base that it trains on.
        config: The config.
        watcher: Shown each step.
        instead: Client id -> what answers in its place, for clients that do not train, as an audit's canaries.
        states: Client id -> what it carries.
        shared: Frozen parts by content.
        summing: Client id -> where it is in a secure sum.
    """

    sites: Mapping[str, Site]
    bases: Mapping[str, Base]
    config: Config
    watcher: Watcher
    instead: Mapping[str, Answer] = field(default_factory=dict)
    states: dict[str, ClientState] = field(default_factory=dict)
    shared: Shared = field(default_factory=dict)
    summing: dict[str, Summer] = field(default_factory=dict)

    def channel(self) -> MemoryChannel:
        """A channel to these clients."""
        return MemoryChannel(dict.fromkeys(self.sites, self._answer))

    def sums(self) -> MemorySums:
        """A channel for secure sums over these clients."""
        return MemorySums({client: functools.partial(self._take, client) for client in self.sites})

    def _take(self, client: str, message: Down) -> Up | None:
        return self.summing[client].take(message)

    def _answer(self, instruction: Instruction) -> Reply | None:
        client, config = instruction.client_id, self.config
        steps = self._steps(client, instruction.round)
        if steps == 0:
            return None
        site = self.sites[client]
        if client in self.instead:
            return self.instead[client](site, self.bases[client], instruction)

        def progress(step: int, loss: float) -> None:
            self.watcher.step(client, instruction.round, step, config.train.local_steps, loss)

        before = self.states.get(client, ClientState())
        reply, self.states[client] = respond(site, self.bases[client], before, instruction, self.shared, progress)
        held = {state.frozen.digest for state in self.states.values() if state.frozen is not None}
        for digest in [digest for digest in self.shared if digest not in held]:
            del self.shared[digest]
        if reply.update is None or not config.privacy.secagg:
            return reply
        spec = self.bases[client].spec
        part = Part(instruction, reply.update, spec, site.budget, config.seed)
        self.summing[client] = Summer(client, part, steps)
        return Reply(client, None, trained=True)

    def _steps(self, client: str, round_number: int) -> int | None:
        """How much a client does of a round before it drops out; 0 for nothing, None for all.

        With secure aggregation there are more ways to drop out than not to answer: after each message of the sum.
        """
        rng = seeds.stream(self.config.seed, "dropout-client", client, round_number)
        if rng.random() >= self.config.clients.dropout_rate:
            return None
        return int(rng.integers(MESSAGES)) if self.config.privacy.secagg else 0

    def files(self) -> dict[str, bytes]:
        """What the clients carry, as checkpoint files."""
        index: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        for client, state in self.states.items():
            digest = None if state.frozen is None else state.frozen.digest
            index[client] = {"version": state.version, "frozen": digest, "optimizer": bool(state.optimizer)}
            if state.frozen is not None:
                files[f"frozen-{digest}.safetensors"] = save_tensors(to_files(state.frozen))
            if state.optimizer:
                tensors = {name: tensor.numpy() for name, tensor in state.optimizer.items()}
                files[f"client-{client}.safetensors"] = save_tensors(tensors)
        files["clients.json"] = json.dumps(index).encode()
        return files

    def restore(self, files: Mapping[str, bytes]) -> None:
        """Take up what `files` wrote."""
        import torch

        try:
            index = json.loads(files["clients.json"])
            self.shared = {
                name.removeprefix("frozen-").removesuffix(".safetensors"): _frozen(name, content)
                for name, content in files.items()
                if name.startswith("frozen-")
            }
            for client, one in index.items():
                tensors = load_tensors(files[f"client-{client}.safetensors"]) if one["optimizer"] else {}
                self.states[client] = ClientState(
                    version=one["version"],
                    frozen=None if one["frozen"] is None else self.shared[one["frozen"]],
                    optimizer={name: torch.tensor(value) for name, value in tensors.items()},
                )
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint: expected the clients' state, got {error!r}. Resume from an older round."
            ) from None


def _frozen(name: str, content: bytes) -> Frozen:
    return from_files(load_tensors(content), name.removeprefix("frozen-").removesuffix(".safetensors"))


def chosen_ranks(config: Config, prepared: Prepared, watcher: Watcher) -> dict[str, dict[str, int]] | None:
    """The ranks by module that the clients choose on their own training examples; the same whenever a run goes on.

    Args:
        config: The config.
        prepared: Base and data.
        watcher: Told of every choice.

    Returns:
        Client id -> module -> rank, or None where ranks are uniform.

    Raises:
        ConfigError: See `importance.chosen_ranks`.
    """
    if config.lora.allocation != "importance":
        return None
    ranks = per_client(config.clients.ranks, config.clients.count, "clients.ranks")
    found = {}
    for client, rank in zip(client_names(config), ranks, strict=True):
        chosen = importance.chosen_ranks(config, prepared.bases[client], prepared.train[client], rank, client)
        modules = len(prepared.base.spec.modules)
        watcher.say(
            f"client {client}: ranks by importance, up to {max(chosen.values(), default=0)} in {len(chosen)} of {modules} modules"
        )
        found[client] = chosen
    return found


def cohort(
    config: Config,
    prepared: Prepared,
    found: Mapping[str, Budget],
    watcher: Watcher,
    instead: Mapping[str, Answer] | None = None,
) -> Cohort:
    """The clients of a run.

    Args:
        config: The config.
        prepared: Base and data.
        found: Client id -> budget.
        watcher: Shown each step.
        instead: Client id -> what answers in its place.

    Returns:
        A cohort with nothing carried yet.

    Raises:
        ConfigError: If no private mechanism fits what a client declares.
    """
    private = mechanisms(config, prepared.train, watcher.say)
    sites = {
        client: Site(
            client_id=client,
            examples=prepared.train[client],
            budget=budget,
            train=config.train,
            rounds=config.rounds,
            wire=update_format(config),
            seed=config.seed,
            private=private.get(client),
            figures=config.privacy.mode == "none",
        )
        for client, budget in found.items()
    }
    return Cohort(sites, prepared.bases, config, watcher, instead or {})


def evaluate(prepared: Prepared, adapter: Adapter, config: Config, where: str) -> Evaluation:
    """Held-out figures of a global adapter on the full-precision base, for every client.

    Args:
        prepared: Base and data.
        adapter: What to evaluate; an empty one is the base.
        config: Batch size and task.
        where: Such as `round 3`, for the message.

    Returns:
        The figures.

    Raises:
        TrainingError: If a loss is not finite.
    """
    put(prepared.base, adapter, None, trainable=False)
    classes = config.task == "sequence-classification"
    scores = {
        client: score(prepared.base, held, config.evaluate.batch_size) for client, held in prepared.held_out.items()
    }
    nats, targets = sum(s.nats for s in scores.values()), sum(s.targets for s in scores.values())
    if not all(s.loss < float("inf") for s in scores.values()):
        raise TrainingError(
            f"{where}: expected a finite held-out loss, got another. Lower train.learning_rate; completed rounds are kept."
        )
    per_client_figures = {
        client: {"loss": s.loss, "tokens": s.targets} | ({"accuracy": s.accuracy} if classes else {})
        for client, s in scores.items()
    }
    accuracy = sum(s.hits for s in scores.values()) / targets if classes else None
    return Evaluation(nats / targets, accuracy, per_client_figures)
