"""kill -9 of a site: what was finished is not trained again, what was not is, and the adapter is the same.

Only a site that stays away past the deadline is missing from a round, and the adapter is that of a run without it there.
"""

from __future__ import annotations

import functools
import signal
import threading
from pathlib import Path

import pytest

from tests import deployment
from tests.e2e.faults.killable import Point
from tests.e2e.faults.scene import BIG_MODULES, BIG_WORDS, Gated, Scene, at_once, fault_free, until

SPOOL = "lamina.client.spool:Spool"
# Name -> where the site dies in round 2, and the rounds that it trains, its second life included.
POINTS = {
    "trained, nothing on disk": (Point(f"{SPOOL}.save", "before", 2), [1, 2, 2, 3]),
    "half on disk": (Point("lamina.protos.files:write_atomic", "before", 2, ".finished-000002.partial"), [1, 2, 2, 3]),
    "on disk, not sent": (Point(f"{SPOOL}.save", "after", 2), [1, 2, 3]),
    "sent, not told": (Point("lamina.protos.link:Link.upload", "after", 2), [1, 2, 3]),
}


def killed(folder: Path, strategy: str, point: Point, trained: list[int]) -> None:
    with Scene(folder, [f"strategy={strategy}"]) as it:
        coordinator = it.coordinator()
        it.site("south")
        it.site("west")
        first = it.process("north", point)
        it.ended(first.process, -signal.SIGKILL)
        second = it.process("north")
        it.ended(coordinator, 0)
        it.ended(second.process, 0)
        it.sites_ended()
        it.undisturbed()
        assert second.rounds("training") == trained


def killed_while_training(folder: Path, strategy: str) -> None:
    with Scene(folder, [f"strategy={strategy}"]) as it:
        coordinator = it.coordinator()
        it.site("south")
        it.site("west")
        first = it.process("north", step_s=0.05, steps=40)
        first.reach("training", 2)
        deployment.kill(first.process)
        second = it.process("north")
        it.ended(coordinator, 0)
        it.ended(second.process, 0)
        it.sites_ended()
        it.undisturbed()
        assert second.rounds("training") == [1, 2, 2, 3]


@pytest.mark.parametrize("strategy", ["recompress", "stack"])
def test_killed_and_back_at_once(tmp_path: Path, strategy: str) -> None:
    at_once(
        {
            name: functools.partial(killed, tmp_path / str(number), strategy, point, trained)
            for number, (name, (point, trained)) in enumerate(POINTS.items())
        }
        | {"while training": functools.partial(killed_while_training, tmp_path / "training", strategy)}
    )


def test_killed_while_uploading(tmp_path: Path) -> None:
    """The site that comes back goes on at the byte, and trains nothing again."""
    with Scene(tmp_path, ["strategy=residual", *BIG_WORDS], BIG_MODULES) as it:
        link = it.proxy()
        link.stall_after(350_000)
        coordinator = it.coordinator()
        it.site("south")
        it.site("west")
        first = it.process("north", port=link.port)
        until(lambda: it.partial_bytes("north") > 200_000, "half of an update on disk")
        until(lambda: it.settled_bytes(link), "the link stands still")
        deployment.kill(first.process)
        there, sent = it.partial_bytes("north"), link.bytes_up
        # The kernel still holds some 240 kB that the dead one had given it, and would send them on a link that is whole again.
        link.cut()
        link.heal()
        second = it.process("north", port=link.port)
        second.reach("sent", 1)
        size = deployment.wait_for(second.log, "sent")[0]["bytes_up"]
        assert link.bytes_up - sent < size - there + 20_000
        it.ended(coordinator, 0)
        it.sites_ended()
        it.undisturbed()
        assert second.rounds("training") == [1, 2, 3]


def never_back(folder: Path) -> None:
    """It is missing from its rounds and no others."""
    given = ["clients.deadline_s=8", "clients.patience_s=4", "clients.quorum=2"]
    with Scene(folder, given) as it:
        coordinator = it.coordinator()
        it.site("south")
        it.site("west")
        north = it.process("north", step_s=0.05, steps=40)
        north.reach("training", 2)
        deployment.kill(north.process)
        it.ended(coordinator, 0)
        it.sites_ended()
        records = it.records()
        assert [record["clients"] for record in records] == [["north", "south", "west"], *[["south", "west"]] * 2]
        # Asked and silent in round 2; silent for longer than clients.patience_s before round 3, and so not asked.
        assert [record["asked"] for record in records] == [*[["north", "south", "west"]] * 2, ["south", "west"]]
        assert [record["rejections"] for record in records] == [[]] * 3
        it.same(fault_free(given, without=[("north", 2), ("north", 3)]))
        assert all(site.worker.trained == [1, 2, 3] for site in it.sites.values())


def back_after_the_deadline(folder: Path) -> None:
    """It is in the next round that opens."""
    given = ["clients.deadline_s=8", "clients.patience_s=4", "clients.quorum=2", "rounds=4"]
    gate = threading.Event()
    with Scene(folder, given) as it:
        coordinator = it.coordinator()
        it.site("south")
        west = Gated("west", gates={3: gate})
        it.site("west", west)
        first = it.process("north", step_s=0.05, steps=40)
        first.reach("training", 2)
        deployment.kill(first.process)
        until(lambda: 3 in west.begun, "round 3")
        second = it.process("north")
        deployment.wait_for(second.log, "ready", count=2)
        gate.set()
        it.ended(coordinator, 0)
        it.ended(second.process, 0)
        it.sites_ended()
        assert [len(record["clients"]) for record in it.records()] == [3, 2, 2, 3]
        it.same(fault_free(given, without=[("north", 2), ("north", 3)]))
        assert second.rounds("training") == [1, 2, 4]


def below_the_quorum(folder: Path) -> None:
    """The coordinator ends with 3, and goes on later."""
    given = ["clients.deadline_s=6", "clients.quorum=3"]
    with Scene(folder, given) as it:
        coordinator = it.coordinator()
        it.site("south")
        it.site("west")
        first = it.process("north", step_s=0.05, steps=40)
        first.reach("training", 2)
        deployment.kill(first.process)
        it.ended(coordinator, 3)
        said = "round 2: expected at least 3 accepted updates of 3 asked, got 2 (no reply). Start again"
        assert said in it.log.read_text()
        assert len(it.records()) == 1
        second = it.process("north")
        it.ended(it.coordinator(None, "clients.deadline_s=120"), 0)
        it.ended(second.process, 0)
        it.sites_ended()
        it.undisturbed()
        assert second.rounds("training") == [1, 2, 2, 3]


def test_killed_and_away_past_the_deadline(tmp_path: Path) -> None:
    plays = (never_back, back_after_the_deadline, below_the_quorum)
    at_once({play.__name__: functools.partial(play, tmp_path / play.__name__) for play in plays})


def test_nobody_comes(tmp_path: Path) -> None:
    """Zero clients: exit code 3 at the deadline, in words; started again, it runs."""
    given = ["clients.deadline_s=1.5", "clients.quorum=2"]
    with Scene(tmp_path, given) as it:
        it.ended(it.coordinator(), 3)
        said = (
            "round 1: expected at least 2 clients within 1.5 s, 0 came. Start the sites' agents and then the coordinator "
            "again, or lower clients.quorum; nothing is lost."
        )
        assert said in it.log.read_text()
        coordinator = it.coordinator(None, "clients.deadline_s=120")
        it.all_sites()
        it.ended(coordinator, 0)
        it.sites_ended()
        it.undisturbed()
