"""The one-machine engine: the coordinator's round loop over clients in this process, one frozen base for all.

Nothing of the method is here: clients answer through the same messages, bytes and checks as over a network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from lamina.client.evaluate import score
from lamina.client.frozen import Frozen, from_files, to_files
from lamina.client.model import Base, put
from lamina.client.participant import ClientState, Shared, Site, respond
from lamina.protos import seeds
from lamina.protos.adapter import Adapter
from lamina.protos.config import Config, known_keys, per_client, value_of
from lamina.protos.errors import CheckpointError, ConfigError, TrainingError
from lamina.protos.files import sha256
from lamina.protos.messages import Budget, Instruction, Reply
from lamina.protos.spec import AdapterSpec
from lamina.server.channel import MemoryChannel
from lamina.server.rounds import Campaign, Completed, Evaluation
from lamina.simulations.prepare import Prepared
from lamina.strategies import Options, build

# Settings that may differ when a run is resumed: they do not change a bit of it.
FREE_KEYS = ("output", "resume", "threads", "checkpoints", "keep_updates", "baselines", "data.generate")


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


def budgets(config: Config, spec: AdapterSpec) -> dict[str, Budget]:
    """What each client can hold: its rank clamped per module, its scale, its download rank.

    Args:
        config: Ranks, lora_alpha, rank pattern.
        spec: Module shapes.

    Returns:
        Client id -> budget.

    Raises:
        ConfigError: If a rank pattern names no module, or leaves nothing to train.
    """
    ranks = per_client(config.clients.ranks, config.clients.count, "clients.ranks")
    pattern = config.lora.rank_pattern
    for suffix in pattern:
        if not any(_suffix(module, suffix) for module in spec.modules):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in spec.modules}))
            raise ConfigError(f"lora.rank_pattern.{suffix}: no adapted module ends so. Adapted: {known}.")
    largest = config.clients.download_rank or _cohort_rank(config, ranks)
    found = {}
    for index, rank in enumerate(ranks):
        train = {}
        for module in spec.modules:
            capped = min([rank, *(cap for suffix, cap in pattern.items() if _suffix(module, suffix))])
            if capped > 0:
                train[module] = spec.clamped(capped, module)
        if not train and not spec.dense:
            raise ConfigError("lora.rank_pattern: expected some module to train, every one has rank 0.")
        found[str(index)] = Budget(
            train=train,
            download={module: spec.clamped(max(largest, train.get(module, 0)), module) for module in spec.modules},
            scale={module: scale(config, rank, train[module]) for module in train},
        )
    return found


def _suffix(module: str, suffix: str) -> bool:
    return module == suffix or module.endswith("." + suffix)


def _cohort_rank(config: Config, ranks: Sequence[int]) -> int:
    """The sum of a cohort's ranks; under partial participation, of the largest that can meet."""
    size = max(1, round(config.clients.fraction * len(ranks)))
    return sum(sorted(ranks, reverse=True)[:size])


def scale(config: Config, client_rank: int, rank: int) -> float:
    """The runtime scale of one module at one client.

    Args:
        config: lora_alpha and rsLoRA.
        client_rank: The client's nominal rank; without lora_alpha, lora_alpha is twice this and the scale 2.
        rank: The module's rank after clamping.

    Returns:
        lora_alpha / rank, or lora_alpha / sqrt(rank).
    """
    if config.lora.lora_alpha is None:
        return 2.0
    return float(config.lora.lora_alpha) / (rank**0.5 if config.lora.use_rslora else rank)


def campaign(config: Config, spec: AdapterSpec, found: Mapping[str, Budget], run_id: str) -> Campaign:
    """The round loop's fixed values.

    Args:
        config: A checked config.
        spec: The schema.
        found: Client id -> budget.
        run_id: The run's name.

    Returns:
        A campaign.
    """
    rank = {m: max((b.train.get(m, 0) for b in found.values()), default=0) for m in spec.modules}
    scales = {
        m: next((b.scale[m] for b in found.values() if b.train.get(m, 0) == rank[m] and rank[m]), 2.0) for m in rank
    }
    ranks = per_client(config.clients.ranks, config.clients.count, "clients.ranks")
    options = Options(
        rank=rank,
        scale=scales,
        rank_cap=config.aggregation.rank_cap or 2 * max(ranks),
        weighting=config.aggregation.weights,  # type: ignore[arg-type]
        learning_rate=config.aggregation.learning_rate,
        seed=config.seed,
    )
    joins = per_client(config.clients.join_round, config.clients.count, "clients.join_round")
    return Campaign(
        run_id=run_id,
        spec=spec,
        strategy=build(config.strategy.name, options),
        budgets=found,
        joined={str(index): first for index, first in enumerate(joins)},
        rounds=config.rounds,
        fraction=config.clients.fraction,
        quorum=config.clients.quorum,
        wire=config.wire.format,  # type: ignore[arg-type]
        weighting=config.aggregation.weights,
        seed=config.seed,
    )


def identity(config: Config, prepared: Prepared) -> dict[str, Any]:
    """What must be the same when a run is resumed.

    Args:
        config: The config.
        prepared: Base and data.

    Returns:
        Base hashes, corpus hash, and every setting that changes a bit. `rounds` may grow under a constant schedule.
    """
    keys = [key for key in known_keys() if key not in FREE_KEYS]
    if config.train.schedule == "constant":
        keys.remove("rounds")
    fixed = {f"base {name} hash": value for name, value in prepared.base.spec.hashes.items()}
    fixed |= {"corpus hash": prepared.corpus["hash"]} | {key: value_of(config, key) for key in keys}
    return dict(json.loads(json.dumps(fixed)))


def run_id(fixed: Mapping[str, Any]) -> str:
    """A name that equal settings on equal data share.

    Args:
        fixed: See `identity`.

    Returns:
        12 hex digits.
    """
    return sha256(json.dumps(fixed, sort_keys=True, default=str).encode())[:12]


@dataclass
class Cohort:
    """The clients of a simulation and what each carries from round to round."""

    sites: Mapping[str, Site]
    base: Base
    config: Config
    watcher: Watcher
    states: dict[str, ClientState] = field(default_factory=dict)
    shared: Shared = field(default_factory=dict)

    def channel(self) -> MemoryChannel:
        """A channel to these clients."""
        return MemoryChannel(dict.fromkeys(self.sites, self._answer))

    def _answer(self, instruction: Instruction) -> Reply | None:
        client, config = instruction.client_id, self.config
        if self._drops_out(client, instruction.round):
            return None
        site = self.sites[client]

        def progress(step: int, loss: float) -> None:
            self.watcher.step(client, instruction.round, step, config.train.local_steps, loss)

        before = self.states.get(client, ClientState())
        reply, self.states[client] = respond(site, self.base, before, instruction, self.shared, progress)
        held = {state.frozen.digest for state in self.states.values() if state.frozen is not None}
        for digest in [digest for digest in self.shared if digest not in held]:
            del self.shared[digest]
        return reply

    def _drops_out(self, client: str, round_number: int) -> bool:
        chance = seeds.stream(self.config.seed, "dropout-client", client, round_number).random()
        return bool(chance < self.config.clients.dropout_rate)

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


def cohort(config: Config, prepared: Prepared, found: Mapping[str, Budget], watcher: Watcher) -> Cohort:
    """The clients of a run.

    Args:
        config: The config.
        prepared: Base and data.
        found: Client id -> budget.
        watcher: Shown each step.

    Returns:
        A cohort with nothing carried yet.
    """
    sites = {
        client: Site(
            client_id=client,
            examples=prepared.train[client],
            budget=budget,
            train=config.train,
            rounds=config.rounds,
            wire=config.wire.format,  # type: ignore[arg-type]
            seed=config.seed,
        )
        for client, budget in found.items()
    }
    return Cohort(sites, prepared.base, config, watcher)


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
