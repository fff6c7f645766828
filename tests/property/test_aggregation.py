"""The laws of exact aggregation: G+ = G + eta * sum p_k (W_k - T_k), for any ranks, scales, weights and attendance.

Each law is checked against a dense float64 sum. What the laws say of the baselines, which break most of them, is in
`test_baselines`; what they say of the number formats is in `test_codec`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lamina.protos import seeds
from lamina.protos.adapter import Adapter, LoraFactors, is_finite, product, rescaled
from lamina.protos.codec import WIRE_FORMATS, WireFormat
from lamina.protos.errors import AdapterMismatch, ConfigError
from lamina.protos.messages import Update
from lamina.protos.spec import AdapterSpec
from lamina.strategies import Options, Strategy, build
from lamina.strategies.base import ServerState, Weighting
from tests.property.oracles import (
    EXACT,
    SHAPES,
    TOLERANCE,
    UNUSED,
    Federation,
    Member,
    aggregated,
    at_scale,
    dense_target,
    drawn_rounds,
    federations,
    first_updates,
    gap,
    largest_gap,
    mean_product,
    moved,
    play,
    same_bits,
    shares,
    strategy_of,
    with_factors,
)

each_exact = pytest.mark.parametrize("name", EXACT)


# Exactness ------------------------------------------------------------------------------------------------------------


@each_exact
@given(
    data=st.data(), federation=federations(), wire=st.sampled_from(WIRE_FORMATS), eta=st.sampled_from([0.5, 1.0, 1.3])
)
def test_every_round_stores_the_dense_target(
    name: str, data: st.DataObject, federation: Federation, wire: WireFormat, eta: float
) -> None:
    strategy = strategy_of(name, federation, learning_rate=eta)
    for played in play(strategy, federation, drawn_rounds(data, federation), wire):
        weights = shares(played.updates)
        for module, stored in played.after.adapter.lora.items():
            target = dense_target(played, module, weights, eta)
            assert gap(product(stored), target) <= TOLERANCE
            report = played.after.report[module]
            assert report.relative_error == pytest.approx(gap(product(stored), target), abs=1e-9)
            assert report.target_norm == pytest.approx(float(np.linalg.norm(target)), rel=1e-9)
            assert stored.A.dtype == stored.B.dtype == np.float32
        for parameter, start in played.before.adapter.dense.items():
            exact = start.astype(np.float64)
            for update in played.updates:
                received = played.releases[update.client_id].trainable.dense[parameter].astype(np.float64)
                exact += eta * weights[update.client_id] * (update.adapter.dense[parameter] - received)
            assert gap(played.after.adapter.dense[parameter], exact) <= TOLERANCE
        assert played.after.round == played.before.round + 1


@each_exact
@given(data=st.data(), federation=federations(least=2))
def test_contributors_renormalise_by_layer_and_others_dilute(
    name: str, data: st.DataObject, federation: Federation
) -> None:
    rounds = drawn_rounds(data, federation)
    for played in play(strategy_of(name, federation, weighting="contributors"), federation, rounds):
        for module, stored in played.after.adapter.lora.items():
            present = [update for update in played.updates if module in update.adapter.lora]
            target = dense_target(played, module, shares(present))
            assert gap(product(stored), target) <= TOLERANCE
            if not present:
                assert same_bits(Adapter({module: stored}), Adapter({module: played.before.adapter.lora[module]}))


@given(federation=federations(least=2))
def test_uniform_weights_ignore_the_number_of_examples(federation: Federation) -> None:
    updates = first_updates(federation)
    equal = [replace(update, num_examples=7) for update in updates]
    assert (
        largest_gap(
            aggregated("residual", federation, updates, weighting="uniform"),
            aggregated("residual", federation, equal),
        )
        <= TOLERANCE
    )


@given(federation=federations())
def test_after_one_round_from_zero_all_exact_strategies_agree(federation: Federation) -> None:
    updates = first_updates(federation)
    states = [aggregated(name, federation, updates) for name in EXACT]
    everything = sum(max(member.ranks.values()) for member in federation.members)
    states.append(aggregated("recompress", federation, updates, rank_cap=everything))
    for module in federation.spec.modules:
        for state in states:
            assert gap(product(state.adapter.lora[module]), mean_product(updates, module)) <= TOLERANCE


@each_exact
@given(federation=federations(least=1, most=1, everywhere=True))
def test_a_single_client_gets_its_own_product_back(name: str, federation: Federation) -> None:
    updates = first_updates(federation)
    state = aggregated(name, federation, updates)
    for module, factors in updates[0].adapter.lora.items():
        assert gap(product(state.adapter.lora[module]), product(factors)) <= TOLERANCE


def test_two_clients_of_rank_one_by_hand() -> None:
    spec = AdapterSpec({"layer": (3, 2)})
    one = LoraFactors(np.array([[1.0, 1.0]]), np.array([[1.0], [0.0], [2.0]]), 2.0)
    two = LoraFactors(np.array([[2.0, -1.0]]), np.array([[0.0], [1.0], [1.0]]), 1.0)
    updates = [
        Update("run", 1, "a", "", Adapter({"layer": one}), num_examples=1),
        Update("run", 1, "b", "", Adapter({"layer": two}), num_examples=3),
    ]
    # 1/4 * 2 * (1 0 2)'(1 1) + 3/4 * 1 * (0 1 1)'(2 -1)
    expected = np.array([[0.5, 0.5], [1.5, -0.75], [2.5, 0.25]])
    for name in EXACT:
        strategy = build(name, Options({"layer": 1}, {"layer": 1.0}))
        state = strategy.step(strategy.init(spec), updates, {}, UNUSED)
        assert product(state.adapter.lora["layer"]) == pytest.approx(expected, abs=1e-6)


# Idle rounds ----------------------------------------------------------------------------------------------------------


@each_exact
@pytest.mark.parametrize("wire", WIRE_FORMATS)
@given(data=st.data(), federation=federations())
def test_a_round_in_which_nobody_trains_changes_no_bit(
    name: str, wire: WireFormat, data: st.DataObject, federation: Federation
) -> None:
    cap = data.draw(st.sampled_from([None, 3])) if name == "recompress" else None
    strategy = strategy_of(name, federation, rank_cap=cap)
    *_, last = play(strategy, federation, drawn_rounds(data, federation, 2), wire)
    for played in play(strategy, federation, drawn_rounds(data, federation, 2), wire, trains=False, state=last.after):
        assert same_bits(played.after.adapter, last.after.adapter)
        assert played.after.relative_error == 0


@each_exact
@given(data=st.data(), federation=federations(least=2), wire=st.sampled_from(WIRE_FORMATS))
def test_an_idle_client_contributes_nothing_beside_one_that_trains(
    name: str, data: st.DataObject, federation: Federation, wire: WireFormat
) -> None:
    strategy = strategy_of(name, federation)
    *_, last = play(strategy, federation, drawn_rounds(data, federation, 2), wire)
    (trained,) = play(strategy, federation, [federation.members], wire, state=last.after)
    (idle,) = play(strategy, federation, [federation.members], wire, trains=False, state=last.after)
    active, weights = federation.members[0].client_id, shares(trained.updates)
    mixed = [first if first.client_id == active else second for first, second in zip(trained.updates, idle.updates)]
    after = strategy.step(last.after, mixed, trained.releases, UNUSED)
    alone = replace(trained, updates=tuple(update for update in mixed if update.client_id == active))
    for module, stored in after.adapter.lora.items():
        assert gap(product(stored), dense_target(alone, module, weights)) <= TOLERANCE


def rounded_up_rows(rows: int, columns: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Rows whose int8 scale is rounded up, so that their largest entry lies just below 127 steps."""
    scales = (0x3F800090 + 0x100 * rng.integers(0, 16, rows)).astype(np.uint32).view(np.float32)
    values = rng.uniform(-120, 120, (rows, columns)).astype(np.float32)
    values[:, 0] = 127
    return values * scales[:, None]


def test_a_round_in_which_nobody_trains_changes_no_bit_over_int8() -> None:
    shape, rng = (48, 32), np.random.default_rng(5)
    modules = [f"layers.{index}.q_proj" for index in range(200)]
    lora = {
        m: LoraFactors(rounded_up_rows(32, shape[1], rng), np.ascontiguousarray(rounded_up_rows(32, shape[0], rng).T))
        for m in modules
    }
    spec = AdapterSpec(dict.fromkeys(modules, shape))
    member = Member("site", dict.fromkeys(modules, 32), dict.fromkeys(modules, 1.0), 1)
    strategy = build("recompress", Options(member.ranks, member.scales))
    state = ServerState(1, Adapter(lora))
    (played,) = play(strategy, Federation(spec, (member,), 0), [[member]], "int8", trains=False, state=state)
    assert same_bits(played.after.adapter, state.adapter)


# Who sends, in which gauge, at which scale, with which weight ------------------------------------------------------------


@each_exact
@given(data=st.data(), federation=federations(least=2))
def test_the_order_of_arrival_changes_no_bit(name: str, data: st.DataObject, federation: Federation) -> None:
    updates = first_updates(federation)
    shuffled = data.draw(st.permutations(updates))
    first, second = aggregated(name, federation, updates), aggregated(name, federation, shuffled)
    assert same_bits(first.adapter, second.adapter)
    assert first.report == second.report
    assert first.optimizer.keys() == second.optimizer.keys()
    assert all(same_bits(kept, second.optimizer[key]) for key, kept in first.optimizer.items())


@each_exact
@given(federation=federations(), size=st.sampled_from([1e-3, 1.0, 50.0]))
def test_a_change_of_gauge_changes_nothing(name: str, federation: Federation, size: float) -> None:
    updates = first_updates(federation)
    turned = []
    for update in updates:
        lora = {}
        for module, factors in update.adapter.lora.items():
            rng = seeds.stream(federation.seed, "gauge", update.client_id, module)
            gauge = np.linalg.qr(rng.standard_normal((factors.rank, factors.rank)))[0] * size
            gauge = gauge * rng.uniform(0.5, 2.0, factors.rank)
            lora[module] = LoraFactors(np.linalg.solve(gauge, factors.A), factors.B @ gauge, factors.scale)
        turned.append(with_factors(update, lora))
    assert largest_gap(aggregated(name, federation, turned), aggregated(name, federation, updates)) <= TOLERANCE


@each_exact
@given(federation=federations(), stretch=st.sampled_from([0.125, 3.0, 70.0]))
def test_lora_alpha_and_its_inverse_in_b_cancel(name: str, federation: Federation, stretch: float) -> None:
    updates = first_updates(federation)
    other = [
        with_factors(u, {module: at_scale(f, f.scale * stretch) for module, f in u.adapter.lora.items()})
        for u in updates
    ]
    rooted = [
        with_factors(u, {module: rescaled(f, f.scale * stretch) for module, f in u.adapter.lora.items()})
        for u in updates
    ]
    plain = aggregated(name, federation, updates)
    assert largest_gap(aggregated(name, federation, other), plain) <= TOLERANCE
    assert largest_gap(aggregated(name, federation, rooted), plain) <= TOLERANCE


@each_exact
@given(federation=federations(least=2))
def test_only_the_ratios_of_the_weights_matter(name: str, federation: Federation) -> None:
    updates = first_updates(federation)
    plain = aggregated(name, federation, updates)
    tenfold = [replace(update, num_examples=10 * update.num_examples) for update in updates]
    assert largest_gap(aggregated(name, federation, tenfold), plain) <= TOLERANCE
    none = replace(with_factors(updates[0], {}), client_id="empty", num_examples=0)
    assert largest_gap(aggregated(name, federation, [*updates, none]), plain) <= TOLERANCE
    doubled = [replace(update, num_examples=2 * update.num_examples) for update in updates]
    halves = [replace(doubled[0], client_id=half, num_examples=updates[0].num_examples) for half in ("left", "right")]
    assert largest_gap(aggregated(name, federation, [*halves, *doubled[1:]]), plain) <= TOLERANCE


@each_exact
@given(data=st.data(), federation=federations(least=2))
def test_aggregation_is_linear_in_disjoint_cohorts(name: str, data: st.DataObject, federation: Federation) -> None:
    updates = first_updates(federation)
    cut = data.draw(st.integers(1, len(updates) - 1))
    parts = [updates[:cut], updates[cut:]]
    states = [aggregated(name, federation, part) for part in parts]
    sizes = np.array([sum(update.num_examples for update in part) for part in parts]) / sum(
        update.num_examples for update in updates
    )
    both = aggregated(name, federation, updates)
    for module, stored in both.adapter.lora.items():
        mixed = sum((w * product(s.adapter.lora[module]) for w, s in zip(sizes, states)), np.zeros(SHAPES[module]))
        assert gap(product(stored), mixed) <= TOLERANCE


@each_exact
@given(data=st.data(), federation=federations(least=2))
def test_layers_do_not_depend_on_each_other(name: str, data: st.DataObject, federation: Federation) -> None:
    updates = first_updates(federation)
    module = data.draw(st.sampled_from(sorted(federation.spec.modules)))
    renamed = AdapterSpec({module: SHAPES[module]}, dense=federation.spec.dense)
    alone = [
        replace(u, adapter=Adapter({m: f for m, f in u.adapter.lora.items() if m == module}, u.adapter.dense))
        for u in updates
    ]
    together = aggregated(name, federation, updates).adapter.lora[module]
    apart = aggregated(name, replace(federation, spec=renamed), alone).adapter.lora[module]
    assert same_bits(Adapter({module: together}), Adapter({module: apart}))


@given(federation=federations(least=2))
def test_half_rounds_in_which_one_factor_stays_are_the_mean_of_the_other(federation: Federation) -> None:
    """FFA-LoRA trains B on a shared A, RoLoRA alternates: there the mean of the factors is exact, and is what we store."""
    module, rank = next(iter(federation.spec.modules)), 4
    shape, weights = SHAPES[module], shares(first_updates(federation))
    for moving in ("A", "B"):
        fixed = seeds.stream(federation.seed, "fixed", moving)
        rows, columns = fixed.standard_normal((rank, shape[1])), fixed.standard_normal((shape[0], rank))
        lora = {}
        for client in weights:
            rng = seeds.stream(federation.seed, "moving", client)
            mine = (
                (rng.standard_normal(rows.shape), columns)
                if moving == "A"
                else (rows, rng.standard_normal(columns.shape))
            )
            lora[client] = LoraFactors(mine[0], mine[1], 2.0)
        mean = LoraFactors(
            np.sum([weights[c] * f.A for c, f in lora.items()], axis=0),
            np.sum([weights[c] * f.B for c, f in lora.items()], axis=0),
            2.0,
        )
        updates = [
            replace(u, adapter=Adapter({module: lora[u.client_id]}, u.adapter.dense)) for u in first_updates(federation)
        ]
        assert gap(product(aggregated("stack", federation, updates).adapter.lora[module]), product(mean)) <= TOLERANCE


@each_exact
@given(federation=federations())
def test_no_change_in_b_is_no_change(name: str, federation: Federation) -> None:
    updates = first_updates(federation)
    still = [
        with_factors(u, {m: LoraFactors(f.A, np.zeros_like(f.B), f.scale) for m, f in u.adapter.lora.items()})
        for u in updates
    ]
    for factors in aggregated(name, federation, still).adapter.lora.values():
        assert factors.rank == 0


# Refusals -------------------------------------------------------------------------------------------------------------


@each_exact
@pytest.mark.parametrize("counts", [[-1, 5], [0, 0]])
@pytest.mark.parametrize("weighting", ["num_examples", "contributors"])
def test_weights_that_cannot_be_formed_are_refused(name: str, counts: list[int], weighting: Weighting) -> None:
    spec = AdapterSpec({"q_proj": SHAPES["q_proj"]})
    strategy: Strategy = build(name, Options({"q_proj": 2}, {"q_proj": 1.0}, weighting=weighting))
    zero = Adapter({"q_proj": LoraFactors(np.ones((2, 32), np.float32), np.zeros((48, 2), np.float32))})
    updates = [Update("run", 1, str(k), "", moved(zero, k), count) for k, count in enumerate(counts)]
    state = strategy.init(spec)
    with pytest.raises(ConfigError, match="num_examples"):
        strategy.step(state, updates, {}, UNUSED)
    with pytest.raises(ConfigError, match="num_examples"):
        strategy.step(state, [], {}, UNUSED)
    assert state.adapter.lora["q_proj"].rank == 0


def test_adapters_that_do_not_fit_are_refused_by_name() -> None:
    spec = AdapterSpec({"q_proj": (48, 32)}, dense={"norm.bias": np.zeros(5, np.float32)})
    fit = LoraFactors(np.zeros((4, 32)), np.zeros((48, 4)))
    spec.check(Adapter({"q_proj": fit}, {"norm.bias": np.zeros(5)}))
    swapped = LoraFactors(np.zeros((4, 48)), np.zeros((32, 4)))
    for wrong, word in [
        (Adapter({"q_proj": swapped}), "shape"),
        (Adapter({"o_proj": fit}), "o_proj"),
        (Adapter({}, {"score.weight": np.zeros(5)}), "score.weight"),
        (Adapter({}, {"norm.bias": np.zeros((5, 1))}), "norm.bias"),
    ]:
        with pytest.raises(AdapterMismatch, match=word):
            spec.check(wrong, "client 17, round 3")
    for rows, columns in [((4, 32), (48, 3)), ((32,), (48, 1)), ((4, 32, 1), (48, 4))]:
        with pytest.raises(AdapterMismatch, match="names"):
            LoraFactors(np.zeros(rows), np.zeros(columns))
    with pytest.raises(AdapterMismatch, match="scale"):
        LoraFactors(fit.A, fit.B, float("nan"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_found_wherever_they_stand(bad: float) -> None:
    rows, columns, bias = np.zeros((2, 32), np.float32), np.zeros((48, 2), np.float32), np.zeros(5, np.float32)
    assert is_finite(Adapter({"q_proj": LoraFactors(rows, columns)}, {"norm.bias": bias}))
    for array in (rows, columns, bias):
        array.flat[-1] = bad
        assert not is_finite(Adapter({"q_proj": LoraFactors(rows, columns)}, {"norm.bias": bias}))
        array.flat[-1] = 0
