"""Numerics of exact aggregation, one layer at a time, in float64.

A layer's target G + eta * sum_k p_k (W_k - T_k) is held as a stack of columns L (m, R) and rows R (R, n) and compressed by
QR of both and an SVD of the small core, so that no m x n array exists while R < mn/(m+n); beyond that the dense sum is
the smaller form. FLoRA's stacking (Wang et al. 2024, arXiv:2409.05976) with the optimal truncation of Eckart and Young.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lamina.protos.adapter import LoraFactors, folded
from lamina.strategies.base import LayerReport

Matrix = NDArray[np.float64]
Pair = tuple[Matrix, Matrix]

# Singular values below this share of the largest are rounding of the float32 factors, not information.
NUMERICAL_RANK = 1e-9
_BLOCK_ROWS = 512


def pair(factors: LoraFactors, weight: float = 1.0) -> Pair:
    """Columns and rows whose product is `weight * scale * B @ A`, without the slots that are zero; a core goes into the columns.

    Args:
        factors: Any float dtype.
        weight: Any sign.

    Returns:
        (m, r') and (r', n), float64, r' <= r.
    """
    plain = folded(factors)
    return _without_zeros(plain.B.astype(np.float64) * (weight * factors.scale), plain.A.astype(np.float64))


def change(trained: LoraFactors, received: LoraFactors | None, weight: float = 1.0) -> Pair:
    """Columns and rows of `weight * (W_k - T_k)`, the client's change.

    Written as (B - B_t) A + B_t (A - A_t), so that what was not trained gives exact zeros and is left out. Of factors with a core
    it is B (C - C_t) A: the others are the same for all and never move.

    Args:
        trained: W_k, what the client sent.
        received: T_k as the client decoded it, or None for zero.
        weight: p_k, times the server's learning rate.

    Returns:
        (m, r') and (r', n), float64.
    """
    if received is None or received.rank == 0:
        return pair(trained, weight)
    if received.scale != trained.scale or received.rank > trained.rank:
        plus, minus = pair(trained, weight), pair(received, -weight)
        return np.concatenate([plus[0], minus[0]], axis=1), np.concatenate([plus[1], minus[1]])
    if trained.core is not None and received.core is not None:
        core = np.array(trained.core, np.float64)
        core[: received.rank, : received.rank] -= received.core
        return pair(replace(trained, core=core), weight)
    trained, received = folded(trained), folded(received)
    rank, factor = received.rank, weight * trained.scale
    rows, start_rows = trained.A.astype(np.float64), received.A.astype(np.float64)
    columns, start_columns = trained.B.astype(np.float64), received.B.astype(np.float64)
    columns[:, :rank] -= start_columns
    return _without_zeros(
        np.concatenate([columns * factor, start_columns * factor], axis=1),
        np.concatenate([rows, rows[:rank] - start_rows]),
    )


def _without_zeros(columns: Matrix, rows: Matrix) -> Pair:
    used = columns.any(axis=0) & rows.any(axis=1)
    return (columns, rows) if used.all() else (columns[:, used], rows[used])


@dataclass(frozen=True, eq=False)
class Sum:
    """A sum of pairs in the smaller of two forms: `left @ right`, or `dense`."""

    left: Matrix
    right: Matrix
    dense: Matrix | None = None


def total(pairs: Iterable[Pair], shape: tuple[int, int]) -> Sum:
    """Add pairs up, stacked while the stack is smaller than the matrix and dense from there on.

    Args:
        pairs: (m, r) and (r, n) each; read once, one at a time.
        shape: (m, n).

    Returns:
        The sum. While it is formed its memory is at most twice that of the smaller form, plus one pair.
    """
    m, n = shape
    lefts: list[Matrix] = []
    rights: list[Matrix] = []
    rank, dense = 0, None
    for left, right in pairs:
        rank += left.shape[1]
        if dense is None and rank * (m + n) < m * n:
            lefts.append(left)
            rights.append(right)
            continue
        if dense is None:
            dense = np.zeros(shape)
            while lefts:
                _add_product(dense, lefts.pop(), rights.pop())
        _add_product(dense, left, right)
    if dense is not None:
        return Sum(np.zeros((m, 0)), np.zeros((0, n)), dense)
    if not lefts:
        return Sum(np.zeros((m, 0)), np.zeros((0, n)))
    left = np.concatenate(lefts, axis=1)
    lefts.clear()
    return Sum(left, np.concatenate(rights))


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK_ROWS) for start in range(0, rows, _BLOCK_ROWS))


def _add_product(dense: Matrix, left: Matrix, right: Matrix) -> None:
    for rows in _blocks(dense.shape[0]):
        dense[rows] += left[rows] @ right


def compress(target: Sum, rank_cap: int | None = None) -> tuple[LoraFactors, LayerReport]:
    """The best factors of a sum: singular-value-ordered and balanced, B'B = AA' = diag(sigma), scale 1.

    Args:
        target: The exact aggregate.
        rank_cap: Keep at most this many singular values; None keeps the numerical rank.

    Returns:
        float32 factors and what was lost. `dropped_norm` is the exact distance before float32 rounding, and optimal
        among factors of that rank.
    """
    if target.dense is not None:
        u, sigma, vt = np.linalg.svd(target.dense, full_matrices=False)
        keep = _kept(sigma, rank_cap)
        root = np.sqrt(sigma[:keep])
        factors = LoraFactors((root[:, None] * vt[:keep]).astype(np.float32), (u[:, :keep] * root).astype(np.float32))
        error = _dense_distance(target.dense, factors)
    else:
        # With left = Q_l R_l and right' = Q_r R_r, the core R_l R_r' = U S V' has the singular values of the sum, and
        # Q_l U sqrt(S) = left R_r' V / sqrt(S): neither Q is ever formed.
        r_left, r_right = _triangle(target.left), _triangle(target.right.T)
        u, sigma, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
        keep = _kept(sigma, rank_cap)
        root = np.sqrt(sigma[:keep])
        columns, rounded_left = _stored(target.left, r_right.T @ (vt[:keep].T / root))
        rows, rounded_right = _stored(target.right.T, r_left.T @ (u[:, :keep] / root))
        error = _stored_distance(sigma[keep:], rounded_left, rounded_right)
        factors = LoraFactors(np.ascontiguousarray(rows.T), columns)
    return factors, _report(sigma, keep, error)


def _kept(sigma: Matrix, rank_cap: int | None) -> int:
    if sigma.size == 0 or sigma[0] == 0:
        return 0
    rank = int((sigma > NUMERICAL_RANK * sigma[0]).sum())
    return rank if rank_cap is None else min(rank, rank_cap)


def _report(sigma: Matrix, keep: int, error: float) -> LayerReport:
    norm = float(np.linalg.norm(sigma))
    return LayerReport(
        relative_error=error / norm if norm > 0 else 0.0,
        dropped_norm=float(np.linalg.norm(sigma[keep:])),
        target_norm=norm,
        singular_values=tuple(float(value) for value in sigma[:keep]),
    )


def _dense_distance(dense: Matrix, factors: LoraFactors) -> float:
    rows, squared = factors.A.astype(np.float64) * factors.scale, 0.0
    for block in _blocks(dense.shape[0]):
        squared += float(np.square(dense[block] - factors.B[block].astype(np.float64) @ rows).sum())
    return float(np.sqrt(squared))


@dataclass(frozen=True, eq=False)
class _Rounding:
    """Gram matrices of one side's stored columns s and of what rounding took from them, e: e'e, e's and s's."""

    ee: Matrix
    es: Matrix
    ss: Matrix


def _stored(stack: Matrix, coefficients: Matrix) -> tuple[NDArray[np.float32], _Rounding]:
    """`stack @ coefficients` in float32, and what that took, a block of rows at a time."""
    keep = coefficients.shape[1]
    stored, grams = np.empty((stack.shape[0], keep), np.float32), [np.zeros((keep, keep)) for _ in range(3)]
    for rows in _blocks(stack.shape[0]):
        taken = stack[rows] @ coefficients
        stored[rows] = taken
        kept = stored[rows].astype(np.float64)
        taken -= kept
        for gram, (left, right) in zip(grams, [(taken, taken), (taken, kept), (kept, kept)], strict=True):
            gram += left.T @ right
    return stored, _Rounding(*grams)


def _stored_distance(dropped: Matrix, left: _Rounding, right: _Rounding) -> float:
    """Distance of stored factors from the sum: the dropped singular values, and E (A + F)' + B F'.

    B and A are stored, E and F what rounding took from them. The dropped part is orthogonal to the rest but for E F'.
    """
    exact_right = right.ss + right.es + right.es.T + right.ee
    squared = float(np.square(dropped).sum()) + float((left.ee * exact_right).sum())
    squared += float((left.ss * right.ee).sum()) + 2.0 * float((left.es * (right.es.T + right.ee)).sum())
    return float(np.sqrt(max(squared, 0.0)))


def distance(stored: LoraFactors, target: Sum) -> LayerReport:
    """How far any stored factors are from a target; for strategies that do not aim at it.

    Args:
        stored: Factors of the layer.
        target: The exact aggregate.

    Returns:
        A report with the relative error and the stored singular values.
    """
    stored = folded(stored)
    minus = pair(stored, -1.0)
    if target.dense is not None:
        norm, error = float(np.linalg.norm(target.dense)), _dense_distance(target.dense, stored)
    else:
        norm = _norm(target.left, target.right)
        error = _norm(np.concatenate([target.left, minus[0]], axis=1), np.concatenate([target.right, minus[1]]))
    return LayerReport(error / norm if norm > 0 else float(error > 0), 0.0, norm, singular_values(stored))


def _triangle(matrix: Matrix) -> Matrix:
    """The R of a QR factorisation, of blocks of rows first, so that what is worked on stays in the cache."""
    rows, columns = matrix.shape
    block = max(_BLOCK_ROWS, 2 * columns)
    if rows > 2 * block:
        parts = [np.linalg.qr(matrix[start : start + block], mode="r") for start in range(0, rows, block)]
        matrix = np.concatenate(parts)
    return np.asarray(np.linalg.qr(matrix, mode="r"))


def _norm(left: Matrix, right: Matrix) -> float:
    if left.shape[1] == 0:
        return 0.0
    return float(np.linalg.norm(_triangle(left) @ _triangle(right.T).T))


def singular_values(factors: LoraFactors) -> tuple[float, ...]:
    """Singular values of a product, from its factors alone.

    Args:
        factors: Factors of any rank.

    Returns:
        min(rank, m, n) values, descending.
    """
    left, right = pair(factors)
    if left.shape[1] == 0:
        return ()
    core = _triangle(left) @ _triangle(right.T).T
    return tuple(float(value) for value in np.linalg.svd(core, compute_uv=False))
