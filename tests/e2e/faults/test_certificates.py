"""Certificates and clocks: who is not let in, who is put out in the middle of a run, who comes back, and what each is told."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from lamina.protos import coordinator_pb2 as pb
from lamina.protos import identity as identities
from lamina.protos import statements as st
from lamina.protos.clock import SYSTEM, Clock
from lamina.protos.coordinator_pb2_grpc import CoordinatorServicer, add_CoordinatorServicer_to_server
from lamina.protos.errors import IdentityError, LaminaError
from lamina.protos.identity import authority as pki
from lamina.protos.identity import site as sites
from lamina.protos.identity.folder import FILES, key_pem
from lamina.protos.link import Refused
from lamina.protos.preflight import preflight
from lamina.server import coordinator as coordinators
from lamina.server.store import log_check, run_directory
from tests import consortium, deployment
from tests.deployment import Synthetic, in_thread
from tests.hostile import Hostile, encoded, end, eventually
from tests.runs import same_bits

NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)
SITES = deployment.NAMES


def everyone(folder: Path, issued: datetime = NOW) -> dict[str, Path]:
    """A consortium whose CA is old enough to have issued certificates in the past."""
    ca = consortium.new_ca(folder / "ca", now=NOW - timedelta(days=1000))
    found = {"ca": folder / "ca"}
    roles = {"coordinator": "coordinator", "op": "operator", **dict.fromkeys(SITES, "client")}
    for name, role in roles.items():
        found[name] = consortium.enrolled(ca, folder / name, name, role, issued)
    return found


def words_of(folder: Path, who: dict[str, Path], *more: str) -> list[str]:
    spec_file = folder / "spec.json"
    spec_file.write_text(deployment.spec().to_json())
    crl = who["ca"] / "crl.pem"
    trust = (f"coordinator.identity={who['coordinator']}", f"coordinator.revocations={crl}")
    return deployment.words(spec_file, *trust, "wire.heartbeat_s=0.3", *more)


def with_files(folder: Path, **files: bytes) -> Path:
    """An identity of plain files."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(content)
        path.chmod(0o600)
    return folder


def files_of(identity: Path) -> dict[str, bytes]:
    return {name.replace(".", "_"): (identity / name).read_bytes() for name in FILES}


# --- before dialling and at the door: `lamina client` as a process --------------------------------------------------


def self_signed(folder: Path) -> Path:
    """A certificate that its owner has signed, with a CA certificate that is its own."""
    own = consortium.new_ca(folder.parent / f"{folder.name}-ca", now=NOW)
    return consortium.enrolled(own, folder, "north", now=NOW)


@dataclass
class Case:
    """A site that must not get in.

    Attributes:
        identity: Its folder.
        says: What its message must hold, whatever else.
    """

    identity: Path | None
    says: tuple[str, ...]


def made(folder: Path, who: dict[str, Path]) -> dict[str, Case]:
    ca = pki.opened(who["ca"], None)
    real = files_of(who["north"])
    other = consortium.new_ca(folder / "other-ca", "hospitals", now=NOW)
    foreign = consortium.enrolled(other, folder / "foreign", "north", now=NOW)
    edited = with_files(folder / "edited", **files_of(foreign) | {"ca_pem": real["ca_pem"]})
    late = consortium.enrolled(ca, folder / "late", "late", now=NOW - timedelta(days=366))
    early = consortium.enrolled(ca, folder / "early", "early", now=NOW + timedelta(days=2))
    gone = consortium.enrolled(ca, folder / "gone", "gone", now=NOW)
    consortium.revoked(who["ca"], "gone")
    strange_key = key_pem(ec.generate_private_key(ec.SECP256R1()))
    swapped = with_files(folder / "swapped", **real | {"tls_key": strange_key})
    open_key = with_files(folder / "open", **real)
    (open_key / "tls.key").chmod(0o644)
    empty = folder / "empty"
    empty.mkdir()
    return {
        "expired": Case(late, ("expired at", "clock says", "new invite")),
        "not yet valid": Case(early, ("valid from", "clock says", "Set the clock")),
        "an operator's": Case(who["op"], ("expected role client, got operator", "invite for role=client")),
        "a coordinator's": Case(who["coordinator"], ("expected role client, got coordinator",)),
        "another CA's, and its CA": Case(foreign, ("got one issued by", "fingerprint")),
        "another CA's under our CA": Case(edited, ("got one of another CA", "enroll again")),
        "self-signed": Case(self_signed(folder / "selfish"), ("got one issued by", "fingerprint")),
        "revoked": Case(gone, ("certificate of gone was revoked", "invite")),
        "another's key": Case(swapped, ("expected the key of certificate.pem", "enroll again")),
        "a key that others can read": Case(open_key, ("chmod 600",)),
        "none": Case(empty, ("found no certificate.pem", "lamina pki enroll")),
        "not even a folder": Case(None, ("client.identity", "lamina pki enroll")),
    }


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Case, int, str]]]:
    """Exit code and words of a client in each of these cases, all started at once against one coordinator."""
    folder = tmp_path_factory.mktemp("clients")
    who = everyone(folder / "pki")
    found, rows = made(folder, who), folder / "rows.txt"
    rows.write_text("a note")
    with deployment.coordinator(folder / "run", words_of(folder, who)) as running:
        started = {}
        for name, case in found.items():
            words = [f"client.coordinator=127.0.0.1:{running.port}", f"client.state={folder / 'state' / name}"]
            words += [f"data={rows}"]
            words += [f"client.identity={case.identity}"] if case.identity else []
            command = [sys.executable, "-m", "lamina", "client", "--json", *words]
            started[name] = subprocess.Popen(
                command, env=deployment.environment(), cwd=deployment.ROOT, stderr=subprocess.PIPE, text=True
            )
        ended = {}
        for name, process in started.items():
            _, words_said = process.communicate(timeout=120)
            ended[name] = (found[name], process.returncode, words_said)
        yield ended
        assert running.thread.is_alive()
        assert not [event for event in running.events if event["event"] == "round"]
        end(running, who["op"])


def test_a_client_that_is_not_let_in_says_why_and_what_to_do(told: dict[str, tuple[Case, int, str]]) -> None:
    for name, (case, code, said) in told.items():
        assert code == 5, (name, said[-2000:])
        assert "Traceback" not in said, (name, said)
        error = said[said.index("error: ") :]
        assert [words for words in case.says if words not in error] == [], (name, error)


# --- a coordinator that is none -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [("north", "expected role coordinator, got client"), ("op", "expected role coordinator, got operator")],
)
def test_a_coordinator_does_not_start_with_another_role(tmp_path: Path, name: str, says: str) -> None:
    who = everyone(tmp_path / "pki")
    with pytest.raises(IdentityError, match=says) as caught:
        coordinators.serve(
            deployment.config_of(words_of(tmp_path, who | {"coordinator": who[name]})),
            tmp_path / "run",
            lambda *_, **__: None,
        )
    assert caught.value.exit_code == 5
    assert not (tmp_path / "run" / "coordinator.sqlite").exists()


class Pretender(CoordinatorServicer):
    """Anyone with a certificate, in the coordinator's place; it notes what reaches it."""

    def __init__(self, certificate: bytes) -> None:
        self.certificate, self.reached = certificate, 0

    def Register(self, request: pb.Signed, context: Any) -> pb.Registered:
        self.reached += 1
        terms = {"kind": "terms", "client_id": "south", "run_id": "x", "protocol": 1}
        return pb.Registered(terms=st.signed(st.TERMS, terms, lambda *_: b""), certificate=self.certificate)


def test_a_client_in_the_coordinators_place_is_not_spoken_to(tmp_path: Path) -> None:
    """Its certificate is of our CA and in its dates; a site sends it nothing, and says who it is."""
    who = everyone(tmp_path / "pki")
    mine = identities.load(who["north"])
    pretender = Pretender(mine.certificate_pem)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_CoordinatorServicer_to_server(pretender, server)  # type: ignore[no-untyped-call]
    pair = [(mine.tls_key_pem, mine.certificate_pem)]
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials(pair, mine.ca_pem, require_client_auth=True)
    )
    server.start()
    try:
        findings = {one.what: one.message for one in preflight(who["south"], f"127.0.0.1:{port}", NOW) if not one.ok}

        def explain() -> LaminaError:
            return IdentityError("\n".join(findings.values()))

        one = deployment.agent("south", port, tmp_path / "south", who["south"], explain=explain)
        thread, outcome = in_thread(one)
        thread.join(30)
        assert not thread.is_alive()
        (error,) = outcome
        assert isinstance(error, IdentityError)
        assert "expected role coordinator, got client (north)" in findings["server role"]
        assert pretender.reached == 0
    finally:
        server.stop(None)


def test_a_coordinator_that_shows_anothers_certificate_in_its_terms(tmp_path: Path) -> None:
    """TLS holds; what signs is not a coordinator's. The site takes no terms of it."""
    who = everyone(tmp_path / "pki")
    mine, north = identities.load(who["coordinator"]), identities.load(who["north"])
    pretender = Pretender(north.certificate_pem)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_CoordinatorServicer_to_server(pretender, server)  # type: ignore[no-untyped-call]
    pair = [(mine.tls_key_pem, mine.certificate_pem)]
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials(pair, mine.ca_pem, require_client_auth=True)
    )
    server.start()
    try:
        thread, outcome = in_thread(deployment.agent("south", port, tmp_path / "south", who["south"]))
        thread.join(30)
        (error,) = outcome
        assert isinstance(error, IdentityError)
        assert "expected role coordinator, got client" in str(error)
        assert pretender.reached == 1
    finally:
        server.stop(None)


# --- revoked while the run goes on ----------------------------------------------------------------------------------


def test_a_site_that_is_revoked_in_the_middle_is_out_and_the_run_goes_on(tmp_path: Path) -> None:
    """Stated difference: the adapter is that of a run in which the site does not count from that round on."""
    who = everyone(tmp_path / "pki")
    words = words_of(
        tmp_path, who, "rounds=4", "clients.deadline_s=4", "clients.patience_s=3", "train.schedule=constant"
    )
    gate = threading.Event()

    @dataclass
    class Waiting(Synthetic):
        """Trains round 2 until it is told to go on, or superseded."""

        def train(self, instruction: Any, progress: Any, allow: Any) -> Any:
            while instruction.round == 2 and not gate.is_set():
                progress(1)
                time.sleep(0.05)
            return super().train(instruction, progress, allow)

    with deployment.coordinator(tmp_path / "run", words) as running:
        try:
            west = deployment.agent("west", running.port, tmp_path / "west", who["west"], worker=Waiting("west"))
            thread, outcome = in_thread(west)
            others = [in_thread(deployment.agent(n, running.port, tmp_path / n, who[n])) for n in SITES[:2]]
            eventually(lambda: [e for e in running.events if e["event"] == "round"] != [])
            consortium.revoked(who["ca"], "west")
            revoked_at = time.monotonic()
            eventually(lambda: west._inbox.error is not None, 6)  # the stream has ended, while it still trains
            assert time.monotonic() - revoked_at < 6
            gate.set()
            thread.join(10)
            (error,) = outcome
            assert isinstance(error, Refused)
            assert error.exit_code == 5
            assert "the certificate of west was revoked" in str(error)
            assert "invite" in str(error)
            assert running.join(40) == 0
            for other, result in others:
                other.join(20)
                assert result == [0]
        finally:
            gate.set()
            end(running, who["op"])
    records = run_directory.read_records(running.path)
    assert [record["clients"] for record in records] == [["north", "south", "west"]] + [["north", "south"]] * 3
    # A round is asked of whoever was heard of in the last `clients.patience_s`, then no more.
    assert records[-1]["asked"] == ["north", "south"]
    without = [("west", number) for number in (2, 3, 4)]
    assert same_bits(deployment.final(running.path), deployment.fault_free(words, without=without))
    checked = log_check.check(running.path / "events.jsonl", (who["ca"] / "ca.pem").read_bytes(), "ca.pem")
    assert checked.verified.bad is None


@pytest.mark.parametrize("stalled", [False, True])
def test_an_upload_is_cut_when_its_sender_is_revoked(tmp_path: Path, stalled: bool) -> None:
    """Whether it goes on sending or stands still; nothing of it counts."""
    who = everyone(tmp_path / "pki")
    modules = {"block.q_proj": (2048, 2048)}
    schema = deployment.spec(modules)
    words = words_of(tmp_path, who, "rounds=1", "clients.deadline_s=9", "evaluate.every=1000")
    (tmp_path / "spec.json").write_text(schema.to_json())
    with deployment.coordinator(tmp_path / "run", words) as running:
        west = Hostile("west", running.port, who["west"], tmp_path / "west")
        try:
            west.register()
            slow = {
                name: Synthetic(name, step_s=1.5) for name in SITES[:2]
            }  # so that the round is still open afterwards
            others = [
                in_thread(deployment.agent(n, running.port, tmp_path / n, who[n], worker=slow[n])) for n in SITES[:2]
            ]
            asked = west.instruction()
            content = encoded(west.honest(asked, schema))
            claim = west.statement(st.CLAIM, west.claim(asked, content))
            over = threading.Event()

            def parts() -> Iterator[pb.UploadPart]:
                yield pb.UploadPart(claim=claim)
                yield pb.UploadPart(data=content[:1024])
                consortium.revoked(who["ca"], "west")
                if stalled:
                    over.wait(30)
                for at in range(1024, len(content) - 1, 128):
                    time.sleep(0.03)
                    yield pb.UploadPart(data=content[at : at + 128])

            started = time.monotonic()
            found = west.send(parts(), 30)
            over.set()
            assert time.monotonic() - started < 8
            assert found.startswith(("UNAUTHENTICATED: the certificate of west was revoked", "CANCELLED")), found
            assert stalled or found.startswith("UNAUTHENTICATED"), found
            again = west.upload(claim, content)
            assert again.startswith("UNAUTHENTICATED: the certificate of west was revoked"), again
            assert running.join(40) == 0
            for thread, outcome in others:
                thread.join(20)
                assert outcome == [0]
        finally:
            west.close()
            end(running, who["op"])
    (record,) = run_directory.read_records(running.path)
    assert record["clients"] == ["north", "south"]
    assert same_bits(deployment.final(running.path), deployment.fault_free(words, schema=schema, without=[("west", 1)]))


def test_a_list_that_cannot_be_trusted_leaves_the_last_in_force(tmp_path: Path) -> None:
    who = everyone(tmp_path / "pki")
    crl = who["ca"] / "crl.pem"
    consortium.revoked(who["ca"], "west")
    other = consortium.new_ca(tmp_path / "other", now=NOW)
    with deployment.coordinator(tmp_path / "run", words_of(tmp_path, who)) as running:
        west = Hostile("west", running.port, who["west"], tmp_path / "west")
        try:
            for content in (b"", b"no list", (other.folder / "crl.pem").read_bytes(), None):
                if content is None:
                    crl.unlink()
                else:
                    crl.with_suffix(".new").write_bytes(content)
                    crl.with_suffix(".new").replace(crl)
                faults = [event for event in running.events if event["event"] == "revocations"]
                if content is not None and not faults:
                    eventually(lambda: any(e["event"] == "revocations" for e in running.events))
                time.sleep(1.2)
                with pytest.raises(Refused, match="the certificate of west was revoked"):
                    west.register()
            assert all("crl.pem" in event["message"] for event in running.events if event["event"] == "revocations")
        finally:
            west.close()
            end(running, who["op"])


# --- renewed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotate", [False, True])
def test_a_site_that_comes_back_with_a_renewed_certificate(tmp_path: Path, rotate: bool) -> None:
    """The old one is revoked at the same time. The adapter is that of a run without faults, and the log can be checked."""
    who = everyone(tmp_path / "pki", NOW - HOUR)
    words = words_of(tmp_path, who)
    hold = threading.Event()

    @dataclass
    class Held(Synthetic):
        def train(self, instruction: Any, progress: Any, allow: Any) -> Any:
            while instruction.round == 2 and not hold.is_set():
                progress(1)
                time.sleep(0.02)
            return super().train(instruction, progress, allow)

    with deployment.coordinator(tmp_path / "run", words) as running:
        try:
            first = deployment.agent("west", running.port, tmp_path / "west", who["west"], worker=Held("west"))
            thread, _ = in_thread(first)
            others = [in_thread(deployment.agent(n, running.port, tmp_path / n, who[n])) for n in SITES[:2]]
            eventually(lambda: first._listener.at[0] == 2)
            first.stop()
            thread.join(20)
            ca = pki.opened(who["ca"], None)
            old = identities.load(who["west"]).peer
            answer = pki.fulfil(ca, sites.prepare_renewal(who["west"], rotate), datetime.now(UTC))
            sites.accept_renewal(who["west"], answer, datetime.now(UTC))
            new = identities.load(who["west"]).peer
            assert new.serial != old.serial
            assert (new.signing_key != old.signing_key) is rotate
            pki.revoke(ca, datetime.now(UTC), serial=f"{old.serial:x}")
            hold.set()
            second = deployment.agent("west", running.port, tmp_path / "west", who["west"])
            again, outcome = in_thread(second)
            assert running.join(60) == 0
            for other, result in [*others, (again, outcome)]:
                other.join(20)
                assert result == [0]
        finally:
            hold.set()
            end(running, who["op"])
    assert same_bits(deployment.final(running.path), deployment.fault_free(words))
    records = run_directory.read_records(running.path)
    assert [record["rejections"] for record in records] == [[], [], []]
    checked = log_check.check(running.path / "events.jsonl", (who["ca"] / "ca.pem").read_bytes(), "ca.pem")
    assert checked.verified.bad is None


# --- clocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew_s", [6.0, -310.0])
@pytest.mark.parametrize("whose", ["client", "coordinator"])
def test_a_clock_that_is_a_little_off_changes_no_bit(tmp_path: Path, skew_s: float, whose: str) -> None:
    """Flower turns a site away that is 5 s fast or 305 s slow; here no statement holds a time that must agree."""
    who = everyone(tmp_path / "pki", NOW - HOUR)
    words = words_of(tmp_path, who)
    off = Clock(ahead_s=skew_s)
    with deployment.coordinator(tmp_path / "run", words, off if whose == "coordinator" else SYSTEM) as running:
        found = [
            in_thread(deployment.agent(n, running.port, tmp_path / n, who[n], off if whose == "client" else SYSTEM))
            for n in SITES
        ]
        assert running.join() == 0
        for thread, outcome in found:
            thread.join(20)
            assert outcome == [0]
    assert same_bits(deployment.final(running.path), deployment.fault_free(words))
    assert all(record["rejections"] == [] for record in run_directory.read_records(running.path))


@pytest.mark.parametrize(("days", "says"), [(-3, "valid from"), (400, "expired at")])
def test_a_clients_clock_that_is_far_off_is_named(tmp_path: Path, days: int, says: str) -> None:
    who = everyone(tmp_path / "pki", NOW - HOUR)
    with deployment.coordinator(tmp_path / "run", words_of(tmp_path, who)) as running:
        off = Clock(ahead_s=86400.0 * days)
        one = deployment.agent("west", running.port, tmp_path / "west", who["west"], off)
        thread, outcome = in_thread(one)
        thread.join(20)
        (error,) = outcome
        assert isinstance(error, IdentityError)
        assert error.exit_code == 5
        assert says in str(error)
        assert f"this machine's clock says {off.now():%Y-%m-%d}" in str(error)
        # And before it dials, with the same clock.
        failed = {one.what: one.message for one in identities.check(who["west"], off.now(), "client") if not one.ok}
        assert "this machine's clock says" in failed["dates"]
        end(running, who["op"])


@pytest.mark.parametrize("days", [-3, 400])
def test_a_coordinators_clock_that_is_far_off_is_named(tmp_path: Path, days: int) -> None:
    who = everyone(tmp_path / "pki", NOW - HOUR)
    config = deployment.config_of([*words_of(tmp_path, who), "coordinator.listen=127.0.0.1:0"])
    with pytest.raises(IdentityError, match="this machine's clock says") as caught:
        coordinators.serve(config, tmp_path / "run", lambda *_, **__: None, Clock(ahead_s=86400.0 * days))
    assert caught.value.exit_code == 5
