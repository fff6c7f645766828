"""What `preflight` and `lamina doctor` say of servers that are not what they should be, over real sockets and TLS."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from lamina.client.doctor import Line, coordinator, exit_code
from lamina.protos import coordinator_pb2, coordinator_pb2_grpc
from lamina.protos.errors import LaminaError
from lamina.protos.identity import Finding
from lamina.protos.identity import authority as pki
from lamina.protos.identity.authority import Authority, listener_pair
from lamina.protos.identity.site import accept, prepare
from lamina.protos.preflight import NETWORK, plain, preflight
from lamina.server import operate
from tests.consortium import enrolled, new_ca

NOW = datetime.now(UTC)
PATIENCE_S = 10.0
SETTINGS = bytes(3) + b"\x04" + bytes(5)
GENERATED: Any = coordinator_pb2_grpc


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A listener that does this with every connection, one after the other; gives its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    ending = threading.Event()

    def loop() -> None:
        while not ending.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(PATIENCE_S)
            with connection:
                try:
                    answer(connection)
                except OSError:
                    continue  # a handshake that is to fail

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        ending.set()
        thread.join()
        listener.close()


def tls(folder: Path, trusted: Path | None = None, then: bytes | None = SETTINGS) -> Callable[[socket.socket], None]:
    """A TLS server with this identity that demands a certificate of this CA, then says something or nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "tls.key")
    context.load_verify_locations(trusted or folder / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            if then is not None:
                secured.sendall(then)
            while secured.recv(1024):
                pass

    return answer


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return new_ca(tmp_path_factory.mktemp("pki") / "ca", "lungs", NOW - timedelta(days=1000))


@pytest.fixture(scope="module")
def site(ca: Authority) -> Path:
    return enrolled(ca, ca.folder.parent / "clinic", "clinic", now=NOW)


@pytest.fixture(scope="module")
def hub(ca: Authority) -> Path:
    return enrolled(ca, ca.folder.parent / "hub", "hub", "coordinator", NOW)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator of another consortium."""
    folder = tmp_path_factory.mktemp("other")
    return enrolled(new_ca(folder / "ca", "hearts", NOW), folder / "hub", "hub", "coordinator", NOW)


def failure(findings: list[Finding]) -> Finding:
    """The one finding that is not ok, which is the last or among the server's."""
    (found,) = [one for one in findings if not one.ok]
    return found


def seen(site: Path, port: int, host: str = "localhost", now: datetime = NOW, timeout_s: float = PATIENCE_S) -> Finding:
    return failure(preflight(site, f"{host}:{port}", now, timeout_s=timeout_s))


# --- a server that is right


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "LOCALHOST"])
def test_a_sound_server_and_site(site: Path, hub: Path, host: str) -> None:
    with serving(tls(hub)) as port:
        findings = preflight(site, f"{host}:{port}", NOW, timeout_s=PATIENCE_S)
    assert all(one.ok for one in findings), findings
    assert [one.what for one in findings][-6:] == [
        "reach",
        "server issuer",
        "server dates",
        "server host",
        "server role",
        "accepted",
    ]


# --- the server's certificate


def test_an_expired_server(ca: Authority, site: Path, tmp_path: Path) -> None:
    old = enrolled(ca, tmp_path / "old", "old-hub", "coordinator", NOW - timedelta(days=368))
    with serving(tls(old)) as port:
        found = seen(site, port)
    assert found.what == "server dates"
    assert "expired at" in found.message
    assert "3 days later" in found.message
    assert "lamina pki renew" in found.message


def test_a_server_from_the_future_is_a_clock_that_is_behind(ca: Authority, site: Path, tmp_path: Path) -> None:
    soon = enrolled(ca, tmp_path / "soon", "soon-hub", "coordinator", NOW + timedelta(hours=3, minutes=10))
    with serving(tls(soon)) as port:
        found = seen(site, port)
    assert found.what == "server dates"
    assert "set the clock, it seems behind by more than 3 hours" in found.message


def test_a_server_of_another_ca(site: Path, stranger: Path) -> None:
    with serving(tls(stranger)) as port:
        found = seen(site, port)
    assert found.what == "server issuer"
    assert "expected a certificate issued by the CA of lungs" in found.message
    assert "O=hearts" in found.message


def test_a_server_for_another_host(site: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **named: real("127.0.0.1", *rest, **named))
    with serving(tls(hub)) as port:
        found = seen(site, port, "hub.example.org")
    assert found.what == "server host"
    assert "expected a certificate for hub.example.org, got one for localhost, 127.0.0.1" in found.message


def test_a_server_that_is_no_coordinator(ca: Authority, site: Path, tmp_path: Path) -> None:
    with serving(tls(site)) as port:
        findings = preflight(site, f"localhost:{port}", NOW, timeout_s=PATIENCE_S)
    failed = {one.what: one.message for one in findings if not one.ok}
    assert "expected role coordinator, got client (clinic)" in failed["server role"]
    assert "got one for no host" in failed["server host"]


def test_the_enrollment_listener_is_recognised(ca: Authority, site: Path, tmp_path: Path) -> None:
    key, pem = listener_pair(ca, NOW)
    for name, content in {"certificate.pem": pem, "tls.key": key, "ca.pem": (site / "ca.pem").read_bytes()}.items():
        (tmp_path / name).write_bytes(content)
    with serving(tls(tmp_path)) as port:
        found = seen(site, port)
    assert found.what == "server role"
    assert "enrollment listener" in found.message


# --- what the server says of us


def test_a_site_whose_certificate_has_expired(ca: Authority, hub: Path, tmp_path: Path) -> None:
    late = enrolled(ca, tmp_path / "late", "late", now=NOW - timedelta(days=368))
    with serving(tls(hub)) as port:
        findings = preflight(late, f"localhost:{port}", NOW, timeout_s=PATIENCE_S)
    failed = {one.what: one.message for one in findings if not one.ok}
    assert set(failed) == {"dates", "accepted"}
    assert "says that it has expired" in failed["accepted"]


def test_a_server_that_trusts_another_ca(site: Path, hub: Path, stranger: Path) -> None:
    with serving(tls(hub, trusted=stranger / "ca.pem")) as port:
        found = seen(site, port)
    assert found.what == "accepted"
    assert "knows another CA" in found.message


def test_a_server_that_closes_after_the_handshake(site: Path, hub: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(hub / "certificate.pem", hub / "tls.key")

    def answer(connection: socket.socket) -> None:
        context.wrap_socket(connection, server_side=True).close()

    with serving(answer) as port:
        found = seen(site, port)
    assert found.what == "accepted"
    assert "closes the connection" in found.message


def test_a_site_of_the_wrong_role_and_one_with_no_files(site: Path, hub: Path, tmp_path: Path) -> None:
    with serving(tls(hub)) as port:
        assert seen(hub, port).what == "role"
        findings = preflight(tmp_path, f"localhost:{port}", NOW)
    assert [(one.what, one.ok) for one in findings] == [("files", False), ("reach", True)]


def test_a_key_that_is_not_the_certificates_is_not_presented(site: Path, hub: Path, tmp_path: Path) -> None:
    for name in ("certificate.pem", "signing.key", "ca.pem"):
        shutil.copy(site / name, tmp_path / name)
    shutil.copy(hub / "tls.key", tmp_path / "tls.key")
    with serving(tls(hub)) as port:
        assert seen(tmp_path, port).what == "keys"


def test_a_server_that_waits_to_be_greeted(site: Path, hub: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(hub / "certificate.pem", hub / "tls.key")

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            if secured.recv(24).startswith(b"PRI * HTTP/2.0"):
                secured.sendall(SETTINGS)

    with serving(answer) as port:
        findings = preflight(site, f"localhost:{port}", NOW, timeout_s=2.0)
    assert all(one.ok for one in findings), findings


# --- servers that are not reached


def http(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    connection.recv(1024)


def silent(connection: socket.socket) -> None:
    while connection.recv(1024):
        pass


def closing(connection: socket.socket) -> None:
    pass


@pytest.mark.parametrize(
    ("answer", "told", "timeout_s"),
    [
        (http, "answers without TLS", PATIENCE_S),
        (silent, "accepted, but nothing is said", 0.3),
        (closing, "closes the connection|breaks the handshake off", PATIENCE_S),
    ],
)
def test_a_server_that_does_not_speak_tls(
    site: Path, answer: Callable[[socket.socket], None], told: str, timeout_s: float
) -> None:
    with serving(answer) as port:
        found = seen(site, port, timeout_s=timeout_s)
    assert found.what in NETWORK
    assert any(one in found.message for one in told.split("|")), found


def test_a_server_that_speaks_an_older_tls(site: Path, hub: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(hub / "certificate.pem", hub / "tls.key")
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def answer(connection: socket.socket) -> None:
        context.wrap_socket(connection, server_side=True).close()

    with serving(answer) as port:
        found = seen(site, port)
    assert found.what == "reach"
    assert "does not speak TLS 1.3" in found.message


def test_a_server_that_says_nothing_after_the_handshake(site: Path, hub: Path) -> None:
    with serving(tls(hub, then=None)) as port:
        found = seen(site, port, timeout_s=1.5)
    assert found.what == "reach"
    assert "the handshake is done, but nothing follows" in found.message


def test_a_server_that_is_not_grpc(site: Path, hub: Path) -> None:
    with serving(tls(hub, then=b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        found = seen(site, port)
    assert found.what == "reach"
    assert "not as gRPC does" in found.message


def test_nobody_there(site: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    assert "refuses the connection" in seen(site, port).message


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (socket.gaierror(-2, "Name or service not known"), "is not found (Name or service not known)"),
        (TimeoutError(), "no answer in 10 s"),
        (OSError(113, "No route to host"), "No route to host"),
    ],
)
def test_the_way_there_is_explained(site: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, told: str) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", failing)
    found = seen(site, 8443)
    assert found.what == "reach"
    assert told in found.message


# --- gRPC


class Hub(GENERATED.CoordinatorServicer):  # type: ignore[misc]
    """A coordinator that only gives a sign of life."""

    def __init__(self, ahead_s: float = 0.0, refusal: Any = None, why: str = "certificate 5f was revoked") -> None:
        self.ahead_s, self.refusal, self.why = ahead_s, refusal, why

    def Heartbeat(self, request: Any, context: Any) -> Any:
        if self.refusal is not None:
            context.abort(self.refusal, self.why)
        return coordinator_pb2.HeartbeatReply(time=time.time() + self.ahead_s)


@contextmanager
def grpc_serving(folder: Path | None, servicer: Hub | None) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    if servicer is not None:
        GENERATED.add_CoordinatorServicer_to_server(servicer, server)
    if folder is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = ((folder / "tls.key").read_bytes(), (folder / "certificate.pem").read_bytes())
        credentials = grpc.ssl_server_credentials([pair], (folder / "ca.pem").read_bytes(), True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


def asked(site: Path, servicer: Hub | None, hub: Path) -> tuple[Line, int]:
    with grpc_serving(hub, servicer) as where:
        lines = list(coordinator(site, where, datetime.now(UTC), timeout_s=PATIENCE_S))
    return lines[-1], exit_code(lines)


@pytest.mark.parametrize(("ahead_s", "level", "told"), [(0, "ok", "about 0 s"), (900, "warn", "900 s behind")])
def test_the_coordinators_clock(site: Path, hub: Path, ahead_s: float, level: str, told: str) -> None:
    line, code = asked(site, Hub(ahead_s), hub)
    assert (line.level, line.what, code) == (level, "clock", 0)
    assert told in line.message


def test_a_site_that_tls_lets_in_and_the_coordinator_does_not(site: Path, hub: Path) -> None:
    line, code = asked(site, Hub(refusal=grpc.StatusCode.PERMISSION_DENIED), hub)
    assert (line.level, line.what, code) == ("FAIL", "accepted", 5)
    assert "certificate 5f was revoked" in line.message


def test_an_operator_gives_no_sign_of_life(ca: Authority, hub: Path, tmp_path: Path) -> None:
    operator = enrolled(ca, tmp_path / "operator", "olga", "operator", NOW)
    line, code = asked(operator, Hub(refusal=grpc.StatusCode.PERMISSION_DENIED), hub)
    assert (line.level, line.what, code) == ("ok", "accepted", 0)


def test_grpc_that_is_no_coordinator_and_one_that_says_no_time(site: Path, hub: Path) -> None:
    line, code = asked(site, None, hub)
    assert (line.level, line.what, code) == ("FAIL", "reach", 2)
    line, code = asked(site, Hub(refusal=grpc.StatusCode.FAILED_PRECONDITION), hub)
    assert (line.level, line.what, code) == ("ok", "clock", 0)


def test_grpc_that_does_not_accept_a_site(hub: Path, stranger: Path, tmp_path: Path) -> None:
    for name in ("certificate.pem", "tls.key", "signing.key"):
        shutil.copy(stranger / name, tmp_path / name)
    shutil.copy(hub / "ca.pem", tmp_path / "ca.pem")
    with grpc_serving(hub, Hub()) as where:
        findings = preflight(tmp_path, where, NOW, None, timeout_s=PATIENCE_S)
    failed = {one.what: one.message for one in findings if not one.ok}
    assert set(failed) == {"issuer", "accepted"}
    assert "as gRPC does with a certificate that it does not accept" in failed["accepted"]


def test_grpc_without_certificates(hub: Path) -> None:
    with grpc_serving(None, Hub()) as where:
        assert all(one.ok for one in plain(where))
    with grpc_serving(hub, Hub()) as where:
        found = failure(plain(where, timeout_s=5.0))
    assert found.what == "reach"
    assert "Take identity=DIR in place of insecure=true" in found.message


# --- the same words for operators


def test_what_an_operator_is_told(ca: Authority, site: Path, hub: Path, tmp_path: Path) -> None:
    olga = str(enrolled(ca, tmp_path / "olga", "olga-again", "operator", NOW))

    def told(where: str, folder: str, insecure: bool = False) -> LaminaError:
        with pytest.raises(LaminaError) as caught, operate.dialled(where, folder, insecure, "operator") as remote:
            remote.status()
        return caught.value

    invite = pki.invite(ca, "far", "coordinator", ["hub.example.org"], NOW)
    accept(tmp_path / "far", pki.fulfil(ca, prepare(tmp_path / "far", invite, NOW), NOW), invite, NOW)
    with grpc_serving(tmp_path / "far", Hub()) as where:
        other = told(where, olga)
    assert other.exit_code == 5
    assert "expected a certificate for localhost, got one for hub.example.org" in str(other)
    with grpc_serving(hub, Hub()) as where:
        bare = told(where, "", insecure=True)
    assert bare.exit_code == 3
    assert "Take identity=DIR in place of insecure=true" in str(bare)
    gone = told(where, olga)
    assert gone.exit_code == 3
    assert "the host refuses the connection: nothing listens on this port" in str(gone)
    assert "is gone after coordinator.linger_s" in str(gone)
    assert "identity=DIR is missing" in str(told(where, ""))


def test_a_refusal_is_told_whole(site: Path, hub: Path) -> None:
    said = "expected a certificate of role client, got auditor. " + "Ask the one who gave it out. " * 5
    line, _ = asked(site, Hub(refusal=grpc.StatusCode.PERMISSION_DENIED, why=said + "\x1b[31m\n"), hub)
    assert said.strip() in line.message
    assert "\x1b" not in line.message
    assert "\n" not in line.message
