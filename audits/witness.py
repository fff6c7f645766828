"""Seeing what every optimizer step of a simulation really receives, whatever the code that made it says of itself.

Under `example-dp` the gradient that an optimizer gets is the release that the claim is about: everything later follows from it.
The witness stands in front of every optimizer of this process, so it needs nothing of the mechanism's own code, and a mistake
there cannot hide from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lamina.simulations.engine import Watcher


_NUMBERS, _MOST_STEPS = 4096, 600


@dataclass(frozen=True, eq=False)
class Seen:
    """One step's gradient.

    Attributes:
        client: Whose.
        round: From 1.
        step: From 1, in the round.
        size: Numbers in it.
        square: Sum of their squares.
        some: (n,) float32, of the same places in every step of one client; empty where enough steps are kept.
    """

    client: str
    round: int
    step: int
    size: int
    square: float
    some: NDArray[np.float32]


@dataclass(eq=False)
class Witness:
    """A watcher that passes everything on and keeps what the steps received.

    Attributes:
        inner: Who is shown progress.
        seen: So far.
    """

    inner: Watcher
    seen: list[Seen] = field(default_factory=list)
    _last: tuple[int, float, NDArray[np.float32]] | None = field(default=None, repr=False)

    def begin(self, rounds: int, names: Mapping[str, str], done: int) -> None:
        """Pass on."""
        self.inner.begin(rounds, names, done)

    def step(self, client_id: str, round_number: int, step: int, steps: int, loss: float) -> None:
        """Give the last gradient its name."""
        if self._last is not None:
            size, square, some = self._last
            self.seen.append(Seen(client_id, round_number, step, size, square, some))
            self._last = None
        self.inner.step(client_id, round_number, step, steps, loss)

    def completed(self, completed: Any) -> None:
        """Pass on."""
        self.inner.completed(completed)

    def say(self, text: str) -> None:
        """Pass on."""
        self.inner.say(text)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at every optimizer step of this process meanwhile.

        Yields:
            Nothing.
        """
        handle = register_optimizer_step_pre_hook(self._look)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            handle.remove()

    def _look(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = gradients_of(optimizer)
        size = sum(one.numel() for one in gradients)
        square = sum(float(one.double().square().sum()) for one in gradients)
        some = np.zeros(0, np.float32)
        if len(self.seen) < _MOST_STEPS:
            stride = max(1, size // _NUMBERS)
            some = torch.cat([one.flatten()[::stride] for one in gradients]).float().cpu().numpy()
        self._last = (size, square, some)


def gradients_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What an optimizer is about to use.

    Args:
        optimizer: Any.

    Returns:
        The gradients that are there, in the optimizer's order.
    """
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    return [one.grad.detach() for one in parameters if one.grad is not None]


def steps_by_client(seen: list[Seen]) -> dict[str, int]:
    """How many steps each client took.

    Args:
        seen: By a witness.

    Returns:
        Client id -> steps.
    """
    found: dict[str, int] = {}
    for one in seen:
        found[one.client] = found.get(one.client, 0) + 1
    return found


def deviation(seen: list[Seen], client: str) -> tuple[float, float, int]:
    """How large the numbers of a client's gradients are.

    Args:
        seen: By a witness.
        client: Whose.

    Returns:
        Root mean square over all steps, that of the step with the least, and numbers in all.
    """
    own = [one for one in seen if one.client == client and one.size]
    size = sum(one.size for one in own)
    if not size:
        return math.nan, math.nan, 0
    least = min(one.square / one.size for one in own)
    return math.sqrt(sum(one.square for one in own) / size), math.sqrt(least), size


def largest_correlation(seen: list[Seen]) -> tuple[float, str, int]:
    """How alike the most alike gradients of two different steps are.

    Args:
        seen: By a witness.

    Returns:
        The largest absolute correlation, between which steps, and how many pairs were compared; NaN without two.
    """
    kept = [one for one in seen if one.some.size]
    length = min((one.some.size for one in kept), default=0)
    if len(kept) < 2 or not length:
        return math.nan, "", 0
    table = np.stack([one.some[:length] for one in kept]).astype(np.float64)
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-30)
    alike = np.abs(table @ table.T)
    np.fill_diagonal(alike, 0)
    first, second = np.unravel_index(int(alike.argmax()), alike.shape)
    named = [f"client {one.client}, round {one.round}, step {one.step}" for one in (kept[first], kept[second])]
    return float(alike.max()), " and ".join(named), len(kept) * (len(kept) - 1) // 2
