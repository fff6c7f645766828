"""Partitions of 10, 45, 90 and 300 seconds, of one site and of all, while they are idle, train and upload.

Nobody is dropped, nothing that was finished is trained again, and the adapter is that of a run without faults. The short form
runs coordinator and sites by a clock on which these seconds pass faster; keepalive, heartbeat and backoff pass with them.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from lamina.protos.clock import SYSTEM, Clock
from tests import deployment
from tests.deployment import NAMES
from tests.e2e.faults.scene import BIG_MODULES, BIG_WORDS, Gated, Scene, at_once, until
from tests.proxy import Proxy

SECONDS = (10.0, 45.0, 90.0, 300.0)
STATES = ("idle", "training", "uploading")
WHO = {"one": NAMES[:1], "all": NAMES}
HOW = ("silence", "cut")
FAST = Clock(rate=60.0)


class Partitioned:
    """A run whose sites reach the coordinator through a proxy each, with a partition in each round.

    Args:
        scene: With a round more than there are partitions.
        hit: The sites that are cut off.
        how: `silence` or `cut`.
    """

    def __init__(self, scene: Scene, hit: Sequence[str], how: str) -> None:
        self.scene, self.hit, self.how = scene, hit, how
        self.links: dict[str, Proxy] = {name: scene.proxy() for name in NAMES}
        self.rounds = range(1, len(SECONDS) + 1)
        self.gates = {name: {number: threading.Event() for number in self.rounds} for name in NAMES}
        self.running = scene.thread()
        self.workers = {name: Gated(name, gates=self.gates[name]) for name in NAMES}
        for name in NAMES:
            scene.site(name, self.workers[name], self.links[name].port)

    def go(self, number: int, names: Sequence[str] = NAMES) -> None:
        for name in names:
            self.gates[name][number].set()

    def begun(self, number: int) -> None:
        until(
            lambda: all(number in worker.begun for worker in self.workers.values()), f"everyone trains round {number}"
        )

    def part(self) -> None:
        for name in self.hit:
            (self.links[name].silence if self.how == "silence" else self.links[name].cut)()

    def heal(self) -> None:
        for name in self.hit:
            self.links[name].heal()

    def sent(self, number: int, names: Sequence[str]) -> None:
        until(lambda: all(number in self.scene.sites[name].rounds("sent") for name in names), f"round {number} is sent")

    # Each plays one round with its partition.

    def idle(self, number: int, seconds: float) -> None:
        """Those who are hit have sent their updates and wait: for another site, or for an operator to go on."""
        if set(self.hit) == set(NAMES):
            operator = self.scene.operator()
            self.begun(number)
            operator.pause(True)
            self.go(number)
            until(lambda: len(self.scene.records()) == number, f"round {number} is over")
            self.part()
            self.scene.clock.sleep(seconds)
            operator.pause(False)
            self.heal()
            return
        self.begun(number)
        self.go(number, self.hit)
        self.sent(number, self.hit)
        self.part()
        self.scene.clock.sleep(seconds)
        self.heal()
        self.go(number)

    def training(self, number: int, seconds: float) -> None:
        """Those who are hit finish their training amid the partition."""
        self.begun(number)
        self.part()
        self.scene.clock.sleep(seconds / 2)
        self.go(number)
        self.scene.clock.sleep(seconds / 2)
        self.heal()

    def uploading(self, number: int, seconds: float) -> None:
        """The link of those who are hit stands still in the middle of their updates."""
        self.begun(number)
        for name in self.hit:
            self.links[name].stall_after(200_000)
        self.go(number)
        until(
            lambda: all(self.scene.partial_bytes(name) > 100_000 for name in self.hit), "half of each update is there"
        )
        until(lambda: all(self.scene.settled_bytes(self.links[name]) for name in self.hit), "the links stand still")
        self.part()
        self.scene.clock.sleep(seconds)
        self.heal()


def partitioned(folder: Path, clock: Clock, state: str, who: str, how: str) -> None:
    rounds = len(SECONDS) + 1  # the last without a partition
    given = [f"rounds={rounds}", "clients.deadline_s=100000", "wire.heartbeat_s=10"]
    big = state == "uploading"
    strategy = {"idle": "recompress", "training": "stack", "uploading": "residual"}[state]
    given += [f"strategy={strategy}", *(BIG_WORDS if big else ())]
    with Scene(folder, given, BIG_MODULES if big else deployment.MODULES, clock) as it:
        play = Partitioned(it, WHO[who], how)
        for number, seconds in enumerate(SECONDS, 1):
            getattr(play, state)(number, seconds)
        assert play.running.join(120) == 0
        it.sites_ended()
        it.undisturbed(rounds)


def cases(folder: Path, clock: Clock) -> dict[str, functools.partial[None]]:
    return {
        f"{who} {state}, {how}": functools.partial(partitioned, folder / f"{state}-{who}-{how}", clock, state, who, how)
        for state, who, how in itertools.product(STATES, WHO, HOW)
    }


def test_partitions(tmp_path: Path) -> None:
    at_once(cases(tmp_path, FAST), workers=12)


@pytest.mark.long
def test_partitions_in_real_seconds(tmp_path: Path) -> None:
    at_once(cases(tmp_path, SYSTEM), workers=12)
