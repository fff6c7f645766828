"""The privacy ledger of a site in a deployment: charged before anything leaves, enforced whatever the coordinator asks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from lamina.client.agent import Agent
from lamina.client.listening import Settings
from lamina.client.loading import BaseOptions, load_base
from lamina.client.policy import Policy, PrivacyFloor
from lamina.client.private import account as accounts
from lamina.client.private import ledger as ledgers
from lamina.client.private.ledger import FILE_NAME, Ledger, opened
from lamina.client.worker import SiteWorker
from lamina.protos.clock import SYSTEM
from lamina.protos.errors import BudgetSpent, LaminaError, QuorumNotReached
from lamina.protos.files import sha256
from lamina.protos.link import Address, Link
from lamina.protos.messages import Update
from lamina.protos.privacy.accounting import epsilon
from lamina.protos.privacy.events import Event
from lamina.server.store import checkpoint, run_directory
from tests import deployment
from tests.deployment import NAMES, Noisy
from tests.models import TINY

PRIVATE = ("privacy=example-dp", "privacy.epsilon=20", "train.local_steps=4", "evaluate.every=100")
ONE = Event("north", 1, 1.0, 0.1, 4, 1.0)


def cost(*times: int, noise: float = 1.0) -> float:
    return epsilon([replace(ONE, steps=4 * n, noise_multiplier=noise) for n in times], 1e-5)


@dataclass
class Played:
    """A run that is over: its directory, its sites' workers and logs, and how they ended."""

    path: Path
    workers: Mapping[str, Noisy]
    events: Mapping[str, list[dict[str, Any]]]
    outcome: Mapping[str, Any] = field(default_factory=dict)
    ended: LaminaError | None = None

    def ledger(self, name: str) -> Ledger:
        return opened(self.path.parent / name)

    def told(self, name: str, event: str) -> list[dict[str, Any]]:
        return [one for one in self.events[name] if one["event"] == event]


def play(
    folder: Path,
    *given: str,
    policy: Policy | None = None,
    workers: Mapping[str, Noisy] | None = None,
    run: str = "run",
    names: Sequence[str] = NAMES,
) -> Played:
    """A coordinator and its sites in this process, to the end of the run."""
    folder.mkdir(exist_ok=True)
    spec_file = folder / "spec.json"
    spec_file.write_text(deployment.spec().to_json())
    played = Played(folder / run, workers or {name: Noisy(name) for name in names}, {name: [] for name in names})
    words = deployment.words(spec_file, "insecure=true", *PRIVATE, *given)
    with deployment.coordinator(played.path, words) as running:
        threads, agents = {}, []
        for name in names:

            def log(event: str, *, who: str = name, **fields: Any) -> None:
                played.events[who].append({"event": event, **fields})

            one = deployment.agent(
                name, running.port, folder / name, worker=played.workers[name], log=log, policy=policy
            )
            agents.append(one)
            threads[name] = deployment.in_thread(one)
        try:
            running.join()
        except (BudgetSpent, QuorumNotReached) as error:
            played.ended = error
            for one in agents:
                one.stop()
        for thread, _ in threads.values():
            thread.join(30)
        played.outcome = {name: outcome for name, (_, outcome) in threads.items()}
    return played


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """SHA-256 of each file as it is sent, and whether the ledger beside it had its charge at that moment."""
    found: list[tuple[str, bool]] = []
    inner = Link.upload

    def upload(self: Link, claim: Any, path: Path, chunk_bytes: int) -> None:
        digest = sha256(path.read_bytes())
        found.append((digest, any(one.update == digest for one in opened(path.parents[2]).charges)))
        inner(self, claim, path, chunk_bytes)

    monkeypatch.setattr(Link, "upload", upload)
    return found


def test_every_update_is_paid_before_it_leaves(tmp_path: Path, uploads: list[tuple[str, bool]]) -> None:
    played = play(tmp_path)
    assert len(uploads) == 9
    assert all(paid for _, paid in uploads)
    for name in NAMES:
        ledger = played.ledger(name)
        assert [one.event.round for one in ledger.charges] == [1, 2, 3]
        assert [one.update for one in ledger.charges] == played.workers[name].made
        assert ledgers.runs_of(ledger) == [json.loads((played.path / "summary.json").read_text())["run_id"]]
        said = [one for one in played.told(name, "privacy") if "round" in one]
        assert [one["spent"] for one in said] == [pytest.approx(cost(n), abs=1e-4) for n in (1, 2, 3)]
        assert said[-1]["remaining"] == pytest.approx(20 - cost(3), abs=1e-4)


def test_the_coordinator_keeps_events_and_tells_the_worst_client(tmp_path: Path) -> None:
    workers = {name: Noisy(name, noise_multiplier=noise) for name, noise in zip(NAMES, (1.0, 2.0, 0.9), strict=True)}
    played = play(tmp_path, workers=workers)
    records = run_directory.read_records(played.path)
    assert [one["epsilon"] for one in records] == [pytest.approx(cost(n, noise=0.9), abs=1e-6) for n in (1, 2, 3)]
    told = json.loads((played.path / "summary.json").read_text())["privacy"]
    per_client = {name: cost(3, noise=worker.noise_multiplier) for name, worker in workers.items()}
    assert told["per_client"] == {name: pytest.approx(value, abs=1e-6) for name, value in per_client.items()}
    assert told["epsilon"] == max(told["per_client"].values())
    assert told["epsilon_rdp"] > told["epsilon"]
    assert (told["mode"], told["unit"], told["delta"], told["accountant"], told["budget"]) == (
        *("example-dp", "record", 1e-5, "pld"),
        20.0,
    )
    last = checkpoint.load_last(played.path)
    assert last is not None
    assert len(last.state.privacy_history) == 9


def test_the_budget_of_the_run_is_kept_by_the_site(tmp_path: Path) -> None:
    """A budget for two rounds, and a coordinator that asks for three: the site answers the third with a code, and lives on."""
    budget = cost(2) + 1e-3
    played = play(tmp_path, f"privacy.epsilon={budget}")
    records = run_directory.read_records(played.path)
    assert [one["clients"] for one in records[:2]] == [sorted(NAMES)] * 2
    assert len(records) == 2
    assert isinstance(played.ended, BudgetSpent)
    assert played.ended.exit_code == 4
    assert "budget of client north, south, west" in str(played.ended)
    refused = [json.loads(line) for line in (played.path / "events.jsonl").read_text().splitlines()]
    codes = [one["fields"].get("code") for one in refused if one["kind"] == "reject"]
    assert codes == ["privacy"] * 3
    for name in NAMES:
        assert played.workers[name].trained == [1, 2]
        (failed,) = played.told(name, "failed")
        assert (failed["round"], failed["code"]) == (3, "privacy")
        assert "expected at most epsilon" in failed["message"]


def test_the_site_is_counted_and_lives_on(tmp_path: Path) -> None:
    """One site has spent its budget: the others go on, its refusals are counted, and it hears of the end."""
    workers = {name: Noisy(name, noise_multiplier=0.8 if name == "north" else 4.0) for name in NAMES}
    played = play(tmp_path, f"privacy.epsilon={cost(1, noise=0.8) + 1e-3}", workers=workers)
    records = run_directory.read_records(played.path)
    assert [one["clients"] for one in records] == [sorted(NAMES), ["south", "west"], ["south", "west"]]
    failed = {"client_id": "north", "reason": "failed", "code": "privacy"}
    assert [one["rejections"] for one in records] == [[], [failed], [failed]]
    assert played.outcome["north"] == [0]


def test_a_new_run_resets_nothing_where_the_policy_bounds_the_total(tmp_path: Path) -> None:
    policy = Policy(privacy=PrivacyFloor(total_epsilon=cost(4) + 1e-3, total_delta=1e-5))
    first = play(tmp_path, policy=policy)
    second = play(tmp_path, "seed=6", policy=policy, run="again")
    assert len(run_directory.read_records(first.path)) == 3
    assert len(run_directory.read_records(second.path)) == 1
    for name in NAMES:
        assert second.workers[name].trained == [1]
        assert len(second.ledger(name).charges) == 4
        assert len(ledgers.runs_of(second.ledger(name))) == 2
        (failed,) = second.told(name, "failed")
        assert "privacy.total_epsilon: expected at most" in failed["message"]


def test_runs_of_other_mechanisms_compose(tmp_path: Path) -> None:
    """The total of two runs with other noise is the epsilon of both, less than the sum of their epsilons."""
    policy = Policy(privacy=PrivacyFloor(total_epsilon=30, total_delta=1e-6))
    play(tmp_path, "rounds=1", policy=policy)
    workers = {name: Noisy(name, noise_multiplier=0.7, sample_rate=0.2) for name in NAMES}
    second = play(tmp_path, "rounds=1", "seed=6", policy=policy, workers=workers, run="again")
    events = [ONE, replace(ONE, noise_multiplier=0.7, sample_rate=0.2)]
    said = [one for one in second.told("north", "privacy") if "round" in one]
    assert said[-1]["total"] == pytest.approx(epsilon(events, 1e-6), abs=1e-4)
    assert said[-1]["total"] < epsilon(events[:1], 1e-6) + epsilon(events[1:], 1e-6)
    assert said[-1]["spent"] == pytest.approx(epsilon(events[1:], 1e-5), abs=1e-4)


def test_a_worker_that_does_not_ask_is_stopped_before_anything_leaves(
    tmp_path: Path, uploads: list[tuple[str, bool]]
) -> None:
    workers = {name: Noisy(name, noise_multiplier=0.05, asks=False) for name in NAMES}
    played = play(tmp_path, workers=workers)
    assert uploads == []
    assert all(played.ledger(name).charges == () for name in NAMES)


def test_an_update_without_its_claim_or_with_another_is_refused(tmp_path: Path) -> None:
    def without(update: Update) -> Update:
        return replace(update, privacy=None)

    def fewer(update: Update) -> Update:
        return replace(update, privacy={**(update.privacy or {}), "steps": 1.0})

    workers = {name: Noisy(name) for name in NAMES}
    workers["north"].change, workers["south"].change = without, fewer
    played = play(tmp_path, workers=workers)
    for record in run_directory.read_records(played.path):
        assert record["clients"] == ["west"]
        assert {(one["client_id"], one["reason"]) for one in record["rejections"]} == {
            ("north", "privacy"),
            ("south", "privacy"),
        }
    # What was refused has left the site all the same: the sites' ledgers have it.
    assert len(played.ledger("north").charges) == 3


def test_a_larger_claim_of_the_site_wins(tmp_path: Path) -> None:
    """A site that has trained a round again claims more than the coordinator can compute from what it accepted."""

    def more(update: Update) -> Update:
        return replace(update, privacy={**(update.privacy or {}), "epsilon": 11.5})

    workers = {name: Noisy(name) for name in NAMES}
    workers["south"].change = more
    played = play(tmp_path, "rounds=1", workers=workers)
    told = json.loads((played.path / "summary.json").read_text())["privacy"]
    assert told["per_client"]["south"] == told["epsilon"] == 11.5
    assert told["per_client"]["north"] == pytest.approx(cost(1), abs=1e-6)


def test_a_damaged_ledger_ends_the_agent_before_it_trains(tmp_path: Path) -> None:
    play(tmp_path, "rounds=1")
    path = tmp_path / "north" / FILE_NAME
    path.write_bytes(path.read_bytes().replace(b'"steps":4', b'"steps":1'))
    played = play(tmp_path, "seed=6", "rounds=1", "clients.start=2", run="again")
    (error,) = played.outcome["north"]
    assert isinstance(error, BudgetSpent)
    assert error.exit_code == 4
    assert played.workers["north"].trained == []
    assert run_directory.read_records(played.path)[0]["clients"] == ["south", "west"]


def test_a_ledger_that_was_restored_from_an_old_copy_is_refused(tmp_path: Path) -> None:
    play(tmp_path, "rounds=2")
    path = tmp_path / "north" / FILE_NAME
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    played = play(tmp_path, "seed=6", "rounds=1", "clients.start=2", run="again")
    (error,) = played.outcome["north"]
    assert isinstance(error, BudgetSpent)
    assert "expected the charge in line 2" in str(error)


def test_the_history_survives_the_strategies(tmp_path: Path) -> None:
    """Each strategy's step carries the events on; here those that a deployment takes and that start from other states."""
    for strategy in ("ffa", "alternate", "residual"):
        played = play(tmp_path / strategy, f"strategy={strategy}", "rounds=2")
        assert run_directory.read_records(played.path)[-1]["epsilon"] == pytest.approx(cost(2), abs=1e-6)


def test_what_is_masked_is_paid_for_and_the_coordinator_knows_the_budget(tmp_path: Path) -> None:
    """Only sums arrive, without claims: each site's ledger has every round, the coordinator what no site exceeds."""
    played = play(tmp_path, "privacy.secagg=true", "strategy=ffa", "aggregation.weights=uniform")
    records = run_directory.read_records(played.path)
    assert [one["clients"] for one in records] == [sorted(NAMES)] * 3
    assert [one["epsilon"] for one in records] == [20.0] * 3
    told = json.loads((played.path / "summary.json").read_text())["privacy"]
    assert (told["epsilon"], told["budget"], told["per_client"]) == (20.0, 20.0, {})
    for name in NAMES:
        assert [one.update for one in played.ledger(name).charges] == played.workers[name].made
        assert played.told(name, "summed")


def test_what_nobody_paid_for_is_not_masked_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpaid(ledger: Ledger, charge: object, now: object) -> Ledger:
        return ledger

    monkeypatch.setattr(accounts, "charged", unpaid)
    played = play(tmp_path, "privacy.secagg=true", "strategy=ffa", "aggregation.weights=uniform")
    assert run_directory.read_records(played.path) == []
    assert all(not played.told(name, "summed") for name in NAMES)
    assert {one["code"] for one in played.told("north", "failed")} == {"privacy"}


def test_a_site_with_a_model_pays_for_what_it_trains(tmp_path: Path) -> None:
    """The worker of a real site: its own mechanism by its own public number, its claim what its ledger says."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "def number_{n}(): return {n} + {n * n}"}}\n' for n in range(80)))
    schema = load_base(BaseOptions(source=str(TINY), target_modules=["q_proj"], device="cpu")).spec
    (tmp_path / "spec.json").write_text(schema.to_json())
    words = "insecure=true privacy=example-dp privacy.epsilon=8 clients.names=[north] clients.count=1 clients.ranks=[2] rounds=2"
    more = "strategy=ffa lora.target_modules=[q_proj] train.local_steps=2 train.batch_size=4 train.max_length=32"
    own = [f"model.source={TINY}", f"data.source={rows}", "train.device=cpu", "privacy.nominal_examples=60"]
    given = [f"coordinator.spec={tmp_path / 'spec.json'}", *words.split(), *more.split()]
    with deployment.coordinator(tmp_path / "run", given) as running:
        worker = SiteWorker(deployment.config_of(own), Policy(), lambda text: None)
        address = Address(f"127.0.0.1:{running.port}", None, "north")
        site = Agent(Settings(address, Policy(), tmp_path / "north"), worker, SYSTEM, lambda event, **said: None)
        thread, outcome = deployment.in_thread(site)
        assert running.join(120) == 0
        thread.join(30)
    assert outcome == [0]
    charges = opened(tmp_path / "north").charges
    assert [(one.event.round, one.event.steps, one.event.sample_rate) for one in charges] == [
        (1, 2, 4 / 60),
        (2, 2, 4 / 60),
    ]
    told = json.loads((tmp_path / "run" / "summary.json").read_text())["privacy"]
    assert told["per_client"]["north"] == pytest.approx(epsilon([one.event for one in charges], 1e-5), abs=1e-9)
    assert 7.9 < told["epsilon"] <= 8
