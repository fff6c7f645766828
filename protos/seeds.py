"""Random streams by name: every use of randomness has its own stream, so that none depends on the order of the others.

Not for privacy noise, which needs an unpredictable source.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, *names: object) -> np.random.Generator:
    """A generator that depends on the seed and on every name, and on nothing else.

    Args:
        seed: The experiment's seed.
        *names: What the stream is for, such as `"batches", client_id, round`.

    Returns:
        A fresh PCG64 generator.
    """
    return np.random.default_rng(integer(seed, *names))


def integer(seed: int, *names: object) -> int:
    """A 64-bit integer that depends on the seed and on every name.

    Args:
        seed: The experiment's seed.
        *names: What it is for.

    Returns:
        0 <= n < 2**63, fit for `torch.manual_seed` too.
    """
    text = "\x1f".join([str(seed), *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
