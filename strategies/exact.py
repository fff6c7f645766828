"""The exact strategies: `recompress`, `residual` and `stack` keep one global G and differ in what they send of it.

All three compute G+ = G + eta * sum_k p_k (W_k - T_k) per layer, whatever the clients' ranks. In this change form a round
in which nobody trains changes nothing, which replacing G by sum_k p_k W_k (FlexLoRA, zero-padding) does not give.

- `recompress` keeps at most `rank_cap` singular values; each client receives a prefix of one factorisation.
- `residual` keeps all; a client trains its prefix and receives the rest frozen, up to its download rank. In the spirit of
  FedEx-LoRA (Singhal et al. 2025, arXiv:2410.09432), for unequal ranks.
- `stack` is FLoRA (Wang et al. 2024, arXiv:2409.05976): every client receives the concatenation of all updates, holds it
  frozen, and starts afresh. Each client thereby sees every other client's raw update.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lamina.protos.adapter import Adapter, LoraFactors, prefix, rescaled, tail
from lamina.protos.messages import Budget, Release, Update
from lamina.protos.spec import AdapterSpec
from lamina.strategies.base import (
    LayerReport,
    ServerState,
    Step,
    Strategy,
    Weighting,
    client_weights,
    layer_weights,
    released,
)
from lamina.strategies.dense import averaged
from lamina.strategies.factors import Pair, change, compress, pair, singular_values, total


def empty_factors(shape: tuple[int, int]) -> LoraFactors:
    """Rank-0 factors, the zero adapter of one module.

    Args:
        shape: (d_out, d_in).

    Returns:
        A (0, d_in) and B (d_out, 0), float32.
    """
    return LoraFactors(np.zeros((0, shape[1]), np.float32), np.zeros((shape[0], 0), np.float32))


def in_order(updates: Sequence[Update]) -> list[Update]:
    """Updates by client id, so that the bits do not depend on who arrived first.

    Args:
        updates: In any order.

    Returns:
        A sorted list.
    """
    return sorted(updates, key=lambda update: update.client_id)


def exact_pairs(
    state: ServerState,
    module: str,
    updates: Sequence[Update],
    releases: Mapping[str, Release],
    weights: Mapping[str, float],
) -> Iterator[Pair]:
    """The pairs whose sum is the exact aggregate of one layer: G first, then each client's weighted change.

    Args:
        state: State before the round.
        module: The layer.
        updates: Accepted updates in client-id order.
        releases: Client id -> decoded release.
        weights: Client id -> weight of the clients that train the layer, times eta.

    Yields:
        (m, r) and (r, n), float64.
    """
    yield pair(state.adapter.lora[module])
    for update in updates:
        if update.client_id in weights and module in update.adapter.lora:
            received = released(releases, update.client_id).lora.get(module)
            yield change(update.adapter.lora[module], received, weights[update.client_id])


@dataclass(frozen=True)
class Rule:
    """How updates are combined, shared by the exact strategies.

    Attributes:
        rank_cap: Singular values kept per layer; None keeps the numerical rank.
        weighting: See `base.client_weights`.
        learning_rate: The server's eta.
    """

    rank_cap: int | None = None
    weighting: Weighting = "num_examples"
    learning_rate: float = 1.0


def initial_state(spec: AdapterSpec) -> ServerState:
    """G = 0 in every module, dense parameters at the spec's initial values.

    Args:
        spec: The negotiated schema.

    Returns:
        State of round 0.
    """
    return ServerState(0, Adapter({m: empty_factors(shape) for m, shape in spec.modules.items()}, dict(spec.dense)))


def exact_step(
    state: ServerState, updates: Sequence[Update], releases: Mapping[str, Release], rule: Rule
) -> ServerState:
    """One exact aggregation, layer by layer.

    Args:
        state: State before the round.
        updates: Accepted updates in client-id order.
        releases: Client id -> decoded release it started from.
        rule: How to combine.

    Returns:
        State after the round, with a report by layer.

    Raises:
        ConfigError: If the weights cannot be formed; before anything is computed.
    """
    weights = client_weights(updates, rule.weighting)
    lora: dict[str, LoraFactors] = {}
    reports: dict[str, LayerReport] = {}
    for module, current in state.adapter.lora.items():
        pairs = exact_pairs(state, module, updates, releases, _scaled_weights(weights, updates, module, rule))
        known = next(pairs)
        changes = (one for one in pairs if one[0].shape[1] > 0)
        first = next(changes, None)
        if first is None:
            lora[module], reports[module] = current, _unchanged(current)
            continue
        lora[module], reports[module] = compress(
            total(itertools.chain([known, first], changes), current.shape), rule.rank_cap
        )
    dense, dense_reports = averaged(state.adapter.dense, updates, releases, weights, rule.weighting, rule.learning_rate)
    return replace(state, round=state.round + 1, adapter=Adapter(lora, dense), report=reports | dense_reports)


def _scaled_weights(
    weights: Mapping[str, float], updates: Sequence[Update], module: str, rule: Rule
) -> dict[str, float]:
    by_client = layer_weights(weights, updates, module, rule.weighting)
    return {client: rule.learning_rate * weight for client, weight in by_client.items()}


def _unchanged(factors: LoraFactors) -> LayerReport:
    sigma = singular_values(factors)
    return LayerReport(0.0, 0.0, float(np.linalg.norm(sigma)), sigma)


def _prefixes(state: ServerState, budget: Budget) -> dict[str, LoraFactors]:
    """Of each module that the client trains, the leading singular values that fit its rank, at its scale."""
    return {
        module: rescaled(prefix(state.adapter.lora[module], rank), budget.scale[module])
        for module, rank in budget.train.items()
    }


def _stepping(rule: Rule) -> Step:
    def step(
        state: ServerState, updates: Sequence[Update], releases: Mapping[str, Release], rng: np.random.Generator
    ) -> ServerState:
        return exact_step(state, in_order(updates), releases, rule)

    return step


def recompress(rule: Rule) -> Strategy:
    """Exact mean, kept to `rule.rank_cap` singular values; prefixes of one factorisation go out.

    Args:
        rule: How updates are combined.

    Returns:
        The strategy.
    """

    def release(state: ServerState, budget: Budget) -> Release:
        return Release(state.round, Adapter(_prefixes(state, budget), state.adapter.dense))

    return Strategy("recompress", initial_state, release, _stepping(rule), exact=True)


def residual(rule: Rule) -> Strategy:
    """Exact mean, uncapped; a client trains its prefix and receives the next directions frozen, up to its download rank.

    Args:
        rule: How updates are combined; its cap is not used.

    Returns:
        The strategy.
    """

    def release(state: ServerState, budget: Budget) -> Release:
        frozen = {
            module: tail(factors, budget.train.get(module, 0), budget.download.get(module, 0))
            for module, factors in state.adapter.lora.items()
        }
        return Release(state.round, Adapter(_prefixes(state, budget), state.adapter.dense), Adapter(frozen))

    return Strategy("residual", initial_state, release, _stepping(replace(rule, rank_cap=None)), exact=True)


def stack(rule: Rule) -> Strategy:
    """FLoRA: the concatenation goes to everyone, who freezes it and starts afresh.

    One who holds all that came before receives the last round's concatenation, one who missed a round all of G.

    Args:
        rule: How updates are combined; its cap is not used.

    Returns:
        The strategy.
    """
    uncapped = replace(rule, rank_cap=None)

    def release(state: ServerState, budget: Budget) -> Release:
        trainable = Adapter({}, state.adapter.dense)
        if state.round == 0:
            return Release(0, trainable, None, keep_frozen=True)
        if budget.held_version == state.round - 1 and "increment" in state.optimizer:
            increment = state.optimizer["increment"]
            return Release(state.round, trainable, increment, frozen_since=budget.held_version, keep_frozen=True)
        return Release(state.round, trainable, Adapter(state.adapter.lora), keep_frozen=True)

    def step(
        state: ServerState, updates: Sequence[Update], releases: Mapping[str, Release], rng: np.random.Generator
    ) -> ServerState:
        ordered = in_order(updates)
        increment = Adapter(_concatenation(state, ordered, releases, uncapped))
        return replace(exact_step(state, ordered, releases, uncapped), optimizer={"increment": increment})

    return Strategy("stack", initial_state, release, step, exact=True, released_view="all_raw")


def _concatenation(
    state: ServerState, updates: Sequence[Update], releases: Mapping[str, Release], rule: Rule
) -> dict[str, LoraFactors]:
    """The clients' weighted changes side by side, in float32, at scale 1."""
    weights = client_weights(updates, rule.weighting)
    found = {}
    for module, current in state.adapter.lora.items():
        scaled = _scaled_weights(weights, updates, module, rule)
        columns, rows = [empty_factors(current.shape).B], [empty_factors(current.shape).A]
        for left, right in itertools.islice(exact_pairs(state, module, updates, releases, scaled), 1, None):
            columns.append(left.astype(np.float32))
            rows.append(right.astype(np.float32))
        found[module] = LoraFactors(np.concatenate(rows), np.concatenate(columns, axis=1))
    return found
