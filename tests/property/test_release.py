"""What is stored and released: the cap and its certificate, prefixes of one factorisation, and who missed what."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.protos.adapter import LoraFactors, concatenated, prefix, product, rescaled
from tests.property.oracles import (
    EXACT,
    SHAPES,
    TOLERANCE,
    UNUSED,
    Federation,
    aggregated,
    dense_target,
    drawn_rounds,
    federations,
    first_updates,
    gap,
    play,
    shares,
    strategy_of,
    truncated_svd,
)

# Truncation -----------------------------------------------------------------------------------------------------------


@given(data=st.data(), federation=federations(), cap=st.integers(1, 12))
def test_the_cap_keeps_the_best_matrix_and_certifies_the_rest(
    data: st.DataObject, federation: Federation, cap: int
) -> None:
    strategy = strategy_of("recompress", federation, rank_cap=cap)
    for played in play(strategy, federation, drawn_rounds(data, federation)):
        for module, stored in played.after.adapter.lora.items():
            target, report = dense_target(played, module, shares(played.updates)), played.after.report[module]
            best, sigma = truncated_svd(target, cap)
            assert stored.rank == min(cap, int((sigma > 1e-9 * sigma[0]).sum()) if sigma[0] else 0)
            distance = float(np.linalg.norm(target - product(stored)))
            assert distance == pytest.approx(float(np.linalg.norm(target - best)), abs=TOLERANCE * report.target_norm)
            assert report.dropped_norm == pytest.approx(
                float(np.linalg.norm(sigma[cap:])), abs=1e-9 * report.target_norm
            )
            if report.target_norm > 0:
                assert report.relative_error == pytest.approx(distance / report.target_norm, abs=1e-9)
                certificate = report.dropped_norm / report.target_norm
                assert report.relative_error == pytest.approx(certificate, abs=TOLERANCE)
            assert report.singular_values == pytest.approx(sigma[: stored.rank], abs=1e-9 * report.target_norm)


@given(federation=federations())
def test_the_error_falls_with_the_cap(federation: Federation) -> None:
    updates = first_updates(federation)
    errors = [aggregated("recompress", federation, updates, rank_cap=cap).relative_error for cap in (1, 2, 4, 8, 48)]
    assert all(larger >= smaller - TOLERANCE for larger, smaller in pairwise(errors))
    assert errors[-1] <= TOLERANCE


@pytest.mark.parametrize("cap", [None, 9])
@given(data=st.data(), federation=federations())
def test_what_is_stored_is_balanced_and_ordered(cap: int | None, data: st.DataObject, federation: Federation) -> None:
    strategy = strategy_of("recompress", federation, rank_cap=cap)
    *_, last = play(strategy, federation, drawn_rounds(data, federation))
    for module, stored in last.after.adapter.lora.items():
        sigma = np.array(last.after.report[module].singular_values)
        assert stored.scale == 1
        assert (np.diff(sigma) <= 0).all()
        columns, rows = stored.B.astype(np.float64), stored.A.astype(np.float64)
        for gram in (columns.T @ columns, rows @ rows.T):
            assert gap(gram, np.diag(sigma)) <= TOLERANCE


@pytest.mark.parametrize("name", ["recompress", "residual"])
@given(data=st.data(), federation=federations())
def test_a_client_trains_the_best_prefix_of_its_rank_at_its_own_scale(
    name: str, data: st.DataObject, federation: Federation
) -> None:
    strategy = strategy_of(name, federation)
    *_, last = play(strategy, federation, drawn_rounds(data, federation))
    for member in federation.members:
        download = data.draw(st.sampled_from([1, 7, 48]))
        release = strategy.release(last.after, member.budget(download=download))
        for module, rank in member.ranks.items():
            everything = product(last.after.adapter.lora[module])
            trained = release.trainable.lora[module]
            assert trained.scale == member.scales[module]
            assert trained.rank == min(rank, last.after.adapter.lora[module].rank)
            assert gap(product(trained), truncated_svd(everything, rank)[0]) <= 3 * TOLERANCE
            if release.frozen is not None:
                beside = concatenated(rescaled(trained, 1.0), release.frozen.lora[module])
                expected = prefix(last.after.adapter.lora[module], max(rank, download))
                assert gap(product(beside), product(expected)) <= TOLERANCE


# Attendance -----------------------------------------------------------------------------------------------------------


@given(data=st.data(), federation=federations(least=2))
def test_stack_reaches_everyone_whatever_they_missed(data: st.DataObject, federation: Federation) -> None:
    """A client that adds up the frozen parts it was sent holds G, also one that joins late or skips rounds."""
    strategy, state = strategy_of("stack", federation), None
    held: dict[str, tuple[int, dict[str, LoraFactors]]] = {}
    last = strategy.init(federation.spec)
    for cohort in drawn_rounds(data, federation, 5):
        for member in cohort:
            version, parts = held.get(member.client_id, (-1, {}))
            release = strategy.release(last, member.budget(version))
            if release.frozen_since is None:
                parts = {}
            else:
                assert release.frozen_since == version
            for module, factors in (release.frozen.lora if release.frozen else {}).items():
                parts[module] = concatenated(parts[module], factors) if module in parts else factors
            held[member.client_id] = (last.round, parts)
            for module, stored in last.adapter.lora.items():
                mine = product(parts[module]) if module in parts else np.zeros(SHAPES[module])
                assert gap(mine, product(stored)) <= 3 * TOLERANCE
        (played,) = play(strategy, federation, [cohort], state=last if state is None else state)
        last = state = played.after


@pytest.mark.parametrize("name", EXACT)
@given(data=st.data(), federation=federations(least=2))
def test_a_dropped_client_is_as_if_it_had_not_been_asked(
    name: str, data: st.DataObject, federation: Federation
) -> None:
    strategy = strategy_of(name, federation)
    *_, last = play(strategy, federation, drawn_rounds(data, federation, 2))
    (full,) = play(strategy, federation, [federation.members], state=last.after)
    survivors = full.updates[1:]
    after = strategy.step(last.after, survivors, full.releases, UNUSED)
    for module, stored in after.adapter.lora.items():
        target = dense_target(replace(full, updates=survivors), module, shares(survivors))
        assert gap(product(stored), target) <= TOLERANCE
