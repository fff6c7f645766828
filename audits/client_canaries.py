"""Canary clients in a simulation under client-dp: does the coordinator clip, and is the noise as large as the claim says?

Each canary client is one more client of the run, which answers through the same messages as the others, and sends five times
`clip_norm` along one random direction in every round: a coordinator that clips makes `clip_norm` of it. How much of the direction
is in the final adapter gives an estimate of epsilon (Andrew et al. 2023, arXiv:2302.03098, with canaries in every round), to be
held beside what the ledger says. One run finds noise that is too small and clipping that is not there, by a factor of two or so.

Where clients are sampled and rounds are few the estimate is below the claim, which is for a client that chance takes every time.

It is a run of its own with the settings of the one that is audited: its strategy, rounds, clip_norm, noise and sampling, and its
real clients beside the canaries. The denominator counts the canaries too, which moves signal and noise alike.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lamina.audits.estimators.one_shot import OneShot, one_shot
from lamina.client.model import Base
from lamina.client.participant import ClientState, Site, received
from lamina.protos import seeds
from lamina.protos.adapter import Adapter, Array
from lamina.protos.blobs import blob
from lamina.protos.codec import encode_update
from lamina.protos.config import Config, client_names, per_client
from lamina.protos.errors import ConfigError
from lamina.protos.messages import Instruction, Reply, Trainable, Update
from lamina.protos.sides import change_of, numbers_of, one_side, start_factors, with_numbers
from lamina.simulations.engine import Quiet
from lamina.simulations.prepare import Prepared, prepare
from lamina.simulations.run import simulate

# What a canary sends, in units of clip_norm: more than may pass.
LOUDNESS = 5.0
_PREFIX = "canary-"
# Factor and side, or dense parameter -> numbers.
Numbers = dict[str, Array]


@dataclass(frozen=True)
class ClientCanaries:
    """What canary clients show of client-dp.

    Attributes:
        found: The estimate.
        analytic: Epsilon of the run by its ledger.
        clients: Real ones beside the canaries.
        rounds: Of the run.
        refused: Updates of canaries that the coordinator did not admit; each makes the estimate smaller.
    """

    found: OneShot
    analytic: float
    clients: int
    rounds: int
    refused: int


@dataclass
class _Seen(Quiet):
    """Keeps what the end of the run needs."""

    progress: Callable[[int, int], None]
    rounds: int
    adapter: Adapter | None = None
    sides: list[Trainable] = field(default_factory=list)
    refused: int = 0

    def completed(self, completed: Any) -> None:
        self.adapter = completed.state.adapter
        self.refused += sum(one["client_id"].startswith(_PREFIX) for one in completed.record["rejections"])
        self.progress(completed.state.round, self.rounds)


def client_canaries(
    config: Config,
    folder: Path,
    canaries: int = 100,
    progress: Callable[[int, int], None] = lambda done, of: None,
    prepared: Prepared | None = None,
) -> ClientCanaries:
    """Run the settings of a client-dp run with canary clients beside the real ones.

    Real clients train for one step, as how they train does not matter to a canary, and nothing is evaluated that need not be.

    Args:
        config: With privacy.mode=client-dp.
        folder: Where the run is kept while it goes on; nothing of it stays.
        canaries: How many. Their number should be far below that of the numbers that are trained, as they disturb each other.
        progress: Told of rounds done and to do.
        prepared: Base and data of `config`, where they are there.

    Returns:
        Estimate and claim.

    Raises:
        ConfigError: If the mode is another, or no canary is asked for.
    """
    if config.privacy.mode != "client-dp" or canaries < 1:
        raise ConfigError(
            f"canary clients: expected privacy.mode=client-dp and at least one canary, got {config.privacy.mode} and {canaries}."
        )
    names = [f"{_PREFIX}{number}" for number in range(canaries)]
    crowded = _crowded(config, names)
    prepared = _with(prepared or prepare(replace(crowded, clients=config.clients)), names)
    seen = _Seen(progress, config.rounds)
    answer = partial(_answer, crowded, seen.sides)
    with tempfile.TemporaryDirectory(dir=folder, prefix="client-canaries-") as path:
        finished = simulate(replace(crowded, output=f"{path}/run"), seen, prepared, dict.fromkeys(names, answer))
    if seen.adapter is None or not seen.sides:
        raise ConfigError(
            f"canary clients: expected one of {canaries} to be asked, got none in {config.rounds} rounds. Raise clients.fraction "
            "or rounds."
        )
    sides = tuple(dict.fromkeys(seen.sides))
    change = _whole_change(config.seed, prepared.base, seen.adapter, sides)
    found = one_shot(
        [_cosine(change, _direction(config.seed, name, seen.adapter, sides)) for name in names],
        sum(value.size for value in change.values()),
        config.privacy.delta,
        config.seed,
    )
    analytic = float(finished.summary["privacy"]["epsilon"])
    return ClientCanaries(found, analytic, config.clients.count, config.rounds, seen.refused)


def json_of(result: ClientCanaries) -> dict[str, Any]:
    """The `client_canaries` of audit.json.

    Args:
        result: Estimate and claim.

    Returns:
        JSON values; an estimate that is not finite is null.
    """
    found = result.found
    epsilon, *interval = (value if math.isfinite(value) else None for value in (found.epsilon, *found.interval))
    return {
        "epsilon": epsilon,
        "interval": interval,
        "analytic": result.analytic,
        "canaries": found.canaries,
        "clients": result.clients,
        "rounds": result.rounds,
        "dimension": found.dimension,
    }


def _crowded(config: Config, names: Sequence[str]) -> Config:
    """The config with canaries at the end of every list, of the largest rank, and as little beside them as can be."""
    clients, count = config.clients, config.clients.count
    ranks = per_client(clients.ranks, count, "clients.ranks")
    more = replace(
        clients,
        count=count + len(names),
        names=[*client_names(config), *names],
        ranks=[*ranks, *[max(ranks)] * len(names)],
        join_round=1,
        dropout_rate=0.0,
        quorum=1,
    )
    return replace(
        config,
        clients=more,
        lora=replace(config.lora, allocation="uniform"),
        quantisation=replace(config.quantisation, format="auto"),
        privacy=replace(config.privacy, force=True, nominal_examples=None),
        train=replace(config.train, local_steps=1),
        evaluate=replace(config.evaluate, max_examples=1, every=config.rounds),
        data=replace(config.data, generate=0),
        baselines=[],
        keep_updates=False,
        resume="",
    )


def _with(prepared: Prepared, names: Sequence[str]) -> Prepared:
    """Base and data with canaries, who have none of the data, and little to evaluate on."""
    return replace(
        prepared,
        bases={**prepared.bases, **dict.fromkeys(names, prepared.base)},
        names={**prepared.names, **dict(zip(names, names, strict=True))},
        train={**prepared.train, **dict.fromkeys(names, ())},
        held_out={client: examples[:1] for client, examples in prepared.held_out.items()},
    )


def _answer(config: Config, sides: list[Trainable], site: Site, base: Base, instruction: Instruction) -> Reply:
    """What a canary sends: what it received, and a step along its direction that is longer than `clip_norm`."""
    side = instruction.train
    sides.append(side)
    start, _ = received(site, base, ClientState(), instruction, {})
    length = LOUDNESS * config.privacy.clip_norm
    step = {name: length * value for name, value in _direction(config.seed, site.client_id, start, (side,)).items()}
    lora = {}
    if side != "AB":  # which it is where there are dense parameters alone
        for module, factors in start.lora.items():
            numbers = (numbers_of(factors, side) + step[f"{module}.{side}"]).astype(np.float32)
            lora[module] = one_side(with_numbers(factors, side, numbers), side)
    dense = {name: (value + step[name]).astype(np.float32) for name, value in start.dense.items()}
    update = Update(
        run_id=instruction.run_id,
        round=instruction.round,
        client_id=site.client_id,
        parent_release_hash=instruction.release_hash,
        adapter=Adapter(lora, dense),
        num_examples=config.aggregation.full_weight or 1,
    )
    rng = seeds.stream(site.seed, "wire", site.client_id, instruction.round)
    return Reply(site.client_id, blob(encode_update(update, site.wire, rng)))


def _direction(seed: int, client: str, like: Adapter, sides: Sequence[Trainable]) -> Numbers:
    """What a canary sends, added up over the sides that are trained: a random direction of length 1 for each, always the same."""
    found: Numbers = {}
    for side in sides:
        shapes = {f"{module}.{side}": numbers_of(factors, side).shape for module, factors in like.lora.items()}
        shapes |= {name: value.shape for name, value in like.dense.items()}
        drawn = {
            name: seeds.stream(seed, "audit", "canary client", client, name).normal(size=shape)
            for name, shape in shapes.items()
        }
        length = _length(drawn)
        for name, value in drawn.items():
            found[name] = found.get(name, 0.0) + value / length
    return found


def _whole_change(seed: int, base: Base, after: Adapter, sides: Sequence[Trainable]) -> Numbers:
    """What a run changed, from its common start: every number that it could."""
    found: Numbers = {}
    for module, factors in after.lora.items():
        shape, cored = base.spec.modules[module], "core" in sides
        start = start_factors(seed, module, factors.rank, shape, factors.scale, cored)
        for side in sides:
            found[f"{module}.{side}"] = change_of(factors, start, side, factors.scale)
    first = base.spec.dense
    return found | {name: value.astype(np.float64) - first[name] for name, value in after.dense.items()}


def _length(numbers: Mapping[str, Array]) -> float:
    return math.sqrt(sum(float(np.square(value).sum()) for value in numbers.values()))


def _cosine(one: Numbers, other: Numbers) -> float:
    """0 where the run changed nothing."""
    lengths = _length(one) * _length(other)
    product = sum(float(np.vdot(value, other[name])) for name, value in one.items())
    return product / lengths if lengths > 0 else 0.0
