"""The strategies that train one factor a round, or a core: exact for unequal ranks, and of nothing but sums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.protos import seeds
from lamina.protos.adapter import Adapter, LoraFactors, prefix, product
from lamina.protos.blobs import blob
from lamina.protos.codec import WIRE_FORMATS, WireFormat, decode, encode
from lamina.protos.errors import AdapterMismatch
from lamina.protos.messages import Update
from lamina.protos.orthonormal import orthonormal_rows
from lamina.protos.sides import Side, filled, one_side, side_of, start_rows, whole
from lamina.server.campaign import Campaign
from lamina.server.releases import Sent, holding, released, started, trained
from lamina.strategies import Options, build
from lamina.strategies.base import ServerState
from lamina.strategies.linear import sliced
from tests.property.oracles import (
    SHAPES,
    TOLERANCE,
    UNUSED,
    Federation,
    Member,
    Played,
    dense_target,
    drawn_rounds,
    federations,
    gap,
    mean_product,
    normal,
    same_bits,
    sent,
    shares,
    sides,
    strategy_of,
    update_of,
)

LINEAR = ("ffa", "alternate", "core")
# These train one and the same side in every round.
STEADY = {"ffa": "B", "core": "core"}


@dataclass(frozen=True)
class Round(Played):
    """A round, and what went out and came in as it travelled."""

    out: dict[str, Sent]
    back: tuple[Update, ...]


def campaign_of(name: str, federation: Federation, wire: WireFormat = "fp32", **options: Any) -> Campaign:
    budgets = {member.client_id: member.budget() for member in federation.members}
    strategy = strategy_of(name, federation, **options)
    return Campaign("run", federation.spec, strategy, budgets, dict.fromkeys(budgets, 1), 99, wire=wire)


def half_moved(start: Adapter, side: str, seed: int, *names: object) -> Adapter:
    """Training of one factor, cut to what is sent."""
    lora = {}
    for module, f in start.lora.items():
        rows = f.A + (normal(f.A.shape, seed, *names, module, "A") / np.float32(4) if side == "A" else 0)
        columns = f.B + (normal(f.B.shape, seed, *names, module, "B") / np.float32(4) if side == "B" else 0)
        core = f.core if f.core is None else f.core + normal(f.core.shape, seed, *names, module, "core")
        lora[module] = one_side(LoraFactors(rows, columns, f.scale, core), side)  # type: ignore[arg-type]
    return Adapter(lora, {n: v + normal(v.shape, seed, *names, n) for n, v in start.dense.items()})


def rounds_of(
    campaign: Campaign,
    federation: Federation,
    cohorts: Sequence[Sequence[Member]],
    trains: bool = True,
    state: ServerState | None = None,
) -> Iterator[Round]:
    """Rounds on the coordinator's own path: released, encoded, made whole, trained, encoded, made whole, aggregated."""
    state, held = state or campaign.strategy.init(federation.spec), dict[str, int]()
    for cohort in cohorts:
        budgets = holding({member.client_id: member.budget() for member in cohort}, held)
        out = released(campaign, blob, state, budgets)
        releases = {client: started(campaign, one) for client, one in out.items()}
        back = []
        for member in cohort:
            release = releases[member.client_id]
            start, side = release.trainable, release.train
            adapter = Adapter({m: one_side(f, side) for m, f in start.lora.items()}, start.dense)  # type: ignore[arg-type]
            if trains:
                adapter = half_moved(start, side, federation.seed, member.client_id, state.round)
            back.append(sent(update_of(member, adapter, state.round + 1), campaign.wire))
            held[member.client_id] = state.round
        updates = tuple(trained(update, releases[update.client_id]) for update in back)
        after = campaign.strategy.step(state, updates, releases, UNUSED)
        yield Round(state, updates, releases, after, out, tuple(back))
        state = after


def divided(factors: LoraFactors, times: float) -> LoraFactors:
    """The same product at a scale of so many times."""
    scale = factors.scale * times
    if factors.core is not None:
        return replace(factors, core=factors.core / np.float32(times), scale=scale)
    return replace(factors, B=factors.B / np.float32(times), scale=scale)


def side_trained(played: Round) -> str:
    return played.releases[played.updates[0].client_id].train


# Exactness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR)
@given(data=st.data(), federation=federations(), learning_rate=st.sampled_from([1.0, 0.5]))
def test_the_step_is_exact_for_unequal_ranks_and_scales(
    name: str, data: st.DataObject, federation: Federation, learning_rate: float
) -> None:
    campaign = campaign_of(name, federation, learning_rate=learning_rate)
    for played in rounds_of(campaign, federation, drawn_rounds(data, federation)):
        for module, stored in played.after.adapter.lora.items():
            target = dense_target(played, module, shares(played.updates), learning_rate)
            assert gap(product(stored), target) <= TOLERANCE
        assert played.after.relative_error <= TOLERANCE


@given(federation=federations(least=2))
def test_the_first_round_is_the_mean_of_the_products(federation: Federation) -> None:
    for name in LINEAR:
        (played,) = rounds_of(campaign_of(name, federation), federation, [federation.members])
        for module, stored in played.after.adapter.lora.items():
            assert gap(product(stored), mean_product(played.updates, module)) <= TOLERANCE


@given(federation=federations(least=2))
def test_zero_padded_factors_are_a_mean_of_products_over_one_a(federation: Federation) -> None:
    """sum_k p_k s_k B_k A[:r_k] == s (sum_k p_k (s_k / s) [B_k, 0]) A, written out."""
    (played,) = rounds_of(campaign_of("ffa", federation), federation, [federation.members])
    weights = shares(played.updates)
    for module, stored in played.after.adapter.lora.items():
        columns = np.zeros(stored.B.shape)
        for update in played.back:
            if module in update.adapter.lora:
                f = update.adapter.lora[module]
                columns[:, : f.rank] += weights[update.client_id] * f.scale / stored.scale * f.B
        assert gap(stored.B, columns) <= TOLERANCE
        assert np.array_equal(stored.A, start_rows(0, module, stored.rank, SHAPES[module][1]))


@given(federation=federations(least=2))
def test_zero_padded_cores_are_a_mean_of_products(federation: Federation) -> None:
    """sum_k p_k s_k B[:, :r_k] C_k A[:r_k] == s B (sum_k p_k (s_k / s) [C_k, 0; 0, 0]) A, written out."""
    (played,) = rounds_of(campaign_of("core", federation), federation, [federation.members])
    weights = shares(played.updates)
    for module, stored in played.after.adapter.lora.items():
        core = np.zeros((stored.rank, stored.rank))
        for update in played.back:
            if module in update.adapter.lora:
                f = update.adapter.lora[module]
                core[: f.rank, : f.rank] += weights[update.client_id] * f.scale / stored.scale * sides(f)["core"]
        assert gap(sides(stored)["core"], core) <= TOLERANCE
        d_out, d_in = SHAPES[module]
        assert np.array_equal(stored.A, orthonormal_rows(0, "core-rows", module, stored.rank, d_in))
        assert np.array_equal(stored.B, orthonormal_rows(0, "core-columns", module, stored.rank, d_out).T)


@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("wire", WIRE_FORMATS)
@given(data=st.data(), federation=federations())
def test_with_frozen_factors_it_is_exact_in_every_wire_format(
    name: str, wire: WireFormat, data: st.DataObject, federation: Federation
) -> None:
    campaign = campaign_of(name, federation, wire)
    for played in rounds_of(campaign, federation, drawn_rounds(data, federation)):
        for module, stored in played.after.adapter.lora.items():
            assert gap(product(stored), dense_target(played, module, shares(played.updates))) <= TOLERANCE


@pytest.mark.parametrize(("wire", "most"), [("bf16", 0.02), ("fp16", 0.002), ("int8", 0.1)])
@given(data=st.data(), federation=federations())
def test_alternate_reports_what_rounding_of_the_frozen_factor_costs(
    wire: WireFormat, most: float, data: st.DataObject, federation: Federation
) -> None:
    campaign = campaign_of("alternate", federation, wire)
    for played in rounds_of(campaign, federation, drawn_rounds(data, federation)):
        for module, stored in played.after.adapter.lora.items():
            error = gap(product(stored), dense_target(played, module, shares(played.updates)))
            assert played.after.report[module].relative_error == pytest.approx(error, abs=TOLERANCE)
            assert error < most


@pytest.mark.parametrize("name", LINEAR)
@given(federation=federations(least=2))
def test_contributors_renormalise_by_layer(name: str, federation: Federation) -> None:
    campaign = campaign_of(name, federation, weighting="contributors")
    (played,) = rounds_of(campaign, federation, [federation.members])
    for module, stored in played.after.adapter.lora.items():
        those = [update for update in played.updates if module in update.adapter.lora]
        if those:
            assert gap(product(stored), mean_product(those, module)) <= TOLERANCE


@pytest.mark.parametrize("name", STEADY)
@given(data=st.data(), federation=federations(least=2))
def test_a_straggler_counts_exactly_in_a_later_round(name: str, data: st.DataObject, federation: Federation) -> None:
    campaign = campaign_of(name, federation)
    early = drawn_rounds(data, federation, 2)
    *_, first = rounds_of(campaign, federation, early)
    late, others = federation.members[0], federation.members[1:]
    (slow,) = rounds_of(campaign, federation, [[late]], state=first.after)
    *_, between = rounds_of(campaign, federation, [others], state=first.after)
    (last,) = rounds_of(campaign, federation, [others], state=between.after)
    updates, releases = (*last.updates, *slow.updates), {**last.releases, **slow.releases}
    carried = replace(last, updates=updates, releases=releases)
    after = campaign.strategy.step(between.after, updates, releases, UNUSED)
    for module, stored in after.adapter.lora.items():
        assert gap(product(stored), dense_target(carried, module, shares(updates))) <= TOLERANCE


# Sums -----------------------------------------------------------------------------------------------------------------


def change_of(state: ServerState, after: ServerState, module: str) -> dict[str, np.ndarray]:
    one, two = state.adapter.lora[module], after.adapter.lora[module]
    return {side: sides(two)[side].astype(np.float64) - value for side, value in sides(one).items()}


@pytest.mark.parametrize("name", LINEAR)
@given(data=st.data(), federation=federations(least=2))
def test_the_change_of_all_is_the_weighted_sum_of_the_changes_of_parts(
    name: str, data: st.DataObject, federation: Federation
) -> None:
    campaign = campaign_of(name, federation)
    *_, before = rounds_of(campaign, federation, drawn_rounds(data, federation, 2))
    (played,) = rounds_of(campaign, federation, [federation.members], state=before.after)
    cut = data.draw(st.integers(1, len(played.updates) - 1))
    parts = [played.updates[:cut], played.updates[cut:]]
    everything = sum(update.num_examples for update in played.updates)
    steps = [campaign.strategy.step(played.before, part, played.releases, UNUSED) for part in parts]
    for module in played.after.adapter.lora:
        ours = change_of(played.before, played.after, module)
        for side in ours:
            added = sum(
                sum(u.num_examples for u in part) / everything * change_of(played.before, step, module)[side]
                for part, step in zip(parts, steps, strict=True)
            )
            size = float(np.linalg.norm(getattr(played.after.adapter.lora[module], side)))
            assert float(np.linalg.norm(ours[side] - added)) <= TOLERANCE * size


@pytest.mark.parametrize("name", LINEAR)
@given(federation=federations(least=2, modules=["q_proj"]), seed=st.integers(0, 2**32))
def test_only_the_sum_of_what_is_sent_matters(name: str, federation: Federation, seed: int) -> None:
    """Masks that cancel in the weighted, scaled sum change nothing but rounding, as they would not under another strategy."""
    campaign = campaign_of(name, federation)
    *_, before = rounds_of(campaign, federation, [federation.members])
    (played,) = rounds_of(campaign, federation, [federation.members], state=before.after)
    side, weights = side_trained(played), shares(played.updates)
    one, two = (played.updates[i].adapter.lora["q_proj"] for i in (0, 1))
    rank = min(one.rank, two.rank)
    shape = {"A": (rank, 32), "B": (48, rank), "core": (rank, rank)}[side]
    mask = normal(shape, seed, "mask").astype(np.float64)
    masked = []
    for sign, update, f in ((1, played.updates[0], one), (-1, played.updates[1], two)):
        share = weights[update.client_id] * (1.0 if side == "A" else f.scale)
        added = (sign * mask * 0.1 / share).astype(np.float32)
        values = sides(f)[side].copy()
        values[: added.shape[0], : added.shape[1]] += added
        moved = replace(f, **{side: values})  # type: ignore[arg-type]
        masked.append(replace(update, adapter=Adapter({"q_proj": moved}, update.adapter.dense)))
    after = campaign.strategy.step(played.before, [*masked, *played.updates[2:]], played.releases, UNUSED)
    ours, theirs = after.adapter.lora["q_proj"], played.after.adapter.lora["q_proj"]
    for side, value in sides(ours).items():
        assert gap(value, sides(theirs)[side]) <= 20 * TOLERANCE


@pytest.mark.parametrize("name", LINEAR)
@given(data=st.data(), federation=federations(least=2))
def test_the_order_of_arrival_changes_no_bit(name: str, data: st.DataObject, federation: Federation) -> None:
    campaign = campaign_of(name, federation)
    (played,) = rounds_of(campaign, federation, [federation.members])
    other = campaign.strategy.step(played.before, data.draw(st.permutations(played.updates)), played.releases, UNUSED)
    assert same_bits(other.adapter, played.after.adapter)
    assert other.report == played.after.report


# Idle rounds, weights, scales -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRE_FORMATS)
@pytest.mark.parametrize("name", LINEAR)
@given(data=st.data(), federation=federations())
def test_rounds_in_which_nobody_trains_change_no_bit(
    name: str, wire: WireFormat, data: st.DataObject, federation: Federation
) -> None:
    campaign = campaign_of(name, federation, wire)
    *_, active = rounds_of(campaign, federation, drawn_rounds(data, federation))
    for idle in rounds_of(campaign, federation, drawn_rounds(data, federation), trains=False, state=active.after):
        assert same_bits(idle.after.adapter, active.after.adapter)


@pytest.mark.parametrize("name", LINEAR)
@given(data=st.data(), federation=federations())
def test_only_the_factor_of_the_round_moves(name: str, data: st.DataObject, federation: Federation) -> None:
    for played in rounds_of(campaign_of(name, federation), federation, drawn_rounds(data, federation)):
        side = STEADY.get(name) or ("B" if played.after.round % 2 else "A")
        assert {release.train for release in played.releases.values()} == {side}
        assert {side_of(update.adapter, "") for update in played.back} == {side}
        for module, stored in played.after.adapter.lora.items():
            before = played.before.adapter.lora[module]
            trains = any(module in update.adapter.lora for update in played.updates)
            for one, value in sides(stored).items():
                assert np.array_equal(value, sides(before)[one]) != (trains and one == side)


@pytest.mark.parametrize("name", LINEAR)
@given(federation=federations(), times=st.integers(2, 9))
def test_weights_are_shares(name: str, federation: Federation, times: int) -> None:
    strategy = campaign_of(name, federation).strategy
    (played,) = rounds_of(campaign_of(name, federation), federation, [federation.members])
    scaled = [replace(update, num_examples=times * update.num_examples) for update in played.updates]
    assert same_bits(strategy.step(played.before, scaled, played.releases, UNUSED).adapter, played.after.adapter)
    last = played.updates[-1]
    twins = [replace(last, client_id=last.client_id + tail) for tail in "ab"]
    doubled = [replace(update, num_examples=2 * update.num_examples) for update in played.updates[:-1]]
    releases = {**played.releases, **{twin.client_id: played.releases[last.client_id] for twin in twins}}
    after = strategy.step(played.before, [*doubled, *twins], releases, UNUSED)
    for module, stored in after.adapter.lora.items():
        assert gap(product(stored), product(played.after.adapter.lora[module])) <= TOLERANCE


@pytest.mark.parametrize("name", LINEAR)
@given(federation=federations(), times=st.sampled_from([0.25, 3.0, 16.0]))
def test_the_scale_of_a_client_is_a_matter_of_its_own(name: str, federation: Federation, times: float) -> None:
    """Another lora_alpha, and B divided by the same: the same global factors, and a start with the same product."""
    strategy = campaign_of(name, federation).strategy
    first, second = rounds_of(campaign_of(name, federation), federation, [federation.members] * 2)
    for member in federation.members:
        budget = member.budget()
        scales = {module: times * scale for module, scale in budget.scale.items()}
        releases = [
            started(
                campaign_of(name, federation),
                released(campaign_of(name, federation), blob, second.after, {member.client_id: one})[member.client_id],
            )
            for one in (budget, replace(budget, scale=scales))
        ]
        for module in budget.train:
            ours, theirs = (release.trainable.lora[module] for release in releases)
            assert np.array_equal(ours.A, theirs.A)
            assert gap(product(ours), product(theirs)) <= TOLERANCE
    for played in (first, second):
        one = played.updates[0]
        at = {m: divided(f, times) for m, f in one.adapter.lora.items()}
        start = played.releases[one.client_id]
        begun = {m: divided(f, times) for m, f in start.trainable.lora.items()}
        again = replace(one, adapter=Adapter(at, one.adapter.dense))
        releases_then = {
            **played.releases, one.client_id: replace(start, trainable=Adapter(begun, start.trainable.dense))
        }  # fmt: skip
        after = strategy.step(played.before, [again, *played.updates[1:]], releases_then, UNUSED)
        for module, stored in after.adapter.lora.items():
            for side, value in sides(stored).items():
                assert gap(value, sides(played.after.adapter.lora[module])[side]) <= TOLERANCE


@pytest.mark.parametrize("name", LINEAR)
@given(
    rank=st.sampled_from([1, 4, 32]),
    counts=st.lists(st.integers(1, 500), min_size=2, max_size=5),
    seed=st.integers(0, 99),
)
def test_with_one_rank_it_is_the_mean_of_that_factor(name: str, rank: int, counts: list[int], seed: int) -> None:
    """fedavg of updates that share the other factor, and of what was sent, the same; two rounds."""
    from lamina.protos.spec import AdapterSpec

    members = tuple(Member(f"site-{k}", {"q_proj": rank}, {"q_proj": 2.0}, count) for k, count in enumerate(counts))
    federation = Federation(AdapterSpec({"q_proj": SHAPES["q_proj"]}), members, seed)
    fedavg = build("fedavg", Options({"q_proj": rank}, {"q_proj": 2.0}))
    for played in rounds_of(campaign_of(name, federation), federation, [members] * 2):
        ours = played.after.adapter.lora["q_proj"]
        if name != "core":  # which fedavg knows nothing of
            theirs = fedavg.step(replace(played.before, optimizer={}), played.updates, played.releases, UNUSED)
            assert gap(ours.A, theirs.adapter.lora["q_proj"].A) <= TOLERANCE
            assert gap(ours.B, theirs.adapter.lora["q_proj"].B) <= TOLERANCE
        side = side_trained(played)
        weights = shares(played.updates)
        mean = sum(
            weights[u.client_id] * getattr(u.adapter.lora["q_proj"], side).astype(np.float64) for u in played.back
        )
        assert gap(getattr(ours, side), mean) <= TOLERANCE


@given(federation=federations(modules=["q_proj"]))
def test_unlike_zeropad_high_slots_are_not_diluted(federation: Federation) -> None:
    """zeropad replaces the factors by padded ones, so it forgets where nobody trains; these add changes."""
    for name in LINEAR:
        campaign = campaign_of(name, federation)
        *_, two = rounds_of(campaign, federation, [federation.members] * 2)
        low = min(federation.members, key=lambda member: member.ranks["q_proj"])
        (idle,) = rounds_of(campaign, federation, [[low]], trains=False, state=two.after)
        assert same_bits(idle.after.adapter, two.after.adapter)


# Releases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR)
@given(data=st.data(), federation=federations(least=2))
def test_whoever_comes_receives_its_slots_of_both_factors(
    name: str, data: st.DataObject, federation: Federation
) -> None:
    """Also one that joins late or skipped rounds: T_k is the first r_k slots of the global factors, whatever it missed."""
    campaign = campaign_of(name, federation)
    *_, last = rounds_of(campaign, federation, drawn_rounds(data, federation))
    for member in federation.members:
        for held in (-1, last.after.round - 1):
            budget = member.budget(held)
            one = released(campaign, blob, last.after, {member.client_id: budget})[member.client_id]
            release = started(campaign, one)
            for module, rank in member.ranks.items():
                stored, got = last.after.adapter.lora[module], release.trainable.lora[module]
                assert got.scale == member.scales[module]
                assert np.array_equal(got.A, stored.A[:rank])
                slots = stored.B[:, :rank].astype(np.float64)
                if stored.core is not None:
                    slots = slots @ stored.core[:rank, :rank]
                assert gap(product(got), stored.scale * slots @ stored.A[:rank].astype(np.float64)) <= TOLERANCE


@pytest.mark.parametrize("wire", WIRE_FORMATS)
@given(federation=federations(least=2))
def test_half_goes_out_and_who_was_there_has_the_rest(wire: WireFormat, federation: Federation) -> None:
    rounds = list(rounds_of(campaign_of("alternate", federation, wire), federation, [federation.members] * 5))
    for before, now in pairwise(rounds[1:]):
        for client, one in now.out.items():
            asked = one.instruction
            assert asked.frozen is not None
            assert asked.frozen.sha256 == before.out[client].instruction.release.sha256
            assert one.num_bytes == asked.release.num_bytes
            assert replace(one, budget=replace(one.budget, held_version=asked.version - 2)).num_bytes == asked.num_bytes
            # What it was left with a round ago is what it starts from now, bit for bit.
            kept, start = before.releases[client].trainable, now.releases[client].trainable
            side = now.releases[client].train
            for module, factors in start.lora.items():
                assert np.array_equal(getattr(factors, side), getattr(kept.lora[module], side))
    for name in LINEAR:
        campaign = campaign_of(name, federation, wire)
        first, *later = rounds_of(campaign, federation, [federation.members] * 3)
        assert all(not one.decoded.trainable.lora for one in first.out.values())
        for played in later:
            for one in played.out.values():
                halves = one.decoded.trainable
                assert side_of(halves, "") in ("A", "B", "core")
                assert set(halves.lora) == set(one.budget.train)


@given(rank=st.integers(1, 16), more=st.integers(0, 16), d_in=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_the_common_rows_are_nested_and_within_their_bound(rank: int, more: int, d_in: int, seed: int) -> None:
    large, small = start_rows(seed, "q", rank + more, d_in), start_rows(seed, "q", rank, d_in)
    assert np.array_equal(large[:rank], small)
    assert small.dtype == np.float32
    assert np.sqrt(0.5) <= np.abs(small).max() * np.sqrt(d_in) <= np.sqrt(2)
    for wire in WIRE_FORMATS:
        adapter = Adapter({"q": LoraFactors(small, np.zeros((3, rank), np.float32))})
        assert np.array_equal(decode(encode(adapter, wire, UNUSED)).lora["q"].A, small)


def test_the_common_rows_differ_by_module_and_seed_and_are_spread_evenly() -> None:
    rows = start_rows(3, "q_proj", 64, 1024)
    assert not np.array_equal(rows, start_rows(3, "k_proj", 64, 1024))
    assert not np.array_equal(rows, start_rows(4, "q_proj", 64, 1024))
    bound = np.abs(rows).max()
    # A uniform distribution's mean and variance, within five standard errors.
    assert abs(rows.mean()) < 5 * bound / np.sqrt(3 * rows.size)
    assert rows.var() == pytest.approx(bound**2 / 3, rel=0.02)


def test_the_common_rows_are_those_of_every_version() -> None:
    """Both ends draw them: 24 bits of raw PCG64 output a number, so that no other release of numpy gives other rows."""
    generator = np.random.PCG64(seeds.integer(7, "shared-rows", "q_proj"))
    steps = np.array([(int(raw) >> 40) * 255 // 2**24 - 127 for raw in generator.random_raw(64)]).reshape(2, 32)
    rows = start_rows(7, "q_proj", 2, 32)
    got = rows * 2.0**9  # 1 / (127 * sqrt(32)) is nearest to 2**-9 among powers of two
    assert ((got == steps) | (np.abs(got) == 127)).all()
    assert ((got != steps).sum(axis=1) <= 1).all()
    assert hashlib.sha256(rows.tobytes()).hexdigest()[:16] == "fa8e10dd566e6eee"


@given(rank=st.integers(1, 24), more=st.integers(0, 24), length=st.integers(1, 200), seed=st.integers(0, 2**40))
def test_orthonormal_rows_are_nested_and_orthonormal(rank: int, more: int, length: int, seed: int) -> None:
    rank, most = min(rank, length), min(rank + more, length)
    large, small = (orthonormal_rows(seed, "what", "q", count, length) for count in (most, rank))
    assert large.dtype == np.float32
    assert np.array_equal(large[:rank], small)
    assert np.abs(large.astype(np.float64) @ large.T.astype(np.float64) - np.eye(most)).max() < 1e-6
    with pytest.raises(AdapterMismatch, match="at most"):
        orthonormal_rows(seed, "what", "q", length + 1, length)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 37, 1000])
def test_orthonormal_rows_are_those_of_a_cosine_transform(length: int) -> None:
    """Against the library's cosine: signs and frequencies aside, the rows of the orthonormal DCT-II, each of them once."""
    rows = orthonormal_rows(11, "what", "q", length, length).astype(np.float64)
    f, j = np.arange(length)[:, None], np.arange(length)[None, :]
    dct = np.sqrt(np.where(f == 0, 1, 2) / length) * np.cos(np.pi * (2 * j + 1) * f / (2 * length))
    flat = [
        row for row in rows if np.abs(np.abs(row) - length**-0.5).max() < 1e-6
    ]  # the row of frequency 0 is among them
    found = [np.abs((rows * np.sign(row)) @ dct.T) for row in flat]
    assert any(
        np.allclose(np.sort(one), np.eye(length)[-1], atol=1e-6) and (one > 0.5).any(axis=0).all() for one in found
    )


def test_orthonormal_rows_are_those_of_every_version() -> None:
    """Both ends draw them; only sums, products and square roots of float64, which IEEE 754 rounds alike, make them."""
    rows = orthonormal_rows(7, "core-rows", "q_proj", 5, 37)
    assert hashlib.sha256(rows.tobytes()).hexdigest()[:16] == "e83a5ef056894893"
    assert not np.array_equal(rows, orthonormal_rows(7, "core-columns", "q_proj", 5, 37))
    assert not np.array_equal(rows, orthonormal_rows(8, "core-rows", "q_proj", 5, 37))


# Refusals -------------------------------------------------------------------------------------------------------------


def other(side: str) -> str:
    return "A" if side == "B" else "B"  # of a core either


@pytest.mark.parametrize("name", LINEAR)
@given(federation=federations())
def test_an_update_of_the_other_factor_is_not_averaged(name: str, federation: Federation) -> None:
    campaign = campaign_of(name, federation)
    first, second, third = rounds_of(campaign, federation, [federation.members] * 3)
    swapped = {c: replace(r, train=other(r.train)) for c, r in second.releases.items()}  # type: ignore[arg-type]
    with pytest.raises(AdapterMismatch, match=f"{name} expected an update of lora_"):
        campaign.strategy.step(second.before, second.updates, swapped, UNUSED)
    with pytest.raises(AdapterMismatch, match="got none"):
        campaign.strategy.step(second.before, second.updates, {}, UNUSED)
    if name == "alternate":
        with pytest.raises(AdapterMismatch, match="lora_B of version 0"):
            campaign.strategy.step(second.before, first.updates, first.releases, UNUSED)
        # The same factor, two rounds later: the other has moved meanwhile.
        with pytest.raises(AdapterMismatch, match="from release 2, got lora_B of version 0"):
            campaign.strategy.step(third.before, first.updates, first.releases, UNUSED)


def test_parts_that_do_not_fit_are_refused() -> None:
    full = LoraFactors(np.ones((2, 32), np.float32), np.ones((48, 2), np.float32), 2.0)
    rows, columns = Adapter({"q_proj": one_side(full, "A")}), Adapter({"q_proj": one_side(full, "B")})

    def made(parts: Sequence[Adapter], rank: int = 2, scale: float = 2.0, side: Side = "B") -> LoraFactors:
        return whole(parts, {"q_proj": rank}, {"q_proj": scale}, SHAPES, 0, side).lora["q_proj"]

    assert product(made([rows, columns])) == pytest.approx(product(full))
    for parts, rank, scale in (([rows, rows], 2, 2.0), ([columns], 3, 2.0), ([columns], 2, 1.0)):
        with pytest.raises(AdapterMismatch, match="each factor once"):
            made(parts, rank, scale)
    core = Adapter({"q_proj": one_side(replace(full, core=np.ones((2, 2), np.float32)), "core")})
    assert np.array_equal(sides(made([core], side="core"))["core"], np.ones((2, 2)))
    for parts, side in (([core], "B"), ([columns], "core"), ([core, rows], "core"), ([Adapter({"q_proj": full})], "B")):
        with pytest.raises(AdapterMismatch, match="each factor once"):
            made(parts, side=side)  # type: ignore[arg-type]
    with pytest.raises(AdapterMismatch, match="one factor"):
        side_of(Adapter({"q_proj": full}), "here")
    with pytest.raises(AdapterMismatch, match="one factor"):
        side_of(Adapter({"q_proj": one_side(full, "A"), "k_proj": one_side(full, "B")}), "here")
    assert side_of(Adapter(), "here") is None
    back = filled(columns, Adapter({"q_proj": full}), "B").lora["q_proj"]
    assert np.array_equal(back.A, full.A)


def test_the_strategies_say_that_they_are_linear() -> None:
    for name in LINEAR:
        strategy = build(name, Options({"q_proj": 4}, {"q_proj": 2.0}))
        assert strategy.linear
        assert strategy.exact
        assert not strategy.equal_ranks
        assert strategy.released_view == "aggregate"
        assert strategy.stable_coordinates == (name in STEADY)


def test_a_slice_is_of_the_same_slots() -> None:
    full = LoraFactors(normal((4, 32), 0, "A"), normal((48, 4), 0, "B"), 2.0)
    cut = sliced(full, 3, 5.0)
    assert np.array_equal(cut.A, full.A[:3])
    assert gap(product(cut), product(prefix(full, 3))) <= TOLERANCE
    assert np.array_equal(sliced(full, 3, 2.0).B, full.B[:, :3])
