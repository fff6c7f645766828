"""Who calls, and what they may call. Every method of the port passes here first.

The transport has checked that a certificate is our CA's and in its dates; here it must also not be revoked, and its role must
be one of the method's. Without certificates (`insecure=true`, loopback only) a caller says who it is in its metadata.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc

from lamina.protos.clock import SYSTEM, Clock
from lamina.protos.errors import CheckpointError, IdentityError, StorageError
from lamina.protos.identity import ROLES, Peer, peer_of, read_revocations
from lamina.server.port.calls import Call, Calls

_SITE, _WATCHERS, _OPERATOR = frozenset({"client"}), frozenset({"operator", "auditor"}), frozenset({"operator"})
_PREFIX = "/lamina.v1.Coordinator/"
METHOD_ROLES: Mapping[str, frozenset[str]] = {
    _PREFIX + "Register": _SITE,
    _PREFIX + "Instructions": _SITE,
    _PREFIX + "Heartbeat": _SITE,
    _PREFIX + "Download": _SITE,
    _PREFIX + "Upload": _SITE,
    _PREFIX + "Report": _SITE,
    _PREFIX + "Status": _WATCHERS,
    _PREFIX + "Watch": _WATCHERS,
    _PREFIX + "Pause": _OPERATOR,
    _PREFIX + "Stop": _OPERATOR,
    _PREFIX + "ListFiles": _WATCHERS,
    _PREFIX + "Fetch": _WATCHERS,
    "/grpc.health.v1.Health/Check": frozenset(ROLES),
    "/grpc.health.v1.Health/Watch": frozenset(ROLES),
}
NAME_KEY, ROLE_KEY = "lamina-name", "lamina-role"


@dataclass(frozen=True)
class Caller:
    """Who is at the other end of a call.

    Attributes:
        name: From the certificate.
        role: From the certificate.
        serial: Of the certificate, 0 without one.
        certificate: PEM, empty without one.
        signing_key: Raw Ed25519 public key, or None without a certificate.
    """

    name: str
    role: str
    serial: int = 0
    certificate: bytes = b""
    signing_key: bytes | None = None


class Access:
    """Certificates to callers, and the list of revoked ones, which is read again when its file changes.

    Args:
        ca_pem: The consortium's CA, or None without certificates.
        revocations: The CRL, or None where there is none.
        clock: For calls that stand still.

    Raises:
        IdentityError: If the list is there and is not the CA's.
    """

    def __init__(self, ca_pem: bytes | None, revocations: Path | None, clock: Clock = SYSTEM) -> None:
        self._ca, self._path = ca_pem, revocations
        self.calls = Calls(clock)
        self._peers: dict[bytes, Peer] = {}
        self._lock = threading.Lock()
        self._revoked: frozenset[int] = frozenset()
        self._stamp: tuple[int, int] | None = None
        self.fault = ""
        self.broken: StorageError | None = None
        if ca_pem is not None and revocations is not None:
            self._revoked, self._stamp = read_revocations(revocations, ca_pem), _stamp(revocations)

    def reload(self) -> None:
        """Read the list again if its file has changed; one that cannot be read leaves the last in force. End stale calls."""
        if self._ca is not None and self._path is not None and _stamp(self._path) != self._stamp:
            try:
                stamp = _stamp(self._path)
                self._revoked, self._stamp, self.fault = read_revocations(self._path, self._ca), stamp, ""
            except (IdentityError, OSError) as error:
                self.fault = str(error)
        self.calls.sweep(lambda serial: serial in self._revoked)

    def is_revoked_serial(self, serial: int) -> bool:
        """Whether a certificate of this serial number is on the list."""
        return serial in self._revoked

    def is_revoked(self, caller: Caller) -> bool:
        """Whether a caller's certificate is on the list."""
        return caller.serial in self._revoked

    def caller(self, context: Any) -> Caller:
        """Who calls.

        Args:
            context: Of the call.

        Returns:
            The caller.

        Raises:
            IdentityError: If the certificate is not one of ours.
        """
        if self._ca is None:
            said = dict(context.invocation_metadata())
            return Caller(said.get(NAME_KEY, ""), said.get(ROLE_KEY, "client"))
        chain = context.auth_context().get("x509_pem_cert", [])
        if not chain:
            raise IdentityError("expected a client certificate, got none.")
        pem = chain[0]
        with self._lock:
            if pem not in self._peers:
                if len(self._peers) > 4096:
                    self._peers.clear()
                self._peers[pem] = peer_of(pem)
            peer = self._peers[pem]
        return Caller(peer.name, peer.role, peer.serial, pem, peer.signing_key)

    def check(self, method: str, context: Any) -> Caller:
        """End the call unless its caller may make it.

        Args:
            method: Full name.
            context: Of the call.

        Returns:
            The caller.
        """
        try:
            caller = self.caller(context)
        except IdentityError as error:
            refuse(context, grpc.StatusCode.UNAUTHENTICATED, str(error))
        self.check_open(caller, context)
        if caller.role not in METHOD_ROLES.get(method, frozenset()):
            allowed = " or ".join(sorted(METHOD_ROLES.get(method, frozenset()))) or "nobody"
            refuse(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                f"{method.rpartition('/')[2]}: expected a certificate of role {allowed}, got {caller.role} ({caller.name}).",
            )
        return caller

    def check_open(self, caller: Caller, context: Any) -> None:
        """End a stream whose caller was revoked while it was open."""
        if self.is_revoked(caller):
            refuse(
                context,
                grpc.StatusCode.UNAUTHENTICATED,
                f"the certificate of {caller.name} was revoked. Ask whoever keeps the CA; a new invite gives a new one.",
            )


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def refuse(context: Any, code: grpc.StatusCode, message: str) -> NoReturn:
    """End a call.

    Args:
        context: Of the call.
        code: Why.
        message: The sentence.
    """
    context.abort(code, message)
    raise AssertionError("abort returned")


class Gate(grpc.ServerInterceptor):  # type: ignore[misc]
    """Checks the caller of every method before its handler runs.

    Args:
        access: What to check against.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """The method's handler with the check before it."""
        handler = continuation(details)
        if handler is None:
            return None
        access, method = self._access, details.method

        @contextmanager
        def entered(request: Any, context: Any) -> Iterator[Any]:
            """The request to go on with, once its caller may come in."""
            context.caller = access.check(method, context)
            call = Call(context.caller.name, context.caller.serial, context, bool(handler.request_streaming))
            with access.calls.counted(call) as allowed:
                if not allowed:
                    refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, f"{call.name} has too many calls open.")
                try:
                    yield access.calls.watched(call, request) if call.sends else request
                except StorageError as error:
                    access.broken = error
                    told = "the coordinator's disk is full or fails. Its operator is told; try again later."
                    refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, told)
                except CheckpointError:
                    told = "the coordinator's files are damaged. Its operator is told; try again later."
                    refuse(context, grpc.StatusCode.INTERNAL, told)

        def checked(behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
            def call(request: Any, context: Any) -> Any:
                with entered(request, context) as received:
                    return behaviour(received, context)

            def stream(request: Any, context: Any) -> Any:
                with entered(request, context) as received:
                    yield from behaviour(received, context)

            return stream if handler.response_streaming else call

        kinds = {
            (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
            (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
            (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
            (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
        }
        make, behaviour = kinds[(bool(handler.request_streaming), bool(handler.response_streaming))]
        return make(checked(behaviour), handler.request_deserializer, handler.response_serializer)
