"""Numerics of exact aggregation, one layer at a time, in float64.

A layer's target G + eta * sum_k p_k (W_k - T_k) is held as a stack of columns L (m, R) and rows R (R, n) and compressed by
QR of both and an SVD of the small core, so that no m x n array exists while R < mn/(m+n); beyond that the dense sum is
the smaller form. FLoRA's stacking (Wang et al. 2024, arXiv:2409.05976) with the optimal truncation of Eckart and Young.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lamina.protos.adapter import LoraFactors
from lamina.strategies.base import LayerReport

Matrix = NDArray[np.float64]
Pair = tuple[Matrix, Matrix]

# Singular values below this share of the largest are rounding of the float32 factors, not information.
NUMERICAL_RANK = 1e-9
_BLOCK_ROWS = 512


def pair(factors: LoraFactors, weight: float = 1.0) -> Pair:
    """Columns and rows whose product is `weight * scale * B @ A`, without the slots that are zero.

    Args:
        factors: Any float dtype.
        weight: Any sign.

    Returns:
        (m, r') and (r', n), float64, r' <= r.
    """
    return _without_zeros(factors.B.astype(np.float64) * (weight * factors.scale), factors.A.astype(np.float64))


def change(trained: LoraFactors, received: LoraFactors | None, weight: float = 1.0) -> Pair:
    """Columns and rows of `weight * (W_k - T_k)`, the client's change.

    Written as (B - B_t) A + B_t (A - A_t), so that what was not trained gives exact zeros and is left out.

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
        The sum. Its memory is at most that of the smaller form plus one pair.
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
    return Sum(np.concatenate(lefts, axis=1), np.concatenate(rights))


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
        q_left, r_left = np.linalg.qr(target.left)
        q_right, r_right = np.linalg.qr(target.right.T)
        core = r_left @ r_right.T
        u, sigma, vt = np.linalg.svd(core, full_matrices=False)
        keep = _kept(sigma, rank_cap)
        root = np.sqrt(sigma[:keep])
        columns = (q_left @ (u[:, :keep] * root)).astype(np.float32)
        rows = (q_right @ (vt[:keep].T * root)).astype(np.float32)
        error = _core_distance(core, (q_left, columns), (q_right, rows))
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


def _core_distance(
    core: Matrix, left: tuple[Matrix, NDArray[np.float32]], right: tuple[Matrix, NDArray[np.float32]]
) -> float:
    """Distance of stored float32 factors from Q_l core Q_r', split into parts in and out of the two bases."""
    inside_left, outside_left = _split(*left)
    inside_right, outside_right = _split(*right)
    squared = float(np.square(core - inside_left @ inside_right.T).sum())
    squared += float((outside_left * (inside_right.T @ inside_right)).sum())
    squared += float((outside_right * (inside_left.T @ inside_left)).sum())
    squared += float((outside_left * outside_right).sum())
    return float(np.sqrt(max(squared, 0.0)))


def _split(basis: Matrix, stored: NDArray[np.float32]) -> Pair:
    """Coordinates of the stored columns in the basis, and the Gram matrix of what lies outside it."""
    exact = stored.astype(np.float64)
    inside = basis.T @ exact
    exact -= basis @ inside
    return inside, exact.T @ exact


def distance(stored: LoraFactors, target: Sum) -> LayerReport:
    """How far any stored factors are from a target; for strategies that do not aim at it.

    Args:
        stored: Factors of the layer.
        target: The exact aggregate.

    Returns:
        A report with the relative error and the stored singular values.
    """
    minus = pair(stored, -1.0)
    if target.dense is not None:
        norm, error = float(np.linalg.norm(target.dense)), _dense_distance(target.dense, stored)
    else:
        norm = _norm(target.left, target.right)
        error = _norm(np.concatenate([target.left, minus[0]], axis=1), np.concatenate([target.right, minus[1]]))
    return LayerReport(error / norm if norm > 0 else float(error > 0), 0.0, norm, singular_values(stored))


def _triangle(matrix: Matrix) -> Matrix:
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
