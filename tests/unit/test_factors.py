"""Memory and numbers of `strategies.factors`, on both sides of R = mn/(m+n), where a stack outgrows its matrix.

Memory is what numpy allocates, as `tracemalloc` sees it; LAPACK's own workspace is measured by `benchmarks/aggregation.py`.
"""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from lamina.protos.adapter import (
    Adapter,
    LoraFactors,
    concatenated,
    folded,
    is_finite,
    prefix,
    product,
    rescaled,
    tail,
)
from lamina.protos.errors import AdapterMismatch
from lamina.strategies.factors import Pair, Sum, change, compress, distance, pair, singular_values, total

Matrix = NDArray[np.float64]

# Multiples of the stack's 8 (m + n) R bytes that total and compress may take together. The parts of the stack and the
# stack stand side by side once (2); so do later the stack, both orthonormal bases, and the stored factors with what of
# them lies outside the bases (4). One more for what is small. To it come a few R x R matrices.
STACKS, CORES = 5, 8
# Multiples of 8 m n bytes: the matrix, its two sides of singular vectors, what they are copied from, and the factors.
MATRICES = 7


def pairs(shape: tuple[int, int], ranks: list[int]) -> Iterator[Pair]:
    rng = np.random.default_rng(len(ranks))
    for rank in ranks:
        yield rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))


def dense(shape: tuple[int, int], ranks: list[int]) -> Matrix:
    return sum((left @ right for left, right in pairs(shape, ranks)), np.zeros(shape))


def peak(call: Callable[[], object]) -> int:
    """Bytes that numpy held at the most during the call, above what it held before."""
    call()
    gc.collect()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def factors(rank: int, shape: tuple[int, int], seed: int, scale: float = 1.0) -> LoraFactors:
    rng = np.random.default_rng(seed)
    rows, columns = rng.standard_normal((rank, shape[1])), rng.standard_normal((shape[0], rank))
    return LoraFactors(rows.astype(np.float32), columns.astype(np.float32), scale)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_cap", [None, 8])
@pytest.mark.parametrize(
    ("shape", "ranks"), [((1200, 800), [8] * 10), ((800, 1200), [64, 8, 4, 1, 1]), ((1000, 900), [1] * 30)]
)
def test_below_the_crossing_no_matrix_of_the_layers_size_is_made(
    shape: tuple[int, int], ranks: list[int], rank_cap: int | None
) -> None:
    (m, n), rank = shape, sum(ranks)
    taken = peak(lambda: compress(total(pairs(shape, ranks), shape), rank_cap))
    assert taken <= 8 * (STACKS * (m + n) * rank + CORES * rank**2)
    assert taken < 8 * m * n


def test_just_below_the_crossing_the_stack_still_bounds_the_memory() -> None:
    m, n, rank = 600, 600, 280
    taken = peak(lambda: compress(total(pairs((m, n), [28] * 10), (m, n))))
    assert taken <= 8 * (STACKS * (m + n) * rank + CORES * rank**2)


@pytest.mark.parametrize("rank_cap", [None, 8])
def test_above_the_crossing_the_matrix_bounds_the_memory_however_many_clients(rank_cap: int | None) -> None:
    m, n = 300, 200
    peaks = [
        peak(lambda: compress(total(pairs((m, n), [20] * clients), (m, n)), rank_cap))  # noqa: B023
        for clients in (7, 20, 60)
    ]
    assert max(peaks) <= 8 * MATRICES * m * n
    assert max(peaks) <= 1.1 * min(peaks)


@pytest.mark.parametrize(("clients", "form"), [(5, "stack"), (50, "dense")])
def test_total_keeps_the_smaller_form_and_one_pair(clients: int, form: str) -> None:
    shape, rank, alive, most = (300, 200), 10, 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def watched() -> Iterator[Pair]:
        nonlocal alive, most
        for left, right in pairs(shape, [rank] * clients):
            weakref.finalize(left, gone)
            alive += 1
            most = max(most, alive)
            yield left, right
            del left, right

    kept = total(watched(), shape)
    crossing = shape[0] * shape[1] // sum(shape) // rank
    if form == "stack":
        assert (kept.dense, kept.left.shape, kept.right.shape) == (None, (300, clients * rank), (clients * rank, 200))
    else:
        # Until the crossing all pairs are the smaller form; from there on, one is read and one is made.
        assert kept.dense is not None
        assert kept.left.size == kept.right.size == 0
        assert most <= crossing + 2
    assert alive == 0


def test_after_the_crossing_pairs_are_read_one_at_a_time() -> None:
    shape, alive, after = (60, 40), 0, []

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def watched() -> Iterator[Pair]:
        nonlocal alive
        for index in range(30):
            one = np.full((60, 10), float(index)), np.ones((10, 40))
            weakref.finalize(one[0], gone)
            alive += 1
            if index > 3:
                after.append(alive)
            yield one
            del one

    total(watched(), shape)
    assert max(after) <= 2


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_cap", [None, 1, 7])
@pytest.mark.parametrize("ranks", [[3, 1, 8], [19], [20], [13, 32, 2], [32] * 4])
def test_both_forms_give_the_same_factors(ranks: list[int], rank_cap: int | None) -> None:
    shape = (48, 32)
    exact, kept = dense(shape, ranks), total(pairs(shape, ranks), shape)
    # 48 * 32 / (48 + 32) = 19.2
    assert (kept.dense is None) == (sum(ranks) <= 19)
    none = np.zeros((48, 0)), np.zeros((0, 32))
    ours, report = compress(kept, rank_cap)
    theirs, expected = compress(Sum(*none, dense=exact), rank_cap)
    assert product(ours) == pytest.approx(product(theirs), abs=1e-5)
    assert ours.rank == theirs.rank == min(sum(ranks), 32, rank_cap or 48)
    assert report.dropped_norm == pytest.approx(expected.dropped_norm, abs=1e-9 * report.target_norm)
    assert report.relative_error == pytest.approx(expected.relative_error, abs=1e-9)
    assert report.singular_values == pytest.approx(expected.singular_values, rel=1e-9)
    other = factors(5, shape, 3)
    true = float(np.linalg.norm(product(other) - exact) / np.linalg.norm(exact))
    assert distance(other, kept).relative_error == pytest.approx(true, rel=1e-9)
    assert distance(other, Sum(*none, dense=exact)).relative_error == pytest.approx(true, rel=1e-9)


def test_nothing_in_gives_nothing_out() -> None:
    stored, report = compress(total(iter([]), (5, 3)))
    assert (stored.rank, stored.shape, report.relative_error, report.target_norm) == (0, (5, 3), 0, 0)
    stored, report = compress(Sum(np.zeros((5, 0)), np.zeros((0, 3)), np.zeros((5, 3))))
    assert (stored.rank, report.relative_error) == (0, 0)
    assert singular_values(LoraFactors(np.ones((2, 3)), np.zeros((5, 2)))) == ()
    assert distance(stored, Sum(np.zeros((5, 0)), np.zeros((0, 3)))).relative_error == 0
    # Something stored where nothing should be has no relative distance: it counts as 1.
    assert distance(factors(1, (5, 3), 0), Sum(np.zeros((5, 0)), np.zeros((0, 3)))).relative_error == 1


def test_rounding_noise_is_not_kept_as_rank() -> None:
    left, right = next(pairs((48, 32), [4]))
    twice = [(left, right), (left * 0.5, right)]
    stored, report = compress(total(iter(twice), (48, 32)))
    assert stored.rank == 4
    assert product(stored) == pytest.approx(1.5 * left @ right, abs=1e-5)
    assert report.relative_error <= 1e-6


@pytest.mark.parametrize("weight", [1.0, 0.25, -2.0])
@pytest.mark.parametrize(
    ("trained", "received"),
    [
        (factors(4, (48, 32), 0, 2.0), None),
        (factors(4, (48, 32), 0, 2.0), factors(0, (48, 32), 0, 2.0)),
        (factors(4, (48, 32), 0, 2.0), factors(4, (48, 32), 1, 2.0)),
        (factors(4, (48, 32), 0, 2.0), factors(1, (48, 32), 1, 2.0)),
        (factors(4, (48, 32), 0, 2.0), factors(3, (48, 32), 1, 0.5)),
        (factors(2, (48, 32), 0, 2.0), factors(9, (48, 32), 1, 2.0)),
    ],
)
def test_a_change_is_the_weighted_difference_of_the_products(
    trained: LoraFactors, received: LoraFactors | None, weight: float
) -> None:
    left, right = change(trained, received, weight)
    start = product(received) if received else 0
    assert left @ right == pytest.approx(weight * (product(trained) - start), abs=1e-12)
    assert left.dtype == right.dtype == np.float64


def test_what_was_not_trained_leaves_no_slot() -> None:
    got = factors(3, (48, 32), 0, 2.0)
    fresh = factors(2, (48, 32), 1, 2.0)
    returned = LoraFactors(np.concatenate([got.A, fresh.A]), np.concatenate([got.B, 0 * fresh.B], axis=1), 2.0)
    assert change(returned, got)[0].shape == (48, 0)
    assert pair(returned)[0].shape == (48, 3)
    moved = LoraFactors(returned.A, returned.B.copy(), 2.0)
    moved.B[:, 1] += 1
    assert change(moved, got)[0].shape == (48, 1)


# Cores ----------------------------------------------------------------------------------------------------------------


def cored(rank: int, seed: int, scale: float = 2.0) -> LoraFactors:
    """In float64, on the first rows and columns of common ones."""
    rows, columns = np.random.default_rng(0).normal(size=(9, 40)), np.random.default_rng(1).normal(size=(30, 9))
    core = np.random.default_rng(seed).normal(size=(rank, rank))
    return LoraFactors(rows[:rank], columns[:, :rank], scale, core)


@pytest.mark.parametrize(("trained", "received"), [(9, 9), (1, 1), (5, 3), (3, 5)])
@pytest.mark.parametrize("scale", [2.0, 0.3])
def test_a_core_lies_between_the_factors_wherever_a_product_is_formed(
    trained: int, received: int, scale: float
) -> None:
    one, other = cored(trained, 2), cored(received, 3, scale)
    assert one.core is not None
    dense = one.scale * one.B @ one.core @ one.A
    assert np.allclose(product(one), dense, rtol=1e-12, atol=1e-12)
    left, right = pair(one, 0.25)
    assert np.linalg.norm(left @ right - 0.25 * dense) <= 1e-12 * np.linalg.norm(dense)
    for before in (other, folded(other)):
        left, right = change(one, before, 0.25)
        wanted = 0.25 * (dense - product(other))
        assert np.linalg.norm(left @ right - wanted) <= 1e-12 * np.linalg.norm(wanted)
    left, right = change(one, one)
    assert not left.size
    report = distance(one, total([pair(one)], one.shape))
    assert report.relative_error < 1e-12
    assert report.singular_values == pytest.approx(np.linalg.svd(dense, compute_uv=False)[:trained], rel=1e-9)


def test_a_core_is_not_left_out_where_it_would_have_no_place() -> None:
    one = cored(3, 2)
    assert one.core is not None
    calls: list[Callable[[], object]] = [
        lambda: rescaled(one, 1.0),
        lambda: tail(one, 1, 2),
        lambda: concatenated(one, folded(one)),
        lambda: concatenated(folded(one), one),
    ]
    for call in calls:
        with pytest.raises(AdapterMismatch, match="core"):
            call()
    with pytest.raises(AdapterMismatch, match="lora_core of shape"):
        LoraFactors(one.A, one.B, 1.0, np.ones((2, 2)))
    assert not is_finite(Adapter({"m": replace(one, core=np.full((3, 3), np.nan))}))
    assert np.array_equal(product(prefix(one, 2)), product(LoraFactors(one.A[:2], one.B[:, :2], 2.0, one.core[:2, :2])))
