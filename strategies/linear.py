"""Strategies that need only sums of what is sent: one factor is trained in a round, the rest is the same for all.

With nested slices of common factors, B[:, :r_k] and A[:r_k], the mean of the clients' products is a product of means:
sum_k p_k B_k A[:r_k] = (sum_k p_k [B_k, 0]) A. So zero-padded factors give the exact mean of unequal ranks, which they do not
where both factors move, and the server needs no single client's update to form it.

Scales go into B alone: a client at scale s_k receives (s / s_k) B[:, :r_k] beside A[:r_k] itself, so that a slot is one
coordinate for all and its product that of the global factors; the change of its B comes back times s_k / s, that of its A as
it is.

- `ffa`: FFA-LoRA (Sun et al. 2024, arXiv:2403.12313). A stays as it was drawn; only B is trained and sent.
- `alternate`: RoLoRA (Chen et al. 2025, arXiv:2502.01755). B in odd rounds, A in even ones.
- `core`: Fed-SB (Singhal et al. 2025, arXiv:2502.15436). B and A stay as they were drawn; the r x r core between them is trained
  and sent, zero-padded like the others: B[:, :r_k] C_k A[:r_k] = B [C_k, 0; 0, 0] A. Scales go into the core there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lamina.protos.adapter import Adapter, Array, LoraFactors, prefix
from lamina.protos.errors import AdapterMismatch
from lamina.protos.messages import Budget, Release, Update
from lamina.protos.sides import Side, change_of, numbers_of, one_side, start_factors, with_numbers
from lamina.protos.spec import AdapterSpec
from lamina.strategies.base import (
    LayerReport,
    ServerState,
    Strategy,
    Weighting,
    client_weights,
    layer_weights,
)
from lamina.strategies.dense import averaged
from lamina.strategies.exact import exact_pairs, in_order
from lamina.strategies.factors import distance, total


@dataclass(frozen=True)
class Nested:
    """What the linear strategies must know before the first round.

    Attributes:
        rank: Module -> rank of the global factors, the largest among the clients.
        scale: Module -> scale at which the global factors are kept.
        seed: Of the common start.
        weighting: See `base.client_weights`.
        learning_rate: The server's eta.
    """

    rank: Mapping[str, int]
    scale: Mapping[str, float]
    seed: int = 0
    weighting: Weighting = "num_examples"
    learning_rate: float = 1.0


def nested_start(spec: AdapterSpec, nested: Nested, cored: bool = False) -> ServerState:
    """The common start, see `start_factors`.

    Args:
        spec: The negotiated schema.
        nested: Ranks, scales and seed.
        cored: Whether a core is trained.

    Returns:
        State of round 0.
    """
    lora = {
        module: start_factors(nested.seed, module, nested.rank[module], shape, nested.scale[module], cored)
        for module, shape in spec.modules.items()
    }
    return ServerState(0, Adapter(lora, dict(spec.dense)))


def sliced(factors: LoraFactors, rank: int, scale: float) -> LoraFactors:
    """A client's slots of the global factors at its scale, which B alone takes up, or the core.

    Args:
        factors: The global factors.
        rank: The client's.
        scale: The client's.

    Returns:
        Factors of that rank and scale whose product is that of the first `rank` slots, up to float32 rounding of what takes up
        the scale.
    """
    cut, ratio = prefix(factors, rank), factors.scale / scale
    if cut.core is not None:
        return replace(cut, core=_times(cut.core, ratio), scale=scale)
    return replace(cut, B=_times(cut.B, ratio), scale=scale)


def _times(values: Array, ratio: float) -> Array:
    return values if ratio == 1.0 else (values.astype(np.float64) * ratio).astype(np.float32)


def _slices(state: ServerState, budget: Budget, side: Side) -> dict[str, LoraFactors]:
    return {
        module: one_side(sliced(state.adapter.lora[module], rank, budget.scale[module]), side)
        for module, rank in budget.train.items()
    }


def moved(
    current: LoraFactors, sent: Sequence[tuple[LoraFactors, LoraFactors, float]], side: Side, learning_rate: float = 1.0
) -> LoraFactors:
    """The global factors with one side moved by the weighted sum of the clients' zero-padded changes.

    Args:
        current: The global factors.
        sent: (what a client trained, what it started from, its weight), each of the client's rank and scale.
        side: Which factor was trained, or the core.
        learning_rate: The server's eta.

    Returns:
        Factors of the same rank and scale, float32; what was not trained is untouched.
    """
    after = numbers_of(current, side).astype(np.float64)
    for trained, start, weight in sent:
        change = change_of(trained, start, side, current.scale)
        after[tuple(slice(size) for size in change.shape)] += learning_rate * weight * change
    return with_numbers(current, side, after.astype(np.float32))


def _check(
    updates: Sequence[Update], releases: Mapping[str, Release], name: str, state: ServerState, side: Side
) -> None:
    """Raise for an update that was trained on the other factor: its change belongs to another round's product."""
    for update in updates:
        release = releases.get(update.client_id)
        if release is None or release.train != side or (name == "alternate" and release.version != state.round):
            got = "none" if release is None else f"lora_{release.train} of version {release.version}"
            raise AdapterMismatch(
                f"client {update.client_id}, round {state.round + 1}: {name} expected an update of lora_{side} from release "
                f"{state.round}, got {got}. Set clients.carry_rounds=0."
            )


def _stepped(
    state: ServerState, updates: Sequence[Update], releases: Mapping[str, Release], nested: Nested, side: Side
) -> ServerState:
    ordered = in_order(updates)
    weights = client_weights(ordered, nested.weighting)
    lora: dict[str, LoraFactors] = {}
    reports: dict[str, LayerReport] = {}
    for module, current in state.adapter.lora.items():
        by_client = layer_weights(weights, ordered, module, nested.weighting)
        sent = [
            (u.adapter.lora[module], releases[u.client_id].trainable.lora[module], by_client[u.client_id])
            for u in ordered
            if module in u.adapter.lora
        ]
        lora[module] = moved(current, sent, side, nested.learning_rate) if sent else current
        scaled = {client: nested.learning_rate * weight for client, weight in by_client.items()}
        pairs = exact_pairs(state, module, ordered, releases, scaled)
        reports[module] = distance(lora[module], total(pairs, current.shape))
    dense, dense_reports = averaged(
        state.adapter.dense, ordered, releases, weights, nested.weighting, nested.learning_rate
    )
    return replace(state, round=state.round + 1, adapter=Adapter(lora, dense), report=reports | dense_reports)


def ffa(nested: Nested) -> Strategy:
    """FFA-LoRA with nested rows: A is drawn once and frozen, B is trained. Exact for unequal ranks, also by stragglers.

    Args:
        nested: Ranks, scales, seed, and how updates are combined.

    Returns:
        The strategy. A release holds B alone, and nothing before the first aggregate.
    """
    return _one_sided("ffa", "B", nested)


def core(nested: Nested) -> Strategy:
    """Fed-SB: orthonormal B and A are drawn once and frozen, the core is trained. Exact for unequal ranks, also by stragglers.

    The paper takes B and A from a singular value decomposition of a first gradient on data, as LoRA-SB does. Here they depend on
    the run's seed alone: a basis that depends on data would tell of them, and no ledger would count it.

    Args:
        nested: Ranks, scales, seed, and how updates are combined.

    Returns:
        The strategy. A release holds cores alone, r_k^2 numbers a module, and nothing before the first aggregate.
    """
    return _one_sided("core", "core", nested)


def _one_sided(name: str, side: Side, nested: Nested) -> Strategy:
    """One side is trained in every round, and the rest stays as it was drawn."""

    def init(spec: AdapterSpec) -> ServerState:
        return nested_start(spec, nested, side == "core")

    def release(state: ServerState, budget: Budget) -> Release:
        lora = _slices(state, budget, side) if state.round else {}
        return Release(state.round, Adapter(lora, state.adapter.dense), train=side)

    def step(
        state: ServerState, updates: Sequence[Update], releases: Mapping[str, Release], rng: np.random.Generator
    ) -> ServerState:
        _check(updates, releases, name, state, side)
        return _stepped(state, updates, releases, nested, side)

    return Strategy(name, init, release, step, exact=True, linear=True, sides=(side,), stable_coordinates=True)


def alternate(nested: Nested) -> Strategy:
    """RoLoRA with nested slices: B is trained in odd rounds, A in even ones. Each round is exact for unequal ranks.

    What moved last goes out as the trainable part and what moved before that as the frozen one, byte for byte as it went out a
    round ago, so that who took part then has it and a skipper receives both.

    Args:
        nested: Ranks, scales, seed, and how updates are combined.

    Returns:
        The strategy. Its `step` raises AdapterMismatch for an update of another round.
    """

    def init(spec: AdapterSpec) -> ServerState:
        return nested_start(spec, nested)

    def release(state: ServerState, budget: Budget) -> Release:
        trained, other = _turn(state), _other(_turn(state))
        if state.round == 0:
            return Release(0, Adapter({}, state.adapter.dense), train=trained)
        newest = Adapter(_slices(state, budget, other), state.adapter.dense)
        before = None
        if state.round > 1:
            before = Adapter(_slices(state, budget, trained), state.optimizer["before"].dense)
        return Release(state.round, newest, before, train=trained)

    def step(
        state: ServerState, updates: Sequence[Update], releases: Mapping[str, Release], rng: np.random.Generator
    ) -> ServerState:
        side = _turn(state)
        _check(updates, releases, "alternate", state, side)
        after = _stepped(state, updates, releases, nested, side)
        return replace(after, optimizer={"before": Adapter({}, state.adapter.dense)})

    return Strategy("alternate", init, release, step, exact=True, linear=True, sides=("B", "A"))


def _turn(state: ServerState) -> Side:
    """The factor that the next round trains; B first, as nothing moves A while B is 0."""
    return "A" if state.round % 2 else "B"


def _other(side: Side) -> Side:
    return "B" if side == "A" else "A"
