"""The coordinator's look at who was revoked: a disk that fails once, one that goes on failing, and who is in the round."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.protos import coordinator_pb2 as pb
from lamina.protos import statements as st
from lamina.protos.errors import StorageError
from lamina.server.port.roster import Roster
from lamina.server.store import events, run_directory
from tests import consortium, deployment
from tests.deployment import NAMES
from tests.e2e.faults.scene import Gated, Scene, until
from tests.hostile import Hostile, encoded, end, eventually


@contextlib.contextmanager
def by_hand(folder: Path, *more: str) -> Iterator[tuple[dict[str, Path], deployment.Running, dict[str, Hostile]]]:
    """A coordinator with a list of revoked certificates, and three registered sites that the test plays."""
    who = deployment.certificates(folder / "pki")
    spec_file = folder / "spec.json"
    spec_file.write_text(deployment.spec().to_json())
    trust = (f"coordinator.identity={who['coordinator']}", f"coordinator.revocations={who['ca'] / 'crl.pem'}")
    words = deployment.words(spec_file, *trust, "evaluate.every=1000", *more)
    with deployment.coordinator(folder / "run", words) as running:
        sites = {name: Hostile(name, running.port, who[name], folder / name) for name in NAMES}
        try:
            for site in sites.values():
                site.register()
            yield who, running, sites
        finally:
            for site in sites.values():
                site.close()
            end(running, who["op"])


def revoked(running: deployment.Running) -> list[str]:
    return [event["client"] for event in running.events if event["event"] == "revoked"]


def looking() -> bool:
    return threading.current_thread().name == "look-after"


def send(site: Hostile, asked: dict[str, Any]) -> str:
    content = encoded(site.honest(asked))
    return site.upload(site.statement(st.CLAIM, site.claim(asked, content)), content)


def test_a_disk_that_fails_once_ends_no_revocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush, failed = events.flush, threading.Event()

    def failing(*given: Any, **named: Any) -> Any:
        if looking() and not failed.is_set():
            failed.set()
            raise StorageError("the log: no room")
        return flush(*given, **named)

    monkeypatch.setattr(events, "flush", failing)
    with by_hand(tmp_path, "rounds=1", "clients.quorum=1") as (who, running, sites):
        asked = {name: site.instruction() for name, site in sites.items()}
        consortium.revoked(who["ca"], "west")
        eventually(lambda: revoked(running) == ["west"])
        assert failed.is_set()
        said = [event["message"] for event in running.events if event["event"] == "revocations"]
        assert "no room" in said[0]
        consortium.revoked(who["ca"], "south")
        eventually(lambda: sorted(revoked(running)) == ["south", "west"])
        eventually(lambda: sites["north"].call("Heartbeat", pb.HeartbeatRequest()) == "OK")
        assert send(sites["north"], asked["north"]) == "stored"
        assert running.join() == 0
    (record,) = run_directory.read_records(running.path)
    assert record["clients"] == ["north"]
    refused = [(one["client_id"], one["reason"]) for one in record["rejections"]]
    assert refused == [("west", "failed"), ("south", "failed")]


def test_nobody_is_let_in_while_it_cannot_be_told_who_was_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, fails = Roster.revoked, threading.Event()

    def failing(self: Roster, access: Any) -> list[str]:
        if fails.is_set():
            raise StorageError("the database: it does not answer")
        return look(self, access)

    monkeypatch.setattr(Roster, "revoked", failing)
    with by_hand(tmp_path) as (_, running, sites):
        north = sites["north"]
        fails.set()
        eventually(lambda: north.call("Heartbeat", pb.HeartbeatRequest()).startswith("UNAVAILABLE: the coordinator ca"))
        fails.clear()
        eventually(lambda: north.call("Heartbeat", pb.HeartbeatRequest()) == "OK")
        said = [event["message"] for event in running.events if event["event"] == "revocations"]
        assert len(said) == 2
        assert "it does not answer" in said[0]
        assert said[1] == "in force"


def test_a_fault_of_ours_in_the_look_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Roster, access: Any) -> list[str]:
        raise AssertionError("a fault of ours")

    monkeypatch.setattr(Roster, "revoked", wrong)
    with (
        pytest.raises(AssertionError, match="a fault of ours"),
        by_hand(tmp_path) as (_, running, _),
    ):
        running.join()


def test_an_update_that_was_admitted_counts_although_its_site_is_revoked(tmp_path: Path) -> None:
    with by_hand(tmp_path, "rounds=1") as (who, running, sites):
        asked = {name: site.instruction() for name, site in sites.items()}
        assert send(sites["west"], asked["west"]) == "stored"
        consortium.revoked(who["ca"], "west")
        eventually(lambda: revoked(running) == ["west"])
        for name in ("north", "south"):
            assert send(sites[name], asked[name]) == "stored"
        assert running.join() == 0
    (record,) = run_directory.read_records(running.path)
    assert record["clients"] == sorted(NAMES)
    assert record["rejections"] == []


# Two of one name.


def test_a_site_that_another_of_its_name_took_out_is_in_again(tmp_path: Path) -> None:
    """The other says that it leaves; the stream of the one that lives ends, so that it registers anew."""
    hold = threading.Event()
    with Scene(tmp_path, ["clients.quorum=2", "evaluate.every=1000"]) as it:
        running = it.thread()
        workers = {name: Gated(name, gates={1: hold}) for name in NAMES}
        for name in NAMES:
            it.site(name, workers[name])
        until(lambda: all(one.begun for one in workers.values()), "all train")
        twin = Hostile("west", it.port, None, it.folder / "twin")
        it.stack.callback(twin.close)
        twin.register()
        stream = twin.link.stub.Instructions(
            pb.InstructionsRequest(run_id=twin.terms["run_id"]), metadata=twin.metadata
        )
        until(lambda: any(event["event"] == "twins" for event in running.events), "two of one name are told")
        (told,) = [event for event in running.events if event["event"] == "twins"]
        assert told["client"] == "west"
        stream.cancel()
        twin.link.call("Report", twin.statement(st.REPORT, {"kind": "leave"}))

        def again() -> bool:
            whole = (it.path / "events.jsonl").read_text().rpartition("\n")[0]
            said = [json.loads(line) for line in whole.splitlines()]
            kinds = [one["kind"] for one in said if one["fields"].get("client_id") == "west"]
            return [kind for kind in kinds if kind != "reject"] == ["register", "leave", "register"]

        until(again, "west has registered again")
        hold.set()
        assert running.join() == 0
        it.sites_ended()
        assert [record["clients"] for record in it.records()][1:] == [sorted(NAMES)] * 2
