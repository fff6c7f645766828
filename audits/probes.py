"""Probes: the code that clients train with, run on data and streams of the audit's own, to see what it does.

A stream that gives no noise shows what the data give to a step; data that are never drawn show what the noise is; rows that can
be told apart show who is drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lamina.audits import witness
from lamina.audits.canaries import references
from lamina.audits.mechanism import Check
from lamina.client.data import Example
from lamina.client.model import Base, put
from lamina.client.private.train import Private, train_privately
from lamina.client.train import Task
from lamina.protos.adapter import EMPTY, Adapter

# How far chance moves what is measured, in standard deviations: one false alarm in two million.
_FAR, _FAR_LEAST = 5.0, 7.0
_PROBED, _ROUNDING = 6, 1e-3
_DRAWN, _DRAWS, _TOKENS, _LEAST_RATE = 48, 100, 8, 0.25
_STILL = 1e-9  # a learning rate at which nothing moves
_NOISE_STEPS = 20
Drawn = NDArray[np.bool_]


class _Silent:
    """A stream that draws everybody and adds nothing."""

    def uniform(self, count: int) -> np.ndarray:
        """Zeros: below any sample rate."""
        return np.zeros(count)

    def normal(self, count: int) -> np.ndarray:
        """Zeros."""
        return np.zeros(count)


class _Nobody(_Silent):
    """A stream that draws nobody."""

    def uniform(self, count: int) -> np.ndarray:
        """Ones: at or above any sample rate."""
        return np.ones(count)


def noise_alone(base: Base, adapter: Adapter, examples: Sequence[Example], private: Private, task: Task) -> Check:
    """How large the noise is by itself, in steps in which nobody is drawn.

    Args:
        base: The frozen base; its slots are overwritten.
        adapter: In the slots meanwhile.
        examples: At least one, of a unit that is not drawn.
        private: The client's mechanism, with its own source of noise.
        task: Settings of its training.

    Returns:
        The check.
    """
    mechanism = replace(private.mechanism, steps=_NOISE_STEPS)
    probe = Private(mechanism, private.nominal, lambda *of: _Nobody() if of[0] == "sampling" else private.stream(*of))  # type: ignore[arg-type]
    unit = mechanism.noise_multiplier * mechanism.max_grad_norm / mechanism.expected_units
    nobody = _in_units(examples, private)
    steps = _received(base, adapter, nobody, probe, replace(task, config=replace(task.config, learning_rate=_STILL)))
    numbers = torch.cat(steps) / unit
    found, size = math.sqrt(float(numbers.square().mean())), numbers.numel()
    surprise = (1 - found**2) * math.sqrt(size / 2)
    return Check(
        "noise alone",
        surprise <= _FAR,
        "with nobody in a step, numbers of 1 x the claimed noise",
        f"{found:.4f} x, over {size:,} numbers",
        "What is left of a step without its data is its noise, which the claim measures.",
    )


def sensitivity(base: Base, adapter: Adapter, examples: Sequence[Example], private: Private, task: Task) -> Check:
    """How far one unit's data move a step's sum, in the code that clients train with, without its noise.

    The bound is made small, so that clipping must do something; the sum of all units is compared with the sum without one.

    Args:
        base: The frozen base; its slots are overwritten.
        adapter: At which the gradients are taken; not zero.
        examples: Canaries among them; under privacy.unit=user several are put together for one user.
        private: A client's mechanism.
        task: Settings of its training.

    Returns:
        The check.
    """
    some = _in_units(examples, private)
    tight = 1e-2 * private.mechanism.max_grad_norm
    worst = 0.0
    for bound in (private.mechanism.max_grad_norm, tight):
        mechanism = replace(private.mechanism, steps=1, max_grad_norm=bound)
        probe = Private(mechanism, private.nominal, lambda *_: _Silent())  # type: ignore[arg-type]
        whole = _received(base, adapter, some, probe, task)[0]
        for left_out in dict.fromkeys(one.user for one in some):
            rest = [one for one in some if one.user != left_out]
            moved = float((whole - _received(base, adapter, rest, probe, task)[0]).norm())
            worst = max(worst, moved * mechanism.expected_units / bound)
    return Check(
        "sensitivity",
        worst <= 1 + _ROUNDING,
        f"one {private.mechanism.unit} moves a step's sum by at most 1 x the clipping norm",
        f"{worst:.4f} x, the largest of {len({one.user for one in some})} {private.mechanism.unit}s at two norms",
        "What one unit can move is what the noise is measured by. More, and the claim counts too little noise.",
    )


def _in_units(examples: Sequence[Example], private: Private) -> list[Example]:
    """Some examples, a row each; of users several, of which the bound counts no more than `user_rows`."""
    each = 1 if private.mechanism.unit == "record" else 3
    return [replace(one, row=row, user=str(row // each)) for row, one in enumerate(examples[: _PROBED * each])]


def _received(
    base: Base, adapter: Adapter, examples: Sequence[Example], private: Private, task: Task
) -> list[torch.Tensor]:
    """What the optimizer receives in each step over these examples, float64."""
    found: list[torch.Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        found.append(torch.cat([one.flatten().double() for one in witness.gradients_of(optimizer)]))

    put(base, adapter, None)
    handle = register_optimizer_step_pre_hook(look)
    try:
        train_privately(base, examples, task, private, adapter)
    finally:
        handle.remove()
    put(base, EMPTY, None, trainable=False)
    return found


def sampling(base: Base, adapter: Adapter, private: Private, task: Task, told: Sequence[float] = ()) -> Check:
    """Whether training draws units at the claimed rate, each by itself and anew in each step.

    The client's training is run on rows of random tokens, and what its model reads is looked at. A rate below a quarter is raised
    to it, or little would be seen: what is done with a rate does not depend on it.

    Args:
        base: The frozen base; its slots are overwritten.
        adapter: In the slots meanwhile.
        private: The client's mechanism.
        task: Settings of its training.
        told: Sample rates that the client's events claim.

    Returns:
        The check.
    """
    truly, steps = private.mechanism.sample_rate, _DRAWS
    rate = max(truly, _LEAST_RATE)
    rows = references(base, _DRAWN, _TOKENS, task.seed)
    distinct = {one.tokens.tobytes(): one for one in rows}.values()
    examples = [replace(one, row=number, user=str(number)) for number, one in enumerate(distinct)]
    mechanism = replace(private.mechanism, steps=steps, sample_rate=rate)
    probe = Private(mechanism, private.nominal, lambda *of: private.stream(*of) if of[0] == "sampling" else _Silent())  # type: ignore[arg-type]
    still = replace(task.config, local_steps=steps, batch_size=len(examples), micro_batch=None, learning_rate=_STILL)
    drawn = _drawn(base, examples, adapter, probe, replace(task, config=still))
    share, number = float(drawn.mean()), len(examples)
    spread = math.sqrt(rate * (1 - rate) / drawn.size)
    wrong = [] if abs(share - rate) <= _FAR * spread + 1e-12 else ["another rate"]
    # Two steps may draw the same units by chance where there are few.
    same = sum(bool((one == other).all()) for one, other in itertools.pairwise(drawn))
    chance = (rate**2 + (1 - rate) ** 2) ** number
    if same > (steps - 1) * chance + _FAR * math.sqrt((steps - 1) * chance * (1 - chance)) + 0.5:
        wrong.append("the same records again")
    # Of independent draws the numbers in a step vary as a binomial one, whose variance this estimates.
    if rate < 1:
        varied = float(drawn.sum(axis=1).var(ddof=1)) / (number * rate * (1 - rate))
        chance = math.sqrt(2 / (steps - 1) + 1 / (steps * number * rate * (1 - rate)))
        if not 1 - _FAR * chance <= varied <= 1 + _FAR_LEAST * chance:
            wrong.append(f"numbers in a step with {varied:.2f} x the variance of independent draws")
    if low := [one for one in told if one < truly * (1 - 1e-9)]:
        wrong.append(f"events claim {min(low):.4g} where it is {truly:.4g}")
    return Check(
        "sampling",
        not wrong,
        f"each record in a step with probability {rate:.4g}, by itself and drawn anew",
        f"{share:.4g} over {steps} steps of {number} records" + "".join(f"; {one}" for one in wrong),
        "The claim counts on whoever is in a step being drawn at this rate, unknown to others.",
    )


def _drawn(base: Base, examples: Sequence[Example], adapter: Adapter, private: Private, task: Task) -> Drawn:
    """(steps, examples): which of the examples the model read in each step of a round."""
    length, kind = len(examples[0].tokens), examples[0].tokens.dtype
    known = {one.tokens.tobytes(): place for place, one in enumerate(examples)}
    read: list[set[int]] = [set()]

    def look(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        rows = given[0][:, :length].cpu().numpy().astype(kind)
        read[-1].update(known[one] for row in rows if (one := row.tobytes()) in known)

    put(base, adapter, None)
    handles = [
        base.model.get_input_embeddings().register_forward_pre_hook(look),
        register_optimizer_step_pre_hook(lambda *_: read.append(set())),
    ]
    try:
        train_privately(base, examples, task, private, adapter)
    finally:
        for handle in handles:
            handle.remove()
        put(base, EMPTY, None, trainable=False)
    return np.array([[place in step for place in range(len(examples))] for step in read[:-1]])
