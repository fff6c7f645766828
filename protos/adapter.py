"""Adapters as plain values: low-rank factors by module, dense parameters by name.

Knows nothing of models, files or networks. A module's *product* is `scale * B @ A`, shape (d_out, d_in): the change
that the factors add to the frozen weight; with a core C (r, r) between them, `scale * B @ C @ A`. Many factor pairs give one
product; only products are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.protos.errors import AdapterMismatch

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """Factors of one module (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        A: (r, d_in).
        B: (d_out, r).
        scale: The runtime multiplier s of `B @ A`; lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA.
        core: (r, r) between B and A, or None for nothing there (LoRA-XS, Balazy et al. 2024, arXiv:2405.17604).
    """

    A: Array
    B: Array
    scale: float = 1.0
    core: Array | None = None

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise AdapterMismatch(
                f"expected lora_A (r, d_in) and lora_B (d_out, r), got {self.A.shape} and {self.B.shape}. "
                "Pair the factors by their names, never by shape."
            )
        if self.core is not None and self.core.shape != (self.rank, self.rank):
            raise AdapterMismatch(
                f"expected lora_core of shape ({self.rank}, {self.rank}), the rank of its factors, got {self.core.shape}."
            )
        if not np.isfinite(self.scale):
            raise AdapterMismatch(f"expected a finite scale, got {self.scale}. Check lora_alpha and the rank.")

    @property
    def rank(self) -> int:
        """Number of columns of B, the r of both shapes."""
        return int(self.A.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the product."""
        return int(self.B.shape[0]), int(self.A.shape[1])


@dataclass(frozen=True, eq=False)
class Adapter:
    """What is trained instead of the base model.

    Attributes:
        lora: Module name -> factors. May be a lazy mapping: read one module at a time.
        dense: Parameter name -> array; heads, biases and norms, as absolute values.
    """

    lora: Mapping[str, LoraFactors] = field(default_factory=dict)
    dense: Mapping[str, Array] = field(default_factory=dict)


EMPTY = Adapter()


@dataclass(frozen=True)
class Lazy(Mapping[str, Any]):
    """Names to what `read` makes of each, made anew at every look.

    Attributes:
        names: What there is, in its order.
        read: Name to value.
    """

    names: Mapping[str, None]
    read: Callable[[str], Any]

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def product(factors: LoraFactors) -> NDArray[np.float64]:
    """The dense change of one module, `scale * B @ A` with the core between, in float64. For oracles and small modules only.

    Args:
        factors: The factors, any float dtype.

    Returns:
        (d_out, d_in), float64.
    """
    plain = folded(factors)
    return factors.scale * (plain.B.astype(np.float64) @ plain.A.astype(np.float64))


def folded(factors: LoraFactors) -> LoraFactors:
    """The same product of two factors: the core goes into B.

    Args:
        factors: With a core or without.

    Returns:
        `factors` itself without a core, else B C in float64 beside A.
    """
    if factors.core is None:
        return factors
    return LoraFactors(factors.A, factors.B.astype(np.float64) @ factors.core.astype(np.float64), factors.scale)


def _without_core(factors: LoraFactors) -> None:
    """Raise for a core where it would be left out."""
    if factors.core is not None:
        raise AdapterMismatch("expected two factors, got a core between them. Call folded() first.")


def rescaled(factors: LoraFactors, scale: float) -> LoraFactors:
    """The same product at another scale, the square root of the ratio in each factor.

    Args:
        factors: The factors to re-express.
        scale: The scale to give them, > 0.

    Returns:
        Factors in the same dtype; `factors` itself where the scale is already right.

    Raises:
        AdapterMismatch: If a scale is not positive.
    """
    if factors.scale == scale:
        return factors
    if scale <= 0 or factors.scale < 0:
        raise AdapterMismatch(f"expected positive scales, got {factors.scale} -> {scale}. Check lora_alpha.")
    _without_core(factors)
    root = np.sqrt(factors.scale / scale)
    dtype = factors.A.dtype
    return LoraFactors(
        (factors.A.astype(np.float64) * root).astype(dtype), (factors.B.astype(np.float64) * root).astype(dtype), scale
    )


def prefix(factors: LoraFactors, rank: int) -> LoraFactors:
    """The first `rank` rows of A and columns of B, and what lies between them; all where the rank is no larger.

    Args:
        factors: The factors.
        rank: How many to keep, >= 0.

    Returns:
        Views, not copies.
    """
    core = None if factors.core is None else factors.core[:rank, :rank]
    return LoraFactors(factors.A[:rank], factors.B[:, :rank], factors.scale, core)


def tail(factors: LoraFactors, start: int, stop: int) -> LoraFactors:
    """Rows of A and columns of B from `start` to `stop`.

    Args:
        factors: The factors.
        start: First slot.
        stop: One past the last slot.

    Returns:
        Views, not copies; rank 0 where nothing lies between.
    """
    _without_core(factors)
    stop = max(start, stop)
    return LoraFactors(factors.A[start:stop], factors.B[:, start:stop], factors.scale)


def concatenated(first: LoraFactors, second: LoraFactors) -> LoraFactors:
    """Factors whose product is the sum of both products (both must have one scale).

    Args:
        first: Factors of one module.
        second: Factors of the same module and scale.

    Returns:
        Factors of rank r1 + r2.

    Raises:
        AdapterMismatch: If the scales differ.
    """
    if first.scale != second.scale:
        raise AdapterMismatch(f"expected one scale, got {first.scale} and {second.scale}. Call rescaled() first.")
    _without_core(first)
    _without_core(second)
    return LoraFactors(np.concatenate([first.A, second.A]), np.concatenate([first.B, second.B], axis=1), first.scale)


def is_finite(adapter: Adapter) -> bool:
    """Whether every number of the adapter is finite.

    Args:
        adapter: Any adapter.

    Returns:
        False where a NaN or an infinity stands anywhere.
    """
    sides = (side for f in adapter.lora.values() for side in (f.A, f.B, f.core) if side is not None)
    return all(bool(np.isfinite(side).all()) for side in sides) and all(
        bool(np.isfinite(value).all()) for value in adapter.dense.values()
    )
