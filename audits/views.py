"""What each party of a run sees of the clients' training, rebuilt from a run directory that kept its updates.

Nothing else enters a view: an attack that reads one knows what that party knows, the run's settings, its seed and the base
included, as every site has them. Two things are granted to a peer that it might have to guess: its own weight in the mean,
and the ranks of the others.

- `coordinator`: each client's update, and what it started from; slots that a release did not fill are drawn from the seed.
- `peer`: its own releases and updates. Under `stack` a release holds the others' factors side by side. Where factors keep
  their slots (`ffa`, `alternate`, `core`, `fedavg`, `zeropad`) two successive releases differ by the mean change; elsewhere
  by the product of one, cut to the peer's rank. Where that is not cut (`residual`), the rows that the others drew from the
  run's seed show what each of them changed, see `_isolated`.
- `secagg-coordinator`: the weighted sum of the clients' changes, where the strategy needs no more.
- `outsider`: the final adapter, without the seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from lamina.audits.kept import KeptRound, read_adapter, start_of
from lamina.client.train import fresh_rows
from lamina.protos.adapter import EMPTY, Adapter, Array, LoraFactors
from lamina.protos.config import Config
from lamina.protos.sides import change_of
from lamina.strategies import Options, build
from lamina.strategies.factors import Pair, change, pair

Party = Literal["peer", "coordinator", "secagg-coordinator", "outsider"]
PARTIES: tuple[Party, ...] = ("peer", "coordinator", "secagg-coordinator", "outsider")
IN_SLOTS = ("ffa", "alternate", "core", "fedavg", "zeropad")
_RANK = 1e-6  # of float32 factors
_CUT = 1e-4  # the part of one's own rows that a release which was not cut may miss, by rounding


@dataclass(frozen=True, eq=False)
class Change:
    """What is seen of one module; one of the two forms.

    Attributes:
        start: Factors that training started from, where the change is seen in their slots.
        rows: (r, d_in), the change of A.
        columns: (d_out, r), the change of B (of B C where a core is trained), times a positive number that is not known.
        product: (d_out, R) and (R, d_in) whose product is that of the change, where factors are not seen.
        known: (k, d_in), rows in whose span the text does not show; what is seen holds off it alone. None for no such.
    """

    start: LoraFactors | None = None
    rows: Array | None = None
    columns: Array | None = None
    product: Pair | None = None
    known: Array | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """One look of one party.

    Attributes:
        party: Who looks.
        clients: Whose training is in it, in id order.
        rounds: Of which rounds.
        changes: Module -> what is seen.
    """

    party: Party
    clients: tuple[str, ...]
    rounds: tuple[int, ...]
    changes: Mapping[str, Change]

    @property
    def individual(self) -> bool:
        """Whether it is of one client alone."""
        return len(self.clients) == 1


@dataclass(frozen=True)
class View:
    """What a party sees of a run.

    Attributes:
        seen: Its looks, in order of rounds and clients; empty where it sees nothing that can be attacked.
        why: A sentence on what that is, or why there is nothing.
    """

    seen: tuple[Seen, ...]
    why: str


def changes_of(start: Adapter, trained: Adapter) -> dict[str, Change]:
    """What changed of each factor.

    Args:
        start: What training started from.
        trained: What it ended with, of the same ranks.

    Returns:
        Module -> the change in its slots, float64.
    """
    return {
        module: Change(
            start=start.lora[module],
            rows=after.A.astype(np.float64) - start.lora[module].A,
            columns=after.B.astype(np.float64) - start.lora[module].B,
        )
        for module, after in trained.lora.items()
    }


def coordinator(rounds: Sequence[KeptRound], config: Config) -> View:
    """What the coordinator sees where updates are not masked.

    Args:
        rounds: As kept.
        config: Of the run.

    Returns:
        Each client's change in each round, exactly.
    """
    if config.privacy.secagg:
        return View((), "privacy.secagg=true: it never saw a single update; see secagg-coordinator")
    seen = []
    for one in rounds:
        for client in one.clients:
            start = start_of(one.releases[client], one.updates[client], client, one.number, config.seed)
            seen.append(Seen("coordinator", (client,), (one.number,), changes_of(start, one.updates[client])))
    return View(tuple(seen), "every client's update, and what it started from")


def _needs_single(config: Config) -> str | None:
    """Why there is no secure sum under a strategy, None where there may be."""
    if build(config.strategy.name, Options({"": 1}, {"": 1.0})).linear:
        return None
    return f"strategy={config.strategy.name} needs single updates; ffa, alternate and core need only sums"


def secagg_coordinator(rounds: Sequence[KeptRound], config: Config) -> View:
    """What the coordinator would have seen, had the run been under secure aggregation.

    Args:
        rounds: As kept.
        config: Of the run.

    Returns:
        The weighted sum of the clients' changes of each round.
    """
    if why := _needs_single(config):
        return View((), why)
    seen = tuple(Seen("secagg-coordinator", one.clients, (one.number,), _summed(one)) for one in rounds)
    return View(seen, "what it would have seen under privacy.secagg=true: the weighted sum of all changes")


def masked_sums(run_dir: Path, config: Config, cohorts: Mapping[int, Sequence[str]], modules: Sequence[str]) -> View:
    """What the coordinator saw of a run under secure aggregation, which keeps no updates: how the global adapter moved.

    Args:
        run_dir: The run directory.
        config: Of the run.
        cohorts: Round -> clients whose changes are in its sum.
        modules: Of which modules.

    Returns:
        The weighted sum of the last rounds whose checkpoints are there, of which two are kept by default.

    Raises:
        ConfigError: If a checkpoint cannot be read.
    """
    if why := _needs_single(config):
        return View((), why)
    there = {}
    for path in sorted((run_dir / "checkpoints").glob("round-[0-9]*/global.safetensors")):
        there[int(path.parent.name.removeprefix("round-"))], _ = read_adapter(path, modules)
    seen = [
        Seen("secagg-coordinator", tuple(sorted(cohorts[number])), (number,), changes_of(there[number - 1], after))
        for number, after in there.items()
        if number - 1 in there and number in cohorts
    ]
    return View(tuple(seen), "the weighted sum of all changes, of the rounds whose checkpoints are there")


def _summed(one: KeptRound) -> dict[str, Change]:
    """The weighted sum of a round's changes in the slots of the widest client."""
    found = {}
    for module in dict.fromkeys(module for update in one.updates.values() for module in update.lora):
        holders = [client for client in one.clients if module in one.updates[client].lora]
        widest = max((one.releases[client].lora[module] for client in holders), key=lambda factors: factors.rank)
        rows, columns = np.zeros(widest.A.shape), np.zeros(widest.B.shape)
        for client in holders:
            sent, start = one.updates[client].lora[module], one.releases[client].lora[module]
            rows[: sent.rank] += one.weights[client] * change_of(sent, start, "A", widest.scale)
            columns[:, : sent.rank] += one.weights[client] * change_of(sent, start, "B", widest.scale)
        found[module] = Change(start=widest, rows=rows, columns=columns)
    return found


def peer(rounds: Sequence[KeptRound], config: Config, client: str) -> View:
    """What one client sees of the others, from what it was sent a round later.

    Args:
        rounds: As kept.
        config: Of the run.
        client: Who looks.

    Returns:
        The others' changes: one by one under `stack`, else mixed, with the client's own part taken away.
    """
    if config.privacy.secagg:
        return View((), "privacy.secagg=true keeps no releases; see secagg-coordinator, who sees no less")
    name, seen = config.strategy.name, list[Seen]()
    for one, following in itertools.pairwise(rounds):
        if client not in one.clients or client not in following.clients or following.number != one.number + 1:
            continue
        others = tuple(other for other in one.clients if other != client)
        if name == "stack":
            seen.extend(_blocks(one, following.frozen[client], others, config.seed))
        elif others:
            between = _in_slots if name in IN_SLOTS else _products
            seen.append(Seen("peer", others, (one.number,), between(one, following, client, config)))
            if name not in IN_SLOTS and len(others) > 1:
                seen.extend(_isolated(one, following, client, config))
    if not seen:
        return View(
            (),
            f"client {client} was sent nothing that others' training had entered: its rounds do not follow each other",
        )
    if name == "stack":
        return View(tuple(seen), "strategy=stack sends every client's own factors to every other")
    why = "the difference of successive releases, without the client's own part"
    if seen[0].individual:
        why += "; of two clients, what is left is the other's alone"
    elif any(one.individual for one in seen):
        why += "; and each other client's first change of A, as its start is drawn from the run's seed and the release is not cut"
    return View(tuple(seen), why)


def _blocks(one: KeptRound, frozen: Adapter, others: Sequence[str], seed: int) -> list[Seen]:
    """The others' factors in a concatenation, which lies in id order; B is times p_k and the scale."""
    found: dict[str, dict[str, Change]] = {client: {} for client in others}
    for module, stacked in frozen.lora.items():
        holders = [client for client in one.clients if module in one.updates[client].lora]
        ranks = [one.updates[client].lora[module].rank for client in holders]
        if (
            sum(ranks) != stacked.rank
        ):  # a slot of zeros is left out, or all of G came: where blocks end is not known then
            continue
        ends = np.cumsum(ranks)
        for client, rank, end in zip(holders, ranks, ends, strict=True):
            if client in found:
                block = LoraFactors(stacked.A[end - rank : end], stacked.B[:, end - rank : end])
                start = start_of(EMPTY, Adapter({module: block}), client, one.number, seed)
                found[client] |= changes_of(start, Adapter({module: block}))
    return [Seen("peer", (client,), (one.number,), changes) for client, changes in found.items() if changes]


def _in_slots(one: KeptRound, following: KeptRound, client: str, config: Config) -> dict[str, Change]:
    """The mean change of factors that keep their slots, without the client's own."""
    before, after, own = one.releases[client], following.releases[client], one.updates[client]
    share, found = config.aggregation.learning_rate * one.weights[client], {}
    for module, mine in own.lora.items():
        then, now = before.lora[module], after.lora[module]
        rows = change_of(now, then, "A", then.scale) - share * change_of(mine, then, "A", then.scale)
        columns = change_of(now, then, "B", then.scale) - share * change_of(mine, then, "B", then.scale)
        found[module] = Change(start=then, rows=rows, columns=columns)
    return found


def _products(one: KeptRound, following: KeptRound, client: str, config: Config) -> dict[str, Change]:
    """The product of the others' change as far as the client's ranks show it, and the rows that they started from."""
    share, found = config.aggregation.learning_rate * one.weights[client], {}
    others = [other for other in one.clients if other != client]
    for module, mine in one.updates[client].lora.items():
        held = _parts(one, client, module)
        pairs = [pair(part) for part in _parts(following, client, module)]
        pairs += [pair(part, -1.0) for part in held]
        pairs.append(change(mine, one.releases[client].lora.get(module), -share))
        known = [part.A for part in held]
        known += [_drawn(one, other, module, config.seed) for other in others if module in one.updates[other].lora]
        found[module] = Change(
            product=(np.concatenate([p[0] for p in pairs], axis=1), np.concatenate([p[1] for p in pairs])),
            known=np.concatenate(known),
        )
    return found


def _isolated(one: KeptRound, following: KeptRound, client: str, config: Config) -> list[Seen]:
    """Each other client's change of A, off the rows V of the next release.

    The rows A_k that a client ended with lie in V, where V is not cut; it started from A_k - D_k, which everyone can draw. Off V,
    that is -D_k. Whether V is cut, the peer sees by its own rows.
    """
    found = []
    for other in (other for other in one.clients if other != client):
        changes = {}
        for module, trained in one.updates[other].lora.items():
            drawn, held = _drawn(one, other, module, config.seed), _parts(following, client, module)
            mine = one.updates[client].lora.get(module)
            if mine is None or not held or len(drawn) < trained.rank:
                continue
            within = _basis(np.concatenate([part.A for part in held]))
            if len(within) < trained.shape[1] and np.linalg.norm(_off(mine.A, within)) < _CUT * np.linalg.norm(mine.A):
                changes[module] = Change(rows=-_off(drawn, within), known=within)
        if changes:
            found.append(Seen("peer", (other,), (one.number,), changes))
    return found


def _basis(rows: Array) -> Array:
    """Orthonormal rows of the same span."""
    _, sizes, directions = np.linalg.svd(np.asarray(rows, np.float64), full_matrices=False)
    return np.asarray(directions[sizes > _RANK * sizes[0]])


def _off(rows: Array, basis: Array) -> Array:
    """What of some rows is not in the span of a basis."""
    wide = np.asarray(rows, np.float64)
    return np.asarray(wide - (wide @ basis.T) @ basis)


def _parts(one: KeptRound, client: str, module: str) -> list[LoraFactors]:
    sides = (one.releases[client], one.frozen.get(client, EMPTY))
    return [side.lora[module] for side in sides if module in side.lora and side.lora[module].rank]


def _drawn(one: KeptRound, other: str, module: str, seed: int) -> Array:
    """The rows that another client drew, as its rank has more slots than its release filled."""
    trained, got = one.updates[other].lora[module], one.releases[other].lora.get(module)
    missing = trained.rank - (0 if got is None else got.rank)
    return fresh_rows(seed, other, one.number, module, (missing, trained.shape[1]))


def outsider(
    run_dir: Path, config: Config, clients: Sequence[str], rounds: Sequence[int], modules: Sequence[str]
) -> View:
    """What whoever holds the final adapter sees.

    Args:
        run_dir: The run directory.
        config: Of the run.
        clients: Who took part in any round.
        rounds: Which there were.
        modules: Of which modules.

    Returns:
        The product of each module; its columns and fixed rows where the strategy trains no rows.
    """
    path = run_dir / "adapter" / "adapter_model.safetensors"
    if not path.exists():
        return View((), "the run has no adapter/: it did not end")
    adapter, _ = read_adapter(path, modules)
    changes = {}
    for module, factors in adapter.lora.items():
        if config.strategy.name in ("ffa", "core"):
            start = replace(factors, B=np.zeros_like(factors.B))
            changes[module] = Change(start=start, rows=np.zeros(factors.A.shape), columns=factors.B.astype(np.float64))
        else:
            changes[module] = Change(product=pair(factors))
    if not changes:
        return View((), "the adapter has no factors in these modules")
    return View((Seen("outsider", tuple(sorted(clients)), tuple(rounds), changes),), "the final adapter alone")
