"""A low-rank part that makes good some of what quantisation loses of each matrix, W - Q(W): its largest singular values (LoftQ,
arXiv 2310.08659, one step; LQ-LoRA's form). It is fixed and the site's own: never trained, never sent, and no part of the
adapter, which is defined against the full-precision base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lamina.client.quantised.selftest import dequantised, is_quantised

# Where both sides are larger, the singular values are found by random projections, with these many more than are wanted.
_WHOLE, _MORE, _POWERS = 1024, 8, 4


def factors(weight: torch.Tensor, quantised: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of what was lost.

    Args:
        weight: (d_out, d_in), as it was.
        quantised: What the quantised matrix stands for.
        rank: Of the approximation.

    Returns:
        A (rank, d_in) and B (d_out, rank), float32; B A is the truncated singular value decomposition, each with half of it.
    """
    lost = weight.float() - quantised.to(weight.device).float()
    rank = min(rank, *lost.shape)
    if min(lost.shape) <= _WHOLE:
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(lost, q=min(rank + _MORE, *lost.shape), niter=_POWERS)
            right = right.T
    root = values[:rank].sqrt()
    return (root[:, None] * right[:rank]).contiguous(), (left[:, :rank] * root).contiguous()


def of_model(
    model: Any, exact: Mapping[str, torch.Tensor], rank: int, dtype: torch.dtype
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors of every quantised layer of a model.

    Args:
        model: Quantised, and not yet wrapped.
        exact: Linear layer -> its weights as they were.
        rank: Of the approximations.
        dtype: Of the factors.

    Returns:
        Module -> (A, B); layers that are not quantised are left out.
    """
    found = {}
    for module, weight in exact.items():
        layer = model.get_submodule(module)
        if is_quantised(layer):
            a, b = factors(weight, dequantised(layer), rank)
            found[module] = a.to(dtype), b.to(dtype)
    return found


def to_files(parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors by name, for a file.

    Args:
        parts: Module -> (A, B).

    Returns:
        `<module>/A` and `<module>/B`.
    """
    return {
        f"{module}/{name}": tensor for module, pair in parts.items() for name, tensor in zip("AB", pair, strict=True)
    }


def from_files(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The inverse of `to_files`.

    Args:
        tensors: By name.

    Returns:
        Module -> (A, B).

    Raises:
        KeyError: If one lacks its other.
    """
    modules = sorted({name.rpartition("/")[0] for name in tensors})
    return {module: (tensors[f"{module}/A"], tensors[f"{module}/B"]) for module in modules}
