"""What the numbers of a secure sum mean: every client's change in the coordinates of the global adapter, and its weight.

One vector for all clients of a round, whatever their ranks: a client's change of the trained factor lies in the first slots of
the global one and is zero elsewhere, at the global scale, which B or a core takes up and A does not (see `strategies.linear`).
Then come the changes of the dense parameters and, last, the weight w_k: the vector is w_k times the change, and w_k once more,
so that the sums give the weighted mean and nobody's weight. Modules and dense parameters come in the order of their names.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lamina.protos.adapter import Adapter, Array, LoraFactors
from lamina.protos.errors import AdapterMismatch, SecureSumAborted, SecureSumRefused
from lamina.protos.identity import canonical
from lamina.protos.secagg.encoding import Encoding, decode, encode
from lamina.protos.sides import Side, change_of, side_of, with_numbers
from lamina.protos.spec import AdapterSpec

# Of a vector, in numbers: 16 GiB at the most.
_MOST = 2**32


@dataclass(frozen=True)
class Rule:
    """How changes are weighed and encoded, the same for all.

    Attributes:
        weights: `uniform`, where every w_k is 1, or `num_examples`, where it is min(num_examples / `examples`, 1).
        examples: The public number of examples that gives weight 1; more count no more.
        bound: Largest magnitude of a weighed change; see `encoding.encode`.
    """

    weights: Literal["uniform", "num_examples"]
    examples: int
    bound: float


@dataclass(frozen=True)
class Layout:
    """A round's vector.

    Attributes:
        side: Which factor was trained.
        modules: Module -> (d_out, d_in).
        ranks: Module -> rank of the global factors.
        scales: Module -> their scale.
        dense: Name -> shape of each dense parameter.
        rule: How changes are weighed.
    """

    side: Side
    modules: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    dense: Mapping[str, tuple[int, ...]]
    rule: Rule

    @property
    def length(self) -> int:
        """Of the vector, in numbers."""
        return sum(math.prod(shape) for _, shape in blocks(self)) + 1

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over all that must be the same at every participant."""
        document = {
            "side": self.side,
            "modules": {name: [*shape, self.ranks[name], self.scales[name]] for name, shape in self.modules.items()},
            "dense": {name: list(shape) for name, shape in self.dense.items()},
            "rule": [self.rule.weights, self.rule.examples, self.rule.bound],
        }
        return hashlib.sha256(b"lamina secagg layout\0" + canonical(document)).hexdigest()


def layout(spec: AdapterSpec, side: Side, ranks: Mapping[str, int], scales: Mapping[str, float], rule: Rule) -> Layout:
    """A round's vector, checked.

    Args:
        spec: The negotiated schema.
        side: Which factor was trained.
        ranks: Module -> rank of the global factors, at a client as the coordinator says.
        scales: Module -> their scale, likewise.
        rule: How changes are weighed.

    Returns:
        The layout.

    Raises:
        SecureSumRefused: If ranks, scales or rule are none that can be.
    """
    fits = set(ranks) == set(scales) == set(spec.modules)
    fits = fits and all(0 <= rank <= min(spec.modules[module]) for module, rank in ranks.items())
    fits = fits and all(math.isfinite(scale) and scale > 0 for scale in scales.values())
    fits = fits and rule.examples >= 1 and math.isfinite(rule.bound) and rule.bound > 0
    if not fits:
        raise SecureSumRefused(
            "secure sum: expected a rank up to the module's size and a scale > 0 for each module of the schema, and a range and "
            "number of examples > 0, got others. Ask the operator of the coordinator."
        )
    found = Layout(side, spec.modules, ranks, scales, {name: v.shape for name, v in spec.dense.items()}, rule)
    if found.length > _MOST:
        raise SecureSumRefused(f"secure sum: expected at most {_MOST} numbers, got {found.length}. Lower the ranks.")
    return found


def blocks(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The parts of a vector, in order.

    Args:
        layout: The vector's.

    Yields:
        Module or dense name, and the shape of its part; the weight is not among them.
    """
    for module in sorted(layout.modules):
        (d_out, d_in), rank = layout.modules[module], layout.ranks[module]
        yield module, {"A": (rank, d_in), "B": (d_out, rank), "core": (rank, rank)}[layout.side]
    for name in sorted(layout.dense):
        yield name, layout.dense[name]


def encoded(layout: Layout, grid: Encoding, sent: Adapter, start: Adapter, num_examples: int) -> Array:
    """A client's vector.

    Args:
        layout: The round's.
        grid: For the round's participants.
        sent: What was trained, of the one side that was, at the client's ranks and scales.
        start: What training started from, whole, with every dense parameter.
        num_examples: The client's, as far as it is told.

    Returns:
        (layout.length,), uint32.

    Raises:
        AdapterMismatch: If the adapter is of another side, or does not fit the global one.
        TrainingError: If a change is out of range; see `encoding.encode`.
    """
    if sent.lora and side_of(sent, "secure sum") != layout.side:
        raise AdapterMismatch(f"secure sum: expected an update of lora_{layout.side}, got one of the other factor.")
    if not sent.lora.keys() <= layout.modules.keys() or sent.dense.keys() != layout.dense.keys():
        raise AdapterMismatch("secure sum: expected modules of the schema and every dense parameter of it.")
    weight = 1.0 if layout.rule.weights == "uniform" else min(num_examples / layout.rule.examples, 1.0)
    values = np.empty(layout.length, np.uint32)
    at = 0
    for name, shape in blocks(layout):
        part = np.zeros(shape)
        if name in layout.dense:
            part += weight * (sent.dense[name].astype(np.float64) - start.dense[name])
        elif name in sent.lora:
            change = weight * change_of(sent.lora[name], start.lora[name], layout.side, layout.scales[name])
            if any(mine > most for mine, most in zip(change.shape, shape, strict=True)):
                raise AdapterMismatch(f"secure sum: {name}: expected at most {shape}, got {change.shape}.")
            part[tuple(slice(size) for size in change.shape)] = change
        values[at : at + part.size] = encode(part.ravel(), grid)
        at += part.size
    values[at:] = encode(np.array([weight * grid.bound]), grid)
    return values


def mean(layout: Layout, grid: Encoding, total: Array, participants: int) -> Adapter:
    """The weighted mean of the clients' changes.

    Args:
        layout: The round's.
        grid: For the round's participants.
        total: (layout.length,), uint32: the sum of `participants` vectors.
        participants: How many are in the sum.

    Returns:
        Changes in float64: of the trained factor, beside another of width 0, at the global ranks and scales; and of the dense
        parameters. With equal weights each number is off by half a step at most.

    Raises:
        SecureSumAborted: If the numbers are no such sum, or all weights are 0.
    """
    weight = float(decode(total[-1:], participants, grid)[0]) / grid.bound
    if weight * grid.bound < grid.step / 2:
        raise SecureSumAborted("secure sum: expected a positive sum of weights, got none. Nothing is changed.")
    lora: dict[str, LoraFactors] = {}
    dense: dict[str, Array] = {}
    at = 0
    for name, shape in blocks(layout):
        size = math.prod(shape)
        part = decode(total[at : at + size], participants, grid).reshape(shape) / weight
        at += size
        if name in layout.dense:
            dense[name] = part
        else:
            rank = layout.ranks[name]
            nothing = LoraFactors(np.zeros((rank, 0)), np.zeros((0, rank)), layout.scales[name])
            lora[name] = with_numbers(nothing, layout.side, part)
    return Adapter(lora, dense)
