"""Federations for hypothesis to draw, a client without a model, and dense float64 oracles.

A federation is a schema and a few clients of unequal rank, scale and size; the numbers come from a seed, so that an example
shrinks to a small federation and not to a matrix of zeros. The layers are not square, and one has the shape of a
grouped-query key projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from lamina.protos import seeds
from lamina.protos.adapter import Adapter, LoraFactors, concatenated, product
from lamina.protos.codec import WireFormat, decode, decode_update, encode, encode_update
from lamina.protos.messages import Budget, Release, Update
from lamina.protos.spec import AdapterSpec
from lamina.strategies import Options, Strategy, build
from lamina.strategies.base import ServerState

Matrix = NDArray[np.float64]

SHAPES: Mapping[str, tuple[int, int]] = {"q_proj": (48, 32), "down_proj": (32, 48), "k_proj": (16, 48)}
DENSE: Mapping[str, tuple[int, ...]] = {"score.weight": (3, 32), "norm.bias": (5,)}
EXACT = ("recompress", "residual", "stack")
# Factors are stored in float32, whose unit roundoff is 6e-8.
TOLERANCE = 1e-6
UNUSED = np.random.default_rng(0)


@dataclass(frozen=True)
class Member:
    """A client: its id, its rank and scale in each module that it trains, and how many examples it has."""

    client_id: str
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    num_examples: int

    def budget(self, held_version: int = -1, download: int | None = None) -> Budget:
        """What it asks for; by default it can download as much as there is."""
        full = {module: min(shape) if download is None else download for module, shape in SHAPES.items()}
        return Budget(self.ranks, full, self.scales, held_version)


@dataclass(frozen=True)
class Federation:
    """A schema, its clients, and the seed of all numbers."""

    spec: AdapterSpec
    members: tuple[Member, ...]
    seed: int


@dataclass(frozen=True)
class Played:
    """One round: the state before, what was sent and received as decoded, and the state after."""

    before: ServerState
    updates: tuple[Update, ...]
    releases: Mapping[str, Release]
    after: ServerState


@st.composite
def members(draw: st.DrawFn, client_id: str, modules: Sequence[str], everywhere: bool = False) -> Member:
    """A client that trains at least one module, at rank 1, at min(m, n), or between."""
    trained = modules if everywhere else draw(st.lists(st.sampled_from(modules), min_size=1, unique=True))
    ranks = {m: draw(st.sampled_from([1, 2, 3, 4, 8, 13, min(SHAPES[m])])) for m in trained}
    lora_alpha = draw(st.sampled_from([1.0, 8.0, 16.0, 37.0]))
    rank_stabilised = draw(st.booleans())
    scales = {m: lora_alpha / (r**0.5 if rank_stabilised else r) for m, r in ranks.items()}
    return Member(client_id, ranks, scales, draw(st.integers(1, 2000)))


@st.composite
def federations(
    draw: st.DrawFn, least: int = 1, most: int = 5, modules: Sequence[str] = (), everywhere: bool = False
) -> Federation:
    """Between `least` and `most` clients on one to three layers, two dense parameters with them."""
    chosen = list(modules) or draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
    seed = draw(st.integers(0, 2**32))
    start = {name: normal(shape, seed, "dense", name) for name, shape in DENSE.items()}
    spec = AdapterSpec({module: SHAPES[module] for module in chosen}, dense=start)
    ids = draw(st.permutations([f"site-{index}" for index in range(draw(st.integers(least, most)))]))
    return Federation(spec, tuple(draw(members(name, chosen, everywhere)) for name in ids), seed)


@st.composite
def cohorts(draw: st.DrawFn, federation: Federation, rounds: int) -> list[list[Member]]:
    """Who takes part in each round: at least one, in any order, so that some join late and some skip."""
    some = st.lists(st.sampled_from(federation.members), min_size=1, unique_by=lambda member: member.client_id)
    return [draw(some) for _ in range(rounds)]


def normal(shape: tuple[int, ...], seed: int, *names: object) -> NDArray[np.float32]:
    """Standard normal numbers of a stream of their own."""
    return seeds.stream(seed, *names).standard_normal(shape).astype(np.float32)


def started(release: Release, member: Member, spec: AdapterSpec, seed: int) -> Adapter:
    """What a client trains from: the released prefix, then fresh slots with B = 0 up to its own rank."""
    lora = {}
    for module, rank in member.ranks.items():
        d_out, d_in = spec.modules[module]
        got = release.trainable.lora.get(module)
        missing = rank - (got.rank if got else 0)
        rows = normal((missing, d_in), seed, "fresh", member.client_id, release.version, module) / np.float32(d_in**0.5)
        fresh = LoraFactors(rows, np.zeros((d_out, missing), np.float32), member.scales[module])
        lora[module] = concatenated(got, fresh) if got else fresh
    return Adapter(lora, release.trainable.dense)


def moved(adapter: Adapter, seed: int, *names: object) -> Adapter:
    """Training that moves every number; later columns of B move less, so that the spectrum decays."""
    lora = {}
    for module, factors in adapter.lora.items():
        decay = (0.8 ** np.arange(factors.rank)).astype(np.float32)
        rows = factors.A + normal(factors.A.shape, seed, *names, module, "A") / np.float32(4)
        columns = factors.B + normal(factors.B.shape, seed, *names, module, "B") / np.float32(4) * decay
        lora[module] = LoraFactors(rows, columns, factors.scale)
    dense = {name: value + normal(value.shape, seed, *names, name) for name, value in adapter.dense.items()}
    return Adapter(lora, dense)


def update_of(member: Member, adapter: Adapter, round_number: int = 1) -> Update:
    """The adapter as this client's update."""
    return Update("run", round_number, member.client_id, "", adapter, member.num_examples)


def received(release: Release, wire: WireFormat, *names: object) -> Release:
    """A release after its way over the wire."""
    rng = seeds.stream(0, "down", *names)
    frozen = None if release.frozen is None else decode(encode(release.frozen, wire, rng))
    return replace(release, trainable=decode(encode(release.trainable, wire, rng)), frozen=frozen)


def sent(update: Update, wire: WireFormat) -> Update:
    """An update after its way over the wire."""
    return decode_update(encode_update(update, wire, seeds.stream(1, "up", update.client_id, update.round)))


def play(
    strategy: Strategy,
    federation: Federation,
    rounds: Sequence[Sequence[Member]],
    wire: WireFormat = "fp32",
    trains: bool = True,
    state: ServerState | None = None,
) -> Iterator[Played]:
    """Rounds of release, local training or none, update and aggregation, every message through the codec."""
    state = state or strategy.init(federation.spec)
    held: dict[str, int] = {}
    for cohort in rounds:
        updates, releases = [], {}
        for member in cohort:
            budget = member.budget(held.get(member.client_id, -1))
            release = received(strategy.release(state, budget), wire, member.client_id, state.round)
            adapter = started(release, member, federation.spec, federation.seed)
            if trains:
                adapter = moved(adapter, federation.seed, member.client_id, state.round)
            releases[member.client_id] = release
            updates.append(sent(update_of(member, adapter, state.round + 1), wire))
            held[member.client_id] = state.round
        after = strategy.step(state, updates, releases, UNUSED)
        yield Played(state, tuple(updates), releases, after)
        state = after


def strategy_of(name: str, federation: Federation, **options: Any) -> Strategy:
    """A strategy with the largest ranks of the federation."""
    rank = {m: max([u.ranks.get(m, 1) for u in federation.members]) for m in federation.spec.modules}
    return build(name, Options(rank, dict.fromkeys(rank, 2.0), **options))


def first_updates(federation: Federation) -> list[Update]:
    """A first round, from G = 0: updates with numbers everywhere, each client at its own rank and scale."""
    nothing = Release(0, Adapter({}, federation.spec.dense))
    return [
        update_of(m, moved(started(nothing, m, federation.spec, federation.seed), federation.seed, m.client_id))
        for m in federation.members
    ]


def shares(updates: Sequence[Update]) -> dict[str, float]:
    """p_k by number of examples, over all of the round's updates."""
    everything = sum(update.num_examples for update in updates)
    return {update.client_id: update.num_examples / everything for update in updates}


def dense_target(played: Played, module: str, weights: Mapping[str, float], learning_rate: float = 1.0) -> Matrix:
    """G + eta * sum p_k (W_k - T_k) of one module, by dense float64 sums."""
    target = product(played.before.adapter.lora[module])
    for update in played.updates:
        if module not in update.adapter.lora:
            continue
        change = product(update.adapter.lora[module])
        if module in played.releases[update.client_id].trainable.lora:
            change = change - product(played.releases[update.client_id].trainable.lora[module])
        target = target + learning_rate * weights[update.client_id] * change
    return target


def mean_product(updates: Sequence[Update], module: str) -> Matrix:
    """sum p_k s_k B_k A_k, densely."""
    weights = shares(updates)
    terms = [weights[u.client_id] * product(u.adapter.lora[module]) for u in updates if module in u.adapter.lora]
    return sum(terms, np.zeros(SHAPES[module]))


def truncated_svd(matrix: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """FlexLoRA's step on a dense sum: the best matrix of this rank, and all singular values."""
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank], sigma


def gap(ours: Matrix, theirs: Matrix) -> float:
    """Frobenius distance over the norm of `theirs`; 0/0 is 0."""
    norm = float(np.linalg.norm(theirs))
    distance = float(np.linalg.norm(ours - theirs))
    return distance / norm if norm > 0 else distance


def sides(factors: LoraFactors) -> dict[str, NDArray[Any]]:
    """A, B, and the core where there is one."""
    return {"A": factors.A, "B": factors.B} | ({} if factors.core is None else {"core": factors.core})


def same_bits(first: Adapter, second: Adapter) -> bool:
    """Whether two adapters hold the same numbers, bit for bit."""
    if first.lora.keys() != second.lora.keys() or first.dense.keys() != second.dense.keys():
        return False
    if any(sides(f).keys() != sides(second.lora[m]).keys() for m, f in first.lora.items()):
        return False
    pairs = [(value, sides(second.lora[m])[side]) for m, f in first.lora.items() for side, value in sides(f).items()]
    pairs += [(value, second.dense[name]) for name, value in first.dense.items()]
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs) and all(
        f.scale == second.lora[m].scale for m, f in first.lora.items()
    )


def with_factors(update: Update, change: Mapping[str, LoraFactors]) -> Update:
    """The update with other factors in some modules."""
    return replace(update, adapter=Adapter({**update.adapter.lora, **change}, update.adapter.dense))


def at_scale(factors: LoraFactors, scale: float) -> LoraFactors:
    """Another scale with B divided by the same, in float32; the product stays up to rounding."""
    return LoraFactors(factors.A, (factors.B * np.float32(factors.scale / scale)).astype(np.float32), scale)


def aggregated(name: str, federation: Federation, updates: Sequence[Update], **options: Any) -> ServerState:
    """One first round, from G = 0."""
    strategy = strategy_of(name, federation, **options)
    return strategy.step(strategy.init(federation.spec), updates, {}, UNUSED)


def largest_gap(first: ServerState, second: ServerState) -> float:
    """The largest distance of two states' products over the modules."""
    pairs = [(product(f), product(second.adapter.lora[module])) for module, f in first.adapter.lora.items()]
    return max(gap(ours, theirs) for ours, theirs in pairs)


def drawn_rounds(data: st.DataObject, federation: Federation, most: int = 4) -> list[list[Member]]:
    """One to `most` rounds of drawn attendance."""
    return data.draw(cohorts(federation, data.draw(st.integers(1, most))))


def adapter_of(seed: int, rank: int = 3, size: float = 1.0, cored: bool = False) -> Adapter:
    """A small adapter of one layer and one dense parameter, for tests of messages."""
    rows, columns = normal((rank, 9), seed, "A") * np.float32(size), normal((7, rank), seed, "B") * np.float32(size)
    core = normal((rank, rank), seed, "core") * np.float32(size) if cored else None
    return Adapter(
        {"layers.0.q_proj": LoraFactors(rows, columns, 16 / rank, core)}, {"score.weight": normal((2, 7), seed, "d")}
    )


def arrays(adapter: Adapter) -> dict[str, NDArray[Any]]:
    """All arrays of an adapter: `<module>.A`, `<module>.B`, `<module>.core`, and the dense ones by their names."""
    found = {f"{m}.{side}": value for m, f in adapter.lora.items() for side, value in sides(f).items()}
    return found | dict(adapter.dense)
