"""Attack: a list of revoked certificates that goes back or goes away, and a coordinator that is on it."""

from __future__ import annotations

import shutil
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from lamina.client import doctor
from lamina.protos import identity as identities
from lamina.protos.errors import IdentityError
from lamina.protos.identity import Revocations, list_of, read_revocations
from lamina.protos.identity import authority as pki
from lamina.protos.link import Refused
from lamina.server import coordinator as coordinators
from lamina.server.port.access import Access
from tests import consortium, deployment
from tests.hostile import Hostile, end, eventually

NOW = datetime.now(UTC)


def put(content: bytes, path: Path) -> None:
    """As the guide says: beside it, then renamed over it."""
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


@pytest.fixture
def lists(tmp_path: Path) -> tuple[dict[str, Path], bytes, bytes, int]:
    """Everyone, the list before and after west was revoked, and west's serial number."""
    who = deployment.certificates(tmp_path / "pki")
    path = who["ca"] / "crl.pem"
    before = path.read_bytes()
    consortium.revoked(who["ca"], "west")
    return who, before, path.read_bytes(), identities.load(who["west"]).peer.serial


def test_an_older_list_does_not_take_effect(lists: tuple[dict[str, Path], bytes, bytes, int]) -> None:
    who, before, after, west = lists
    path = who["ca"] / "crl.pem"
    kept: list[Revocations] = []
    access = Access((who["ca"] / "ca.pem").read_bytes(), path)
    access.remember(None, kept.append)
    put(before, path)
    access.reload()
    assert access.is_revoked_serial(west)
    assert "expected the list in force, number 1, or a later one, got number 0" in access.fault
    put(after, path)
    access.reload()
    assert (access.fault, access.is_revoked_serial(west)) == ("", True)
    consortium.revoked(who["ca"], "south")
    access.reload()
    assert access.is_revoked_serial(identities.load(who["south"]).peer.serial)
    assert [one.number for one in kept] == [1, 2]
    # A CA that was restored from a copy counts on from a lower number.
    with pytest.raises(IdentityError, match="an older list"):
        Revocations(2, frozenset({1})).check_follows(kept[1], path)
    Revocations(2, kept[1].serials | {1}).check_follows(kept[1], path)


def test_a_list_that_comes_later_takes_effect(lists: tuple[dict[str, Path], bytes, bytes, int]) -> None:
    who, _, after, west = lists
    path = who["coordinator"] / "crl.pem"
    access = Access((who["ca"] / "ca.pem").read_bytes(), path)
    access.remember(None, lambda found: None)
    access.reload()
    assert (access.fault, access.is_revoked_serial(west)) == ("", False)
    put(after, path)
    access.reload()
    assert access.is_revoked_serial(west)


def test_a_restart_does_not_go_back(tmp_path: Path, lists: tuple[dict[str, Path], bytes, bytes, int]) -> None:
    who, before, after, _ = lists
    path = who["coordinator"] / "crl.pem"
    path.write_bytes(after)
    (tmp_path / "spec.json").write_text(deployment.spec().to_json())
    words = deployment.words(tmp_path / "spec.json", f"coordinator.identity={who['coordinator']}")
    with deployment.coordinator(tmp_path / "run", words) as running:
        end(running, who["op"])
    put(before, path)
    with deployment.coordinator(tmp_path / "run", words) as running:
        west = Hostile("west", running.port, who["west"], tmp_path / "west")
        try:
            with pytest.raises(Refused, match="the certificate of west was revoked"):
                west.register()
            eventually(lambda: any("an older list" in str(one.get("message")) for one in running.events))
        finally:
            west.close()
            end(running, who["op"])
    log = (tmp_path / "run" / "events.jsonl").read_bytes()
    path.unlink()
    with deployment.coordinator(tmp_path / "run", words) as running, pytest.raises(IdentityError) as caught:
        running.join()
    assert caught.value.exit_code == 5
    assert "expected the list of revoked certificates, number 1 or later, which this run has seen" in str(caught.value)
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == log


def test_a_list_without_a_number_is_none(lists: tuple[dict[str, Path], bytes, bytes, int], tmp_path: Path) -> None:
    ca = pki.opened(lists[0]["ca"], None)
    builder = x509.CertificateRevocationListBuilder().issuer_name(ca.certificate.subject)
    bare = builder.last_update(NOW).next_update(ca.certificate.not_valid_after_utc).sign(ca.key, hashes.SHA256())
    (tmp_path / "bare.pem").write_bytes(bare.public_bytes(Encoding.PEM))
    with pytest.raises(IdentityError, match="expected a list with a number"):
        read_revocations(tmp_path / "bare.pem", ca.ca_pem)


# --- a coordinator that is revoked ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rolled_back", [False, True])
def test_a_revoked_coordinator_does_not_start(tmp_path: Path, rolled_back: bool) -> None:
    """Nor where the list that it is on was replaced by an older one after the run has seen it."""
    who = deployment.certificates(tmp_path / "pki")
    path = who["ca"] / "crl.pem"
    before = path.read_bytes()
    (tmp_path / "spec.json").write_text(deployment.spec().to_json())
    trust = (f"coordinator.identity={who['coordinator']}", f"coordinator.revocations={path}")
    words = deployment.words(tmp_path / "spec.json", *trust)
    if rolled_back:
        with deployment.coordinator(tmp_path / "run", words) as running:
            consortium.revoked(who["ca"], "coordinator")
            eventually(lambda: running_has_seen(tmp_path / "run", 1))
            end(running, who["op"])
        put(before, path)
    else:
        consortium.revoked(who["ca"], "coordinator")
    with pytest.raises(IdentityError, match="revoked") as caught:
        coordinators.serve(deployment.config_of(words), tmp_path / "run", lambda *_, **__: None)
    assert caught.value.exit_code == 5
    assert (tmp_path / "run" / "coordinator.sqlite").exists() is rolled_back


def running_has_seen(path: Path, number: int) -> bool:
    """Whether a run's database has a list of this number."""
    with sqlite3.connect(f"file:{path / 'coordinator.sqlite'}?mode=ro", uri=True) as db:
        found = db.execute("SELECT value FROM facts WHERE name = 'revocations'").fetchone()
    return found is not None and found[0].startswith(f"[{number},")


def test_a_site_with_the_list_does_not_work_for_a_revoked_coordinator(tmp_path: Path) -> None:
    who = deployment.certificates(tmp_path / "pki")
    mine = who["north"] / "crl.pem"
    assert list_of("", who["north"]) is None
    shutil.copy(who["ca"] / "crl.pem", mine)
    assert list_of("", who["north"]) == mine
    assert list_of("other.pem", who["north"]) == Path("other.pem")
    (tmp_path / "spec.json").write_text(deployment.spec().to_json())
    words = deployment.words(tmp_path / "spec.json", f"coordinator.identity={who['coordinator']}")

    def told(port: int) -> list[doctor.Line]:
        found = doctor.coordinator(who["north"], f"127.0.0.1:{port}", NOW, revocations=mine)
        return [line for line in found if "revocations" in line.what]

    with deployment.coordinator(tmp_path / "run", words) as running:
        try:
            assert [line.level for line in told(running.port)] == ["ok", "ok"]
            consortium.revoked(who["ca"], "coordinator")
            put((who["ca"] / "crl.pem").read_bytes(), mine)
            agent = deployment.agent("north", running.port, tmp_path / "north", who["north"], revocations=mine)
            with pytest.raises(IdentityError, match=r"coordinator's certificate \(coordinator\)") as caught:
                agent.run()
            assert caught.value.exit_code == 5
            lines = told(running.port)
            assert [line.level for line in lines] == ["ok", "FAIL"]
            assert doctor.exit_code(lines) == 5
            mine.unlink()
            lost = deployment.agent("north", running.port, tmp_path / "north", who["north"], revocations=mine)
            with pytest.raises(IdentityError, match="expected a revocation list in PEM"):
                lost.run()
        finally:
            end(running, who["op"])
