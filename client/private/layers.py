"""Layers whose backward pass gives the gradient of their parameters for each row of the batch by itself, in float32.

A layer's forward is replaced by one that computes the same. Its backward pass writes into a `Sheet`, where the gradients of all
parameters lie until they are clipped, and gives autograd none: `.grad` stays None, and whoever finds one there knows that a
parameter was used outside of what is covered.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.functional import linear

from lamina.protos.errors import ConfigError

_NORMS = ("LayerNorm", "RMSNorm")
_PROBED = 5  # rows on which a norm is held against what it should be
_AGREE = 1e-5


@dataclass(eq=False)
class Sheet:
    """Gradients of one micro-batch, row by row.

    Attributes:
        names: Parameter -> its name, for messages.
        rows: How many rows the micro-batch has.
        blocks: Parameter -> (rows, its size) float32, the sum over all places where it is used.
    """

    names: Mapping[Parameter, str]
    rows: int = 0
    blocks: dict[Parameter, torch.Tensor] = field(default_factory=dict)

    def begin(self, rows: int) -> None:
        """Empty the sheet for a micro-batch of so many rows."""
        self.rows = rows
        for parameter in self.names:
            held = self.blocks.get(parameter)
            if held is None or held.shape[0] < rows or held.device != parameter.device:
                self.blocks[parameter] = torch.zeros(rows, parameter.numel(), device=parameter.device)
            else:
                held[:rows].zero_()

    def block(self, parameter: Parameter, rows: int) -> torch.Tensor:
        """Where the gradients of a parameter go.

        Args:
            parameter: Whose.
            rows: First size of what its layer got.

        Returns:
            (rows, numbers of the parameter).

        Raises:
            ConfigError: If the layer mixes rows, or takes them in another dimension.
        """
        if rows != self.rows:
            raise ConfigError(
                f"{self.names[parameter]}: expected the {self.rows} rows of the batch in the first dimension of its input, got "
                f"{rows}. The gradient of one row cannot be told from it: leave it out of lora.target_modules."
            )
        return self.blocks[parameter][:rows]


class _Linear(torch.autograd.Function):
    """y = x W^T + b."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Parameter, bias: Parameter | None, sheet: Sheet) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        # What is saved comes back as another object where activations are computed again.
        ctx.sheet, ctx.parameters = sheet, (weight, bias)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        known, offset = ctx.parameters
        rows = x.shape[0]
        ours = upstream.reshape(rows, -1, upstream.shape[-1]).float()
        if known.requires_grad:
            theirs = x.reshape(rows, -1, x.shape[-1]).float()
            ctx.sheet.block(known, rows).view(rows, *known.shape).baddbmm_(ours.transpose(1, 2), theirs)
        if offset is not None and offset.requires_grad:
            ctx.sheet.block(offset, rows).add_(ours.sum(1))
        passed = (upstream.to(weight.dtype) @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        return passed, None, None, None


class _Scale(torch.autograd.Function):
    """y = n (w + shift) + b, number by number along the last dimension."""

    @staticmethod
    def forward(
        ctx: Any, n: torch.Tensor, weight: Parameter, bias: Parameter | None, shift: float, sheet: Sheet
    ) -> torch.Tensor:
        factor = (weight + shift).to(n.dtype)
        ctx.save_for_backward(n, factor)
        ctx.sheet, ctx.parameters = sheet, (weight, bias)
        return n * factor if bias is None else n * factor + bias.to(n.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        n, factor = ctx.saved_tensors
        known, offset = ctx.parameters
        rows, size = n.shape[0], n.shape[-1]
        if known.requires_grad:
            each = (upstream.float() * n.float()).reshape(rows, -1, size).sum(1)
            ctx.sheet.block(known, rows).add_(each)
        if offset is not None and offset.requires_grad:
            ctx.sheet.block(offset, rows).add_(upstream.float().reshape(rows, -1, size).sum(1))
        return (upstream * factor if ctx.needs_input_grad[0] else None), None, None, None, None


def covering(module: torch.nn.Module, sheet: Sheet) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A forward for a layer with trained parameters, of which each row's gradient goes to a sheet.

    Args:
        module: The layer.
        sheet: Where to.

    Returns:
        The forward, or None where there is none for such a layer.
    """
    if type(module) is torch.nn.Linear and _plain(module, ("weight", "bias")):
        return partial(_linear, module, sheet)
    if type(module).__name__.endswith(_NORMS) and _plain(module, ("weight", "bias")):
        found = _normalised(module)
        if found is not None:
            return partial(_scaled, module, *found, sheet)
    return None


def _plain(module: torch.nn.Module, names: Sequence[str]) -> bool:
    """Whether a layer has a weight, no parameters of other names, and no layers within."""
    own = {name: one for name, one in module._parameters.items() if one is not None}
    floating = all(type(one) is Parameter and one.is_floating_point() for one in own.values())
    return "weight" in own and own.keys() <= set(names) and floating and not list(module.children())


def _linear(module: torch.nn.Linear, sheet: Sheet, x: torch.Tensor) -> torch.Tensor:
    return _Linear.apply(x, module.weight, module.bias, sheet)  # type: ignore[no-any-return, no-untyped-call]


def _scaled(
    module: Any, normalise: Callable[..., torch.Tensor], shift: float, sheet: Sheet, x: torch.Tensor
) -> torch.Tensor:
    bias = module._parameters.get("bias")
    return _Scale.apply(normalise(x), module.weight, bias, shift, sheet)  # type: ignore[no-any-return, no-untyped-call]


def _normalised(module: Any) -> tuple[Callable[..., torch.Tensor], float] | None:
    """What a norm does before it scales, and what it adds to its weight; None where it is no such norm.

    It is the module's own code with a weight of ones, or where the weight is one more than it says (Gemma) of zeros, so that
    epsilon, formats and order of operations are those of the model. It is tried before it is believed.
    """
    if module.weight.dim() != 1:
        return None
    size = module.weight.numel()
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(module.weight.device, module.weight.dtype)

    x, weight, bias = drawn(2, _PROBED, size), drawn(size), drawn(size)
    wanted = _with(module, weight, bias)(x).float()
    shift = bias if module._parameters.get("bias") is not None else torch.zeros_like(bias)
    for more, fill in ((0.0, 1.0), (1.0, 0.0)):
        normalise = _with(module, torch.full_like(weight, fill), torch.zeros_like(bias))
        found = normalise(x).float() * (weight.float() + more) + shift.float()
        if (found - wanted).norm() <= _AGREE * wanted.norm():
            return normalise, more
    return None


def _with(module: Any, weight: torch.Tensor, bias: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The forward of a norm with other parameters, without its hooks."""
    other = copy.copy(module)
    values = {"weight": weight, "bias": bias}
    other.__dict__["_parameters"] = {
        name: None if one is None else Parameter(values[name], requires_grad=False)
        for name, one in module._parameters.items()
    }
    return partial(type(module).forward, other)
