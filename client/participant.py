"""One client of a run: an instruction in, an update out.

The path of an update at the site: decode and check the release, fill the slots, train, check, encode. What a client keeps from
round to round is `ClientState`, a value; the base is shared by whoever runs on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from lamina.client import frozen as frozen_part
from lamina.client.data import Example
from lamina.client.frozen import Frozen
from lamina.client.model import Base, put, take
from lamina.client.private.train import Private, train_privately
from lamina.client.train import Optimizer, Task, completed, train
from lamina.protos import seeds
from lamina.protos.adapter import EMPTY, Adapter, is_finite
from lamina.protos.blobs import blob
from lamina.protos.codec import WireFormat, encode_update, loaded, opened
from lamina.protos.config import Config, TrainConfig
from lamina.protos.errors import AdapterMismatch, TrainingError
from lamina.protos.messages import Budget, Instruction, Reply, Update
from lamina.protos.privacy.accounting import epsilon
from lamina.protos.privacy.events import Claim, to_claim
from lamina.protos.sides import Side, one_side, side_of, whole


@dataclass(frozen=True)
class ClientState:
    """What a client carries from round to round.

    Attributes:
        version: Of the release that it holds; -1 for none.
        frozen: Its frozen part, or None.
        optimizer: Optimizer tensors by name, where they are kept.
    """

    version: int = -1
    frozen: Frozen | None = None
    optimizer: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """What a client is.

    Attributes:
        client_id: Its name.
        examples: Its training set.
        budget: Its ranks and scales.
        train: Local training settings.
        rounds: Of the campaign, for the schedule.
        wire: Number format of its updates.
        seed: Of the run.
        private: What makes its training private under example-dp, or None.
        figures: Whether figures of its training may leave; under a privacy mode no noise would cover them.
    """

    client_id: str
    examples: Sequence[Example]
    budget: Budget
    train: TrainConfig
    rounds: int
    wire: WireFormat
    seed: int
    private: Private | None = None
    figures: bool = True


def update_format(config: Config) -> WireFormat:
    """The number format of a client's updates.

    Args:
        config: Of the run.

    Returns:
        That of the wire; fp32 where an update stays at its client and only a sum is seen.
    """
    return "fp32" if config.privacy.secagg else config.wire.format  # type: ignore[return-value]


Progress = Callable[[int, float], None]
# Frozen parts by content, so that clients with one history share one in memory.
Shared = dict[str, Frozen]


def respond(
    site: Site,
    base: Base,
    state: ClientState,
    instruction: Instruction,
    shared: Shared,
    progress: Progress | None = None,
    leaving: Callable[[Update], Update] = lambda update: update,
) -> tuple[Reply, ClientState]:
    """Take part in one round.

    Args:
        site: Who.
        base: The frozen base; its slots are overwritten.
        state: What the client carries.
        instruction: The round's release and what to do with it.
        shared: Frozen parts known on this machine; may gain one.
        progress: Called after each training step.
        leaving: What the site lets go of an update: metrics and counts may be left out or made coarser.

    Returns:
        The reply with the encoded update, and what to carry on.

    Raises:
        UpdateRejected: If the release is malformed.
        AdapterMismatch: If it does not fit this client's base, or adds to a version that the client does not hold.
        TrainingError: If training is not finite.
    """
    where = f"client {site.client_id}, round {instruction.round}, release"
    release, beside = received(site, base, state, instruction, shared)
    task = Task(site.client_id, instruction.round, site.rounds, site.seed, site.train)
    start = completed(release, site.budget.train, site.budget.scale, task, base)
    put(base, start, beside, sides=instruction.train)
    del release
    if site.train.proximal == 0:
        start = EMPTY  # it is in the slots; nothing else of it is held while memory is at its peak
    metrics, optimizer = _trained(site, base, task, start, state.optimizer or None, progress)
    adapter = take(base)
    if not is_finite(adapter):
        raise TrainingError(f"{where}: expected finite factors after training. Lower train.learning_rate.")
    if instruction.train != "AB":
        adapter = Adapter({m: one_side(f, instruction.train) for m, f in adapter.lora.items()}, adapter.dense)
    update = Update(
        run_id=instruction.run_id,
        round=instruction.round,
        client_id=site.client_id,
        parent_release_hash=instruction.release_hash,
        adapter=adapter,
        num_examples=len(site.examples) if site.private is None else site.private.nominal,
        metrics=metrics,
        privacy=None if site.private is None else _claimed(site.private, instruction.round),
    )
    told = leaving(update)
    # The machine's memory is the site's own business, whatever a policy lists.
    metrics = {name: value for name, value in told.metrics.items() if name != "peak_bytes" and site.figures}
    told = replace(told, metrics=metrics)
    payload = encode_update(told, site.wire, seeds.stream(site.seed, "wire", site.client_id, instruction.round))
    after = ClientState(
        version=instruction.version,
        frozen=beside if instruction.keep_frozen else None,
        optimizer=optimizer if site.train.keep_optimizer else {},
    )
    return Reply(site.client_id, blob(payload)), after


def _trained(
    site: Site, base: Base, task: Task, start: Adapter, kept: Optimizer | None, progress: Progress | None
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    if site.private is None:
        return train(base, site.examples, task, start, kept, progress)
    return train_privately(base, site.examples, task, site.private, start, kept, progress)


def _claimed(private: Private, round_number: int) -> dict[str, float]:
    """What the update says of its mechanism; nothing of it depends on data. Epsilon is that of this round alone: a site's worker
    puts what its ledger says in its place, and a simulation's coordinator computes the rest from all events.
    """
    mechanism = private.mechanism
    event = mechanism.event("", round_number)
    return to_claim(Claim(event, mechanism.target_delta, epsilon([event], mechanism.target_delta)))


def received(
    site: Site, base: Base, state: ClientState, instruction: Instruction, shared: Shared
) -> tuple[Adapter, Frozen | None]:
    """A release as the client has it, checked against its base.

    Args:
        site: Whose ranks and seed make a release of one factor whole.
        base: For the schema.
        state: What the client carries; a frozen part may be added to it.
        instruction: With the encoded release.
        shared: Frozen parts known on this machine; may gain one.

    Returns:
        The trainable part, and what rides beside it.

    Raises:
        UpdateRejected: If the release is malformed.
        AdapterMismatch: If it does not fit, or adds to a version that the client does not hold.
    """
    where = f"client {instruction.client_id}, round {instruction.round}, release"
    if instruction.train != "AB":
        return _made_whole(site, base, instruction, instruction.train, where), None
    release = loaded(opened(instruction.release))
    base.spec.check(release, where)
    return release, _frozen(state, instruction, base, shared, where)


def _made_whole(site: Site, base: Base, instruction: Instruction, side: Side, where: str) -> Adapter:
    """All factors of every module: what came, and what has not moved since the start."""
    parts = [loaded(opened(part)) for part in (instruction.release, instruction.frozen) if part is not None]
    for part in parts:
        base.spec.check(part, where, side_of(part, where) or "AB")
        if not part.lora.keys() <= site.budget.train.keys():
            raise AdapterMismatch(f"{where}: expected modules that this client trains, got others.")
    return loaded(whole(parts, site.budget.train, site.budget.scale, base.spec.modules, site.seed, side))


def _frozen(state: ClientState, instruction: Instruction, base: Base, shared: Shared, where: str) -> Frozen | None:
    if instruction.frozen is None:
        return None
    before = None
    if instruction.frozen_since is not None:
        if instruction.frozen_since != state.version:
            raise AdapterMismatch(
                f"{where}: it adds to version {instruction.frozen_since}, this client holds {state.version}. "
                "Ask for the whole frozen part."
            )
        before = state.frozen
    digest = frozen_part.digest_of(instruction.frozen.sha256, before)
    if digest not in shared:
        part = loaded(opened(instruction.frozen))
        base.spec.check(part, where)
        shared[digest] = frozen_part.added(before, part, digest)
    return shared[digest]
