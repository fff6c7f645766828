"""A connection to a coordinator, of a site or an operator: it dials out, says what happened in two kinds of error, and moves
blobs from the byte where they broke off.

    Unreachable   the network, or a coordinator that is restarting: dial again later
    Refused       the coordinator has decided: dialling again will not help
"""

from __future__ import annotations

import ipaddress
import os
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from lamina.protos import coordinator_pb2 as pb
from lamina.protos.blobs import Blob
from lamina.protos.clock import Clock
from lamina.protos.coordinator_pb2_grpc import CoordinatorStub
from lamina.protos.errors import ConfigError, IdentityError, LaminaError
from lamina.protos.files import file_digest
from lamina.protos.growing import Growing
from lamina.protos.identity import Identity

_AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DATA_LOSS,
)
DATA_LOSS = grpc.StatusCode.DATA_LOSS
_TRUST = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_CALL_S = 30.0
_HUNG_UP = "this side has hung up."  # gRPC raises ValueError on a closed channel


class Unreachable(LaminaError):
    """The coordinator could not be reached, or the connection broke."""

    exit_code = 3


class Refused(LaminaError):
    """The coordinator refused a call.

    Args:
        code: gRPC's status.
        message: The coordinator's sentence.
    """

    exit_code = 2

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        if code in _TRUST:
            self.exit_code = 5


@dataclass(frozen=True)
class Address:
    """Where and as whom to dial.

    Attributes:
        target: host:port.
        identity: Certificate and keys, or None on loopback without certificates.
        name: The client's, where there is no certificate.
        role: Likewise.
    """

    target: str
    identity: Identity | None
    name: str
    role: str = "client"


class Link:
    """One connection, made anew by `dial`.

    Args:
        address: Where and as whom.
        clock: For time-outs.
    """

    def __init__(self, address: Address, clock: Clock) -> None:
        self._address, self._clock = address, clock
        self._metadata = None if address.identity else (("lamina-name", address.name), ("lamina-role", address.role))
        self._channel: Any = None
        self.stub: Any = None
        self.dial()

    def dial(self) -> None:
        """Drop the connection, if there is one, and make another."""
        self.close()
        options = [
            ("grpc.keepalive_time_ms", max(1, int(self._clock.real(20_000)))),
            ("grpc.keepalive_timeout_ms", max(1, int(self._clock.real(20_000)))),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", max(100, int(self._clock.real(500)))),
            ("grpc.min_reconnect_backoff_ms", max(100, int(self._clock.real(500)))),
            ("grpc.max_reconnect_backoff_ms", max(100, int(self._clock.real(5_000)))),
            ("grpc.max_receive_message_length", 24 * 1024**2),
            ("grpc.max_send_message_length", 24 * 1024**2),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        identity = self._address.identity
        if identity is None:
            self._channel = grpc.insecure_channel(self._address.target, options)
        else:
            credentials = grpc.ssl_channel_credentials(identity.ca_pem, identity.tls_key_pem, identity.certificate_pem)
            self._channel = grpc.secure_channel(self._address.target, credentials, options)
        self.stub = CoordinatorStub(self._channel)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Hang up."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def call(self, method: str, request: Any, wait_s: float = _CALL_S) -> Any:
        """One question, one answer.

        Args:
            method: Of the service.
            request: Its message.
            wait_s: Longest wait.

        Returns:
            The answer.

        Raises:
            Unreachable: If there was none.
            Refused: If it was no.
        """
        try:
            timeout = max(1.0, self._clock.real(wait_s))
            return getattr(self.stub, method)(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise translated(error) from None
        except ValueError:
            raise Unreachable(_HUNG_UP) from None

    def stream(self, method: str, request: Any) -> Iterator[Any]:
        """One question, answers for as long as there are any.

        Args:
            method: Of the service.
            request: Its message, or an iterator of them.

        Yields:
            Answers.

        Raises:
            Unreachable: If the connection broke.
            Refused: If the coordinator ended it.
        """
        try:
            call = getattr(self.stub, method)(request, metadata=self._metadata)
        except ValueError:
            raise Unreachable(_HUNG_UP) from None
        try:
            yield from call
        except grpc.RpcError as error:
            raise translated(error) from None
        finally:
            call.cancel()

    def download(self, blob: Blob, folder: Path) -> Blob:
        """Fetch a blob into a folder, from the byte where an earlier try broke off.

        Args:
            blob: Its name and length.
            folder: Where it is kept under its name.

        Returns:
            The blob with its file, its content checked.

        Raises:
            Unreachable: If the connection broke; what came is kept.
            Refused: If the coordinator has no such blob for this client, or sent other content.
        """
        whole = folder / blob.sha256
        self._complete(blob, whole, "Download", lambda offset: pb.DownloadRequest(sha256=blob.sha256, offset=offset))
        return Blob(blob.sha256, blob.num_bytes, whole)

    def fetch(self, name: str, blob: Blob, whole: Path) -> None:
        """Fetch a file of a run directory, from the byte where an earlier try broke off.

        Args:
            name: The file's, at the coordinator.
            blob: Its hash and length when it was listed.
            whole: Where it is put, once its content is checked.

        Raises:
            Unreachable: If the connection broke; what came is kept.
            Refused: If it is not there, or is another version by now; nothing of that is kept.
        """
        self._complete(blob, whole, "Fetch", lambda offset: pb.FetchRequest(name=name, offset=offset))

    def _complete(self, blob: Blob, whole: Path, method: str, request: Callable[[int], Any]) -> None:
        """Have a blob whole in a file; `request` asks for what follows a byte."""
        part = whole.with_name(f"{whole.name}.part")
        if whole.is_file() and file_digest(whole).hexdigest() == blob.sha256:
            return
        whole.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        if part.stat().st_size > blob.num_bytes:
            part.unlink()
            part.touch()
        with Growing(part) as growing:
            if growing.size < blob.num_bytes:
                for piece in self.stream(method, request(growing.size)):
                    # A log may have grown since it was listed.
                    growing.write(piece.data[: blob.num_bytes - growing.size])
                    if growing.size >= blob.num_bytes:
                        break
            if growing.size < blob.num_bytes:
                raise Unreachable(f"the download broke off at {growing.size} of {blob.num_bytes} bytes.")
            found = growing.finish()
        if found != blob.sha256:
            part.unlink()
            raise Refused(
                grpc.StatusCode.DATA_LOSS, f"expected {blob.sha256[:12]}…, the coordinator sent other content."
            )
        os.replace(part, whole)

    def upload(self, claim: pb.Signed, path: Path, chunk_bytes: int) -> None:
        """Send a file, from the byte that the coordinator lacks; returns when the coordinator has it on disk.

        Args:
            claim: What it is.
            path: The file.
            chunk_bytes: Bytes in one message.

        Raises:
            Unreachable: If the connection broke; the coordinator keeps what came.
            Refused: If the coordinator does not want it.
        """
        offsets: queue.Queue[int | None] = queue.Queue()

        def parts() -> Iterator[pb.UploadPart]:
            yield pb.UploadPart(claim=claim)
            offset = offsets.get()
            if offset is None:
                return
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                while data := file.read(chunk_bytes):
                    yield pb.UploadPart(data=data)

        try:
            for number, ack in enumerate(self.stream("Upload", parts())):
                if ack.stored:
                    return
                if number == 0:
                    offsets.put(ack.offset)
        finally:
            offsets.put(None)
        raise Unreachable("the upload broke off.")


def is_loopback(address: str) -> bool:
    """Whether host:port is on this machine only.

    Args:
        address: Such as 127.0.0.1:8443 or [::1]:8443.

    Returns:
        False for every other host, and for names that are no address.
    """
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposed(address: str, insecure: bool, key: str) -> None:
    """Raise unless an address may be used.

    Args:
        address: host:port.
        insecure: Whether there are no certificates.
        key: Of the setting, for the message.

    Raises:
        ConfigError: If it is no host:port.
        IdentityError: If it is open to others without certificates.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{key}={address}: expected host:port.")
    if insecure and not is_loopback(address):
        raise IdentityError(
            f"{key}={address}: insecure=true is for the loopback interface only. Use 127.0.0.1, or certificates "
            "from `lamina pki`."
        )


def translated(error: grpc.RpcError) -> LaminaError:
    """GRPC's error as one of ours.

    Args:
        error: As raised by a call.

    Returns:
        `Unreachable` or `Refused`.
    """
    code, details = error.code(), (error.details() or "")[:500]
    if code in _AGAIN:
        return Unreachable(f"{code.name.lower()}: {details}")
    return Refused(code, details)
