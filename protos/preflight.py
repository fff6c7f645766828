"""Why a coordinator cannot be reached or is not trusted, found with plain sockets and TLS: gRPC does not say.

A first handshake believes nothing, presents nothing, and only looks at the server's certificate. A second one is the real one,
with this site's certificate; under TLS 1.3 the server's verdict on that comes only with the first bytes that are read.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from lamina.protos.errors import ConfigError, IdentityError, shown
from lamina.protos.identity import Finding, check, peer_of
from lamina.protos.identity.certificates import (
    RESERVED_SUFFIX,
    certificate,
    consortium_of,
    fingerprint,
    issued_by,
    stamp,
)
from lamina.protos.identity.checks import in_force
from lamina.protos.identity.folder import CA, CERTIFICATE, TLS_KEY, set_of

# Findings about the way to the server; every other is about who it is, or who we are.
NETWORK = ("address", "reach")

# What a client says first in HTTP/2 (RFC 9113, 3.4), with empty SETTINGS; a server's first frame is SETTINGS, type 4.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
_FRAME_BYTES, _SETTINGS = 9, 4

# OpenSSL's name of the server's alert -> why it does not accept our certificate.
_ALERTS = {
    "CERTIFICATE_EXPIRED": "says that it has expired; compare its dates and the server's clock",
    "CERTIFICATE_REVOKED": "says that it was revoked; ask whoever keeps the CA for a new invite",
    "UNKNOWN_CA": "knows another CA; ask its operator for the fingerprint of its ca.pem and compare it with yours",
    "BAD_CERTIFICATE": "does not accept it; ask its operator whether it is of this consortium and not revoked",
    "CERTIFICATE_UNKNOWN": "does not accept it; ask its operator whether it is of this consortium and not revoked",
    "CERTIFICATE_REQUIRED": "got none; the identity's files are not those of a client",
    "UNSUPPORTED_CERTIFICATE": "does not accept its kind; enroll again with `lamina pki enroll`",
    "ACCESS_DENIED": "denies access to it; ask its operator whether this site may take part",
}
_CLOSED = (
    "closes the connection at once, as gRPC does with a certificate that it does not accept; compare the CA's fingerprint, the"
    " dates and the clocks with its operator"
)

_TLS = "answers with TLS, so it has a certificate. Take identity=DIR in place of insecure=true."


class _NotReachedError(Exception):
    """The server did not get as far as showing who it is; the message says why."""


def preflight(
    identity: Path,
    coordinator: str,
    now: datetime,
    role: str | None = "client",
    *,
    revocations: Path | None = None,
    timeout_s: float = 5.0,
) -> list[Finding]:
    """Look at everything between this site and a coordinator's first answer. Nothing is sent but handshakes.

    Args:
        identity: Folder with the site's certificate and keys.
        coordinator: `host:port`.
        now: This machine's time, aware.
        role: That the identity must have; None accepts any.
        revocations: The consortium's list of revoked certificates, or None.
        timeout_s: Longest wait for each step of the server.

    Returns:
        Findings in order, up to the first that makes the next impossible; see `NETWORK` for what is no matter of trust.

    Raises:
        ConfigError: If `coordinator` is no host:port.
    """
    host, port = address("coordinator", coordinator)
    findings = check(identity, now, role, revocations)
    usable = all(one.ok or one.what not in ("files", "keys") for one in findings)
    try:
        presented = _presented(host, port, timeout_s)
        findings.append(Finding(True, "reach", f"{coordinator} answers, with TLS 1.3."))
        if not usable:
            return findings
        base = set_of(identity)
        server = _server(presented, (base / CA).read_bytes(), host, now, revocations)
        findings += server
        if all(one.ok for one in server):
            findings.append(_accepted(base, host, port, timeout_s))
    except _NotReachedError as error:
        findings.append(Finding(False, "reach", f"{coordinator}: {error}"))
    except OSError as error:  # the identity was replaced while it was read
        findings.append(
            Finding(False, "files", f"{identity}: changed while it was read ({error.strerror}). Try again.")
        )
    return findings


def plain(coordinator: str, *, timeout_s: float = 5.0) -> list[Finding]:
    """Look at the way to a coordinator without certificates.

    Args:
        coordinator: `host:port`, on the loopback interface.
        timeout_s: Longest wait for each step of the server.

    Returns:
        Findings in order.

    Raises:
        ConfigError: If `coordinator` is no host:port.
    """
    host, port = address("coordinator", coordinator)
    if host != "localhost" and not (is_ip(host) and ipaddress.ip_address(host).is_loopback):
        message = f"{coordinator}: expected the loopback interface with insecure=true. Elsewhere use identity=DIR."
        return [Finding(False, "address", message)]
    try:
        with _connected(host, port, timeout_s) as connection, _explained():
            _settled(connection)
    except _NotReachedError as error:
        told = _TLS if _speaks_tls(host, port, timeout_s) else str(error)
        return [Finding(False, "reach", f"{coordinator}: {told}")]
    return [Finding(True, "reach", f"{coordinator} answers, without TLS.")]


def _speaks_tls(host: str, port: int, timeout_s: float) -> bool:
    try:
        return bool(_presented(host, port, timeout_s))
    except _NotReachedError:
        return False


def address(key: str, text: str) -> tuple[str, int]:
    """Host and port.

    Args:
        key: The setting, for the message.
        text: `host:port`, an IPv6 host in brackets.

    Returns:
        Host without brackets, and port.

    Raises:
        ConfigError: If it is none.
    """
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else 65536
    if not colon or not bare or (":" in bare and (bare == host or not is_ip(bare))) or "/" in bare or number > 65535:
        raise ConfigError(f"{key}={text}: expected host:port, as in hub.example.org:8443 or [2001:db8::1]:8443.")
    return bare, number


def is_ip(host: str) -> bool:
    """Whether a host is an IP address.

    Args:
        host: Without brackets.

    Returns:
        True for IPv4 and IPv6.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _connected(host: str, port: int, timeout_s: float) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout=timeout_s)
    except (socket.gaierror, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "no host name"
        raise _NotReachedError(
            f"the host {shown(host)} is not found ({why}). Check the name, DNS and the network."
        ) from None
    except ConnectionRefusedError:
        raise _NotReachedError(
            "the host refuses the connection: nothing listens on this port. Is the coordinator started, on this port, and"
            " on an interface that is reached from here (coordinator.listen)?"
        ) from None
    except TimeoutError:
        raise _NotReachedError(
            f"no answer in {timeout_s:g} s. A firewall may drop it: ask for outgoing TCP to this host and port, unchanged."
        ) from None
    except OSError as error:
        raise _NotReachedError(f"no connection: {error.strerror or error}. Check the network and its routes.") from None


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    return context


def _presented(host: str, port: int, timeout_s: float) -> bytes:
    """The server's certificate, DER, believed in nothing."""
    context = _context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        _connected(host, port, timeout_s) as connection,
        _explained(),
        context.wrap_socket(connection, server_hostname=host) as secured,
    ):
        return secured.getpeercert(binary_form=True) or b""


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what a socket raises before the server is known into a sentence."""
    try:
        yield
    except TimeoutError:
        raise _NotReachedError(
            "the connection is accepted, but nothing is said on it. Is it a coordinator's port? A firewall or load balancer"
            " may hold it back: it must pass TCP through."
        ) from None
    except ssl.SSLError as error:
        reason = error.reason or ""
        if "WRONG_VERSION_NUMBER" in reason or "HTTP_REQUEST" in reason:
            told = "answers without TLS. Is it another service, or a coordinator with insecure=true?"
        elif "PROTOCOL" in reason:
            told = f"does not speak TLS 1.3 with HTTP/2 ({reason}). A proxy may be between: it must pass TCP through."
        else:
            told = f"breaks the handshake off ({reason or type(error).__name__}). Is it a coordinator's port?"
        raise _NotReachedError(told) from None
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise _NotReachedError(
            f"closes the connection before it answers ({why}). Is it a coordinator's port, and does a firewall let TLS by?"
        ) from None


def _server(der: bytes, ca_pem: bytes, host: str, now: datetime, revocations: Path | None) -> list[Finding]:
    """What the server's certificate says, against the CA, the clock, and what a coordinator's says."""
    try:
        found = x509.load_der_x509_certificate(der)
        pem, issuer = found.public_bytes(Encoding.PEM), found.issuer.rfc4514_string()
        names = _names(found)
    except ValueError:
        return [Finding(False, "server issuer", "The server's certificate cannot be read. Is it a coordinator's port?")]
    ca = certificate(ca_pem, "the CA's certificate")
    if not issued_by(found, ca):
        told = (
            f"The server: expected a certificate issued by the CA of {consortium_of(ca)} ({fingerprint(ca_pem)}), got one"
            f" issued by {shown(issuer)}. If a firewall or proxy opens TLS here, it must pass TCP through; else compare the"
            " CA's fingerprint with the coordinator's operator."
        )
        return [Finding(False, "server issuer", told)]
    if any(name.endswith(RESERVED_SUFFIX) for name in names):
        told = "The server: expected a coordinator, got the CA's enrollment listener. Take the coordinator's port."
        return [Finding(False, "server role", told)]
    return [
        Finding(True, "server issuer", f"The server's certificate is of the CA of {consortium_of(ca)}."),
        _dates(found, now),
        _host(names, host),
        *_role(pem, ca_pem, revocations),
    ]


def _names(found: x509.Certificate) -> list[str]:
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension):
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _dates(found: x509.Certificate, now: datetime) -> Finding:
    start, end, clock = found.not_valid_before_utc, found.not_valid_after_utc, f"this machine's clock says {stamp(now)}"
    if now < start:
        behind = "behind by more than " + _rounded(start - now)
        told = f"The server's certificate is valid from {stamp(start)}, but {clock}: set the clock, it seems {behind}."
        return Finding(False, "server dates", told)
    if now > end:
        told = (
            f"The server's certificate expired at {stamp(end)}, and {clock}, {_rounded(now - end)} later. If the clock is"
            " right, the coordinator's operator renews it with `lamina pki renew`."
        )
        return Finding(False, "server dates", told)
    return Finding(True, "server dates", f"The server's certificate is valid until {stamp(end)}.")


def _rounded(span: timedelta) -> str:
    seconds = int(span.total_seconds())
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} seconds"


def _host(names: list[str], host: str) -> Finding:
    same = str(ipaddress.ip_address(host)) if is_ip(host) else host.lower().rstrip(".")
    if any(same == (name if is_ip(name) else name.lower()) for name in names):
        return Finding(True, "server host", f"The server's certificate is for {host}.")
    told = (
        f"The server: expected a certificate for {host}, got one for {', '.join(names) or 'no host'}. Dial one of these"
        " names, or have the coordinator invited anew with this one in host=."
    )
    return Finding(False, "server host", told)


def _role(pem: bytes, ca_pem: bytes, revocations: Path | None) -> Iterator[Finding]:
    """Whether it is a coordinator, and one that is not revoked."""
    try:
        peer = peer_of(pem)
    except IdentityError as error:
        yield Finding(False, "server role", f"The server: {error}")
        return
    if peer.role != "coordinator":
        told = f"The server: expected role coordinator, got {peer.role} ({peer.name}). Check host and port, and who runs it."
        yield Finding(False, "server role", told)
        return
    yield Finding(True, "server role", f"The server is {peer.name}, coordinator of {peer.consortium}.")
    if revocations is not None:
        yield in_force("server revocations", peer, revocations, ca_pem)


def _accepted(base: Path, host: str, port: int, timeout_s: float) -> Finding:
    """The real handshake, and the server's verdict on our certificate."""
    context = _context()
    try:
        context.load_verify_locations(cadata=(base / CA).read_text())
        context.load_cert_chain(base / CERTIFICATE, base / TLS_KEY, password="")
        with (
            _connected(host, port, timeout_s) as connection,
            context.wrap_socket(connection, server_hostname=host) as secured,
            _explained_verdict(),
        ):
            _settled(secured)
    except ssl.SSLCertVerificationError as error:
        told = f"The server's certificate fails OpenSSL's check: {error.verify_message}. Have it issued anew by `lamina pki`."
        return Finding(False, "server issuer", told)
    except _RefusedError as error:
        return Finding(False, "accepted", f"The server and this site's certificate: it {error}.")
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or type(error).__name__
        return Finding(False, "reach", f"The second handshake broke off ({reason}), the first did not. Try again.")
    return Finding(True, "accepted", "The server accepts this site's certificate.")


class _RefusedError(Exception):
    """The server's verdict on our certificate."""


@contextmanager
def _explained_verdict() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise _NotReachedError("the handshake is done, but nothing follows. Is it a coordinator's port?") from None
    except ssl.SSLError as error:
        reason = error.reason or type(error).__name__
        told = next((why for name, why in _ALERTS.items() if reason.endswith(name)), "")
        raise _RefusedError(
            told or f"broke off after the handshake ({reason}); ask its operator what its log says"
        ) from None
    except OSError:
        raise _RefusedError(_CLOSED) from None


def _settled(connection: socket.socket) -> None:
    """Wait for the first frame of HTTP/2. A server that waits for ours is greeted after half the time-out."""
    timeout_s = connection.gettimeout() or 0.0
    connection.settimeout(timeout_s / 2)
    try:
        first = connection.recv(_FRAME_BYTES)
    except TimeoutError:
        connection.sendall(_PREFACE)
        first = connection.recv(_FRAME_BYTES)
    if not first:
        raise ConnectionResetError("end of stream")
    if len(first) >= 4 and first[3] != _SETTINGS:
        raise _NotReachedError("answers, but not as gRPC does. Is it a coordinator's port?")
