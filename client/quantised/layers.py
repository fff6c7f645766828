"""Which layers of a model are quantised: the linear ones but the output head, as far as a format can hold them."""

from __future__ import annotations

from typing import Any

import torch

from lamina.client.quantised import formats


def not_quantised(model: Any, number_format: str, compute: str) -> list[str]:
    """What stays in the compute format: the output head, and matrices that the format cannot hold.

    Args:
        model: In full precision.
        number_format: Of the linear layers.
        compute: Of the activations.

    Returns:
        Module names.
    """
    shapes = linear_layers(model)
    odd = [name for name, shape in shapes.items() if formats.held(number_format, compute, shape) != number_format]
    head = head_name(model)
    return [head, *odd] if head else odd


def head_name(model: Any) -> str:
    """Name of a model's output head.

    Args:
        model: Of transformers.

    Returns:
        Empty for a model without one.
    """
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if head is not None and module is head), "")


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """What is quantised: every linear layer but the output head.

    Args:
        model: Of transformers.

    Returns:
        Module -> (d_out, d_in).
    """
    head = head_name(model)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != head
    }
