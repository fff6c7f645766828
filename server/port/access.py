"""Who calls, and what they may call. Every method of the port passes here first.

The transport has checked that a certificate is our CA's and in its dates; here it must also not be revoked, and its role must
be one of the method's. Without certificates (`insecure=true`, loopback only) a caller says who it is in its metadata.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc

from lamina.protos.clock import SYSTEM, Clock
from lamina.protos.errors import CheckpointError, IdentityError, StorageError, one_line
from lamina.protos.identity import ROLES, Peer, Revocations, peer_of, read_revocations
from lamina.protos.logs import Log
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
    _PREFIX + "Mask": _SITE,
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
    """Certificates to callers, and the list of revoked ones, which is read again when its file changes and never goes back.

    Args:
        ca_pem: The consortium's CA, or None without certificates.
        revocations: Where the CRL is, or will be; None without certificates.
        clock: For calls that stand still.
        sites: Names of the run's clients; no other is let in.

    Attributes:
        fault: Why the list that is in force is not the file's, or empty.
        held: Why nobody is let in just now, or empty.
        broken: What the disk said to a caller, or None.

    Raises:
        IdentityError: If the list is there and is not the CA's.
    """

    def __init__(
        self, ca_pem: bytes | None, revocations: Path | None, clock: Clock = SYSTEM, sites: Container[str] = ()
    ) -> None:
        self._ca, self._path, self._sites = ca_pem, revocations, sites
        self.calls = Calls(clock)
        self._peers: dict[bytes, Peer] = {}
        self._lock = threading.Lock()
        self._in_force = Revocations()
        self._keep: Callable[[Revocations], None] = lambda found: None
        self._stamp: tuple[int, int] | None = None
        self.fault = self.held = ""
        self.broken: StorageError | None = None
        if ca_pem is not None and revocations is not None and revocations.exists():
            self._stamp, self._in_force = _stamp(revocations), read_revocations(revocations, ca_pem)

    def remember(self, before: Revocations | None, keep: Callable[[Revocations], None]) -> None:
        """Go on from the list that the run has seen last; an older one in its place does not take effect.

        Args:
            before: That list, or None where the run has seen none.
            keep: Makes a list durable.

        Raises:
            IdentityError: If the run has seen a list and there is none now.
        """
        self._keep = keep
        if before is not None and self._stamp is None:
            raise IdentityError(
                f"{self._path}: expected the list of revoked certificates, number {before.number} or later, which this run has "
                "seen, found none. Put the consortium's crl.pem there, or name it with coordinator.revocations=."
            )
        if self._stamp is not None:
            found, self._in_force = self._in_force, before or Revocations()
            self._take(found)

    def reload(self) -> None:
        """Read the list again if its file has changed; one that cannot be read, or is older, leaves the last in force. End
        stale calls.
        """
        if self._ca is not None and self._path is not None and (stamp := _stamp(self._path)) != self._stamp:
            try:
                found = read_revocations(self._path, self._ca)
                self._stamp = stamp
                self._take(found)
            except IdentityError as error:
                self.fault = str(error)
        self.calls.sweep(self.is_revoked_serial)

    def _take(self, found: Revocations) -> None:
        """Put a list in force, unless it is older than the one that is."""
        try:
            found.check_follows(self._in_force, self._path or Path())
        except IdentityError as error:
            self.fault = str(error)
            return
        before, self._in_force, self.fault = self._in_force, found, ""
        if found != before:
            try:
                self._keep(found)
            except StorageError as error:
                self.broken = error

    def is_revoked_serial(self, serial: int) -> bool:
        """Whether a certificate of this serial number is on the list."""
        return serial in self._in_force.serials

    def is_revoked(self, caller: Caller) -> bool:
        """Whether a caller's certificate is on the list."""
        return self.is_revoked_serial(caller.serial)

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
        if self.held:
            refuse(context, grpc.StatusCode.UNAVAILABLE, self.held)
        self.check_open(caller, context)
        if caller.role not in METHOD_ROLES.get(method, frozenset()):
            allowed = " or ".join(sorted(METHOD_ROLES.get(method, frozenset()))) or "nobody"
            refuse(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                f"{method.rpartition('/')[2]}: expected a certificate of role {allowed}, got {caller.role} ({caller.name}).",
            )
        if caller.role in _SITE and caller.name not in self._sites:
            refuse(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"client {caller.name}: expected one of the run's clients. Add it to clients.names at the coordinator, "
                "or enroll under one of its names.",
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
    # A client's own words may be in it, and it travels in a header of 16 kB.
    context.abort(code, one_line(message, 2000))
    raise AssertionError("abort returned")


def _call(caller: Caller, context: Any, method: str, handler: Any) -> Call:
    site = caller.role in _SITE
    single = method if site and (handler.request_streaming or handler.response_streaming) else ""
    return Call(caller.name, caller.serial, context, bool(handler.request_streaming), site, single)


class Gate(grpc.ServerInterceptor):  # type: ignore[misc]
    """Checks the caller of every method before its handler runs.

    Args:
        access: What to check against.
        log: Told of what no method expects.
    """

    def __init__(self, access: Access, log: Log) -> None:
        self._access, self._log = access, log

    def _unexpected(self, method: str, error: Exception, context: Any) -> NoReturn:
        """End a call that failed as nobody expects; its caller learns nothing of this machine."""
        places = traceback.extract_tb(error.__traceback__)
        place = " > ".join(f"{Path(one.filename).name}:{one.lineno}" for one in places[-6:])
        self._log("fault", method=method.rpartition("/")[2], kind=type(error).__name__, place=place)
        refuse(
            context,
            grpc.StatusCode.INTERNAL,
            "the coordinator failed in this call. Its operator is told; try again later.",
        )

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
            call = _call(context.caller, context, method, handler)
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
                except grpc.RpcError:
                    raise  # the caller is gone
                except Exception as error:
                    if context.code() is not None:
                        raise  # refused
                    self._unexpected(method, error, context)

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
