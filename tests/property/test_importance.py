"""Laws of ranks by importance: never more numbers than the uniform ranks, the best there is for them, and nothing by chance."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lamina.client.sizing.importance import allocated, spent
from lamina.protos.adapter import product
from lamina.protos.errors import ConfigError
from lamina.protos.ranks import SPREAD, check, most, numbers, uniform
from lamina.protos.spec import AdapterSpec
from tests.property.oracles import (
    EXACT,
    SHAPES,
    TOLERANCE,
    Federation,
    Member,
    dense_target,
    gap,
    play,
    shares,
    strategy_of,
)

Scores = Mapping[str, NDArray[np.float64]]
SIDES = st.sampled_from([1, 2, 3, 8, 16, 33, 64])
PATTERNS = st.dictionaries(st.sampled_from(["q_proj", "v_proj", "1.q_proj"]), st.integers(0, 6), max_size=2)


@st.composite
def schemas(draw: st.DrawFn) -> AdapterSpec:
    names = [
        f"layers.{layer}.{kind}" for layer in range(draw(st.integers(1, 4))) for kind in ("q_proj", "v_proj", "down")
    ]
    return AdapterSpec({name: (draw(SIDES), draw(SIDES)) for name in names})


@st.composite
def scored(draw: st.DrawFn, spec: AdapterSpec) -> Scores:
    """Spectra from a coarse grid, so that ties, zeros, short spectra and missing modules all occur."""
    found = {}
    for module, shape in spec.modules.items():
        if draw(st.integers(0, 9)):
            values = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0, 100.0]), max_size=min(shape)))
            found[module] = np.array(sorted(values, reverse=True))
    return found


def caught(found: Scores, ranks: Mapping[str, int]) -> float:
    return float(sum((found[module][:rank] ** 2).sum() for module, rank in ranks.items() if module in found))


@given(data=st.data(), spec=schemas(), rank=st.integers(1, 40), pattern=PATTERNS)
def test_ranks_are_admitted_and_take_no_more_numbers(
    data: st.DataObject, spec: AdapterSpec, rank: int, pattern: Mapping[str, int]
) -> None:
    found = data.draw(scored(spec))
    even = uniform(spec, rank, pattern)
    ranks = allocated(spec, found, rank, pattern)
    assert bool(ranks) == bool(even)
    if ranks:
        check(spec, ranks, rank, pattern, "importance")
    assert all(rank >= 1 for rank in ranks.values())
    assert list(ranks) == [module for module in spec.modules if module in ranks]
    left = numbers(spec, even) - numbers(spec, ranks)
    full = all(ranks.get(module, 0) == cap for module, cap in most(spec, rank, pattern).items())
    assert full or 0 <= left < max(map(sum, spec.modules.values()))


@given(data=st.data(), spec=schemas(), rank=st.integers(1, 40))
def test_the_size_of_scores_and_the_order_of_their_mapping_are_nothing(
    data: st.DataObject, spec: AdapterSpec, rank: int
) -> None:
    found = data.draw(scored(spec))
    ranks = allocated(spec, found, rank)
    power = 2.0 ** data.draw(st.integers(-400, 400))
    assert allocated(spec, {module: values * power for module, values in found.items()}, rank) == ranks
    assert allocated(spec, dict(reversed(list(found.items()))), rank) == ranks


@given(data=st.data(), spec=schemas(), rank=st.integers(1, 40))
def test_a_larger_sum_takes_no_rank_away(data: st.DataObject, spec: AdapterSpec, rank: int) -> None:
    found, largest = data.draw(scored(spec)), most(spec, rank)
    budgets = sorted(data.draw(st.lists(st.integers(0, 3000), min_size=2, max_size=2)))
    less, more = (spent(spec, found, largest, budget) for budget in budgets)
    assert all(more.get(module, 0) >= rank for module, rank in less.items())
    assert caught(found, more) >= caught(found, less)


@given(data=st.data(), spec=schemas(), rank=st.integers(1, 40), pattern=PATTERNS)
def test_without_scores_the_ranks_are_uniform(
    data: st.DataObject, spec: AdapterSpec, rank: int, pattern: Mapping[str, int]
) -> None:
    for found in ({}, {module: np.zeros(min(shape)) for module, shape in spec.modules.items()}):
        assert allocated(spec, found, rank, pattern) == uniform(spec, rank, pattern)


@given(count=st.integers(1, 9), sides=st.tuples(SIDES, SIDES), rank=st.integers(1, 40))
def test_equal_modules_with_equal_scores_get_equal_ranks(count: int, sides: tuple[int, int], rank: int) -> None:
    spec = AdapterSpec({f"layers.{layer}.q_proj": sides for layer in range(count)})
    found = {module: np.asarray(0.7 ** np.arange(min(sides)), np.float64) for module in spec.modules}
    assert allocated(spec, found, rank) == uniform(spec, rank)


@given(data=st.data(), rank=st.integers(1, 2))
def test_no_other_ranks_of_as_many_numbers_catch_more(data: st.DataObject, rank: int) -> None:
    """Against all of them, on a schema small enough to try all."""
    spec = AdapterSpec({name: data.draw(st.sampled_from([(4, 4), (4, 8), (16, 8)])) for name in ("a", "b", "c")})
    found = data.draw(scored(spec))
    ranks = allocated(spec, found, rank)
    largest = most(spec, rank)
    best = max(
        caught(found, dict(zip(spec.modules, some)))
        for some in itertools.product(*(range(largest[module] + 1) for module in spec.modules))
        if numbers(spec, dict(zip(spec.modules, some))) <= numbers(spec, ranks)
    )
    assert caught(found, ranks) >= best * (1 - 1e-12)


def test_all_goes_to_the_module_that_matters_as_far_as_it_may() -> None:
    spec = AdapterSpec({"a": (32, 32), "b": (32, 32), "c": (32, 32), "d": (32, 32), "e": (32, 32)})
    found = {module: np.full(32, 9.0 if module == "c" else 1.0) for module in spec.modules}
    assert allocated(spec, found, 2) == {"a": 1, "b": 1, "c": 2 * SPREAD}
    with pytest.raises(ConfigError, match="at most 8 for c"):
        check(spec, {"c": 2 * SPREAD + 1}, 2, {}, "importance")


@given(data=st.data(), seed=st.integers(0, 2**32), rank=st.integers(1, 4))
def test_what_clients_choose_each_for_itself_aggregates_to_the_dense_target(
    data: st.DataObject, seed: int, rank: int
) -> None:
    """Clients of one nominal rank with other ranks in every module, some of them with none."""
    spec = AdapterSpec(SHAPES)
    chosen = []
    for client in range(data.draw(st.integers(2, 4))):
        favourite = data.draw(st.sampled_from(sorted(SHAPES)))
        found = {m: np.full(min(SHAPES[m]), 50.0 if m == favourite else 1.0) for m in SHAPES}
        ranks = allocated(spec, found, rank)
        chosen.append(Member(f"site-{client}", ranks, dict.fromkeys(ranks, 2.0), data.draw(st.integers(1, 99))))
    assert all(len(set(member.ranks.values())) > 1 or set(member.ranks) != set(SHAPES) for member in chosen)
    federation = Federation(spec, tuple(chosen), seed)
    for name in EXACT:
        for played in play(strategy_of(name, federation), federation, [federation.members] * 2):
            weights = shares(played.updates)
            for module, stored in played.after.adapter.lora.items():
                assert gap(product(stored), dense_target(played, module, weights)) <= TOLERANCE
