"""A format for each matrix: nf4, int8 or bf16 under a budget of bits (LQ-LoRA's assignment, arXiv 2311.12023), with bitsandbytes'
layers.

The matrices' squared errors add up, each in each format, and so do their bits: a knapsack with one choice a matrix. It is solved
by its relaxation, exact up to one matrix: all begin at nf4, and the upgrade that lowers the error most a bit comes next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lamina.client.quantised.formats import DTYPES, held
from lamina.protos.errors import ConfigError

CHOICES = ("nf4", "int8", "bf16")
# nf4: 4 bits and a byte for 64 numbers, whose own scale is 4 bytes for 256 of them. int8: 4 bytes a row, here of a wide one.
BITS = {"nf4": 4 + (8 + 32 / 256) / 64, "int8": 8.0, "bf16": 16.0}
LOWEST_BITS = 4.2


def bits_of(number_format: str, shape: tuple[int, int]) -> float:
    """Bits that a matrix takes in a format.

    Args:
        number_format: Of `CHOICES`.
        shape: (d_out, d_in).

    Returns:
        All of them, constants included.
    """
    d_out, d_in = shape
    return d_out * d_in * BITS[number_format] + (32 * d_out if number_format == "int8" else 0)


def assignment(
    errors: Mapping[str, Mapping[str, float]], shapes: Mapping[str, tuple[int, int]], bits: float
) -> dict[str, str]:
    """A format for each matrix, with the least sum of squared errors that the budget allows.

    Args:
        errors: Module -> format -> squared Frobenius error.
        shapes: Module -> (d_out, d_in).
        bits: Budget, a weight, over all matrices.

    Returns:
        Module -> format, in the order of `shapes`.

    Raises:
        ConfigError: If the budget is below that of nf4 everywhere.
    """
    if not bits >= LOWEST_BITS:
        raise ConfigError(
            f"quantisation.bits={bits:g}: expected at least {LOWEST_BITS}, what nf4 takes with its constants."
        )
    chosen = {module: next(name for name in CHOICES if name in errors[module]) for module in shapes}
    numbers = sum(d_out * d_in for d_out, d_in in shapes.values())
    least = sum(bits_of(chosen[module], shape) for module, shape in shapes.items())
    left = bits * numbers - least
    if left < 0:
        raise ConfigError(
            f"quantisation.bits={bits:g}: expected at least {least / numbers:.3g} for this model, some of whose matrices nf4 "
            "cannot hold."
        )
    while True:
        steps = [
            step for module in shapes for step in _upgrades(module, chosen[module], errors[module], shapes[module])
        ]
        fitting = [step for step in steps if step[1] <= left]
        if not fitting:
            return chosen
        gain, cost, module, number_format = max(fitting, key=lambda step: (step[0] / step[1], step[2]))
        if gain <= 0:
            return chosen
        chosen[module], left = number_format, left - cost


def _upgrades(
    module: str, now: str, errors: Mapping[str, float], shape: tuple[int, int]
) -> list[tuple[float, float, str, str]]:
    return [
        (errors[now] - errors[other], bits_of(other, shape) - bits_of(now, shape), module, other)
        for other in CHOICES[CHOICES.index(now) + 1 :]
        if other in errors
    ]


def errors_of(weight: torch.Tensor) -> dict[str, float]:
    """The squared error of a matrix in each format.

    Args:
        weight: (d_out, d_in).

    Returns:
        Format -> squared Frobenius norm of what the format loses; formats that cannot hold it are left out.
    """
    exact = weight.detach().float()
    found = {}
    for name in CHOICES:
        if held(name, "bf16", (weight.shape[0], weight.shape[1])) != name:
            continue
        back = exact.bfloat16().float() if name == "bf16" else _round_trip(exact, name)
        found[name] = float((exact - back).double().square().sum())
    return found


def chosen(model: Any, shapes: Mapping[str, tuple[int, int]], bits: float) -> dict[str, str]:
    """A format for each matrix of a model.

    Args:
        model: In full precision.
        shapes: Module -> (d_out, d_in) of what is quantised.
        bits: Budget, a weight.

    Returns:
        Module -> format.

    Raises:
        ConfigError: If the budget is too small.
    """
    errors = {module: errors_of(model.get_submodule(module).weight) for module in shapes}
    return assignment(errors, shapes, bits)


def _round_trip(weight: torch.Tensor, number_format: str) -> torch.Tensor:
    from lamina.client.quantised.selftest import dequantised

    d_out, d_in = weight.shape
    plain = torch.nn.Linear(d_in, d_out, bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    return dequantised(linear(plain, number_format, "fp32"))


def linear(layer: torch.nn.Linear, number_format: str, compute: str) -> torch.nn.Module:
    """A linear layer in a number format.

    Args:
        layer: Of floating-point weights.
        number_format: Of `CHOICES`.
        compute: Of its output.

    Returns:
        A new layer, on the old one's device.
    """
    if number_format not in ("nf4", "int8"):
        return layer.to(DTYPES[compute])
    import bitsandbytes as bnb

    made = empty(layer.in_features, layer.out_features, layer.bias is not None, number_format, compute)
    weight = layer.weight.detach()
    kind = bnb.nn.Int8Params if number_format == "int8" else bnb.nn.Params4bit
    if number_format == "int8":
        made.weight = kind(weight.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        made.weight = kind(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=made)
    if layer.bias is not None:
        made.bias = torch.nn.Parameter(layer.bias.detach().to(DTYPES[compute]), requires_grad=False)
    moved: torch.nn.Module = made.to(weight.device)
    return moved


def empty(d_in: int, d_out: int, bias: bool, number_format: str, compute: str) -> Any:
    """A layer in a number format without weights.

    Args:
        d_in: Its inputs.
        d_out: Its outputs.
        bias: Whether it has one.
        number_format: Of `CHOICES`.
        compute: Of its output.

    Returns:
        A layer on the meta device.
    """
    import bitsandbytes as bnb

    if number_format == "nf4":
        return bnb.nn.Linear4bit(
            d_in, d_out, bias, DTYPES[compute], compress_statistics=True, quant_type="nf4", device="meta"
        )
    if number_format == "int8":
        return bnb.nn.Linear8bitLt(d_in, d_out, bias, has_fp16_weights=False, threshold=6.0, device="meta")
    return torch.nn.Linear(d_in, d_out, bias, device="meta", dtype=DTYPES[compute])


def quantise(model: Any, formats: Mapping[str, str], compute: str) -> None:
    """Replace a model's linear layers, one after the other, and cast what remains.

    Args:
        model: Of transformers, in floating point; changed in place.
        formats: Module -> format.
        compute: Of everything else.
    """
    for module, number_format in formats.items():
        parent, _, name = module.rpartition(".")
        setattr(model.get_submodule(parent), name, linear(model.get_submodule(module), number_format, compute))
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point and parameter.dtype != DTYPES[compute]:
            parameter.data = parameter.data.to(DTYPES[compute])
    mark(model)


def mark(model: Any) -> None:
    """Say to peft that both kinds of bitsandbytes' layers may be there.

    Args:
        model: Changed in place.
    """
    model.is_loaded_in_8bit = model.is_loaded_in_4bit = True


def fill(model: Any, tensors: Mapping[str, torch.Tensor], formats: Mapping[str, str]) -> None:
    """Give a model that has no weights those of a mixed copy.

    Args:
        model: With `empty` layers in their places; changed in place.
        tensors: As its `state_dict` was.
        formats: Module -> format.

    Raises:
        KeyError: If a tensor is missing.
        RuntimeError: If one has another shape.
    """
    import bitsandbytes as bnb

    rest = dict(tensors)
    for module, number_format in formats.items():
        if number_format not in ("nf4", "int8"):
            continue
        layer = model.get_submodule(module)
        weight = rest.pop(f"{module}.weight")
        if number_format == "nf4":
            constants = {
                n.removeprefix(f"{module}.weight."): n for n in list(rest) if n.startswith(f"{module}.weight.")
            }
            layer.weight = bnb.nn.Params4bit.from_prequantized(
                weight, {name: rest.pop(full) for name, full in constants.items()}, requires_grad=False, device="cpu",
                module=layer,
            )  # fmt: skip
        else:
            scale = rest.pop(f"{module}.SCB")
            rest.pop(f"{module}.weight_format", None)
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scale)
    _, unknown = model.load_state_dict(rest, strict=False, assign=True)
    if unknown:
        raise KeyError(f"unknown tensors {unknown[:3]}")
    absent = [name for name, one in model.named_parameters() if one.is_meta and name not in _tied(model)]
    if absent:
        raise KeyError(f"no tensor for {absent[:3]}")


def _tied(model: Any) -> set[str]:
    found = getattr(model, "_tied_weights_keys", None) or ()
    return set(found)
