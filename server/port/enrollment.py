"""Enrollment over the network: the CA's listener and the site's call to it. Off unless started with `lamina pki listen`.

The listener is a service of its own, with its own port and certificate: whoever breaks it has reached neither the coordinator
nor a certificate that could pose as one. It tells a caller that a request was refused, never why; why goes to `say`. The command
has called `require_tls13` before this module brings in gRPC.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent import futures
from datetime import UTC, datetime
from typing import Any, NoReturn

import grpc

from lamina.protos import enrollment_pb2, enrollment_pb2_grpc
from lamina.protos.errors import ConfigError, IdentityError
from lamina.protos.identity import peer_of
from lamina.protos.identity.authority import Authority, fulfil, listener_pair
from lamina.protos.identity.issuing import ENROLLMENT_HOST
from lamina.protos.identity.requests import MAX_REQUEST_BYTES

_REFUSED = "The request was refused. Ask whoever keeps the CA; its listener says why."
_BUSY = "Too many requests. Try again in a minute."
_FAULT = "The CA could not answer. Ask whoever keeps it."
_MESSAGE_BYTES = MAX_REQUEST_BYTES + 64
_TIMEOUT_S = 20.0

# The generated module has no types.
_generated: Any = enrollment_pb2_grpc


class TokenBucket:
    """Lets through so many at once, and so many a second after that.

    Args:
        burst: How many at once.
        per_s: How many a second in the long run.
        clock: Seconds; monotonic.
    """

    def __init__(self, burst: float, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst, self._per_s, self._clock = burst, per_s, clock
        self._left, self._last = burst, clock()
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take one.

        Returns:
            Whether there was one.
        """
        with self._lock:
            now = self._clock()
            self._left = min(self._burst, self._left + (now - self._last) * self._per_s)
            self._last = now
            if self._left < 1:
                return False
            self._left -= 1
            return True


class Listener:
    """The CA's enrollment service.

    Args:
        authority: The opened CA.
        address: `host:port`; port 0 takes a free one.
        say: Takes a line for each request, for whoever keeps the CA.
        bucket: Limits all callers together.
        now: This machine's time.
    """

    def __init__(
        self,
        authority: Authority,
        address: str,
        say: Callable[[str], None],
        bucket: TokenBucket | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._authority, self._address, self._say, self._now = authority, address, say, now
        self._bucket = bucket or TokenBucket(burst=20, per_s=1)
        self._server: Any = None

    def start(self) -> int:
        """Listen.

        Returns:
            The port.

        Raises:
            ConfigError: If the address cannot be listened on.
        """
        key, certificate = listener_pair(self._authority, self._now())
        options = [
            ("grpc.max_receive_message_length", _MESSAGE_BYTES),
            ("grpc.max_concurrent_streams", 4),
            ("grpc.max_connection_idle_ms", 30_000),
            ("grpc.so_reuseport", 0),  # a second listener on the port is refused, not given half the calls
        ]
        pool = futures.ThreadPoolExecutor(4, thread_name_prefix="enrollment")
        server = grpc.server(pool, options=options, maximum_concurrent_rpcs=32)
        _generated.add_EnrollmentServicer_to_server(self, server)
        try:
            port = int(server.add_secure_port(self._address, grpc.ssl_server_credentials([(key, certificate)])))
        except RuntimeError:
            port = 0
        if port == 0:
            server.stop(None)
            raise ConfigError(
                f"address={self._address}: expected one to listen on, but it is in use or not this machine's."
            )
        server.start()
        self._server = server
        return port

    def stop(self) -> None:
        """Finish what has begun and stop listening."""
        if self._server is not None:
            self._server.stop(2.0).wait()

    def Enroll(self, message: enrollment_pb2.EnrollRequest, context: Any) -> enrollment_pb2.EnrollReply:  # noqa: D102
        return enrollment_pb2.EnrollReply(certificate_pem=self._answer("enroll", message.request, context))

    def Renew(self, message: enrollment_pb2.RenewRequest, context: Any) -> enrollment_pb2.RenewReply:  # noqa: D102
        return enrollment_pb2.RenewReply(certificate_pem=self._answer("renew", message.request, context))

    def _answer(self, kind: str, request: bytes, context: Any) -> bytes:
        caller = str(context.peer())
        if not self._bucket.take():
            self._end(context, grpc.StatusCode.RESOURCE_EXHAUSTED, _BUSY, f"{kind} from {caller}: over the limit")
        try:
            pem = fulfil(self._authority, request, self._now(), kind=kind, counted=True)
        except IdentityError as error:
            self._end(context, grpc.StatusCode.UNAUTHENTICATED, _REFUSED, f"{kind} from {caller}: refused. {error}")
        except Exception as error:  # noqa: BLE001 - what gRPC would otherwise send to the caller in words
            self._end(
                context, grpc.StatusCode.INTERNAL, _FAULT, f"{kind} from {caller}: {type(error).__name__}: {error}"
            )
        peer = peer_of(pem)
        self._say(f"{kind} from {caller}: {peer.name} ({peer.role}), serial {peer.serial:x}")
        return pem

    def _end(self, context: Any, code: Any, told: str, line: str) -> NoReturn:
        self._say(line)
        context.abort(code, told)
        raise AssertionError  # abort has raised


def ask(address: str, ca_pem: bytes, kind: str, request: bytes) -> bytes:
    """Send a request to the CA's listener, which must hold a certificate of this CA for the listener's reserved name.

    Args:
        address: `host:port`.
        ca_pem: The CA's certificate, from the invite or the identity.
        kind: `enroll` or `renew`.
        request: The request's JSON.

    Returns:
        The certificate, PEM.

    Raises:
        IdentityError: If the listener refuses, or is not this CA's.
        ConfigError: If nothing answers there.
    """
    options = [
        ("grpc.ssl_target_name_override", ENROLLMENT_HOST),
        ("grpc.max_receive_message_length", _MESSAGE_BYTES),
        ("grpc.enable_retries", 0),
    ]
    channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(root_certificates=ca_pem), options=options)
    try:
        stub = _generated.EnrollmentStub(channel)
        if kind == "enroll":
            reply: Any = stub.Enroll(enrollment_pb2.EnrollRequest(request=request), timeout=_TIMEOUT_S)
        else:
            reply = stub.Renew(enrollment_pb2.RenewRequest(request=request), timeout=_TIMEOUT_S)
        return bytes(reply.certificate_pem)
    except grpc.RpcError as error:
        raise _failure(address, error) from None
    finally:
        channel.close()


def _failure(address: str, error: Any) -> ConfigError | IdentityError:
    code, details = error.code(), str(error.details())
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return IdentityError(f"{address}: {_REFUSED}")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return IdentityError(f"{address}: {_BUSY}")
    if any(word in details for word in ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification", "WRONG_VERSION")):
        return IdentityError(
            f"{address}: expected the listener of the CA in the invite, got a server that is not. Check the address, and"
            " compare the CA's fingerprint with that of whoever keeps it."
        )
    if code == grpc.StatusCode.INTERNAL:
        return IdentityError(f"{address}: {_FAULT}")
    return ConfigError(
        f"{address}: expected the CA's enrollment listener, got no answer ({code.name}). Check the address and whether"
        " `lamina pki listen` runs, or go by files with online=false."
    )
