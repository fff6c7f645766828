"""kill -9 of the coordinator or of a site amid a secure sum: the attempt is lost, its keys with it, and the next one is whole.

The updates stay at their sites, which train nothing twice, and no sum over other sites is ever shown.
"""

from __future__ import annotations

import functools
import json
import signal
from pathlib import Path

import pytest

from lamina.protos.secagg.encoding import encoding
from tests import deployment
from tests.deployment import NAMES
from tests.e2e.faults.killable import Point
from tests.e2e.faults.scene import Scene, at_once, fault_free
from tests.integration.test_secagg import CLEAR, farthest

SUMS = "lamina.server.port.sums:PortSums"
WORDS = ("strategy=alternate", "privacy.secagg=true", "aggregation.full_weight=20")
# A round tells five times: opening, keys, shares, survivors, signatures. Round 2's are the 6th to the 10th.
COORDINATOR = {
    "shares are asked for": Point(f"{SUMS}._tell", "after", 7),
    "a vector has come": Point(f"{SUMS}.vector", "after", 4),
    "a sum is about to be shown": Point("lamina.server.store.deployment:DeploymentStore.reveal", "after", 2),
    "the last shares are asked for": Point(f"{SUMS}._tell", "after", 10),
    "the sum is known": Point("lamina.server.store.deployment:DeploymentStore.summed", "before", 2),
    "the checkpoint is written": Point("lamina.server.store.checkpoint:save", "after", 2),
}
# A site answers five times a round; its states are lost with it.
ANSWERED = "lamina.client.masked:answered"
SITE = {
    "before its shares": Point(ANSWERED, "before", 7),
    "before its vector": Point(ANSWERED, "before", 8),
    "its vector is sent": Point("lamina.protos.link:Link.upload", "after", 2),
    "before its signature": Point(ANSWERED, "before", 9),
    "its last shares are noted": Point("lamina.client.spool:Spool.show", "after", 2),
}


def whole(it: Scene) -> None:
    """The adapter of a run in the clear, everyone in every round."""
    wanted = fault_free([*WORDS, *CLEAR])
    step = encoding(1.0, len(NAMES)).step / (13 / 20) + 2.0**-23
    assert farthest(deployment.final(it.path), wanted) <= 3 * 2 * step
    assert [record["clients"] for record in it.records()] == [sorted(NAMES)] * 3
    it.logged(3)


def coordinator_killed(folder: Path, point: Point) -> None:
    with Scene(folder, WORDS) as it:
        first = it.coordinator(point)
        it.all_sites()
        it.ended(first, -signal.SIGKILL)
        it.ended(it.coordinator(), 0)
        it.sites_ended()
        whole(it)
        for name, site in it.sites.items():
            assert site.worker.trained == [1, 2, 3], name


def site_killed(folder: Path, point: Point) -> None:
    with Scene(folder, WORDS) as it:
        coordinator = it.coordinator()
        it.site("south")
        it.site("west")
        first = it.process("north", point)
        it.ended(first.process, -signal.SIGKILL)
        second = it.process("north")
        it.ended(coordinator, 0)
        it.ended(second.process, 0)
        it.sites_ended()
        whole(it)
        assert second.rounds("training") == [1, 2, 3]
        shown = json.loads(next((folder / "north").glob("*/shown.json")).read_text())
        assert shown == [3, *sorted(NAMES)]


@pytest.mark.parametrize("part", [0, 1])
def test_the_coordinator_is_killed(tmp_path: Path, part: int) -> None:
    names = list(COORDINATOR)[part::2]
    at_once({name: functools.partial(coordinator_killed, tmp_path / name[:12], COORDINATOR[name]) for name in names}, 3)


@pytest.mark.parametrize("part", [0, 1])
def test_a_site_is_killed_and_comes_back(tmp_path: Path, part: int) -> None:
    names = list(SITE)[part::2]
    at_once({name: functools.partial(site_killed, tmp_path / name[-12:], SITE[name]) for name in names}, 3)
