"""What tests of example-dp share: bases with numbers in their slots, odd rows, and gradients by autograd of one row at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import Parameter

from lamina.client.data import Example
from lamina.client.losses import collate, losses, pad_id
from lamina.client.model import Base, put, trainable_parameters
from lamina.client.private import clipper
from lamina.client.private.layers import Sheet
from lamina.client.private.sampling import Share
from lamina.client.private.train import training_row_by_row
from lamina.client.train import Task
from lamina.protos.adapter import Adapter, LoraFactors
from lamina.protos.config import TrainConfig

Gradients = dict[str, torch.Tensor]


def adapter(base: Base, rank: int = 3, size: float = 0.1, cored: bool = False) -> Adapter:
    rng = np.random.default_rng(0)

    def drawn(*sides: int) -> Any:
        return rng.normal(0, size, sides).astype(np.float32)

    return Adapter(
        {
            name: LoraFactors(drawn(rank, d_in), drawn(d_out, rank), 2.0, drawn(rank, rank) if cored else None)
            for name, (d_out, d_in) in base.spec.modules.items()
        }
    )


def filled(base: Base, sides: str = "AB", also: Sequence[str] = ()) -> dict[str, Parameter]:
    """What is trained: factors, dense parameters, and whatever ends in one of some words."""
    base.model.requires_grad_(False)
    put(base, adapter(base, cored=sides == "core"), None, sides=sides)
    found = trainable_parameters(base)
    for name, parameter in base.model.named_parameters():
        if any(name.endswith(word) for word in also):
            parameter.requires_grad_(True)
            found[name] = parameter
    return found


def rows(base: Base, lengths: Sequence[int], seed: int = 0) -> list[Example]:
    """One example of each length; 0 stands for three tokens without a target."""
    rng = np.random.default_rng(seed)
    labels = len(base.spec.labels)
    made = []
    for number, length in enumerate(lengths):
        tokens = rng.integers(2, 1000, length or 3).astype(np.int32)
        targets = np.arange(len(tokens)) > (0 if length else len(tokens))
        made.append(Example(tokens, targets & (not labels), int(rng.integers(labels)) if labels else -1, number))
    return made


def share(*examples: Example) -> Share:
    return Share(
        examples,
        [1.0 / (max(1, int(one.targets.sum())) * len(examples)) for one in examples],
    )


def task(**more: Any) -> Task:
    return Task("0", 1, 1, 0, TrainConfig(**{"batch_size": 64, "max_length": 64, **more}))


def alone(base: Base, parameters: Mapping[str, Parameter], one: Share) -> Gradients:
    """The gradient of one unit, example by example, by autograd."""
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    with training_row_by_row(base):
        for example, weight in zip(one.examples, one.weights, strict=True):
            batch = collate([example], pad_id(base), base.device)
            (weight * losses(base, batch)[0]).backward()  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    total[name] += parameter.grad
                parameter.grad = None
    return total


def norm(gradients: Mapping[str, torch.Tensor]) -> float:
    return float(torch.stack([one.double().norm() for one in gradients.values()]).norm())


@contextmanager
def watched(base: Base, parameters: Mapping[str, Parameter]) -> Iterator[Sheet]:
    with training_row_by_row(base), clipper.attached(base.model, parameters) as sheet:
        yield sheet


def by_row(base: Base, parameters: Mapping[str, Parameter], examples: Sequence[Example]) -> list[Gradients]:
    """The gradients of the rows of one batch, as the clipper finds them."""
    weights = [1.0 / max(1, int(one.targets.sum())) for one in examples]
    with watched(base, parameters) as sheet:
        sheet.begin(len(examples))
        losses(base, collate(examples, pad_id(base), base.device, 0, weights))[0].backward()  # type: ignore[no-untyped-call]
        clipper.check_unused(sheet)
    return [
        {name: sheet.blocks[one][number].view(one.shape).clone() for name, one in parameters.items()}
        for number in range(len(examples))
    ]


def distance(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """Of two gradients, relative to the second."""
    return norm({name: found[name].double() - one.double() for name, one in wanted.items()}) / max(norm(wanted), 1e-30)
