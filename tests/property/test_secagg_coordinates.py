"""The secure sum of linear strategies: the same step as with the updates in the clear, up to the steps of the encoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.protos.adapter import Adapter, LoraFactors
from lamina.protos.errors import AdapterMismatch, SecureSumAborted, SecureSumRefused, TrainingError
from lamina.protos.secagg.coordinates import Layout, Rule, encoded, layout, mean
from lamina.protos.secagg.encoding import Encoding, encoding
from lamina.protos.sides import Side, numbers_of, one_side, with_numbers
from lamina.protos.spec import AdapterSpec

SHAPES: Mapping[str, tuple[int, int]] = {"b.v_proj": (5, 9), "a.q_proj": (8, 6), "c.wide": (3, 12)}
GLOBAL = {"b.v_proj": 5, "a.q_proj": 4, "c.wide": 0}


def spec() -> AdapterSpec:
    return AdapterSpec(
        SHAPES, dense={"head": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(3, np.float32)}
    )


def scheme(side: Side, weights: str = "num_examples", bound: float = 4.0) -> Layout:
    scales = {"b.v_proj": 2.0, "a.q_proj": 0.5, "c.wide": 1.0}
    return layout(spec(), side, GLOBAL, scales, Rule(weights, 100, bound))  # type: ignore[arg-type]


def client(rng: np.random.Generator, side: Side, ranks: Mapping[str, int], scale: float) -> tuple[Adapter, Adapter]:
    """What a client sends, and what it started from."""
    start, sent = {}, {}
    for module, rank in ranks.items():
        d_out, d_in = SHAPES[module]
        core = rng.normal(size=(rank, rank)) if side == "core" else None
        begun = LoraFactors(rng.normal(size=(rank, d_in)), rng.normal(size=(d_out, rank)), scale, core)
        before = numbers_of(begun, side)
        moved = with_numbers(begun, side, before + rng.uniform(-1, 1, before.shape))
        start[module], sent[module] = begun, one_side(moved, side)
    dense = dict(spec().dense)
    changed = {name: value + rng.uniform(-1, 1, value.shape) for name, value in dense.items()}
    return Adapter(sent, changed), Adapter(start, dense)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["A", "B", "core"]), st.sampled_from(["uniform", "num_examples"]), st.data())
def test_the_decoded_mean_is_that_of_the_padded_changes(side: Side, weights: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(3, 6))
    one, grid = scheme(side, weights), encoding(4.0, count)
    total = np.zeros(one.length, np.uint32)
    sums: dict[str, np.ndarray] = {}
    weight_sum = 0.0
    for index in range(count):
        rng = np.random.default_rng(data.draw(st.integers(0, 10_000)) + index)
        ranks = {m: data.draw(st.integers(1, GLOBAL[m])) for m in ("b.v_proj", "a.q_proj") if data.draw(st.booleans())}
        scale, examples = data.draw(st.sampled_from([0.5, 1.0, 2.0, 3.0])) / 2, data.draw(st.integers(1, 150))
        sent, start = client(rng, side, ranks, scale)
        total += encoded(one, grid, sent, start, examples)
        weight = 1.0 if weights == "uniform" else min(examples / 100, 1.0)
        weight_sum += weight
        for module, (d_out, d_in) in SHAPES.items():
            rank = GLOBAL[module]
            shape = {"A": (rank, d_in), "B": (d_out, rank), "core": (rank, rank)}[side]
            padded = sums.setdefault(module, np.zeros(shape))
            if module in ranks:
                change = numbers_of(sent.lora[module], side) - numbers_of(start.lora[module], side)
                scaled = change if side == "A" else scale / one.scales[module] * change
                padded[: change.shape[0], : change.shape[1]] += weight * scaled
        for name, value in sent.dense.items():
            sums[name] = sums.get(name, 0) + weight * (value.astype(np.float64) - start.dense[name])
    found = mean(one, grid, total, count)
    # Numerator and denominator are each off by count / 2 steps at most, and no mean here exceeds the bound.
    allowed = count * grid.step / weight_sum * 1.001 + 1e-12
    for module in SHAPES:
        got = numbers_of(found.lora[module], side)
        assert np.abs(got - sums[module] / weight_sum).max(initial=0.0) <= allowed
        assert (found.lora[module].rank, found.lora[module].scale) == (GLOBAL[module], one.scales[module])
    for name in spec().dense:
        assert np.abs(found.dense[name] - sums[name] / weight_sum).max() <= allowed


def test_equal_weights_add_up_exactly_and_idle_clients_change_nothing() -> None:
    one, grid = scheme("B", "uniform"), encoding(4.0, 5)
    total = np.zeros(one.length, np.uint32)
    for index in range(5):
        _, start = client(np.random.default_rng(index), "B", {"b.v_proj": index + 1}, 2.0)
        idle = Adapter({m: one_side(f, "B") for m, f in start.lora.items()}, start.dense)
        total += encoded(one, grid, idle, start, 7)
    found = mean(one, grid, total, 5)
    assert all(not factors.B.any() for factors in found.lora.values())
    assert all(not value.any() for value in found.dense.values())


def small(**more: object) -> tuple[Layout, Encoding, Adapter, Adapter]:
    one = scheme("B")
    sent, start = client(np.random.default_rng(0), "B", {"a.q_proj": 2}, 0.5)
    return one, encoding(4.0, 3), sent, start


def test_an_update_of_the_other_side_is_refused() -> None:
    one, grid, sent, start = small()
    other = replace(one, side="A")
    with pytest.raises(AdapterMismatch, match="other factor"):
        encoded(other, grid, sent, start, 1)


def test_an_adapter_that_does_not_fit_the_global_one_is_refused() -> None:
    one, grid, _, _ = small()
    sent, start = client(np.random.default_rng(0), "B", {"a.q_proj": 5}, 0.5)
    with pytest.raises(AdapterMismatch, match="at most"):
        encoded(one, grid, sent, start, 1)
    sent, start = client(np.random.default_rng(0), "B", {}, 0.5)
    with pytest.raises(AdapterMismatch, match="every dense"):
        encoded(one, grid, Adapter({}, {"head": sent.dense["head"]}), start, 1)


def test_a_change_out_of_range_is_refused() -> None:
    one, grid, sent, start = small()
    sent.dense["head"][0, 0] = 50.0
    with pytest.raises(TrainingError, match="Raise"):
        encoded(one, grid, sent, start, 100)


@pytest.mark.parametrize(
    ("ranks", "scales", "rule"),
    [
        ({**GLOBAL, "a.q_proj": 7}, dict.fromkeys(SHAPES, 1.0), Rule("uniform", 1, 1.0)),
        ({"a.q_proj": 2}, {"a.q_proj": 1.0}, Rule("uniform", 1, 1.0)),
        (GLOBAL, dict.fromkeys(SHAPES, 0.0), Rule("uniform", 1, 1.0)),
        (GLOBAL, dict.fromkeys(SHAPES, float("nan")), Rule("uniform", 1, 1.0)),
        (GLOBAL, dict.fromkeys(SHAPES, 1.0), Rule("uniform", 0, 1.0)),
        (GLOBAL, dict.fromkeys(SHAPES, 1.0), Rule("uniform", 1, float("inf"))),
    ],
)
def test_what_a_coordinator_cannot_mean_is_refused(
    ranks: Mapping[str, int], scales: Mapping[str, float], rule: Rule
) -> None:
    with pytest.raises(SecureSumRefused, match="Ask the operator"):
        layout(spec(), "B", ranks, scales, rule)


def test_a_sum_without_weight_changes_nothing() -> None:
    one, grid, sent, start = small()
    total = sum((encoded(one, grid, sent, start, 0) for _ in range(3)), np.zeros(one.length, np.uint32))
    with pytest.raises(SecureSumAborted, match="sum of weights"):
        mean(one, grid, total, 3)


def test_the_digest_is_over_every_part_of_the_layout() -> None:
    one = scheme("B")
    others = [
        replace(one, side="A"),
        replace(one, ranks={**one.ranks, "a.q_proj": 3}),
        replace(one, scales={**one.scales, "a.q_proj": 3.0}),
        replace(one, dense={"head": (2, 3)}),
        *(
            replace(one, rule=replace(one.rule, **change))
            for change in ({"weights": "uniform"}, {"examples": 9}, {"bound": 1.0})
        ),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 8
