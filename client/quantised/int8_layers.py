"""int8 layers in training on devices where bitsandbytes multiplies with the dequantised matrix. Its function keeps the inputs as
a plain attribute, out of autograd's sight: a model that computes its activations again held those of all layers all the same.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from lamina.client.quantised.product import product

_DEQUANTISED = ("cpu", "xpu")


def mend(layer: Any) -> None:
    """Let a layer keep nothing for its gradient; an evaluation multiplies as before.

    Args:
        layer: Any; one that is not bitsandbytes' of 8 bits is left as it is.
    """
    if layer.weight.dtype == torch.int8 and hasattr(layer.weight, "SCB"):
        layer.forward = functools.partial(_forward, layer)


def _forward(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    if not layer.training or inputs.device.type not in _DEQUANTISED:
        plain: torch.Tensor = type(layer).forward(layer, inputs)
        return plain
    return product(inputs, layer, weights)


def weights(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The matrix, as the library makes it.

    Args:
        layer: Of 8 bits.
        dtype: Wanted.

    Returns:
        (d_out, d_in).
    """
    # The library moves the scales from the weight to its own state when a layer is first evaluated.
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    values: torch.Tensor = layer.weight.data.to(dtype)
    return values.mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
