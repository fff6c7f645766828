"""Orthonormal vectors that two machines draw from one seed, bit for bit: rows of a cosine transform with random signs.

Row i of frequency f is sign_j * sqrt(2 / n) * cos(pi (2 j + 1) f / (2 n)): with one sign for each position the rows stay exactly
orthonormal, and with distinct frequencies in random order they sketch a space about as well as Gaussian ones (Tropp 2011,
arXiv:1011.1595). No row depends on how many are asked for, so those of a smaller rank are the first of a larger one. Each costs
its length; Gram-Schmidt would cost rank times as much, and its sums depend on the order in which a library adds.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lamina.protos import seeds
from lamina.protos.adapter import Array
from lamina.protos.errors import AdapterMismatch

_TERMS = 14


def orthonormal_rows(seed: int, what: str, module: str, rank: int, length: int) -> Array:
    """The first rows of a random orthonormal matrix.

    Made from raw bits of PCG64 and from sums, products and square roots of float64 alone, which every machine rounds alike; the
    cosines of a library differ in the last bit.

    Args:
        seed: Of the run.
        what: What the rows are for.
        module: Whose.
        rank: How many, at most `length`.
        length: Of each.

    Returns:
        (rank, length), float32; orthonormal up to float32 rounding.

    Raises:
        AdapterMismatch: If there cannot be so many.
    """
    if rank > length:
        raise AdapterMismatch(f"{module}: expected at most {length} orthonormal rows of that length, got rank {rank}.")
    raw = np.asarray(seeds.stream(seed, what, module).bit_generator.random_raw(2 * length), np.uint64)
    signs = np.where(raw[:length] >> np.uint64(63), 1.0, -1.0)
    frequencies = np.argsort(raw[length:], kind="stable")[:rank].reshape(-1, 1).astype(np.int64)
    at = (2 * np.arange(length, dtype=np.int64) + 1) * frequencies % (4 * length)
    scale = np.where(frequencies == 0, np.sqrt(1.0 / length), np.sqrt(2.0 / length))
    return np.asarray(_cosines(length)[at] * (scale * signs), np.float32)


@lru_cache(maxsize=16)
def _cosines(length: int) -> NDArray[np.float64]:
    """cos(pi m / (2 length)) for m < 4 length, from the series on the first half quadrant and symmetry."""
    m = np.arange(length + 1)
    low = m * 2 <= length
    angle = np.where(low, m, length - m) * (np.pi / (2 * length))
    square, cosine, sine = angle * angle, np.zeros_like(angle), np.zeros_like(angle)
    for k in range(_TERMS, 0, -1):  # Horner: 1 - x^2 / (1 * 2) (1 - x^2 / (3 * 4) (...))
        cosine = 1.0 - square / ((2 * k - 1) * (2 * k)) * (cosine if k < _TERMS else 1.0)
        sine = 1.0 - square / ((2 * k) * (2 * k + 1)) * (sine if k < _TERMS else 1.0)
    quadrant = np.where(low, cosine, angle * sine)
    half = np.concatenate([quadrant, -quadrant[-2::-1]])  # m = 0 ... 2 length
    return np.concatenate([half, half[-2:0:-1]])
