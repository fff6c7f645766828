"""Baselines that are not exact, implemented correctly: `fedavg`, `zeropad`, `flexlora`.

Averaging factors gives (sum p_k B_k)(sum p_k A_k), off the mean of the products by the weighted covariance of B and A, and
depends on the gauge: rescaling (10 B, A / 10) leaves a client's product alone and changes the result. Each reports its true
relative error against the exact aggregate.

- `fedavg`: FedIT (Zhang et al. 2024, arXiv:2305.05644); one rank and one scale for all.
- `zeropad`: factors padded with zeros to the largest rank, as in HetLoRA (Cho et al. 2024, arXiv:2401.06432) without its
  sparsity weights and self-pruning. High ranks are diluted, also in a round in which nobody trains.
- `flexlora`: FlexLoRA (Bai et al. 2024, arXiv:2402.11505) as published: a dense SVD of sum p_k W_k replaces the global
  adapter, so the modes above a client's rank decay with every round, trained or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lamina.protos import seeds
from lamina.protos.adapter import Adapter, LoraFactors, prefix, product, rescaled
from lamina.protos.errors import AdapterMismatch, ConfigError
from lamina.protos.messages import Budget, Release, Update
from lamina.protos.spec import AdapterSpec
from lamina.strategies.base import LayerReport, ServerState, Step, Strategy, Weighting, client_weights, layer_weights
from lamina.strategies.dense import averaged
from lamina.strategies.exact import exact_pairs, in_order, initial_state
from lamina.strategies.factors import distance, total

Sent = Sequence[tuple[LoraFactors, float]]
Combine = Callable[[LoraFactors, Sent], LoraFactors]


@dataclass(frozen=True)
class Shared:
    """What the factor-wise strategies must know before the first round.

    Attributes:
        rank: Module -> rank of the global factors, the largest among the clients.
        scale: Module -> scale at which the global factors are kept.
        seed: Of the common first A.
        weighting: See `base.client_weights`.
    """

    rank: Mapping[str, int]
    scale: Mapping[str, float]
    seed: int = 0
    weighting: Weighting = "num_examples"


def common_start(spec: AdapterSpec, shared: Shared) -> ServerState:
    """A uniform in +-1/sqrt(d_in) and B = 0, the same for all clients, so that their factors stay comparable.

    Args:
        spec: The negotiated schema.
        shared: Ranks, scales and seed.

    Returns:
        State of round 0.
    """
    lora = {}
    for module, (d_out, d_in) in spec.modules.items():
        rank, bound = shared.rank[module], 1.0 / np.sqrt(d_in)
        rows = seeds.stream(shared.seed, "common-start", module).uniform(-bound, bound, (rank, d_in))
        lora[module] = LoraFactors(rows.astype(np.float32), np.zeros((d_out, rank), np.float32), shared.scale[module])
    return ServerState(0, Adapter(lora, dict(spec.dense)))


def _truncated(state: ServerState, budget: Budget) -> Release:
    lora = {
        module: rescaled(prefix(state.adapter.lora[module], rank), budget.scale[module])
        for module, rank in budget.train.items()
    }
    return Release(state.round, Adapter(lora, state.adapter.dense))


def _step(
    state: ServerState,
    updates: Sequence[Update],
    releases: Mapping[str, Release],
    weighting: Weighting,
    combine: Combine,
) -> ServerState:
    weights = client_weights(updates, weighting)
    lora: dict[str, LoraFactors] = {}
    reports: dict[str, LayerReport] = {}
    for module, current in state.adapter.lora.items():
        by_client = layer_weights(weights, updates, module, weighting)
        sent = [(u.adapter.lora[module], by_client[u.client_id]) for u in updates if module in u.adapter.lora]
        lora[module] = combine(current, sent) if sent else current
        pairs = exact_pairs(state, module, updates, releases, by_client)
        reports[module] = distance(lora[module], total(pairs, current.shape))
    dense, dense_reports = averaged(state.adapter.dense, updates, releases, weights, weighting)
    return ServerState(
        state.round + 1, Adapter(lora, dense), state.optimizer, state.privacy_history, reports | dense_reports
    )


def factor_mean(current: LoraFactors, sent: Sent) -> LoraFactors:
    """The mean of the factors, each padded with zeros to the global rank; weights that miss 1 leave the rest in place.

    Args:
        current: The global factors; their rank and scale are kept.
        sent: (factors, weight) of each client.

    Returns:
        Factors of the same rank and scale, float32.
    """
    rows, columns = np.zeros(current.A.shape), np.zeros(current.B.shape)
    rest = 1.0 - sum(weight for _, weight in sent)
    if rest > 1e-12:
        sent = [*sent, (current, rest)]
    for factors, weight in sent:
        same = rescaled(factors, current.scale)
        rows[: same.rank] += weight * same.A
        columns[:, : same.rank] += weight * same.B
    return LoraFactors(rows.astype(np.float32), columns.astype(np.float32), current.scale)


def dense_svd(current: LoraFactors, sent: Sent) -> LoraFactors:
    """FlexLoRA's server step: the dense mean of the products and its full SVD, O(mn min(m, n)).

    Args:
        current: The global factors; the largest rank sent or held is kept.
        sent: (factors, weight) of each client.

    Returns:
        Balanced factors at scale 1, float32.
    """
    mean = np.zeros(current.shape)
    for factors, weight in sent:
        mean += weight * product(factors)
    u, sigma, vt = np.linalg.svd(mean, full_matrices=False)
    keep = min(max(factors.rank for factors, _ in sent), int((sigma > 0).sum()))
    root = np.sqrt(sigma[:keep])
    return LoraFactors((root[:, None] * vt[:keep]).astype(np.float32), (u[:, :keep] * root).astype(np.float32))


def _stepping(weighting: Weighting, combine: Combine) -> Step:
    def step(
        state: ServerState, updates: Sequence[Update], releases: Mapping[str, Release], rng: np.random.Generator
    ) -> ServerState:
        return _step(state, in_order(updates), releases, weighting, combine)

    return step


def fedavg(shared: Shared) -> Strategy:
    """The mean of the factors. Inexact; one rank and one scale for all clients, anything else is refused.

    Args:
        shared: The common rank, scale and start.

    Returns:
        The strategy. Its `release` raises ConfigError, its `step` AdapterMismatch, for another rank or scale.
    """
    averaging = _stepping(shared.weighting, factor_mean)

    def release(state: ServerState, budget: Budget) -> Release:
        for module, rank in budget.train.items():
            ours = state.adapter.lora[module]
            if rank != ours.rank or budget.scale[module] != ours.scale:
                raise ConfigError(
                    f"fedavg: expected rank {ours.rank} and scale {ours.scale:g} at every client, got rank {rank} and "
                    f"scale {budget.scale[module]:g} for {module}. Set clients.ranks to one value, or "
                    "strategy=recompress, which is exact for unequal ranks."
                )
        return _truncated(state, budget)

    def step(
        state: ServerState, updates: Sequence[Update], releases: Mapping[str, Release], rng: np.random.Generator
    ) -> ServerState:
        for update in updates:
            for module, factors in update.adapter.lora.items():
                if factors.rank != state.adapter.lora[module].rank:
                    raise AdapterMismatch(
                        f"client {update.client_id}: fedavg expected rank {state.adapter.lora[module].rank} for "
                        f"{module}, got {factors.rank}. Set clients.ranks to one value, or strategy=recompress."
                    )
        return averaging(state, updates, releases, rng)

    def init(spec: AdapterSpec) -> ServerState:
        return common_start(spec, shared)

    return Strategy("fedavg", init, release, step, exact=False, equal_ranks=True, stable_coordinates=True)


def zeropad(shared: Shared) -> Strategy:
    """The mean of zero-padded factors. Inexact; ranks may differ.

    Args:
        shared: The largest rank, its scale and the common start.

    Returns:
        The strategy.
    """

    def init(spec: AdapterSpec) -> ServerState:
        return common_start(spec, shared)

    step = _stepping(shared.weighting, factor_mean)
    return Strategy("zeropad", init, _truncated, step, exact=False, stable_coordinates=True)


def flexlora(weighting: Weighting) -> Strategy:
    """Replace G by the truncated SVD of the mean of the products. Not exact over rounds; an oracle and a baseline.

    Args:
        weighting: See `base.client_weights`.

    Returns:
        The strategy.
    """
    return Strategy("flexlora", initial_state, _truncated, _stepping(weighting, dense_svd), exact=False)
