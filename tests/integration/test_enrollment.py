"""The enrollment listener on loopback: what it gives, what it tells, and to whom."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from lamina.protos import identity
from lamina.protos.enrollment_pb2 import EnrollRequest
from lamina.protos.errors import ConfigError, IdentityError, LaminaError
from lamina.protos.identity import authority as pki
from lamina.protos.identity.authority import Authority
from lamina.protos.identity.issuing import ENROLLMENT_HOST
from lamina.protos.identity.ledger import read_ledger
from lamina.protos.identity.requests import MAX_REQUEST_BYTES, read_invite
from lamina.protos.identity.site import prepare
from lamina.server.commands.pki import main
from lamina.server.port import enrollment
from lamina.server.port.enrollment import Listener, TokenBucket, ask
from tests.consortium import enrolled


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAMINA_CA_PASSPHRASE", raising=False)


def run(line: str) -> None:
    assert main("pki", line.split()) == 0


@pytest.fixture
def ca() -> Authority:
    run("init ca consortium=hospitals")
    return pki.opened(Path("ca"), None)


def now() -> datetime:
    return datetime.now(UTC)


def failure(line: str) -> LaminaError:
    with pytest.raises(LaminaError) as caught:
        main("pki", line.split())
    return caught.value


class Heard(list[str]):
    """What the listener said to its operator."""


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def address(ca: Authority, heard: Heard) -> Iterator[str]:
    listener = Listener(ca, "127.0.0.1:0", heard.append)
    port = listener.start()
    yield f"127.0.0.1:{port}"
    listener.stop()


def test_through_the_listener(ca: Authority, address: str, heard: Heard) -> None:
    run(f"invite ca north enrollment={address}")
    run("enroll north.invite.json output=north")
    before = identity.load(Path("north")).peer
    run("renew north")  # the address is remembered
    after = identity.load(Path("north")).peer
    assert before.name == after.name == "north"
    assert before.serial != after.serial
    run("renew north")
    assert len(read_ledger(Path("ca")).certificates) == 3
    assert [line.split()[0] for line in heard] == ["enroll", "renew", "renew"]


def test_an_address_on_the_command_line_and_none_at_all(ca: Authority, address: str) -> None:
    run("invite ca north enrollment=127.0.0.1:1")
    run("enroll north.invite.json output=north online=false")
    assert Path("north/request.json").is_file()
    run(f"enroll north.invite.json output=north address={address}")
    assert identity.load(Path("north")).peer.name == "north"


def test_no_listener_is_said_and_can_be_tried_again(ca: Authority, address: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{free.getsockname()[1]}"
    run("invite ca north")
    error = failure(f"enroll north.invite.json output=north address={closed}")
    assert (error.exit_code, "whether `lamina pki listen` runs" in str(error)) == (2, True)
    run(f"enroll north.invite.json output=north address={address}")


def on_the_wire(address: str, ca_pem: bytes, request: bytes) -> tuple[str, str]:
    """The status and words that a caller is sent."""
    options = [("grpc.ssl_target_name_override", ENROLLMENT_HOST)]
    message = EnrollRequest(request=request).SerializeToString()
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(ca_pem), options=options) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/lamina.enrollment.v1.Enrollment/Enroll")(message, timeout=20)
        return caught.value.code().name, caught.value.details()


def test_a_refusal_tells_the_caller_nothing_and_the_operator_why(ca: Authority, address: str, heard: Heard) -> None:
    run("invite ca used")
    run("enroll used.invite.json output=used ca=ca")
    run("invite ca open")
    used, waiting = (read_invite(Path(f"{name}.invite.json").read_bytes(), "") for name in ("used", "open"))
    wrong = [used, replace(waiting, token=bytes(32)), replace(waiting, id="0" * 32), replace(waiting, name="x")]
    told = {
        on_the_wire(address, ca.ca_pem, prepare(Path(f"site-{number}"), invite, now()))
        for number, invite in enumerate(wrong)
    }
    assert told == {("UNAUTHENTICATED", enrollment._REFUSED)}
    reasons = ["was used already", "signed with the invite for open", "got an unknown one", "expected name, role"]
    assert [reason in line for reason, line in zip(reasons, heard)] == [True] * 4
    assert waiting.token.hex() not in "".join(heard)


def test_guesses_through_the_listener_end_the_invite(ca: Authority, address: str, heard: Heard) -> None:
    run("invite ca north")
    invite = read_invite(Path("north.invite.json").read_bytes(), "")
    guess = prepare(Path("guess"), replace(invite, token=bytes(32)), now())

    def attempt(_: int) -> None:
        with pytest.raises(IdentityError):
            ask(address, ca.ca_pem, "enroll", guess)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(attempt, range(8)))
    assert sum("signed with the invite" in line for line in heard) == pki.MAX_ATTEMPTS
    with pytest.raises(IdentityError):
        ask(address, ca.ca_pem, "enroll", prepare(Path("north"), invite, now()))
    assert not read_ledger(Path("ca")).certificates


def test_all_callers_together_are_limited(ca: Authority, heard: Heard) -> None:
    listener = Listener(ca, "127.0.0.1:0", heard.append, bucket=TokenBucket(burst=2, per_s=0))
    address = f"127.0.0.1:{listener.start()}"
    told = []
    for _ in range(4):
        with pytest.raises(IdentityError) as caught:
            ask(address, ca.ca_pem, "enroll", b"{}")
        told.append("Too many requests" in str(caught.value))
    listener.stop()
    assert told == [False, False, True, True]
    assert sum("over the limit" in line for line in heard) == 2


def test_an_oversized_request_is_cut_off_before_it_is_read(ca: Authority, address: str, heard: Heard) -> None:
    with pytest.raises(IdentityError):
        ask(address, ca.ca_pem, "enroll", bytes(MAX_REQUEST_BYTES * 4))
    assert heard == []


def test_a_fault_at_the_ca_is_not_told(ca: Authority, address: str, heard: Heard) -> None:
    Path("ca/issued.json").unlink()
    request = b'{"schema": 1, "kind": "enroll", "base": "", "csr": "", "proof": ""}'
    assert on_the_wire(address, ca.ca_pem, request) == ("INTERNAL", enrollment._FAULT)
    with pytest.raises(IdentityError, match="could not answer"):
        ask(address, ca.ca_pem, "enroll", request)
    assert "issued.json" in heard[0]


def test_a_listener_of_another_ca_is_not_spoken_to(ca: Authority, tmp_path: Path) -> None:
    other = pki.create(tmp_path / "other", "hospitals", 10, None, now())
    listener = Listener(other, "127.0.0.1:0", lambda _: None)
    address = f"127.0.0.1:{listener.start()}"
    run(f"invite ca north enrollment={address}")
    error = failure("enroll north.invite.json output=north")
    listener.stop()
    assert error.exit_code == 5
    assert "expected the listener of the CA in the invite" in str(error)


def test_a_coordinator_cannot_pose_as_the_listener_nor_the_listener_as_a_coordinator(
    ca: Authority, address: str, tmp_path: Path
) -> None:
    hub = identity.load(enrolled(ca, tmp_path / "hub", "hub", "coordinator", now()))
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([(hub.tls_key_pem, hub.certificate_pem)], hub.ca_pem, False)
    )
    server.start()
    with pytest.raises(IdentityError, match="expected the listener of the CA"):
        ask(f"127.0.0.1:{port}", ca.ca_pem, "enroll", b"{}")
    server.stop(0).wait()

    context = ssl.create_default_context(cadata=ca.ca_pem.decode())
    context.set_alpn_protocols(["h2"])
    host, _, number = address.partition(":")
    for name in ("127.0.0.1", "localhost"):
        with socket.create_connection((host, int(number))) as plain, pytest.raises(ssl.SSLCertVerificationError):
            context.wrap_socket(plain, server_hostname=name)


def test_a_second_listener_on_the_port_is_refused(ca: Authority, address: str) -> None:
    with pytest.raises(ConfigError, match="in use"):
        Listener(ca, address, lambda _: None).start()


def test_grpc_takes_our_certificates_on_both_sides(ca: Authority, tmp_path: Path) -> None:
    hub = identity.load(enrolled(ca, tmp_path / "hub", "hub", "coordinator", now()))
    north = identity.load(enrolled(ca, tmp_path / "north", "north", now=now()))

    def who(_: bytes, context: Any) -> bytes:
        return identity.peer_of(context.auth_context()["x509_pem_cert"][0]).name.encode()

    server = grpc.server(ThreadPoolExecutor(1))
    handler = grpc.method_handlers_generic_handler("t.T", {"Who": grpc.unary_unary_rpc_method_handler(who)})
    server.add_generic_rpc_handlers((handler,))
    pair = [(hub.tls_key_pem, hub.certificate_pem)]
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair, hub.ca_pem, True))
    server.start()
    credentials = grpc.ssl_channel_credentials(north.ca_pem, north.tls_key_pem, north.certificate_pem)
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
        assert channel.unary_unary("/t.T/Who")(b"", timeout=20) == b"north"
    nameless = grpc.ssl_channel_credentials(north.ca_pem)
    with grpc.secure_channel(f"127.0.0.1:{port}", nameless) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/t.T/Who")(b"", timeout=20)
    server.stop(0).wait()


@pytest.fixture
def process(ca: Authority) -> Iterator[subprocess.Popen[str]]:
    code = "import sys; from lamina.server.commands.pki import main; sys.exit(main('pki', sys.argv[1:]))"
    started = subprocess.Popen(
        [sys.executable, "-c", code, "listen", "ca", "address=127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    watchdog = threading.Timer(60, started.kill)
    watchdog.start()
    with started:
        yield started
        started.kill()
    watchdog.cancel()


def port_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.match(r"listening on 127\.0\.0\.1:(\d+) for hospitals", line)
    assert found, line
    return int(found[1])


def test_the_listen_command_runs_until_it_is_told_to_stop(process: subprocess.Popen[str]) -> None:
    run(f"invite ca north enrollment=127.0.0.1:{port_of(process)}")  # while the listener runs
    run("enroll north.invite.json output=north")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 0
    assert re.search(r"enroll from ipv4:\S+: north \(client\), serial [0-9a-f]+", errors)


def test_the_listen_command_speaks_nothing_below_tls_1_3(ca: Authority, process: subprocess.Popen[str]) -> None:
    port = port_of(process)
    context = ssl.create_default_context(cadata=ca.ca_pem.decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname=ENROLLMENT_HOST) as wrapped,
    ):
        assert wrapped.version() == "TLSv1.3"
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", port)) as plain, pytest.raises(OSError):
        context.wrap_socket(plain, server_hostname=ENROLLMENT_HOST)
