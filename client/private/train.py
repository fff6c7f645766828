"""Local training under `example-dp`: DP-SGD (Abadi et al. 2016, arXiv:1607.00133) with AdamW on the noised gradients.

What a step takes from the data is one sum, of gradients that are clipped unit by unit. It gets its noise here, before anything
else sees it: the optimizer, the next step, the update. How many units there were in a step is told to nobody, and decides
nothing: the sum is divided by the number that the mechanism expects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import Parameter

from lamina.client import resident
from lamina.client.data import Example
from lamina.client.losses import collate, longest, losses, pad_id, padded_length
from lamina.client.model import Base, set_checkpointing, trainable_parameters
from lamina.client.private import clipper, selftest
from lamina.client.private.layers import Sheet
from lamina.client.private.sampling import Share, drawn, pieces, units_of
from lamina.client.train import (
    Optimizer,
    Task,
    anchored,
    autocast,
    optimizer_of,
    proximal_term,
    restore,
    saved,
    set_rate,
)
from lamina.protos.adapter import Adapter
from lamina.protos.errors import ConfigError, TrainingError
from lamina.protos.privacy.mechanism import LEAST_CLIP, Mechanism
from lamina.protos.privacy.noise import Stream, noised


@dataclass(frozen=True)
class Private:
    """What makes a client's training private.

    Attributes:
        mechanism: Its fixed numbers.
        nominal: The public number of units that they come from.
        stream: Gives a fresh stream for a purpose, a client and a round: secret in a deployment.
    """

    mechanism: Mechanism
    nominal: int
    stream: Callable[[str, str, int], Stream]


def train_privately(
    base: Base,
    examples: Sequence[Example],
    task: Task,
    private: Private,
    start: Adapter,
    kept: Optimizer | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Train what is in the slots for one round, so that the result is as private as the mechanism says.

    Args:
        base: With the start in its slots; changed in place.
        examples: The client's training set.
        task: Round, settings.
        private: Mechanism and source of its noise.
        start: What is in the slots, for the proximal term.
        kept: Optimizer state of an earlier round, or None for a fresh one.
        progress: Called after each step with its number and the loss before it, which is not private and must stay here.

    Returns:
        `peak_bytes`, where the system says it, which must stay here too, and the optimizer state.

    Raises:
        ConfigError: If the mechanism adds no noise, or a trained parameter cannot be clipped.
        TrainingError: If a parameter is not finite, or the gradients are not those of single rows.
    """
    config, mechanism = task.config, private.mechanism
    _check(mechanism)
    resident.forget_peak(base.device.type)
    if config.checkpointing is not None:
        set_checkpointing(base, config.checkpointing)
    parameters = trainable_parameters(base)
    optimizer = optimizer_of(config, list(parameters.values()))
    if kept:
        restore(optimizer, parameters, kept)
    units = units_of(examples, mechanism.unit)
    sampling = private.stream("sampling", task.client_id, task.round)
    noise = private.stream("noise", task.client_id, task.round)
    anchor = anchored(start, base) if config.proximal > 0 else {}
    with training_row_by_row(base), tested(base, parameters, task) as sheet:
        for step in range(mechanism.steps):
            set_rate(optimizer, task, step)
            shares = drawn(units, mechanism.sample_rate, mechanism.user_rows, sampling)
            total, loss = clipped_sum(base, sheet, shares, task, mechanism.max_grad_norm)
            _give_gradients(parameters, total, mechanism, noise)
            if anchor:  # of parameters alone, which are private already
                (0.5 * config.proximal * proximal_term(base, anchor)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _check_finite(parameters, task, step)
            if progress is not None:
                progress(step + 1, loss)
    peak = resident.peak(base.device.type)
    return {"peak_bytes": float(peak)} if peak else {}, saved(optimizer, parameters)


@contextmanager
def tested(base: Base, parameters: Mapping[str, Parameter], task: Task) -> Iterator[Sheet]:
    """A model that gives gradients row by row, after it has shown that it does.

    Args:
        base: In the mode of `training_row_by_row`.
        parameters: What is trained.
        task: For settings and the message.

    Yields:
        Where the gradients go.
    """
    selftest.check_once(base, parameters, task.config, f"client {task.client_id}, round {task.round}")
    with clipper.attached(base.model, parameters) as sheet:
        yield sheet


def _check(mechanism: Mechanism) -> None:
    """Raise where a mechanism is none; nothing is trained then."""
    noise, clip = mechanism.noise_multiplier, mechanism.max_grad_norm
    if not (0 < noise < math.inf and LEAST_CLIP <= clip < math.inf):
        raise ConfigError(
            f"privacy.mode=example-dp: expected a positive finite noise multiplier and train.max_grad_norm >= {LEAST_CLIP:g}, "
            f"got {noise} and {clip}. Without noise nothing is private: set privacy.epsilon, or privacy.mode=none."
        )
    if not (0 < mechanism.sample_rate <= 1 and 0 < mechanism.expected_units < math.inf and mechanism.user_rows >= 1):
        raise ConfigError(
            f"privacy.mode=example-dp: expected a sample rate in (0, 1] and a positive denominator, got {mechanism.sample_rate} "
            f"and {mechanism.expected_units}."
        )


@contextmanager
def training_row_by_row(base: Base) -> Iterator[None]:
    """What a model does in training without what mixes rows or depends on a row's place in the batch, such as dropout.

    Which rows are neighbours in a batch depends on who was drawn; with dropout's mask going by place, one unit more or less would
    move the gradients of others. Only linear layers, some of which cut the graph in an evaluation, and layers that compute
    their activations again are told that this is training.

    Args:
        base: The base.

    Yields:
        Nothing.
    """
    base.model.eval()
    try:
        for module in base.model.modules():
            module.training = isinstance(module, torch.nn.Linear) or getattr(module, "gradient_checkpointing", False)
        yield
    finally:
        base.model.eval()


def clipped_sum(
    base: Base, sheet: Sheet, shares: Sequence[Share], task: Task, clip: float
) -> tuple[list[torch.Tensor], float]:
    """The sum of the units' gradients, each clipped: all that a step takes from the data, without its noise.

    Args:
        base: With what is trained in its slots.
        sheet: Of `clipper.attached`.
        shares: Of the units of the step; none is allowed, and nothing is computed then.
        task: Micro-batch, length, precision.
        clip: Largest L2 norm of a unit.

    Returns:
        Parameter by parameter (its size,) float32, and the mean loss of the units, NaN without any.
    """
    config, found, loss = task.config, clipper.nothing(sheet), 0.0
    for piece in pieces(shares, config.micro_batch or config.batch_size):
        length = padded_length(base, longest(piece.examples), config.max_length)
        batch = collate(piece.examples, pad_id(base), base.device, length, piece.weights)
        sheet.begin(len(piece.examples))
        with autocast(base.device, config.precision):
            summed, _, _ = losses(base, batch)
        summed.backward()  # type: ignore[no-untyped-call]
        clipper.add(found, sheet, piece.units, piece.goes_on, clip)
        loss += float(summed.detach())
    return found.total, loss / len(shares) if shares else math.nan


def _give_gradients(
    parameters: Mapping[str, Parameter], total: Sequence[torch.Tensor], mechanism: Mechanism, noise: Stream
) -> None:
    """Noise, once for the step, and the fixed denominator; what the optimizer sees."""
    for parameter, one in zip(parameters.values(), total, strict=True):
        released = noised(one.cpu().numpy(), mechanism.noise_multiplier * mechanism.max_grad_norm, noise)
        gradient = torch.from_numpy((released / mechanism.expected_units).astype(np.float32))
        parameter.grad = gradient.view(parameter.shape).to(parameter.device, parameter.dtype)


def _check_finite(parameters: Mapping[str, Parameter], task: Task, step: int) -> None:
    for name, parameter in parameters.items():
        if not bool(torch.isfinite(parameter).all()):
            raise TrainingError(
                f"client {task.client_id}, round {task.round}, step {step + 1}: expected finite numbers in {name}, got others. "
                "Lower train.learning_rate. Completed rounds are kept: resume from them."
            )
