"""What each party sees, held against the updates themselves: as much as it gets, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from lamina.audits import views
from lamina.audits.kept import KeptRound, read_rounds, start_of
from lamina.audits.views import Change, Seen, changes_of
from lamina.client.train import Task, completed
from lamina.protos.adapter import Adapter, LoraFactors, product
from lamina.protos.config import Config
from lamina.protos.errors import ConfigError
from lamina.server.store.run_directory import keep_round
from lamina.simulations.run import simulate
from tests.runs import Outcome, Quiet, play, small

# Client ids as text: "10" comes before "2" and "9".
NAMES = "clients.names=[9,10,2]"
EQUAL = {"fedavg": "clients.ranks=2"}
STRATEGIES = ("recompress", "residual", "stack", "ffa", "alternate", "core", "fedavg", "zeropad", "flexlora")


@dataclass(frozen=True)
class Kept:
    path: Path
    config: Config
    outcome: Outcome
    rounds: tuple[KeptRound, ...]


Play = Callable[..., Kept]


@pytest.fixture(scope="module")
def kept(llama: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Play:
    found: dict[tuple[str, ...], Kept] = {}

    def played(strategy: str, *words: str) -> Kept:
        key = (strategy, *words)
        if key not in found:
            ranks = EQUAL.get(strategy, "clients.ranks=[4,2,1]")
            config = small(llama, notes, f"strategy={strategy}", NAMES, ranks, "rounds=3", "seed=5", *words)
            outcome, path = play(config), tmp_path_factory.mktemp(strategy)
            for one in outcome.rounds:
                keep_round(path, one)
            modules = tuple(outcome.prepared.base.spec.modules)
            found[key] = Kept(path, config, outcome, read_rounds(path, modules))
        return found[key]

    return played


def starts(run: Kept, number: int) -> dict[str, Adapter]:
    """What the clients really had in their slots, by the client's own code."""
    one, base = run.rounds[number], run.outcome.prepared.base
    found = {}
    for client in one.clients:
        trained = one.updates[client].lora
        ranks, scales = {m: f.rank for m, f in trained.items()}, {m: f.scale for m, f in trained.items()}
        task = Task(client, one.number, run.config.rounds, run.config.seed, run.config.train)
        found[client] = completed(one.releases[client], ranks, scales, task, base)
    return found


def same(got: np.ndarray | None, wanted: np.ndarray, size: float = 0.0) -> None:
    """Equal but for float32 rounding of what was added up."""
    assert got is not None
    largest = max(float(np.abs(wanted).max()), size)
    assert largest > 0
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6 * largest)


def rows_of(change: Change) -> np.ndarray:
    assert change.rows is not None
    return change.rows


def columns_of(change: Change) -> np.ndarray:
    assert change.columns is not None
    return change.columns


def change_product(start: LoraFactors, trained: LoraFactors) -> np.ndarray:
    return product(trained) - product(start)


@pytest.mark.parametrize("strategy", ["recompress", "stack", "ffa"])
def test_the_coordinator_sees_each_change_from_where_it_started(kept: Play, strategy: str) -> None:
    run = kept(strategy)
    seen = views.coordinator(run.rounds, run.config).seen
    assert [(one.clients, one.rounds) for one in seen] == [((c,), (n,)) for n in (1, 2, 3) for c in ("10", "2", "9")]
    for look in seen:
        (client,), (number,) = look.clients, look.rounds
        start, trained = starts(run, number - 1)[client], run.rounds[number - 1].updates[client]
        for module, change in look.changes.items():
            assert np.array_equal(rows_of(change), trained.lora[module].A.astype(np.float64) - start.lora[module].A)
            assert np.array_equal(columns_of(change), trained.lora[module].B.astype(np.float64) - start.lora[module].B)
        # One step of AdamW moves a number by at most about the rate: from another start it would be many times that.
        most = max(float(np.abs(rows_of(change)).max()) for change in look.changes.values())
        assert most < 3 * run.config.train.local_steps * run.config.train.learning_rate


def test_a_peer_under_stack_has_every_other_clients_own_factors(kept: Play) -> None:
    run = kept("stack")
    looks = views.peer(run.rounds, run.config, "2").seen
    assert [(one.clients, one.rounds) for one in looks] == [((c,), (n,)) for n in (1, 2) for c in ("10", "9")]
    for look in looks:
        (client,), number = look.clients, look.rounds[0] - 1
        one = run.rounds[number]
        wanted = changes_of(starts(run, number)[client], one.updates[client])
        assert look.changes.keys() == wanted.keys()
        for module, change in look.changes.items():
            assert np.array_equal(rows_of(change), rows_of(wanted[module]))
            share = one.weights[client] * one.updates[client].lora[module].scale
            same(change.columns, share * columns_of(wanted[module]))


def others_mean(run: Kept, number: int, client: str, side: str, module: str) -> np.ndarray:
    """The mean change of the others in one factor, in the client's slots and at its scale."""
    one, start = run.rounds[number], starts(run, number)
    mine = one.updates[client].lora[module]
    total = np.zeros(getattr(mine, side).shape)
    for other in (other for other in one.clients if other != client):
        after, before = one.updates[other].lora[module], start[other].lora[module]
        change = getattr(after, side).astype(np.float64) - getattr(before, side)
        ratio, rank = (1.0 if side == "A" else after.scale / mine.scale), min(after.rank, mine.rank)
        there = np.s_[:rank] if side == "A" else np.s_[:, :rank]
        total[there] += one.weights[other] * ratio * change[there]
    return total


@pytest.mark.parametrize("strategy", ["ffa", "alternate", "core", "fedavg"])
def test_a_peer_sees_the_mean_of_the_others_where_factors_keep_their_slots(kept: Play, strategy: str) -> None:
    run = kept(strategy)
    # A smaller client sees a corner of the others' cores, which B hides in the file.
    me, others = ("9", ("10", "2")) if strategy == "core" else ("10", ("2", "9"))
    looks = views.peer(run.rounds, run.config, me).seen
    assert [(one.clients, one.rounds) for one in looks] == [(others, (n,)) for n in (1, 2)]
    for look in looks:
        for module, change in look.changes.items():
            number = look.rounds[0] - 1
            factors = run.rounds[number].updates[me].lora[module]
            for side, got in (("A", change.rows), ("B", change.columns)):
                wanted = others_mean(run, number, me, side, module)
                same(got, wanted, float(np.abs(getattr(factors, side)).max()))


@pytest.mark.parametrize("strategy", ["residual", "recompress"])
def test_a_peer_sees_the_product_of_the_others_as_far_as_a_release_is_not_cut(kept: Play, strategy: str) -> None:
    run = kept(strategy, "clients.download_rank=16")
    for look in (one for one in views.peer(run.rounds, run.config, "9").seen if not one.individual):
        number = look.rounds[0] - 1
        one, start = run.rounds[number], starts(run, number)
        for module, change in look.changes.items():
            assert change.product is not None
            wanted = sum(
                one.weights[c] * change_product(start[c].lora[module], one.updates[c].lora[module]) for c in ("10", "2")
            )
            got = change.product[0] @ change.product[1]
            if strategy == "residual":
                same(got, np.asarray(wanted), float(np.abs(product(one.updates["9"].lora[module])).max()))
            else:
                assert np.linalg.norm(got - wanted) > 1e-3 * np.linalg.norm(wanted)


def test_a_release_that_is_not_cut_shows_single_changes_of_the_first_round(kept: Play) -> None:
    run = kept("residual", "clients.ranks=[4,2,1]")
    looks = [one for one in views.peer(run.rounds, run.config, "9").seen if one.individual]
    assert [(one.clients, one.rounds) for one in looks] == [(("10",), (1,)), (("2",), (1,))]
    for look in looks:
        wanted = changes_of(starts(run, 0)[look.clients[0]], run.rounds[0].updates[look.clients[0]])
        for module, change in look.changes.items():
            assert change.known is not None
            rows = rows_of(wanted[module])
            off = rows - (rows @ change.known.T) @ change.known
            same(change.rows, off, 0.05 * float(np.abs(rows).max()))
    cut = kept("recompress", "clients.ranks=[4,2,1]")
    assert not any(one.individual for one in views.peer(cut.rounds, cut.config, "9").seen)


@pytest.mark.parametrize("strategy", ["ffa", "alternate", "core"])
def test_a_secure_sum_is_the_weighted_sum(kept: Play, strategy: str) -> None:
    run = kept(strategy)
    looks = views.secagg_coordinator(run.rounds, run.config).seen
    assert [one.clients for one in looks] == [("10", "2", "9")] * 3
    for look in looks:
        number = look.rounds[0] - 1
        one, start = run.rounds[number], starts(run, number)
        for module, change in look.changes.items():
            assert change.start is not None
            got = [change.rows, change.columns]
            for side, seen in zip("AB", got, strict=True):
                total = np.zeros(getattr(change.start, side).shape)
                for client in one.clients:
                    after, before = one.updates[client].lora[module], start[client].lora[module]
                    part = getattr(after, side).astype(np.float64) - getattr(before, side)
                    part *= 1.0 if side == "A" else after.scale / change.start.scale
                    total[tuple(slice(size) for size in part.shape)] += one.weights[client] * part
                same(seen, total, float(np.abs(getattr(change.start, side)).max()))


def test_a_masked_run_shows_the_sum_and_no_update(kept: Play, llama: Path, notes: Path, tmp_path: Path) -> None:
    plain = kept("ffa", "aggregation.weights=uniform")
    words = ["strategy=ffa", NAMES, "clients.ranks=[4,2,1]", "rounds=3", "seed=5", "aggregation.weights=uniform"]
    config = small(llama, notes, *words, "privacy.secagg=true", f"output={tmp_path / 'run'}")
    simulate(config, Quiet(), plain.outcome.prepared)
    modules = tuple(plain.outcome.prepared.base.spec.modules)
    assert views.coordinator((), config).seen == ()
    assert views.peer((), config, "9").seen == ()
    (look,) = views.masked_sums(tmp_path / "run", config, {3: ["9", "10", "2"]}, modules).seen
    wanted = views.secagg_coordinator(plain.rounds, plain.config).seen[2]
    assert (look.clients, look.rounds) == (wanted.clients, wanted.rounds) == (("10", "2", "9"), (3,))
    for module, change in look.changes.items():
        # The sum is of whole numbers of steps, so both runs drift apart a little.
        np.testing.assert_allclose(columns_of(change), columns_of(wanted.changes[module]), atol=2e-3)
        assert float(np.abs(columns_of(change)).max()) > 5e-3


def poisoned(one: KeptRound, clients: set[str]) -> KeptRound:
    """A round with numbers in some clients' files that nobody else may have read."""

    def lost(adapter: Adapter) -> Adapter:
        lora = {
            m: LoraFactors(np.full_like(f.A, np.nan), np.full_like(f.B, np.nan), f.scale)
            for m, f in adapter.lora.items()
        }
        return Adapter(lora)

    def some(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
        return {client: lost(adapter) if client in clients else adapter for client, adapter in adapters.items()}

    weights = {client: np.nan if client in clients else weight for client, weight in one.weights.items()}
    return replace(
        one, updates=some(one.updates), releases=some(one.releases), frozen=some(one.frozen), weights=weights
    )


def equal(one: Change, other: Change) -> bool:
    got = [(a, b) for a, b in ((one.rows, other.rows), (one.columns, other.columns), (one.known, other.known))]
    got += list(zip(one.product or (), other.product or (), strict=True))
    return all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in got)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_peer_reads_no_number_that_it_was_not_sent(kept: Play, strategy: str) -> None:
    run = kept(strategy)
    hidden = tuple(poisoned(one, {"10", "9"}) for one in run.rounds)
    seen, without = views.peer(run.rounds, run.config, "2").seen, views.peer(hidden, run.config, "2").seen
    assert seen
    assert [(one.clients, one.rounds) for one in seen] == [(one.clients, one.rounds) for one in without]
    for one, other in zip(seen, without, strict=True):
        assert one.changes.keys() == other.changes.keys()
        assert all(equal(one.changes[module], other.changes[module]) for module in one.changes)


def test_two_clients_show_each_other(kept: Play) -> None:
    run = kept("recompress")
    two = tuple(replace(one, clients=("10", "2")) for one in run.rounds)
    view = views.peer(two, run.config, "2")
    assert all(one.individual for one in view.seen)
    assert "the other's alone" in view.why


def test_what_a_party_does_not_see_is_said(kept: Play, tmp_path: Path) -> None:
    run = kept("recompress")
    assert "single updates" in views.secagg_coordinator(run.rounds, run.config).why
    assert "do not follow" in views.peer(run.rounds[:1], run.config, "2").why
    assert "did not end" in views.outsider(run.path, run.config, ["2"], [1], ()).why
    with pytest.raises(ConfigError, match="keep_updates=true"):
        read_rounds(tmp_path, ())
    broken = tmp_path / "rounds" / "0001" / "updates"
    broken.mkdir(parents=True)
    (broken / "0.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rounds(tmp_path, ("m",))


def test_a_start_is_drawn_for_the_right_client_and_round(kept: Play) -> None:
    """The mistake, planted: with another client's draws the change is as large as a start, and shows nothing."""
    run = kept("stack")
    one = run.rounds[0]
    right = changes_of(start_of(one.releases["9"], one.updates["9"], "9", 1, run.config.seed), one.updates["9"])
    for client, number, seed in (("10", 1, 5), ("9", 2, 5), ("9", 1, 6)):
        wrong = changes_of(start_of(one.releases["9"], one.updates["9"], client, number, seed), one.updates["9"])
        for module, change in right.items():
            assert np.linalg.norm(rows_of(wrong[module])) > 3 * np.linalg.norm(rows_of(change))


def test_looks_of_one_client_are_individual() -> None:
    assert Seen("peer", ("0",), (1,), {}).individual
    assert not Seen("peer", ("0", "1"), (1,), {}).individual
