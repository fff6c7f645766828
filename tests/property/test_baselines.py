"""Other people's aggregation as oracles, and what the baselines do: right by their own definition, inexact by ours."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lamina.protos import seeds
from lamina.protos.adapter import Adapter, LoraFactors, product
from lamina.protos.errors import AdapterMismatch, ConfigError
from lamina.protos.messages import Budget, Update
from lamina.protos.spec import AdapterSpec
from lamina.strategies import STRATEGIES, Options, build
from lamina.strategies.base import ServerState
from tests.property.oracles import (
    SHAPES,
    TOLERANCE,
    UNUSED,
    Federation,
    Matrix,
    Member,
    aggregated,
    dense_target,
    drawn_rounds,
    federations,
    first_updates,
    gap,
    mean_product,
    normal,
    play,
    same_bits,
    shares,
    strategy_of,
    truncated_svd,
)

SHAPE, SCALE = SHAPES["q_proj"], 2.0
SPEC = AdapterSpec({"q_proj": SHAPE})
Sent = list[LoraFactors]


def fed(rank: int) -> tuple[Any, ServerState]:
    strategy = build("fedavg", Options({"q_proj": rank}, {"q_proj": SCALE}))
    return strategy, strategy.init(SPEC)


def updates_of(sent: Sent, counts: list[int]) -> list[Update]:
    return [Update("run", 1, f"site-{k}", "", Adapter({"q_proj": f}), counts[k]) for k, f in enumerate(sent)]


def factors(seed: int, client: int, rank: int, scale: float = SCALE) -> LoraFactors:
    return LoraFactors(normal((rank, SHAPE[1]), seed, client, "A"), normal((SHAPE[0], rank), seed, client, "B"), scale)


def mean(arrays: list[NDArray[Any]], counts: list[int]) -> Matrix:
    return sum(
        (n / sum(counts) * array.astype(np.float64) for n, array in zip(counts, arrays)), np.zeros(arrays[0].shape)
    )


cohort = st.lists(st.integers(1, 500), min_size=3, max_size=6)
seed_numbers = st.integers(0, 2**32)


# Oracles --------------------------------------------------------------------------------------------------------------


def stacked_by_peft(peft: ModuleType, federation: Federation, updates: list[Update], module: str) -> Matrix:
    """The product of the concatenation that peft makes of the clients' adapters."""
    import torch

    d_out, d_in = SHAPES[module]
    base = torch.nn.Sequential()
    base.add_module(module, torch.nn.Linear(d_in, d_out, bias=False))
    weights, model = shares(updates), None
    names = [u.client_id for u in updates if module in u.adapter.lora]
    for update in updates:
        if update.client_id not in names:
            continue
        ours = update.adapter.lora[module]
        config = peft.LoraConfig(r=ours.rank, lora_alpha=ours.scale * ours.rank, target_modules=[module])
        if model is None:
            model = peft.PeftModel(base, config, update.client_id)
        else:
            model.add_adapter(update.client_id, config)
        layer = getattr(model.base_model.model, module)
        layer.lora_A[update.client_id].weight.data = torch.from_numpy(ours.A)
        layer.lora_B[update.client_id].weight.data = torch.from_numpy(ours.B)
    assert model is not None
    model.base_model.add_weighted_adapter(names, [weights[n] for n in names], "all", combination_type="cat")
    result: Matrix = layer.get_delta_weight("all").detach().double().numpy()
    return result


@given(federation=federations())
def test_stack_is_what_peft_makes_of_the_same_adapters(federation: Federation) -> None:
    peft = pytest.importorskip("peft")
    updates = first_updates(federation)
    state = aggregated("stack", federation, updates)
    for module, stored in state.adapter.lora.items():
        if any(module in update.adapter.lora for update in updates):
            theirs = stacked_by_peft(peft, federation, updates, module)
            assert gap(product(stored), theirs) <= TOLERANCE
            assert gap(product(state.optimizer["increment"].lora[module]), theirs) <= TOLERANCE


@given(federation=federations())
def test_the_first_round_of_flexlora_is_the_dense_svd_and_so_is_recompress_at_its_rank(federation: Federation) -> None:
    updates = first_updates(federation)
    theirs = aggregated("flexlora", federation, updates)
    for module, stored in theirs.adapter.lora.items():
        largest = max([member.ranks.get(module, 0) for member in federation.members])
        best = truncated_svd(mean_product(updates, module), largest)[0]
        assert gap(product(stored), best) <= 3 * TOLERANCE
        if largest:
            ours = aggregated("recompress", federation, updates, rank_cap=largest)
            assert gap(product(ours.adapter.lora[module]), best) <= 3 * TOLERANCE


@pytest.mark.parametrize("name", ["flexlora", "zeropad"])
@given(data=st.data(), federation=federations())
def test_the_baselines_report_their_true_distance_from_the_exact_aggregate(
    name: str, data: st.DataObject, federation: Federation
) -> None:
    for played in play(strategy_of(name, federation), federation, drawn_rounds(data, federation)):
        for module, stored in played.after.adapter.lora.items():
            target = dense_target(played, module, shares(played.updates))
            reported = played.after.report[module].relative_error
            assert reported == pytest.approx(gap(product(stored), target), abs=TOLERANCE)


# Idle rounds ----------------------------------------------------------------------------------------------------------


def kept_shares(members: tuple[Member, ...], module: str, rank: int) -> Matrix:
    """c_i, the weight of the clients whose rank reaches mode i."""
    everything = sum(m.num_examples for m in members)
    reach = [sum(m.num_examples for m in members if m.ranks[module] > i) / everything for i in range(rank)]
    return np.array(reach)


@given(federation=federations(least=2, modules=["q_proj"]))
def test_flexlora_forgets_modes_above_a_clients_rank_though_nobody_trains(federation: Federation) -> None:
    strategy = strategy_of("flexlora", federation)
    (first,) = play(strategy, federation, [federation.members])
    (idle,) = play(strategy, federation, [federation.members], trains=False, state=first.after)
    sigma = np.array(first.after.report["q_proj"].singular_values)
    reach = kept_shares(federation.members, "q_proj", len(sigma))
    after = np.linalg.svd(product(idle.after.adapter.lora["q_proj"]), compute_uv=False)[: len(sigma)]
    assert after == pytest.approx(np.sort(reach * sigma)[::-1], abs=TOLERANCE * sigma[0])
    if reach.min() < 0.99:
        assert not same_bits(idle.after.adapter, first.after.adapter)
        assert idle.after.relative_error > 1e-7


@given(federation=federations(least=2, modules=["q_proj"]))
def test_zero_padding_dilutes_high_ranks_though_nobody_trains(federation: Federation) -> None:
    strategy = strategy_of("zeropad", federation)
    (first,) = play(strategy, federation, [federation.members])
    (idle,) = play(strategy, federation, [federation.members], trains=False, state=first.after)
    before, after = first.after.adapter.lora["q_proj"], idle.after.adapter.lora["q_proj"]
    reach = kept_shares(federation.members, "q_proj", before.rank)
    # A fresh slot of a client is none here: the global factors have the largest rank from the start.
    assert gap(after.A, reach[:, None] * before.A) <= TOLERANCE
    assert gap(after.B, before.B * reach) <= TOLERANCE


# Means of factors -----------------------------------------------------------------------------------------------------


@given(counts=cohort, rank=st.sampled_from([1, 4, 32]), seed=seed_numbers)
def test_fedavg_is_the_mean_of_the_factors_and_not_the_first_client(counts: list[int], rank: int, seed: int) -> None:
    sent = [factors(seed, k, rank) for k in range(len(counts))]
    strategy, state = fed(rank)
    after = strategy.step(state, updates_of(sent, counts), {}, UNUSED)
    stored = after.adapter.lora["q_proj"]
    rows, columns = mean([f.A for f in sent], counts), mean([f.B for f in sent], counts)
    assert gap(stored.A, rows) <= TOLERANCE
    assert gap(stored.B, columns) <= TOLERANCE
    assert gap(stored.A, counts[0] / sum(counts) * sent[0].A) > 1e-3
    target = mean([product(f) for f in sent], counts)
    # The error is the weighted covariance of B and A, to the sign.
    spread = [SCALE * (f.B - columns) @ (f.A - rows) for f in sent]
    assert gap(target - product(stored), mean(spread, counts)) <= 1e-5
    assert after.relative_error == pytest.approx(gap(product(stored), target), abs=TOLERANCE)


@given(counts=cohort, seed=seed_numbers, shared=st.sampled_from(["A", "B"]))
def test_fedavg_is_exact_where_one_factor_is_shared(counts: list[int], seed: int, shared: str) -> None:
    common = factors(seed, -1, 4)
    sent = [factors(seed, k, 4) for k in range(len(counts))]
    sent = [LoraFactors(common.A, f.B, SCALE) if shared == "A" else LoraFactors(f.A, common.B, SCALE) for f in sent]
    strategy, state = fed(4)
    after = strategy.step(state, updates_of(sent, counts), {}, UNUSED)
    assert gap(product(after.adapter.lora["q_proj"]), mean([product(f) for f in sent], counts)) <= TOLERANCE
    assert after.relative_error <= TOLERANCE


@given(counts=cohort, seed=seed_numbers)
def test_fedavg_depends_on_the_gauge_and_stack_does_not(counts: list[int], seed: int) -> None:
    sent = [factors(seed, k, 4) for k in range(len(counts))]
    turned = [LoraFactors(sent[0].A / 10, sent[0].B * 10, SCALE), *sent[1:]]
    strategy, state = fed(4)
    first, second = (
        strategy.step(state, updates_of(s, counts), {}, UNUSED).adapter.lora["q_proj"] for s in (sent, turned)
    )
    # Of the mean rows p_0 A_0 shrinks tenfold and of the mean columns p_0 B_0 grows tenfold; the cross terms do not cancel.
    assert gap(product(second), product(first)) > 1e-4
    exact = build("stack", Options({"q_proj": 4}, {"q_proj": SCALE}))
    states = [exact.step(exact.init(SPEC), updates_of(s, counts), {}, UNUSED) for s in (sent, turned)]
    assert gap(product(states[1].adapter.lora["q_proj"]), product(states[0].adapter.lora["q_proj"])) <= TOLERANCE


@given(ranks=st.lists(st.sampled_from([1, 3, 8]), min_size=2, max_size=5), seed=seed_numbers, absent=st.booleans())
def test_zero_padding_pads_by_slot_and_leaves_the_share_of_the_absent(
    ranks: list[int], seed: int, absent: bool
) -> None:
    strategy = build("zeropad", Options({"q_proj": 8}, {"q_proj": SCALE}))
    state = strategy.init(SPEC)
    sent = [factors(seed, k, rank) for k, rank in enumerate(ranks)]
    counts = [1 + k for k in range(len(ranks))]
    updates = updates_of(sent, counts)
    if absent:
        updates[0] = replace(updates[0], adapter=Adapter())
        sent[0] = state.adapter.lora["q_proj"]
    stored = strategy.step(state, updates, {}, UNUSED).adapter.lora["q_proj"]
    rows = mean([np.pad(f.A, ((0, 8 - f.rank), (0, 0))) for f in sent], counts)
    columns = mean([np.pad(f.B, ((0, 0), (0, 8 - f.rank))) for f in sent], counts)
    assert gap(stored.A, rows) <= TOLERANCE
    assert gap(stored.B, columns) <= TOLERANCE


@pytest.mark.parametrize("name", ["fedavg", "zeropad", "flexlora"])
@given(data=st.data(), counts=cohort, seed=seed_numbers)
def test_the_order_of_arrival_changes_no_bit(name: str, data: st.DataObject, counts: list[int], seed: int) -> None:
    strategy = build(name, Options({"q_proj": 4}, {"q_proj": SCALE}))
    updates = updates_of([factors(seed, k, 4) for k in range(len(counts))], counts)
    state = strategy.init(SPEC)
    first = strategy.step(state, updates, {}, UNUSED)
    second = strategy.step(state, data.draw(st.permutations(updates)), {}, UNUSED)
    assert same_bits(first.adapter, second.adapter)
    assert first.report == second.report


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [(4, 1), (1, 4), (4, 8)])
def test_fedavg_refuses_another_rank_and_never_broadcasts_rank_one(ours: int, theirs: int) -> None:
    strategy, state = fed(ours)
    before = state.adapter.lora["q_proj"].A.copy()
    with pytest.raises(AdapterMismatch, match=f"site-1: fedavg expected rank {ours} for q_proj, got {theirs}"):
        strategy.step(state, updates_of([factors(0, 0, ours), factors(0, 1, theirs)], [1, 1]), {}, UNUSED)
    assert np.array_equal(state.adapter.lora["q_proj"].A, before)
    with pytest.raises(ConfigError, match="one value"):
        strategy.release(state, Budget({"q_proj": theirs}, {"q_proj": theirs}, {"q_proj": SCALE}))
    with pytest.raises(ConfigError, match="scale"):
        strategy.release(state, Budget({"q_proj": ours}, {"q_proj": ours}, {"q_proj": SCALE / 2}))


@pytest.mark.parametrize("name", ["fedavg", "zeropad", "flexlora"])
def test_weights_and_options_that_cannot_be_used_are_refused(name: str) -> None:
    options = Options({"q_proj": 4}, {"q_proj": SCALE})
    strategy = build(name, options)
    for counts in ([-1, 5], [0, 0]):
        with pytest.raises(ConfigError, match="num_examples"):
            strategy.step(strategy.init(SPEC), updates_of([factors(0, 0, 4), factors(0, 1, 4)], counts), {}, UNUSED)
    with pytest.raises(ConfigError, match="learning_rate"):
        build(name, replace(options, learning_rate=0.5))


def test_strategies_are_found_by_name_and_say_what_they_are() -> None:
    built = [build(name, Options({"q_proj": 4}, {"q_proj": SCALE})) for name in STRATEGIES]
    assert [strategy.name for strategy in built] == list(STRATEGIES)
    assert {s.name for s in built if s.exact} == {"recompress", "residual", "stack", "ffa", "alternate", "core"}
    assert {s.name for s in built if s.linear} == {"ffa", "alternate", "core"}
    assert [s.name for s in built if s.released_view == "all_raw"] == ["stack"]
    assert [s.name for s in built if s.equal_ranks] == ["fedavg"]
    with pytest.raises(ConfigError, match="Did you mean recompress"):
        build("recompres", Options({}, {}))


def test_the_streams_of_the_common_start_depend_on_the_seed_alone() -> None:
    starts = [
        build("zeropad", Options({"q_proj": 4}, {"q_proj": SCALE}, seed=seed)).init(SPEC).adapter for seed in (3, 3, 4)
    ]
    assert same_bits(starts[0], starts[1])
    assert not same_bits(starts[0], starts[2])
    assert product(starts[0].lora["q_proj"]).any() == np.False_
    assert seeds.integer(3, "a", "b") != seeds.integer(3, "ab")
