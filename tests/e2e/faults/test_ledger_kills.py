"""kill -9 of a site under example-dp, at every point between noise and acknowledgement: what left, or could, was charged.

A site's training draws fresh noise each time, as a real one does. Over-counting is allowed, under-counting never.
"""

from __future__ import annotations

import functools
import json
import signal
from pathlib import Path

import pytest

from lamina.client.private.ledger import opened
from lamina.protos.privacy.accounting import epsilon
from lamina.server.store import checkpoint
from tests.deployment import NAMES, Noisy
from tests.e2e.faults.killable import Point
from tests.e2e.faults.scene import Scene, at_once

GIVEN = ("privacy=example-dp", "privacy.epsilon=30", "train.local_steps=4", "evaluate.every=100")
LEDGER = "lamina.client.private.ledger"
# Name -> where the site dies in round 2, and the rounds that are charged, its second life included.
POINTS = {
    "noised, not charged": (Point(f"{LEDGER}:append_durably", "before", 2), [1, 2, 3]),
    "half of the charge on disk": (Point(f"{LEDGER}:append_durably", "torn", 2), [1, 2, 3]),
    "charged, nothing stored": (Point(f"{LEDGER}:append_durably", "after", 2), [1, 2, 2, 3]),
    "charged, half stored": (
        Point("lamina.protos.files:write_atomic", "before", 2, ".finished-000002.partial"),
        [1, 2, 2, 3],
    ),
    "stored, not sent": (Point("lamina.protos.link:Link.upload", "before", 2), [1, 2, 3]),
    "sent, not told": (Point("lamina.protos.link:Link.upload", "after", 2), [1, 2, 3]),
}


def killed(folder: Path, point: Point, charged: list[int]) -> None:
    with Scene(folder, GIVEN) as it:
        coordinator = it.coordinator()
        it.site("south", Noisy("south"))
        it.site("west", Noisy("west"))
        first = it.process("north", point, private=True)
        it.ended(first.process, -signal.SIGKILL)
        second = it.process("north", private=True)
        it.ended(coordinator, 0)
        it.ended(second.process, 0)
        it.sites_ended()
        never_under(it)
        assert [one.event.round for one in opened(folder / "north").charges] == charged
        assert [len(record["clients"]) for record in it.records()] == [3, 3, 3]
        whole_history(it)


def never_under(it: Scene) -> None:
    """Every update of a site that the coordinator has, or that the site keeps and could send, has a charge of its own."""
    logged = [json.loads(line) for line in (it.path / "events.jsonl").read_text().splitlines()]
    received = [one["fields"] for one in logged if one["kind"] == "received"]
    for name in NAMES:
        paid = [one.update for one in opened(it.folder / name).charges]
        assert len(paid) == len(set(paid)), name
        out = {one["sha256"] for one in received if one["client_id"] == name}
        assert len(out) == 3, name
        metas = (json.loads(path.read_text()) for path in (it.folder / name).glob("*/finished-*/meta.json"))
        kept = {meta["sha256"]["update.safetensors"] for meta in metas}
        assert out | kept <= set(paid), name


def whole_history(it: Scene) -> None:
    """The coordinator's epsilon is no less than what it accepted costs, and that of a site's ledger where that is more."""
    last = checkpoint.load_last(it.path)
    assert last is not None
    assert len(last.state.privacy_history) == 9
    told = json.loads((it.path / "summary.json").read_text())["privacy"]["per_client"]
    for name in NAMES:
        assert told[name] == pytest.approx(epsilon(opened(it.folder / name).events(), 1e-5), abs=1e-6), name


def test_killed_between_noise_and_acknowledgement(tmp_path: Path) -> None:
    at_once(
        {
            name: functools.partial(killed, tmp_path / str(number), point, charged)
            for number, (name, (point, charged)) in enumerate(POINTS.items())
        }
    )


def coordinator_killed(folder: Path, when: str) -> None:
    """What was spent is in the checkpoint; a round that is aggregated again is in the history once."""
    with Scene(folder, GIVEN) as it:
        first = it.coordinator(Point("lamina.server.store.checkpoint:save", when, 2))
        for name in NAMES:
            it.site(name, Noisy(name))
        it.ended(first, -signal.SIGKILL)
        it.ended(it.coordinator(), 0)
        it.sites_ended()
        never_under(it)
        whole_history(it)
        for name in NAMES:
            assert [one.event.round for one in opened(folder / name).charges] == [1, 2, 3]
        epsilons = [record["epsilon"] for record in it.records()]
        assert epsilons == sorted(epsilons)
        assert len(set(epsilons)) == 3


def test_a_coordinator_that_is_killed_forgets_nothing(tmp_path: Path) -> None:
    at_once({when: functools.partial(coordinator_killed, tmp_path / when, when) for when in ("before", "after")})
