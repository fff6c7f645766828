"""Numbers that nobody can foretell: noise and sampling of private mechanisms, from the key stream of AES-256 in counter mode.

A generator that is seeded by an experiment is of no use against whoever knows or guesses the seed: with the noise known, nothing
is private, and clients of one seed would add the same noise. So a deployment takes its key from the system (`secret`), each time
anew; a simulation derives it from the run's seed and the names of what it is for (`seeded`), so that runs repeat, and claims
nothing.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lamina.protos.adapter import Array

_CHUNK = 2**18  # numbers at one time, so that 10 million need no 10 million of each intermediate
# What is released lies on a grid of this many standard deviations of the noise.
GRID = 2.0**-20


class Stream:
    """Uniform and normal numbers of one key. Not for more than one thread; a forked process must not go on with it.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._owner = os.getpid()

    def _words(self, count: int) -> Any:
        if os.getpid() != self._owner:
            raise RuntimeError("a stream of noise was taken over by a forked process, which would repeat its numbers")
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), np.uint64)

    def uniform(self, count: int) -> Array:
        """Uniform numbers.

        Args:
            count: How many.

        Returns:
            (count,) float64 in [0, 1), multiples of 2^-53.
        """
        return np.asarray((self._words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def normal(self, count: int) -> Array:
        """Standard normal numbers, by Box and Muller from 53-bit uniform ones; none is beyond 8.6.

        Args:
            count: How many.

        Returns:
            (count,) float64.
        """
        found = np.empty(count, np.float64)
        for start in range(0, count, 2 * _CHUNK):
            half = min(_CHUNK, (count - start + 1) // 2)
            uniform = self.uniform(2 * half)
            radius = np.sqrt(-2.0 * np.log1p(-uniform[:half]))  # 1 - u is in (0, 1]
            angle = 2.0 * math.pi * uniform[half:]
            found[start : start + half] = (radius * np.cos(angle))[: count - start]
            rest = found[start + half : start + 2 * half]
            rest[:] = (radius * np.sin(angle))[: len(rest)]
        return found


def secret() -> Stream:
    """A stream that nobody can foretell, from the system's source of randomness; no two are alike.

    Returns:
        A fresh stream.
    """
    return Stream(os.urandom(32))


def seeded(seed: int, *names: object) -> Stream:
    """A stream that depends on the seed and on every name, for simulations, which claim nothing.

    Args:
        seed: Of the run.
        *names: What it is for: a client, a round.

    Returns:
        A fresh stream.
    """
    text = "\x1f".join([str(seed), *(str(name) for name in names)])
    return Stream(HKDF(SHA256(), 32, None, b"lamina simulated noise").derive(text.encode()))


def noised(total: Array, deviation: float, stream: Stream) -> Array:
    """A sum with Gaussian noise, rounded to a grid of 2^-20 deviations.

    The grid is the same whatever the data, and about 2^32 times coarser than the steps of the float64 noise: which float64
    numbers the sampler can make, by which a sum can be told apart from its neighbour (Mironov 2012; Holohan and Braghin 2021,
    arXiv:2107.10138), is not to be seen in what is left. This is an argument, not a proof in the integers.

    Args:
        total: Any shape; finite.
        deviation: Standard deviation of the noise, > 0.
        stream: Where the noise comes from.

    Returns:
        float64, of the same shape.

    Raises:
        ValueError: If the deviation is not positive and finite, or the sum is not finite: nothing is released then.
    """
    if not (deviation > 0 and math.isfinite(deviation)) or not np.isfinite(total).all():
        raise ValueError("expected a finite sum and a positive deviation of the noise")
    noise = stream.normal(total.size).reshape(total.shape)
    step = deviation * GRID
    return np.asarray(np.rint((total.astype(np.float64) + deviation * noise) / step) * step)
