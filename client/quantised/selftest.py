"""Whether the gradients of a quantised base are those of its weights. Quantised training can fail with a loss that looks right:
a kernel for inference that cuts the graph, a layer that packs its weights in an evaluation and never unpacks them.

Each adapted layer's forward and backward pass is held against plain float32 algebra on its own dequantised weights: the gradient
of its factors, and that of its input, by which every layer below learns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from lamina.client.model import SLOT, Base, FrozenHook
from lamina.protos.errors import TrainingError

# Largest relative error by compute format: rounding of the activations, some hundred times below a broken gradient's.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
_TOKENS = 24
_PIECE = 4096


def check(base: Base, when: str) -> float:
    """Hold the gradients of every kind of quantised layer against those of its dequantised weights.

    Args:
        base: With any adapter in its slots; as it was when this returns.
        when: For the message, such as `before the first step`.

    Returns:
        The largest relative error; 0 for a base that is not quantised.

    Raises:
        TrainingError: If one is larger than the compute format's rounding explains. Nothing should be trained then.
    """
    worst = 0.0
    for module in representatives(base):
        error = gradient_error(base, module)
        worst = max(worst, error)
        if not error <= TOLERANCE[base.dtype]:
            raise TrainingError(
                f"self-test {when}: {module}: expected gradients of the {base.format} base within "
                f"{TOLERANCE[base.dtype]:g} of those of its dequantised weights, got {error:.2g}. This device or library "
                f"version does not train {base.format}: set quantisation.format=fp32 or bf16, or update bitsandbytes."
            )
    return worst


def representatives(base: Base) -> Iterator[str]:
    """One module of each kind and shape that is quantised, and the last one.

    Args:
        base: The base.

    Yields:
        Module names.
    """
    seen, last = set(), None
    for module, shape in base.spec.modules.items():
        layer = base.layer(module).base_layer
        if not is_quantised(layer):
            continue
        kind, last = (type(layer), type(layer.weight), shape), module
        if kind not in seen:
            seen.add(kind)
            last = None
            yield module
    if last is not None:
        yield last


def is_quantised(layer: Any) -> bool:
    """Whether a linear layer's weights are in another form than floating-point numbers.

    Args:
        layer: A linear layer.

    Returns:
        True for bitsandbytes' and torchao's.
    """
    weight = layer.weight
    return not weight.dtype.is_floating_point or type(weight) not in (torch.nn.Parameter, torch.Tensor)


def dequantised(layer: Any) -> torch.Tensor:
    """The numbers that a linear layer's weights stand for.

    Args:
        layer: A linear layer, quantised or not.

    Returns:
        float32 (d_out, d_in).
    """
    weight: Any = layer.weight
    values: torch.Tensor = weight.detach()
    if getattr(weight, "quant_state", None) is not None:
        values = _of_codes(weight.data, weight.quant_state)
    elif weight.dtype == torch.int8 and hasattr(weight, "SCB"):
        scale = layer.state.SCB if weight.SCB is None else weight.SCB
        values = weight.data.float().mul_(scale.float().reshape(-1, 1) / 127)
    elif is_quantised(layer):
        values = weight.dequantize()
    return values.float()


def _of_codes(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """What 4-bit codes stand for, by their definition and not by the library's kernel, which is what is on trial."""
    from bitsandbytes.functional import dequantize_blockwise

    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    flat, code = packed.reshape(-1), state.code.float()
    count, size = math.prod(state.shape), state.blocksize
    values = torch.empty(count, device=packed.device)
    # Some at a time, as an index of all would take twice what the matrix does.
    for start in range(0, count, _PIECE * size):
        end = min(count, start + _PIECE * size)
        some = flat[start // 2 : (end + 1) // 2]
        indices = torch.stack([some >> 4, some & 0xF], dim=1).reshape(-1)[: end - start].int()
        blocks = scales[start // size : -(-end // size)].float()
        values[start:end] = code[indices] * blocks.repeat_interleave(size)[: end - start]
    return values.reshape(tuple(state.shape))


def compensated(layer: Any) -> torch.Tensor | None:
    """What compensation adds to a layer's weights.

    Args:
        layer: A base layer.

    Returns:
        float32 (d_out, d_in), or None.
    """
    for hook in layer._forward_hooks.values():
        if isinstance(hook, FrozenHook) and hook.compensation:
            a, b = hook.compensation
            return b.float() @ a.float()
    return None


def gradient_error(base: Base, module: str, rank: int = 4) -> float:
    """The relative error of one layer's gradients.

    Args:
        base: The base; its slots are as before when this returns.
        module: Which layer.
        rank: Of the factors that are tried.

    Returns:
        The largest of those of A, B and the input, each ||g - g'|| / ||g'||.
    """
    layer = base.layer(module)
    d_out, d_in = base.spec.modules[module]
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(base.device)

    rows, columns = drawn(rank, d_in) / math.sqrt(d_in), drawn(d_out, rank) / math.sqrt(rank)
    inputs, upstream = drawn(_TOKENS, d_in).to(base.dtype), drawn(_TOKENS, d_out).to(base.dtype)
    kept = (
        layer.lora_A[SLOT].weight,
        layer.lora_B[SLOT].weight,
        layer.r[SLOT],
        layer.scaling[SLOT],
        layer._disable_adapters,
    )
    frozen = base.frozen.pop(module, None)
    beside = compensated(layer.base_layer)
    training = layer.training
    try:
        found = torch.nn.Parameter(rows.clone()), torch.nn.Parameter(columns.clone())
        layer.lora_A[SLOT].weight, layer.lora_B[SLOT].weight = found
        layer.r[SLOT], layer.scaling[SLOT], layer._disable_adapters = rank, 1.0, False
        layer.train()
        x = inputs.clone().requires_grad_()
        (layer(x.unsqueeze(0)).squeeze(0) * upstream).sum().backward()
        got = [found[0].grad, found[1].grad, x.grad]
    finally:
        layer.lora_A[SLOT].weight, layer.lora_B[SLOT].weight = kept[:2]
        layer.r[SLOT], layer.scaling[SLOT], layer._disable_adapters = kept[2:]
        layer.train(training)
        if frozen is not None:
            base.frozen[module] = frozen
    x, g = inputs.float(), upstream.float()
    weights = dequantised(layer.base_layer)
    if beside is not None:
        weights = weights + beside
    wanted = [(g @ columns).T @ x, g.T @ (x @ rows.T), g @ weights + (g @ columns) @ rows]
    errors = [
        math.inf if one is None else float((one.float() - other).norm() / other.norm())
        for one, other in zip(got, wanted, strict=True)
    ]
    return max(errors)
