"""The gradient of each unit by itself, clipped, and their sum: what DP-SGD adds its noise to (Abadi et al. 2016,
arXiv:1607.00133).

Gradients are those of one row of a batch each (`layers`). A unit may have several rows, which may lie in several micro-batches:
they are added up before anything is clipped. The bound is on the norm over all trained tensors together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from lamina.client.private.layers import Sheet, covering
from lamina.protos.errors import ConfigError


@contextmanager
def attached(model: torch.nn.Module, parameters: Mapping[str, Parameter]) -> Iterator[Sheet]:
    """Have a model give the gradient of every row by itself, and no other; it is as it was when this ends.

    Args:
        model: What is trained.
        parameters: Name -> parameter: what is trained, and all of it.

    Yields:
        Where the gradients go.

    Raises:
        ConfigError: If a trained parameter is of a layer that is not covered, or is not listed.
    """
    listed = {parameter: name for name, parameter in parameters.items()}
    sheet, covered = Sheet(listed), set[Parameter]()
    before: list[tuple[torch.nn.Module, Any]] = []
    try:
        for path, module in model.named_modules():
            own = [(name, one) for name, one in module._parameters.items() if one is not None and one.requires_grad]
            if not own:
                continue
            forward = covering(module, sheet)
            for name, parameter in own:
                if forward is None or parameter not in listed:
                    raise ConfigError(
                        f"{path}.{name}: expected a trained parameter of a linear layer, a LayerNorm or an RMSNorm, got one of "
                        f"{type(module).__name__}, whose gradient cannot be clipped row by row. Leave it out of "
                        "lora.target_modules, or set privacy.mode=none."
                    )
            before.append((module, module.__dict__.get("forward")))
            covered.update(parameter for _, parameter in own)
            module.forward = forward
        if missing := [name for parameter, name in listed.items() if parameter not in covered]:
            raise ConfigError(f"{missing[0]}: expected a parameter of a layer of the model that takes gradients.")
        yield sheet
    finally:
        for module, forward in before:
            del module.forward
            if forward is not None:
                module.forward = forward


@dataclass(eq=False)
class ClippedSum:
    """What a step has added up so far.

    Attributes:
        total: Parameter by parameter (its size,) float32: the sum of clipped gradients of complete units.
        waiting: The same of the unit whose rows go on in the next micro-batch, not clipped; None where there is none.
    """

    total: list[torch.Tensor]
    waiting: list[torch.Tensor] | None = None


def nothing(sheet: Sheet) -> ClippedSum:
    """The sum over no unit.

    Args:
        sheet: For sizes.

    Returns:
        Zeros.
    """
    return ClippedSum([torch.zeros(one.numel(), device=one.device) for one in sheet.names])


def check_unused(sheet: Sheet) -> None:
    """Raise if autograd has found a gradient of its own, after a backward pass.

    Args:
        sheet: With the parameters.

    Raises:
        ConfigError: If a parameter was used outside of the layers that are covered.
    """
    for parameter, name in sheet.names.items():
        if parameter.grad is not None:
            raise ConfigError(
                f"{name}: expected it to be used by its own layer alone, but another part of the model reads it as well, so that "
                "its gradient is not clipped. Leave it out of lora.target_modules."
            )


def add(found: ClippedSum, sheet: Sheet, units: Sequence[int], goes_on: bool, clip: float) -> torch.Tensor:
    """Clip the gradients of a micro-batch, after its backward pass, and add them.

    A unit whose gradient is not finite adds nothing.

    Args:
        found: What is added to.
        sheet: With the gradients.
        units: Unit of each row; rows of one unit follow each other, also over micro-batches.
        goes_on: Whether the last unit has rows in the next micro-batch.
        clip: Largest L2 norm of a unit.

    Returns:
        (units,) float32: the norms of the complete units before clipping.

    Raises:
        ConfigError: See `check_unused`.
    """
    check_unused(sheet)
    blocks = [sheet.blocks[parameter][: sheet.rows] for parameter in sheet.names]
    order = list(dict.fromkeys(units))
    if len(order) < len(units):
        index = torch.tensor([order.index(unit) for unit in units], device=blocks[0].device)
        blocks = [torch.zeros(len(order), b.shape[1], device=b.device).index_add_(0, index, b) for b in blocks]
    if found.waiting is not None:
        for block, earlier in zip(blocks, found.waiting, strict=True):
            block[0] += earlier
    found.waiting = [block[-1].clone() for block in blocks] if goes_on else None
    if goes_on:
        blocks = [block[:-1] for block in blocks]
    norms: torch.Tensor = torch.stack([torch.linalg.vector_norm(block, dim=1) for block in blocks]).norm(dim=0)
    finite = torch.isfinite(norms)
    if not bool(finite.all()):
        for block in blocks:
            block[~finite] = 0
    factors = torch.where(finite, (clip / norms.clamp(min=1e-30)).clamp(max=1.0), torch.zeros_like(norms))
    for total, block in zip(found.total, blocks, strict=True):
        total += factors @ block
    return norms
