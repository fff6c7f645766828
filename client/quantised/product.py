"""The product of inputs with a matrix that is made from its codes when it is needed, and for the gradient once more. Neither is
kept: whoever computes activations again finds none left over from the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def product(inputs: torch.Tensor, layer: Any, weights: Callable[[Any, torch.dtype], torch.Tensor]) -> torch.Tensor:
    """A layer's output.

    Args:
        inputs: (..., d_in).
        layer: A linear layer.
        weights: Makes its matrix (d_out, d_in), in a format.

    Returns:
        (..., d_out), with a gradient for the inputs.
    """
    found: torch.Tensor = _Product.apply(inputs, layer, weights)  # type: ignore[no-untyped-call]
    return found if layer.bias is None else found + layer.bias.to(found.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: Any, weights: Any) -> torch.Tensor:
        ctx.layer, ctx.weights, ctx.dtype = layer, weights, inputs.dtype
        return torch.nn.functional.linear(inputs, weights(layer, inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return upstream[0] @ ctx.weights(ctx.layer, ctx.dtype), None, None
