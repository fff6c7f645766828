"""Attack: a coordinator that wants more of a site's privacy than it was promised, and bytes that nobody paid for.

Whatever it asks, what leaves the site was charged to the site's ledger, and the ledger stays within the budget.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lamina.client.policy import Policy, PrivacyFloor
from lamina.client.private.ledger import FILE_NAME, Ledger, opened
from lamina.client.work import Allow, Trained
from lamina.protos.errors import BudgetSpent, ConfigError
from lamina.protos.messages import Instruction
from lamina.protos.privacy.accounting import epsilon
from lamina.protos.privacy.events import Event
from lamina.protos.privacy.mechanism import example_dp
from lamina.protos.spec import AdapterSpec
from tests.attacks.test_hostile_coordinator import RUN, Liar, Site
from tests.deployment import Synthetic, config_of

TASK = {"seed": 5, "privacy.mode": "example-dp", "privacy.delta": 1e-5}
ONE = Event("north", 1, 1.0, 0.1, 4, 1.0)


def cost(rounds: int) -> float:
    return epsilon([Event("north", 1, 1.0, 0.1, 4 * rounds, 1.0)], 1e-5)


@dataclass
class Paid(Synthetic):
    """A worker whose update is fresh noise, and whose mechanism is as the terms would have it."""

    asks: bool = True
    given: list[tuple[dict[str, bytes], int]] = field(default_factory=list)

    def begin(self, terms: Mapping[str, Any], spec: AdapterSpec, state: Mapping[str, bytes], version: int) -> None:
        self.task = terms["task"]
        self.given.append((dict(state), version))

    def train(self, instruction: Instruction, progress: Callable[[int], None], allow: Allow) -> Trained:
        noise = self.task.get("privacy.noise_multiplier") or 1.0
        event = Event("north", instruction.round, noise, 0.1, self.task.get("train.local_steps", 4), 1.0)
        if self.asks:
            allow(event)
        self.trained.append(instruction.round)
        return Trained(os.urandom(64), {"moments": b"%d" % instruction.round}, event)


def liar(budget: float = 1000.0, run_id: str = RUN, **task: Any) -> Liar:
    found = Liar(run_id=run_id)
    settings = {**found.terms["task"], **TASK, "privacy.epsilon": budget, "train.local_steps": 4, **task}
    found.terms = {**found.terms, "task": settings}
    return found


def site(of: Liar, folder: Path, policy: Policy | None = None, asks: bool = True) -> Site:
    return Site(of, folder, policy or Policy(), Paid("north", asks=asks))


def given(one: Site) -> list[tuple[dict[str, bytes], int]]:
    """State and version that the site's worker began with."""
    assert isinstance(one.worker, Paid)
    return one.worker.given


def within(folder: Path, of: Liar) -> Ledger:
    """The ledger; all that left is in it."""
    ledger = opened(folder)
    assert {claim["sha256"] for claim in of.claims} <= {one.update for one in ledger.charges}
    return ledger


def test_more_rounds_than_the_budget(tmp_path: Path) -> None:
    with liar(cost(2) + 1e-3) as hub:
        for again in (False, True):  # a restart does not forget
            with site(hub, tmp_path) as one:
                if not again:
                    assert [one.asked(hub.train(number)) for number in (1, 2)] == ["sent", "sent"]
                assert [one.asked(hub.train(number)) for number in (3, 4)] == ["failed", "failed"]
                assert one.worker.trained == ([] if again else [1, 2])
        assert len(within(tmp_path, hub).charges) == len(hub.claims) == 2
        assert {said["code"] for said in hub.said if said["kind"] == "failure"} == {"privacy"}


def test_a_site_bounds_a_generous_coordinator(tmp_path: Path) -> None:
    """The coordinator raises the budget as it goes; the policy's is the one that counts."""
    policy = Policy(privacy=PrivacyFloor(total_epsilon=cost(2) + 1e-3, total_delta=1e-5))
    with liar(60.0) as hub, site(hub, tmp_path, policy) as one:
        assert [one.asked(hub.train(number)) for number in (1, 2, 3)] == ["sent", "sent", "failed"]


def test_a_replay_gets_the_same_bytes_and_costs_nothing(tmp_path: Path) -> None:
    with liar() as hub, site(hub, tmp_path) as one:
        assert [one.asked(hub.train(1)) for _ in range(3)] == ["sent"] * 3
        assert one.worker.trained == [1]
        assert len({claim["sha256"] for claim in hub.claims}) == 1
        assert len(within(tmp_path, hub).charges) == 1


def test_a_round_whose_bytes_are_lost_is_charged_again(tmp_path: Path) -> None:
    with liar(cost(2) + 1e-3) as hub:
        outcomes = []
        for number in range(3):
            with site(hub, tmp_path) as one:
                outcomes.append(one.asked(hub.train(1)))
            for folder in (tmp_path / RUN).glob("finished-*"):
                folder.rename(tmp_path / f"gone-{number}")
        assert outcomes == ["sent", "sent", "failed"]
        assert len({claim["sha256"] for claim in hub.claims}) == 2  # fresh noise
        assert [charge.event.round for charge in within(tmp_path, hub).charges] == [1, 1]


def test_a_new_run_resets_no_budget(tmp_path: Path) -> None:
    policy = Policy(privacy=PrivacyFloor(total_epsilon=cost(3) + 1e-3, total_delta=1e-5))
    outcomes = []
    for number in range(3):
        run_id = f"{RUN[:-1]}{number}"
        with liar(run_id=run_id) as hub, site(hub, tmp_path, policy) as one:
            outcomes += [one.asked(hub.train(turn, run_id=run_id)) for turn in (1, 2)]
            within(tmp_path, hub)
    assert outcomes == ["sent", "sent", "sent", "failed", "failed", "failed"]
    assert epsilon(opened(tmp_path).events(), 1e-5) <= cost(3) + 1e-9


def test_people_who_delete_a_runs_folder_reset_no_budget(tmp_path: Path) -> None:
    with liar(cost(2) + 1e-3) as hub:
        with site(hub, tmp_path) as one:
            assert [one.asked(hub.train(number)) for number in (1, 2)] == ["sent", "sent"]
        (tmp_path / RUN).rename(tmp_path.parent / "elsewhere")
        with site(hub, tmp_path) as one:
            assert one.asked(hub.train(3)) == "failed"
            assert one.asked(hub.train(1)) == "failed"


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("task", [{"privacy.noise_multiplier": 1e-3}, {"train.local_steps": 10**5}])
def test_hardly_any_noise_or_steps_without_end(tmp_path: Path, asks: bool, task: dict[str, Any]) -> None:
    """Refused before it trains; and if a worker did not ask, before anything is kept or sent."""
    with liar(8.0, **task) as hub, site(hub, tmp_path, asks=asks) as one:
        assert one.asked(hub.train(1)) == "failed"
        assert one.worker.trained == ([] if asks else [1])
        assert hub.claims == []
        assert within(tmp_path, hub).charges == ()
        assert not list(tmp_path.glob("*/finished-*"))


def test_an_update_without_noise_is_not_sent_when_the_run_turns_private(tmp_path: Path) -> None:
    """Made in the clear under `none`, and offered again under example-dp of the same run: nobody paid for it."""
    with liar(1000.0, **{"privacy.mode": "none"}) as hub:
        with site(hub, tmp_path, asks=False) as one:
            assert one.asked(hub.train(1)) == "sent"
        sent = len(hub.claims)
        hub.terms = {**hub.terms, "task": {**hub.terms["task"], "privacy.mode": "example-dp"}}
        with site(hub, tmp_path) as one:
            assert one.asked(hub.train(1)) == "failed"
            assert one.asked(hub.train(2)) == "sent"
        assert len(hub.claims) == sent + 1
        assert [charge.event.round for charge in opened(tmp_path).charges] == [2]


def test_no_state_of_training_without_noise_enters_a_private_round(tmp_path: Path) -> None:
    """Moments of an optimizer are gradients of the data: kept from a round in the clear, they would be in the next update."""
    with liar(1000.0, **{"privacy.mode": "none"}) as hub:
        with site(hub, tmp_path, asks=False) as one:
            assert one.asked(hub.train(1)) == "sent"
            assert given(one) == [({}, -1)]
        with site(hub, tmp_path, asks=False) as one:
            assert one.asked(hub.train(2)) == "sent"
            assert given(one) == [({"moments": b"1"}, 0)]  # while nothing is private it goes on with it
        hub.terms = {**hub.terms, "task": {**hub.terms["task"], "privacy.mode": "example-dp"}}
        with site(hub, tmp_path) as one:
            assert one.asked(hub.train(3)) == "sent"
            assert given(one) == [({}, -1)]
        with site(hub, tmp_path) as one:
            assert one.asked(hub.train(4)) == "sent"
            assert given(one) == [({"moments": b"3"}, 0)]


def test_bytes_that_were_forged_on_disk_are_not_sent(tmp_path: Path) -> None:
    """Other bytes in the place of the paid ones, while the agent runs."""
    with liar() as hub, site(hub, tmp_path) as one:
        assert one.asked(hub.train(1)) == "sent"
        (path,) = tmp_path.glob("*/finished-*/update.safetensors")
        path.write_bytes(b"without noise")
        assert one.asked(hub.train(1)) == "failed"
        assert len(hub.claims) == 1


def test_a_ledger_that_vanishes_under_an_agent_stops_it(tmp_path: Path) -> None:
    with liar() as hub, site(hub, tmp_path) as one:
        assert one.asked(hub.train(1)) == "sent"
        (tmp_path / FILE_NAME).unlink()
        assert one.asked(hub.train(2)) == "failed"
        assert len(hub.claims) == 1


def test_a_ledger_that_is_gone_when_an_agent_starts_stops_it(tmp_path: Path) -> None:
    with liar() as hub:
        with site(hub, tmp_path) as one:
            assert one.asked(hub.train(1)) == "sent"
        (tmp_path / FILE_NAME).unlink()
        with site(hub, tmp_path) as one:
            assert isinstance(one.error(), BudgetSpent)


def test_the_sites_own_mechanism_refuses_less_noise_than_the_budget_needs() -> None:
    """More noise than it needs is taken from a coordinator; less is not, nor batches beyond its public number."""
    words = ["privacy=example-dp", "privacy.epsilon=8", "train.batch_size=64", "train.local_steps=30", "rounds=20"]
    needed = example_dp(config_of(words), 2000).noise_multiplier
    assert example_dp(config_of([*words, "privacy.noise_multiplier=2"]), 2000).noise_multiplier == 2 > needed
    with pytest.raises(ConfigError, match="expected enough noise"):
        example_dp(config_of([*words, "privacy.noise_multiplier=0.5"]), 2000)
    # A smaller batch is sampled at a smaller rate, with noise of its own; a larger one than is declared is refused.
    assert example_dp(config_of([*words, "train.batch_size=1"]), 2000).epsilon <= 8
    with pytest.raises(ConfigError, match="expected at least"):
        example_dp(config_of([*words, "train.batch_size=4000"]), 2000)
