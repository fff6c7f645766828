"""Adapters of which one factor travels: what they carry, and how both ends make them whole.

Where a strategy trains one factor a round, an update holds that factor, and a part of a release one factor, too: the other has
width 0, so that rank, scale and pairing by name stay as they are and nothing that did not move takes bytes. What neither part
of a release holds has not moved since the start: B = 0, and rows of A that coordinator and clients each draw from the run's
seed. The rows of a smaller rank are the first of a larger one.

A core is one side more: where it is trained, both factors have width 0 on their way, never move, and are orthonormal vectors that
both ends draw; the core starts at 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from lamina.protos import seeds
from lamina.protos.adapter import EMPTY, Adapter, Array, Lazy, LoraFactors
from lamina.protos.errors import AdapterMismatch
from lamina.protos.messages import Trainable
from lamina.protos.orthonormal import orthonormal_rows

Side = Literal["A", "B", "core"]


def start_rows(seed: int, module: str, rank: int, d_in: int) -> Array:
    """The common first A: uniform on 255 steps of a power of two, within about +-1/sqrt(d_in) (Kaiming, as in peft).

    Every wire format returns these numbers bit for bit, so that they may be sent back although they were never sent out: the
    steps fit 8 bits, and the largest number of each row is moved to the last step, which is the scale of int8. They are made
    from the raw bits of PCG64, which numpy keeps from version to version as it does not its distributions: two ends with
    different rows would train in different coordinates.

    Args:
        seed: Of the run.
        module: Whose.
        rank: How many rows; those of a smaller rank are the first of these.
        d_in: Their length.

    Returns:
        (rank, d_in), float32.
    """
    raw = np.asarray(seeds.stream(seed, "shared-rows", module).bit_generator.random_raw(rank * d_in), np.uint64)
    steps = ((raw >> np.uint64(40)) * np.uint64(255) >> np.uint64(24)).astype(np.float64).reshape(rank, d_in) - 127
    largest = (np.arange(rank), np.abs(steps).argmax(axis=1))
    steps[largest] = np.where(steps[largest] < 0, -127.0, 127.0)
    step = 2.0 ** round(math.log2(1 / (127 * math.sqrt(d_in))))
    return (steps * step).astype(np.float32)


def start_factors(
    seed: int, module: str, rank: int, shape: tuple[int, int], scale: float, cored: bool = False
) -> LoraFactors:
    """What coordinator and clients begin from, each on its own; the product is 0.

    Args:
        seed: Of the run.
        module: Whose.
        rank: How many slots; those of a smaller rank are the first of these.
        shape: (d_out, d_in).
        scale: To give them.
        cored: Whether a core is trained.

    Returns:
        `start_rows` and B = 0; or orthonormal rows and columns about a core of zeros.
    """
    d_out, d_in = shape
    if not cored:
        return LoraFactors(start_rows(seed, module, rank, d_in), np.zeros((d_out, rank), np.float32), scale)
    rows = orthonormal_rows(seed, "core-rows", module, rank, d_in)
    columns = orthonormal_rows(seed, "core-columns", module, rank, d_out).T
    return LoraFactors(rows, columns, scale, np.zeros((rank, rank), np.float32))


def one_side(factors: LoraFactors, side: Side) -> LoraFactors:
    """One of two factors, or the core; what is not asked for is cut to width 0.

    Args:
        factors: All.
        side: Which stays.

    Returns:
        Views, not copies.
    """
    if side == "core":
        return LoraFactors(factors.A[:, :0], factors.B[:0], factors.scale, factors.core)
    if side == "A":
        return LoraFactors(factors.A, factors.B[:0], factors.scale)
    return LoraFactors(factors.A[:, :0], factors.B, factors.scale)


def numbers_of(factors: LoraFactors, side: Trainable) -> Array:
    """The numbers that a round trains of factors, which share one coordinate system where the rest stands still.

    Args:
        factors: With all sides.
        side: Which one.

    Returns:
        (r, d_in), (d_out, r) or (r, r).

    Raises:
        AdapterMismatch: If there is no such side, or both factors are trained.
    """
    found = {"A": factors.A, "B": factors.B, "core": factors.core}.get(side)
    if found is None:
        raise AdapterMismatch(f"expected factors with a lora_{side} in every module, got none.")
    return found


def change_of(sent: LoraFactors, start: LoraFactors, side: Trainable, scale: float) -> Array:
    """What a client changed of one module, in the coordinates of the global factors.

    Args:
        sent: What it ended with.
        start: What it started from, of the same rank and scale.
        side: Which side it trained.
        scale: Of the global factors, which every side but A takes up.

    Returns:
        (r_k, d_in), (d_out, r_k) or (r_k, r_k), float64: the first slots of the global ones.
    """
    ratio = 1.0 if side == "A" else sent.scale / scale
    change: Array = ratio * (numbers_of(sent, side).astype(np.float64) - numbers_of(start, side))
    return change


def with_numbers(factors: LoraFactors, side: Trainable, values: Array) -> LoraFactors:
    """Factors with other numbers in one side.

    Args:
        factors: The factors.
        side: Which side.
        values: Its numbers, of the same shape.

    Returns:
        Factors of the same rank and scale.
    """
    if side == "core":
        return replace(factors, core=values)
    return replace(factors, A=values) if side == "A" else replace(factors, B=values)


def side_of(adapter: Adapter, where: str) -> Side | None:
    """Which factor an adapter holds.

    Args:
        adapter: Of one factor in every module.
        where: Put before the message.

    Returns:
        The side, None where it has no module.

    Raises:
        AdapterMismatch: If a module has both factors or none, or modules differ.
    """
    found = {_side(factors) for factors in adapter.lora.values()}
    if not found:
        return None
    if len(found) == 1 and (side := found.pop()) is not None:
        return side
    raise AdapterMismatch(f"{where}: expected one factor, the same in every module, got both, none or different ones.")


def _side(factors: LoraFactors) -> Side | None:
    there: list[Side] = ["A"] if factors.A.shape[1] else []
    there += ["B"] if factors.B.shape[0] else []
    there += [] if factors.core is None else ["core"]
    return there[0] if len(there) == 1 else None


def whole(
    parts: Sequence[Adapter | None],
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    seed: int,
    side: Side,
) -> Adapter:
    """A release of one-sided parts as the client has it, all factors in every module that the client trains.

    Args:
        parts: What came, each of one side; the first part's dense parameters count.
        ranks: Module -> rank that the client trains.
        scales: Module -> its scale.
        shapes: Module -> (d_out, d_in).
        seed: Of the run, for what has not moved since the start.
        side: What is trained.

    Returns:
        An adapter whose modules are read when they are asked for. Reading one raises AdapterMismatch where a part is of another
        rank or scale, both parts are of one side, or one is of a side that does not move beside the trained one.
    """
    there = [part for part in parts if part is not None]

    def factors(module: str) -> LoraFactors:
        rank, scale = ranks[module], scales[module]
        found: dict[Side, LoraFactors] = {}
        for got in (part.lora[module] for part in there if module in part.lora):
            came = _side(got)
            fits = came not in found and (came == "core") == (side == "core")
            if came is None or not fits or (got.rank, got.scale) != (rank, scale):
                raise AdapterMismatch(
                    f"{module}: expected each factor once, of rank {rank} and scale {scale:g}, got rank {got.rank} and scale "
                    f"{got.scale:g} of lora_{came}."
                )
            found[came] = got
        if found.keys() == {"A", "B"}:
            return LoraFactors(found["A"].A, found["B"].B, scale)
        made = start_factors(seed, module, rank, shapes[module], scale, side == "core")
        for came, got in found.items():
            made = _with(made, got, came)
        return made

    return Adapter(Lazy(dict.fromkeys(ranks), factors), (there[0] if there else EMPTY).dense)


def filled(sent: Adapter, start: Adapter, side: Side) -> Adapter:
    """What a client trained, from the one factor that it sent and the other that it started from.

    Args:
        sent: Of one side.
        start: What its release was as the client had it, whole, of the same ranks.
        side: The side that was trained.

    Returns:
        An adapter of all factors, whose modules are read when they are asked for.
    """

    def factors(module: str) -> LoraFactors:
        return _with(start.lora[module], sent.lora[module], side)

    return Adapter(Lazy(dict.fromkeys(sent.lora), factors), sent.dense)


def _with(factors: LoraFactors, got: LoraFactors, side: Side) -> LoraFactors:
    """Factors with one side of others, and their scale."""
    return replace(with_numbers(factors, side, numbers_of(got, side)), scale=got.scale)
