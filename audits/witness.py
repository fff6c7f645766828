"""Seeing what every optimizer step of a simulation really receives, whatever the code that made it says of itself.

Under `example-dp` the gradient that an optimizer gets is the release that the claim is about: everything later follows from it.
The witness stands in front of every optimizer of this process, so it needs nothing of the mechanism's own code, and a mistake
there cannot hide from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lamina.protos.adapter import Adapter
from lamina.simulations.engine import Watcher

_NUMBERS, _MOST_STEPS, _COMPARED = 4096, 600, 256


@dataclass(frozen=True, eq=False)
class Seen:
    """One step's gradient.

    Attributes:
        client: Whose.
        round: From 1.
        step: From 1, in the round.
        sizes: (p,) numbers in each parameter.
        squares: (p,) sum of their squares.
        some: (n,) float32, of the same places in every step of one client; empty where enough steps are kept.
        sent: Of a client's last step in a round: how far its update is from what the step left, relative; otherwise NaN.
    """

    client: str
    round: int
    step: int
    sizes: NDArray[np.int64]
    squares: NDArray[np.float64]
    some: NDArray[np.float32]
    sent: float = math.nan


@dataclass(eq=False)
class Witness:
    """A watcher that passes everything on and keeps what the steps received.

    Attributes:
        inner: Who is shown progress.
        seen: So far.
    """

    inner: Watcher
    seen: list[Seen] = field(default_factory=list)
    _last: tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float32]] | None = field(default=None, repr=False)
    _moved: list[torch.Tensor] = field(default_factory=list, repr=False)
    _left: dict[str, tuple[int, list[tuple[int, NDArray[np.float32]]]]] = field(default_factory=dict, repr=False)

    def begin(self, rounds: int, names: Mapping[str, str], done: int) -> None:
        """Pass on."""
        self.inner.begin(rounds, names, done)

    def step(self, client_id: str, round_number: int, step: int, steps: int, loss: float) -> None:
        """Give the last gradient its name."""
        if self._last is not None:
            self.seen.append(Seen(client_id, round_number, step, *self._last))
            self._last = None
            if step == steps:
                self._left[client_id] = len(self.seen) - 1, [_some(one.detach()) for one in self._moved]
        self.inner.step(client_id, round_number, step, steps, loss)

    def completed(self, completed: Any) -> None:
        """Compare the round's updates with what the clients' last steps left, and pass on."""
        for update in completed.updates:
            if update.client_id in self._left:
                place, left = self._left[update.client_id]
                self.seen[place] = replace(self.seen[place], sent=_apart(left, update.adapter))
        self._left.clear()
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
        handle = register_optimizer_step_pre_hook(self._look)
        try:
            yield
        finally:
            handle.remove()

    def _look(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = gradients_of(optimizer)
        sizes = np.array([one.numel() for one in gradients], np.int64)
        squares = np.array([float(one.double().square().sum()) for one in gradients])
        some = np.zeros(0, np.float32)
        if len(self.seen) < _MOST_STEPS:
            stride = max(1, int(sizes.sum()) // _NUMBERS)
            some = torch.cat([one.flatten()[::stride] for one in gradients]).float().cpu().numpy()
        self._last = (sizes, squares, some)
        self._moved = [one for group in optimizer.param_groups for one in group["params"]]


def _some(tensor: torch.Tensor) -> tuple[int, NDArray[np.float32]]:
    """A parameter's size, and numbers at even places in it."""
    flat = tensor.flatten()
    return flat.numel(), flat[:: max(1, flat.numel() // _COMPARED)].float().cpu().numpy().copy()


def _apart(left: list[tuple[int, NDArray[np.float32]]], adapter: Adapter) -> float:
    """The largest relative distance of a parameter from the nearest array of its size in an adapter."""
    sides = (side for f in adapter.lora.values() for side in (f.A, f.B, f.core) if side is not None)
    arrays = [
        _some(torch.from_numpy(np.ascontiguousarray(one, np.float32))) for one in (*sides, *adapter.dense.values())
    ]
    worst = 0.0
    for size, numbers in left:
        scale = float(np.linalg.norm(numbers)) or 1.0
        near = (float(np.linalg.norm(other - numbers)) / scale for count, other in arrays if count == size)
        worst = max(worst, min(near, default=math.inf))
    return worst


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


@dataclass(frozen=True)
class Noise:
    """How large the numbers of a client's gradients are, in units of some deviation.

    Attributes:
        pooled: Root mean square over all parameters and steps.
        least: Of each parameter and all together, in each step and in all together, that which is furthest below 1 for its size:
            its root mean square.
        surprise: How far below 1 that is, in deviations of chance.
        where: Which it is.
    """

    pooled: float
    least: float
    surprise: float
    where: str


def noise_of(seen: list[Seen], client: str, unit: float) -> Noise | None:
    """Compare a client's gradients with a deviation.

    A mean of n squares of independent normal numbers of deviation 1 has a deviation of sqrt(2 / n). Whatever is added that does
    not depend on them makes it larger.

    Args:
        seen: By a witness.
        client: Whose.
        unit: The deviation.

    Returns:
        What was found, or None where no step of the client was seen.
    """
    own = [one for one in seen if one.client == client and one.sizes.size]
    if not own:
        return None
    parameters = min(one.sizes.size for one in own)
    sizes = np.stack([one.sizes[:parameters] for one in own]).astype(np.float64)
    squares = np.stack([one.squares[:parameters] for one in own]) / unit**2
    sizes, squares = _with_sums(sizes), _with_sums(squares)
    surprise = (1 - squares / sizes) * np.sqrt(sizes / 2)
    step, parameter = np.unravel_index(int(surprise.argmax()), surprise.shape)
    when = "all steps" if step == len(own) else f"round {own[step].round}, step {own[step].step}"
    which = "all parameters" if parameter == parameters else f"parameter {parameter + 1} of {parameters}"
    return Noise(
        pooled=math.sqrt(float(squares[-1, -1] / sizes[-1, -1])),
        least=math.sqrt(float(squares[step, parameter] / sizes[step, parameter])),
        surprise=float(surprise[step, parameter]),
        where=f"client {client}, {when}, {which}",
    )


def _with_sums(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """A table with the sums of its columns below it, and of its rows beside it."""
    table = np.vstack([table, table.sum(axis=0)])
    return np.hstack([table, table.sum(axis=1, keepdims=True)])


def largest_correlation(seen: list[Seen], deviations: Mapping[str, float]) -> tuple[float, str, int]:
    """How alike the most alike gradients of two different steps are, beyond what the data in them may account for.

    If a share f of a gradient's square is not noise, then the parts of two gradients that are not noise correlate by no more than
    sqrt(f f').

    Args:
        seen: By a witness.
        deviations: Client id -> deviation of its noise.

    Returns:
        The largest absolute correlation beyond that, between which steps, and how many pairs were compared; NaN without two.
    """
    kept = [one for one in seen if one.some.size and one.client in deviations]
    length = min((one.some.size for one in kept), default=0)
    if len(kept) < 2 or not length:
        return math.nan, "", 0
    table = np.stack([one.some[:length] for one in kept]).astype(np.float64)
    lengths = np.maximum(np.linalg.norm(table, axis=1), 1e-30)
    noise = np.array([deviations[one.client] for one in kept]) * math.sqrt(length)
    data = np.sqrt(np.maximum(0, 1 - np.square(noise / lengths)))
    table /= lengths[:, None]
    alike = np.maximum(np.abs(table @ table.T) - np.outer(data, data), 0)
    np.fill_diagonal(alike, 0)
    first, second = np.unravel_index(int(alike.argmax()), alike.shape)
    named = [f"client {one.client}, round {one.round}, step {one.step}" for one in (kept[first], kept[second])]
    return float(alike.max()), " and ".join(named), len(kept) * (len(kept) - 1) // 2


def keep(path: Path, seen: Sequence[Seen]) -> None:
    """Write what was seen, so that an audit that is broken off can go on.

    Args:
        path: The file.
        seen: By a witness.
    """
    length = min((one.some.size for one in seen if one.some.size), default=0)
    most = max((one.sizes.size for one in seen), default=0)
    names = np.array([[one.client, str(one.round), str(one.step)] for one in seen], dtype="U64").reshape(-1, 3)
    sizes, squares = np.zeros((len(seen), most), np.int64), np.zeros((len(seen), most))
    for row, one in enumerate(seen):
        sizes[row, : one.sizes.size], squares[row, : one.sizes.size] = one.sizes, one.squares
    some = np.stack([one.some[:length] for one in seen if one.some.size] or [np.zeros(0, np.float32)])
    partial = path.with_name(f"writing-{path.name}")
    with partial.open("wb") as file:
        sent = np.array([one.sent for one in seen], np.float64)
        np.savez(file, names=names, sizes=sizes, squares=squares, some=some, sent=sent)
    partial.replace(path)


def kept(path: Path) -> tuple[Seen, ...]:
    """The inverse of `keep`.

    Args:
        path: The file.

    Returns:
        What was seen; nothing where there is no file.
    """
    if not path.is_file():
        return ()
    with np.load(path, allow_pickle=False) as held:
        names, sizes, squares, some, sent = (held[name] for name in ("names", "sizes", "squares", "some", "sent"))
    empty = np.zeros(0, np.float32)
    counts = (sizes > 0).sum(axis=1)
    return tuple(
        Seen(
            client=str(name[0]),
            round=int(name[1]),
            step=int(name[2]),
            sizes=sizes[row, : counts[row]],
            squares=squares[row, : counts[row]],
            some=some[row] if row < len(some) else empty,
            sent=float(sent[row]),
        )
        for row, name in enumerate(names)
    )
