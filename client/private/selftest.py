"""Whether gradients row by row are what they are taken for, tried on random tokens before any data is touched.

The bound on what one unit gives holds only if the gradient of a row is of that row alone. A model can break that in ways that no
list of layers foresees: an expert that gets the tokens of all rows, statistics of a batch, a mask that goes by place. So two rows
together are held against each by itself, with autograd's own gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import Parameter

from lamina.client.data import Example
from lamina.client.losses import collate, losses, pad_id
from lamina.client.model import Base
from lamina.client.private import clipper
from lamina.client.train import autocast
from lamina.protos.config import TrainConfig
from lamina.protos.errors import ConfigError, TrainingError

# Largest relative error of a parameter's gradient: in 32 bits of rounding, in 16 bits of other kernels for other shapes.
TOLERANCE, TOLERANCE_16 = 2e-3, 0.1
_LENGTHS = (12, 7)
_DEQUANTISED = ("cpu", "xpu")
# Of the whole gradient; one that is smaller than this share of it counts as zero.
_NEGLIGIBLE = 1e-2


def check_once(base: Base, parameters: Mapping[str, Parameter], config: TrainConfig, where: str) -> None:
    """`check`, unless the same parameters of this base have passed it in the same way.

    Args:
        base: See `check`.
        parameters: See `check`.
        config: See `check`.
        where: See `check`.
    """
    again = any(getattr(module, "gradient_checkpointing", False) for module in base.model.modules())
    way = (tuple(parameters), again, config.precision, bool(base.frozen))
    if way not in base.tried:
        check(base, parameters, config, where)
        base.tried.add(way)


def check(base: Base, parameters: Mapping[str, Parameter], config: TrainConfig, where: str) -> float:
    """Hold the gradients of two rows of a batch against those of each row by itself.

    Args:
        base: In the mode in which it is trained; as it was when this returns.
        parameters: What is trained.
        config: Length, precision.
        where: Such as `client 3, round 1`, for the message.

    Returns:
        The largest relative error of a parameter.

    Raises:
        ConfigError: If a trained parameter is not covered, or the base's format mixes rows.
        TrainingError: If the gradients differ by more than rounding explains.
    """
    _check_format(base)
    rows = _random_rows(base, config)
    worst, which = 0.0, ""
    with _nonzero(parameters):
        with clipper.attached(base.model, parameters) as sheet:
            sheet.begin(len(rows))
            _backward(base, rows, config)
            clipper.check_unused(sheet)
        for number, row in enumerate(rows):
            _backward(base, [row], config)
            alone = {name: _taken(parameter) for name, parameter in parameters.items()}
            whole = math.sqrt(sum(float(one.square().sum()) for one in alone.values()))
            for name, parameter in parameters.items():
                change = float((sheet.blocks[parameter][number] - alone[name].flatten()).norm())
                error = change / max(float(alone[name].norm()), _NEGLIGIBLE * whole, 1e-30)
                if not error <= worst:
                    worst, which = error, name
    wide = base.dtype == torch.float32 and config.precision != "bf16" and base.device.type == "cpu"
    tolerance = TOLERANCE if wide else TOLERANCE_16
    if not worst <= tolerance:
        raise TrainingError(
            f"{where}: expected the gradient of each row to depend on that row alone, got one of {which} that is {worst:.2g} off "
            f"with another row beside it (at most {tolerance:g} is rounding). This model cannot be trained under "
            "privacy.mode=example-dp: take another model.source or quantisation.format."
        )
    return worst


def _check_format(base: Base) -> None:
    """Raise where a quantised layer looks at all rows: int8 on a GPU treats a column apart where any row has an outlier."""
    if base.device.type in _DEQUANTISED:
        return
    for name, layer in base.model.named_modules():
        if hasattr(getattr(layer, "weight", None), "SCB"):
            raise ConfigError(
                f"quantisation.format={base.format}: {name}: expected a layer that treats each row by itself, got int8 whose "
                f"outliers on {base.device.type} are found in all rows together. Set quantisation.format=nf4 or bf16."
            )


def _random_rows(base: Base, config: TrainConfig) -> list[Example]:
    generator = np.random.default_rng(0)
    labelled = base.spec.task == "sequence-classification"
    rows = []
    for number, length in enumerate(_LENGTHS):
        tokens = generator.integers(0, int(base.model.config.vocab_size), min(length, config.max_length))
        targets = np.arange(len(tokens)) > 0
        label = number % max(1, len(base.spec.labels)) if labelled else -1
        rows.append(Example(tokens.astype(np.int32), targets & (not labelled), label))
    return rows


def _backward(base: Base, rows: Sequence[Example], config: TrainConfig) -> None:
    weights = [1.0 / max(1, int(row.targets.sum())) for row in rows]
    batch = collate(rows, pad_id(base), base.device, min(max(_LENGTHS), config.max_length), weights)
    with autocast(base.device, config.precision):
        summed, _, _ = losses(base, batch)
    summed.backward()  # type: ignore[no-untyped-call]


def _taken(parameter: Parameter) -> torch.Tensor:
    found, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if found is None else found.float()


@contextmanager
def _nonzero(parameters: Mapping[str, Parameter]) -> Iterator[None]:
    """Random numbers where a parameter is all zeros, as B is at first, so that every gradient passes through it."""
    generator = torch.Generator().manual_seed(0)
    zeros = [one for one in parameters.values() if not bool(one.detach().any())]
    for one in zeros:
        one.data.copy_(0.02 * torch.randn(one.shape, generator=generator))
    try:
        yield
    finally:
        for one in zeros:
            one.data.zero_()
