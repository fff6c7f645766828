"""A coordinator that ended without a result and is started again: who is asked, what must be as it was, and what may change."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from lamina.client.work import Allow, Trained
from lamina.protos.clock import Clock
from lamina.protos.errors import CheckpointError, ConfigError, QuorumNotReached
from lamina.protos.messages import Instruction
from tests import deployment
from tests.deployment import NAMES, Synthetic
from tests.e2e.faults.scene import Gated, Scene, fault_free, until


@dataclass
class Failing(Synthetic):
    """A worker that has no memory for as long as it is bad."""

    bad: bool = True

    def train(self, instruction: Instruction, progress: Callable[[int], None], allow: Allow) -> Trained:
        if self.bad:
            raise MemoryError
        return super().train(instruction, progress, allow)


def test_who_failed_is_asked_again_after_a_missed_quorum(tmp_path: Path) -> None:
    """And the adapter is that of a run without the fault; the failure stays counted."""
    with Scene(tmp_path, ["clients.quorum=3"]) as scene:
        first = scene.thread()
        west = Failing("west")
        scene.site("north"), scene.site("south"), scene.site("west", west)
        with pytest.raises(QuorumNotReached, match="failed"):
            first.join()
        west.bad = False
        assert scene.thread().join() == 0
        scene.sites_ended()
        scene.same()
        records = scene.records()
        assert [record["clients"] for record in records] == [sorted(NAMES)] * 3
        assert [(one["client_id"], one["reason"]) for one in records[0]["rejections"]] == [("west", "failed")]
        assert scene.sites["north"].worker.trained == [1, 2, 3]  # what it had sent counts


def test_whoever_has_come_since_is_asked_after_a_missed_quorum(tmp_path: Path) -> None:
    given = ["clients.start=2", "clients.quorum=2", "clients.deadline_s=8", "evaluate.every=1000", "rounds=1"]
    with Scene(tmp_path, given) as scene:
        never = threading.Event()
        first = scene.thread()
        scene.site("north")
        scene.site("south", Gated("south", gates={1: never}))
        with pytest.raises(QuorumNotReached):
            first.join()
        scene.sites.pop("south").agent.stop()
        second = scene.thread()
        scene.site("west")
        assert second.join() == 0
        scene.sites_ended()
        assert scene.records()[0]["clients"] == ["north", "west"]
        scene.same(fault_free(scene.given, without=[("south", 1)]))


def test_a_lower_quorum_is_taken_up(tmp_path: Path) -> None:
    """As the message says; but not another setting that changes a bit."""
    with Scene(tmp_path, ["clients.quorum=3", "rounds=1", "evaluate.every=1000"]) as scene:
        first = scene.thread()
        scene.site("north"), scene.site("south"), scene.site("west", Failing("west"))
        with pytest.raises(QuorumNotReached, match=r"lower clients\.quorum"):
            first.join()
        scene.words = deployment.words(Path("spec.json"), *scene.words, "clients.quorum=2")
        assert scene.thread().join() == 0
        assert scene.records()[0]["clients"] == ["north", "south"]


OTHER: Mapping[str, str] = {
    "strategy.name": "strategy=residual",
    "seed": "seed=99",
    "train.local_steps": "train.local_steps=7",
    "clients.ranks": "clients.ranks=[2,2,2]",
}


def test_other_settings_are_refused_before_the_first_checkpoint_too(tmp_path: Path) -> None:
    with Scene(tmp_path, ["clients.quorum=3", "evaluate.every=1000"]) as scene:
        first = scene.thread()
        scene.site("north"), scene.site("south"), scene.site("west", Failing("west"))
        with pytest.raises(QuorumNotReached):
            first.join()
        before = (scene.path / "events.jsonl").read_bytes()
        same = list(scene.words)
        for key, word in OTHER.items():
            scene.words = deployment.words(Path("spec.json"), *same, word)
            with pytest.raises(CheckpointError, match=key):
                scene.thread().join()
        assert (scene.path / "events.jsonl").read_bytes() == before


def test_a_stop_is_not_forgotten_by_a_kill(tmp_path: Path) -> None:
    """The round that was open is finished, and no other is opened."""
    with Scene(tmp_path, ["evaluate.every=1000"]) as scene:
        process = scene.coordinator()
        gate = threading.Event()
        for name in NAMES:
            scene.site(name, Gated(name, gates={2: gate}))
        until(lambda: scene.sites["west"].rounds("training") == [1, 2], "round 2")
        scene.operator().stop(now=False)
        deployment.kill(process)
        gate.set()
        scene.ended(scene.coordinator(), 0)
        scene.sites_ended()
        assert [record["round"] for record in scene.records()] == [1, 2]


def test_a_stop_in_an_evaluation_leaves_a_directory_that_agrees_with_itself(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        asked, never = threading.Event(), threading.Event()

        class Mute(Synthetic):
            def measure(self, instruction: Instruction) -> dict[str, float]:
                if instruction.round == 2:
                    asked.set()
                    never.wait(60)
                return super().measure(instruction)

        running = scene.thread()
        for name in NAMES:
            scene.site(name, Mute(name))
        assert asked.wait(60)
        scene.operator().stop(now=True)
        assert running.join() == 0
        never.set()
        assert [record["round"] for record in scene.records()] == [1, 2]
        assert scene.records()[1]["loss"] is None
        assert json.loads((scene.path / "summary.json").read_text())["rounds"] == 2
        end = [json.loads(line) for line in (scene.path / "events.jsonl").read_text().splitlines()][-1]
        assert (end["kind"], end["fields"]["round"]) == ("end", 2)


def test_a_site_that_measures_too_slowly_is_waited_for_once(tmp_path: Path) -> None:
    """Later evaluations take the others' figures and go on; what it trains counts."""

    class Slow(Synthetic):
        def measure(self, instruction: Instruction) -> dict[str, float]:
            time.sleep(3.0)  # 150 s of the coordinator's clock
            return super().measure(instruction)

    given = ["evaluate.deadline_s=100", "clients.deadline_s=100000", "wire.heartbeat_s=60"]
    with Scene(tmp_path, given, clock=Clock(rate=50.0)) as scene:
        running = scene.thread()
        scene.site("north"), scene.site("south"), scene.site("west", Slow("west"))
        assert running.join(120) == 0
        records = scene.records()
        assert [record["clients"] for record in records] == [sorted(NAMES)] * 3
        assert all({"north", "south"} <= record["per_client_loss"].keys() for record in records)
        assert all("west" not in record["per_client_loss"] for record in records)


IMPOSSIBLE: Mapping[str, list[str]] = {
    "clients.start": ["clients.start=1", "clients.quorum=3"],
    "clients.quorum": ["clients.fraction=0.34", "clients.quorum=3"],
    "coordinator.linger_s": ["coordinator.linger_s=1e300"],
    "wire.heartbeat_s": ["wire.heartbeat_s=1e-9"],
    "clients.names": ["clients.names=[a/b,x,c]"],
}


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_what_cannot_work_is_refused_before_anything_is_made(tmp_path: Path, key: str) -> None:
    with Scene(tmp_path, IMPOSSIBLE[key]) as scene:
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            scene.thread().join()
        assert not scene.path.exists()
