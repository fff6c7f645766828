"""Secure sums between a coordinator and sites over gRPC, all in this process: with certificates, and with dropouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lamina.client import masked
from lamina.client.agent import Superseded
from lamina.client.summing import answered
from lamina.protos.codec import opened_update
from lamina.protos.errors import UpdateRejected
from lamina.server.store import run_directory
from lamina.server.store.blobs import BlobStore
from tests import deployment, summing
from tests.deployment import Running, Synthetic, fault_free
from tests.hostile import eventually
from tests.integration.test_secagg import CLEAR, allowed, farthest

FIVE = summing.SIX[:5]


def words(folder: Path, *more: str) -> list[str]:
    spec_file = folder / "spec.json"
    spec_file.write_text(deployment.spec().to_json())
    return summing.words(f"coordinator.spec={spec_file}", *more, names=FIVE)


def rejections(running: Running) -> list[list[tuple[str, str]]]:
    records = run_directory.read_records(running.path)
    return [[(one["client_id"], one["reason"]) for one in record["rejections"]] for record in records]


def clients(running: Running) -> list[Sequence[str]]:
    return [record["clients"] for record in run_directory.read_records(running.path)]


@pytest.mark.parametrize("secure", [True, False])
def test_the_adapter_is_that_of_updates_in_the_clear(tmp_path: Path, secure: bool) -> None:
    who = deployment.certificates(tmp_path / "pki", FIVE) if secure else {}
    trust = f"coordinator.identity={who['coordinator']}" if secure else "insecure=true"
    given = words(tmp_path, trust, "strategy=alternate")
    with deployment.coordinator(tmp_path / "run", given) as running:
        agents = [deployment.agent(name, running.port, tmp_path / name, who.get(name)) for name in FIVE]
        sites = [deployment.in_thread(one) for one in agents]
        assert running.join() == 0
        for thread, outcome in sites:
            thread.join(20)
            assert outcome == [0]
    assert farthest(deployment.final(running.path), fault_free([*given, *CLEAR])) <= allowed(3, 5)
    assert clients(running) == [list(FIVE)] * 3
    assert rejections(running) == [[]] * 3
    # The coordinator has no update, whole or in part, and no vector.
    store = BlobStore(running.path / "blobs")
    for path in (running.path / "blobs").glob("??/*"):
        found = store.find(path.name)
        assert found is not None
        with pytest.raises(UpdateRejected):
            opened_update(found)
    assert not list((running.path / "blobs" / "partial").glob("*"))
    records = run_directory.read_records(running.path)
    assert [record["bytes_up"] for record in records] == [5 * 4 * (4 * n + 6 + 1) for n in (24 + 16, 16 + 32, 24 + 16)]
    assert all(record["train_loss"] is None for record in records)
    # Who was summed is asked for figures: 20 / (1 + round) nats over 10 targets.
    assert [record["loss"] for record in records] == pytest.approx([1.0, 2 / 3, 0.5])
    assert not list(tmp_path.glob("*/*/masked"))


@pytest.mark.parametrize("messages", [0, 1, 2, 3, 4])
def test_a_site_is_lost_after_any_message_and_comes_back(
    tmp_path: Path, messages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = words(tmp_path, "insecure=true", "rounds=2")
    step, sent = answered, [0]

    def dying(part: Any, me: Any, *more: Any) -> Any:
        if me.name == "cedar" and part.instruction.round == 1:
            if sent[0] == messages:
                lost.stop()
                raise Superseded("stopped")
            sent[0] += 1
        return step(part, me, *more)

    monkeypatch.setattr(masked, "answered", dying)
    with deployment.coordinator(tmp_path / "run", given) as running:
        lost = deployment.agent("cedar", running.port, tmp_path / "cedar")
        dead = deployment.in_thread(lost)
        others = [n for n in FIVE if n != "cedar"]
        sites = [deployment.in_thread(deployment.agent(n, running.port, tmp_path / n)) for n in others]
        dead[0].join(30)
        assert isinstance(dead[1][0], Superseded)
        worker = Synthetic("cedar")
        eventually(lambda: bool([one for one in running.events if one["event"] == "round"]))
        sites.append(deployment.in_thread(deployment.agent("cedar", running.port, tmp_path / "cedar", worker=worker)))
        assert running.join() == 0
        for thread, outcome in sites:
            thread.join(20)
            assert outcome == [0]
    counts = messages >= 3
    assert clients(running) == [[n for n in FIVE if counts or n != "cedar"], list(FIVE)]
    wanted = fault_free([*given, *CLEAR], without=[] if counts else [("cedar", 1)])
    assert farthest(deployment.final(running.path), wanted) <= allowed(2, 5)
    assert worker.trained == [2]
