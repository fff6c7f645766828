"""A site's plan for a run that it is offered: the terms and the site's own settings become what the planner is asked, and its
plan becomes settings of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lamina.client.hardware import Profile, num_bytes, profile, size
from lamina.client.loading import resolved
from lamina.client.quantised import copies, formats
from lamina.client.sizing.planner import NothingFits, Plan, Wanted, budget_of, plan, trained
from lamina.client.sizing.shape import held_as, shape_of
from lamina.client.sizing.written import document, plan_of
from lamina.protos.config import Config
from lamina.protos.errors import ConfigError
from lamina.protos.ranks import SPREAD, uniform
from lamina.protos.spec import AdapterSpec

# Of these strategies a frozen part comes down beside the trainable one.
_FROZEN = ("residual", "stack")
# These train less than both factors in a round.
_TRAINED = {"ffa": "B", "alternate": "turns", "core": "core"}


@dataclass(frozen=True)
class Offer:
    """What of a run's terms a plan depends on.

    Attributes:
        rank: Nominal rank that the site may train.
        equal_ranks: Whether it must be that rank in every layer.
        download_rank: Largest rank of the frozen part that comes beside it.
        deadline_s: Of a round, or None.
        train: Of factors, what has gradients in a round, one of `memory.TRAINED`.
    """

    rank: int
    equal_ranks: bool = False
    download_rank: int = 0
    deadline_s: float | None = None
    train: str = "AB"


def offer_of(terms: Mapping[str, Any]) -> Offer:
    """The part of terms that a plan depends on.

    Args:
        terms: Checked.

    Returns:
        The offer.
    """
    budget, strategy = terms["budget"], terms["strategy"]
    beside = {module: rank - budget["train"].get(module, 0) for module, rank in budget["download"].items()}
    return Offer(
        rank=int(terms["rank"]),
        equal_ranks=strategy == "fedavg",
        download_rank=max(beside.values(), default=0) if strategy in _FROZEN else 0,
        deadline_s=terms.get("deadline_s"),
        train=_TRAINED.get(strategy, "AB"),
    )


def wanted_of(config: Config, offer: Offer, spec: AdapterSpec, machine: Profile, held: int = 0) -> Wanted:
    """What the planner is asked.

    Args:
        config: The site's, with the terms' settings in it.
        offer: Of the terms.
        spec: The run's schema.
        machine: The site's profile.
        held: Bytes beside the imports that this process holds already, for its data; they count against `client.memory`.

    Returns:
        With everything that the site has decided itself.

    Raises:
        ConfigError: If `lora.rank` is not what is offered, `client.memory` is no size, or the copy's manifest cannot be read.
    """
    own = config.lora.rank
    if own is not None and (own > offer.rank or (offer.equal_ranks and own != offer.rank)):
        bound = "exactly" if offer.equal_ranks else "at most"
        raise ConfigError(
            f"lora.rank={own}: expected {bound} rank {offer.rank}, what the coordinator offers this site. "
            f"Set lora.rank={offer.rank}, or raise clients.ranks at the coordinator."
        )
    train, copy = config.train, copies.read_manifest(resolved(config.model.source))
    number_format = copy.format if copy else config.quantisation.format
    only = None
    if number_format != "auto":
        compute = config.quantisation.compute
        if compute == "auto":
            compute = formats.compute_of(copy.compute if copy else "", number_format, machine)
        only = (number_format, compute)
    return Wanted(
        rank=own or offer.rank,
        batch_size=train.batch_size,
        accumulation=train.accumulation,
        max_length=train.max_length,
        local_steps=train.local_steps,
        targets=tuple(uniform(spec, offer.rank, config.lora.rank_pattern)),
        deadline_s=offer.deadline_s,
        memory_bytes=max(0, num_bytes(config.client.memory, "client.memory") - held) if config.client.memory else None,
        download_rank=offer.download_rank,
        compensation=copy.compensation if copy else config.quantisation.compensation,
        dense=sum(int(np.prod(value.shape)) for value in spec.dense.values()),
        train=offer.train if config.adapter.kind == "lora" else config.adapter.kind,
        by_row=_by_row(config),
        whole=offer.equal_ranks or config.lora.rank is not None,
        only=only,
        importance=config.lora.allocation == "importance",
        micro_batch=train.micro_batch,
        checkpointing=train.checkpointing,
        optimizer="adamw" if train.keep_optimizer else None if train.optimizer == "auto" else train.optimizer,
    )


def _by_row(config: Config) -> int:
    """Gradients of each example that example-dp holds: its own, and where units have several examples a unit's sum."""
    if config.privacy.mode != "example-dp":
        return 0
    return 2 if config.privacy.unit == "user" else 1


def fitted(config: Config, spec: AdapterSpec, wanted: Wanted, machine: Profile, loaded: bool = False) -> Plan:
    """The site's plan.

    Args:
        config: The site's, with the terms' settings in it.
        spec: The run's schema.
        wanted: Of `wanted_of`.
        machine: The site's profile.
        loaded: Whether the base is in memory already, so that its file is not read any more.

    Returns:
        The plan.

    Raises:
        NothingFits: If no way to train fits.
        ConfigError: If the model has no configuration, or a setting is impossible.
    """
    source, revision = config.model.source, config.model.revision
    shape = shape_of(source, revision, config.task, len(spec.labels))
    held = held_as(source, shape, revision)
    file_bytes = 0 if loaded else held.file_bytes
    asked = replace(wanted, file_bytes=file_bytes, file_format=held.format, module_formats=held.modules)
    return plan(machine, shape, asked)


def tightened(config: Config, spec: AdapterSpec, wanted: Wanted, before: Plan, room: int) -> Plan | None:
    """A plan that takes less memory for what has begun: ranks, number format and examples stay as they are.

    Args:
        config: The site's, with the plan in it.
        spec: The run's schema.
        wanted: What the plan was made for.
        before: The plan.
        room: Bytes that there are.

    Returns:
        A plan of a smaller peak, within the room where one is; None where there is no smaller one.

    Raises:
        ConfigError: If the model has no configuration by now.
    """
    only = (before.format, before.compute)
    asked = replace(wanted, rank=before.rank, whole=True, only=only, targets=tuple(before.ranks), memory_bytes=room)
    try:
        found = fitted(config, spec, asked, replace(profile(config.train.device), free_bytes=2 * room), loaded=True)
    except NothingFits as error:
        found = error.smallest  # which may do
    return found if found.max_length == before.max_length and found.peak_bytes < before.peak_bytes else None


def to_keep(wanted: Wanted, chosen: Plan, ranks: Mapping[str, int], leaves: str) -> dict[str, Any]:
    """What a site keeps of its plan, so that it asks for the same when it is started again.

    Args:
        wanted: What the plan was made for.
        chosen: The plan.
        ranks: Module -> rank, as it registered.
        leaves: What of the ranks the site's policy lets leave.

    Returns:
        JSON values.
    """
    return {"wanted": _question(wanted), "leaves": leaves, "plan": document(chosen), "ranks": dict(ranks)}


def known_plan(
    kept: Mapping[str, Any] | None, wanted: Wanted, machine: Profile, leaves: str
) -> tuple[Plan, dict[str, int]] | None:
    """A plan that was kept, where the same is wanted and it still fits.

    Args:
        kept: Of `to_keep`, or None. It comes from a file, so that anything may be in it.
        wanted: What is wanted now.
        machine: The site's profile now.
        leaves: What of the ranks the site's policy lets leave now.

    Returns:
        The plan and the ranks that the site registered, or None where it must plan anew.
    """
    if kept is None or kept.get("wanted") != _question(wanted) or kept.get("leaves") != leaves:
        return None
    try:
        found, ranks = plan_of(kept["plan"]), dict(kept["ranks"])
        most = wanted.rank * (SPREAD if wanted.importance else 1)
        right = bool(ranks) == bool(wanted.targets) and all(
            type(rank) is int and 1 <= rank <= most for rank in ranks.values()
        )
        right &= set(ranks) <= set(wanted.targets) and set(found.ranks) <= set(wanted.targets)
        right &= found.micro_batch * found.accumulation == wanted.batch_size * wanted.accumulation
        right &= found.max_length <= wanted.max_length and found.rank <= wanted.rank
        return (found, ranks) if right and found.peak_bytes <= budget_of(machine, wanted) else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _question(wanted: Wanted) -> str:
    """What is wanted, but for the memory that there is for it."""
    return repr(replace(wanted, memory_bytes=None))


def applied(config: Config, chosen: Plan) -> Config:
    """A site's config with a plan in it.

    Args:
        config: Without.
        chosen: The plan.

    Returns:
        With format, micro-batch, checkpointing, optimizer and length; evaluation takes no larger batches than training where
        memory is short.
    """
    train = replace(
        config.train,
        micro_batch=math.gcd(chosen.micro_batch, config.train.batch_size),
        checkpointing=chosen.checkpointing,
        optimizer=chosen.optimizer,
        max_length=chosen.max_length,
    )
    short = chosen.checkpointing or chosen.micro_batch < config.train.batch_size
    batch = min(config.evaluate.batch_size, chosen.micro_batch) if short else config.evaluate.batch_size
    return replace(
        config,
        train=train,
        evaluate=replace(config.evaluate, batch_size=batch),
        quantisation=replace(config.quantisation, format=chosen.format, compute=chosen.compute),
    )


def line(chosen: Plan) -> str:
    """A plan in a line.

    Args:
        chosen: The plan.

    Returns:
        For a log.
    """
    batch = f"{chosen.micro_batch} x {chosen.accumulation} examples of {chosen.max_length} tokens"
    again = ", activations computed again" if chosen.checkpointing else ""
    return (
        f"plan: {chosen.format} base, {trained(chosen)}, {batch}{again}, {chosen.optimizer}: "
        f"{size(chosen.peak_bytes)} of {size(chosen.budget_bytes)}"
    )


def coarse(ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks that say less of a site: each rounded down to a power of two.

    Args:
        ranks: Module -> rank, at least 1 each.

    Returns:
        The same modules.
    """
    return {module: 1 << (rank.bit_length() - 1) for module, rank in ranks.items()}
