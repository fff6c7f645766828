"""The frozen part that rides beside the trainable adapter at a client: factors, or one matrix where that is smaller.

`stack` adds to it every round; `residual` replaces it. It is never merged into the base, whose number format may be
coarser than the part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lamina.protos.adapter import Adapter, LoraFactors
from lamina.protos.errors import AdapterMismatch
from lamina.protos.files import sha256


@dataclass(frozen=True, eq=False)
class Frozen:
    """What a client holds frozen.

    Attributes:
        parts: Module -> (A, B) with the scale folded in, applied one after the other, or (W,).
        digest: Names the content, so that clients with one history share one object.
    """

    parts: Mapping[str, tuple[torch.Tensor, ...]]
    digest: str


def digest_of(part_hash: str, before: Frozen | None) -> str:
    """A name for `before` plus what an encoded part adds.

    Args:
        part_hash: SHA-256 of the encoded part.
        before: What is there, or None.

    Returns:
        Hex.
    """
    return sha256(f"{before.digest if before else ''}|{part_hash}".encode())


def added(before: Frozen | None, adapter: Adapter, digest: str = "") -> Frozen:
    """The frozen part with an adapter added to it.

    Args:
        before: What is held, or None for nothing.
        adapter: Decoded frozen part of a release.
        digest: Names the result; see `digest_of`.

    Returns:
        A new value; in each module the smaller of factors and one matrix.
    """
    parts = dict(before.parts) if before else {}
    for module, factors in adapter.lora.items():
        if factors.rank:
            parts[module] = _sum(parts.get(module), factors)
    return Frozen(parts, digest)


def _sum(held: tuple[torch.Tensor, ...] | None, factors: LoraFactors) -> tuple[torch.Tensor, ...]:
    rows = torch.tensor(factors.A)
    columns = torch.tensor(factors.B * np.float32(factors.scale))
    d_out, d_in = factors.shape
    if held is None or len(held) == 2:
        if held is not None:
            rows, columns = torch.cat([held[0], rows]), torch.cat([held[1], columns], dim=1)
        if rows.shape[0] * (d_out + d_in) < d_out * d_in:
            return rows, columns
        return ((columns.double() @ rows.double()).float(),)
    return ((held[0].double() + columns.double() @ rows.double()).float(),)


def to_files(frozen: Frozen) -> dict[str, np.ndarray]:
    """The tensors of a frozen part by name, for a checkpoint.

    Args:
        frozen: The part.

    Returns:
        `<module>/A` and `<module>/B`, or `<module>/W`.
    """
    names = {1: ("W",), 2: ("A", "B")}
    return {
        f"{module}/{name}": tensor.numpy()
        for module, parts in frozen.parts.items()
        for name, tensor in zip(names[len(parts)], parts, strict=True)
    }


def from_files(tensors: Mapping[str, np.ndarray], digest: str) -> Frozen:
    """The inverse of `to_files`.

    Args:
        tensors: Name -> array.
        digest: As saved.

    Returns:
        The part.

    Raises:
        AdapterMismatch: If a name is not one of `to_files`.
    """
    parts: dict[str, tuple[torch.Tensor, ...]] = {}
    for module in sorted({name.rsplit("/", 1)[0] for name in tensors}):
        found = {
            name.rsplit("/", 1)[1]: torch.tensor(v) for name, v in tensors.items() if name.startswith(module + "/")
        }
        if set(found) == {"W"}:
            parts[module] = (found["W"],)
        elif set(found) == {"A", "B"}:
            parts[module] = (found["A"], found["B"])
        else:
            raise AdapterMismatch(f"frozen part of {module}: expected A and B, or W, got {sorted(found)}.")
    return Frozen(parts, digest)
