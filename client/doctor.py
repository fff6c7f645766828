"""What can be wrong with an installation, a machine and a site before anything is trained; each with what to do.

Needs neither torch nor a coordinator: what is not there is a finding.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lamina.client.hardware import host_memory, size
from lamina.protos.errors import ConfigError, IdentityError, one_line
from lamina.protos.identity import Finding, check, load, require_tls13
from lamina.protos.preflight import NETWORK, address, plain, preflight

__all__ = [
    "Line",
    "coordinator",
    "devices",
    "exit_code",
    "listening",
    "packages",
    "preflight",
    "python",
    "size",
    "state",
]

DISTRIBUTION = "lamina-fl"
LOW_DISK_BYTES = 2 * 1024**3
LOW_MEMORY_BYTES = 2 * 1024**3
# Certificates are valid from five minutes before they are issued, so a clock that is off by less does no harm.
MAX_SKEW_S = 240.0

Level = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        level: `ok`; `warn`, which works now; or `FAIL`.
        what: What was looked at.
        message: A sentence, with what to do where something is to be done.
        trust: Whether a failure is one of identity or trust.
    """

    level: Level
    what: str
    message: str
    trust: bool = False


def exit_code(lines: Sequence[Line]) -> int:
    """The command's verdict.

    Args:
        lines: All findings.

    Returns:
        0 without failures, 5 if one is of identity or trust, else 2.
    """
    failed = [line for line in lines if line.level == "FAIL"]
    return 0 if not failed else 5 if any(line.trust for line in failed) else 2


def python(distribution: str = DISTRIBUTION) -> Iterator[Line]:
    """Python and the platform.

    Args:
        distribution: Whose metadata says which Python it needs.

    Yields:
        One finding.
    """
    told = f"Python {platform.python_version()} on {platform.system()} {platform.release()} ({platform.machine()})"
    try:
        needed = (importlib.metadata.metadata(distribution).get_all("Requires-Python") or [""])[0]
    except importlib.metadata.PackageNotFoundError:
        needed = ""
    if SpecifierSet(needed).contains(platform.python_version(), prereleases=True):
        yield Line("ok", "python", f"{told}.")
    else:
        yield Line("FAIL", "python", f"{told}: expected Python {needed}. Make a new environment with it.")


def packages(distribution: str = DISTRIBUTION) -> Iterator[Line]:
    """Whether the packages that Lamina's own metadata names are installed, in versions that it admits.

    Args:
        distribution: Whose metadata.

    Yields:
        A finding for each package that is not as it should be, or one for all.
    """
    try:
        version = importlib.metadata.version(distribution)
        listed = [Requirement(one) for one in importlib.metadata.requires(distribution) or []]
    except importlib.metadata.PackageNotFoundError:
        told = f"{distribution} is not installed, so versions cannot be compared. pip install '{distribution}[client]'"
        yield Line("warn", "packages", told)
        return
    base = [one for one in listed if one.marker is None or one.marker.evaluate({"extra": ""})]
    client = [one for one in listed if one not in base and one.marker and one.marker.evaluate({"extra": "client"})]
    wrong = [*_unfit(base, "FAIL", distribution), *_unfit(client, "warn", f"{distribution}[client]")]
    yield from wrong or [Line("ok", "packages", f"{distribution} {version} and what it needs are installed.")]


def _unfit(needed: Sequence[Requirement], missing: Level, install: str) -> Iterator[Line]:
    for one in needed:
        if one.name == DISTRIBUTION:
            continue
        try:
            got = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            use = "" if missing == "FAIL" else " A coordinator does not need it; to train, install it:"
            yield Line(missing, "packages", f"{one.name} is not installed.{use} pip install '{install}'")
            continue
        if not one.specifier.contains(got, prereleases=True):
            yield Line("FAIL", "packages", f"expected {one.name}{one.specifier}, got {got}. pip install '{install}'")


def devices() -> Iterator[Line]:
    """What torch can train on here.

    Yields:
        A finding for the library, and one for each device.
    """
    try:
        torch: Any = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        why = " ".join(str(error).split())[:200]
        told = f"torch cannot be used ({why}). This machine can coordinate, not train: pip install 'lamina-fl[client]'"
        yield Line("warn", "devices", told)
        return
    free = _free_memory_bytes()
    memory = "" if free is None else f", {size(free)} of memory free"
    cpu = f"torch {torch.__version__}; CPU with {torch.get_num_threads()} threads of {os.cpu_count()}{memory}."
    low = free is not None and free < LOW_MEMORY_BYTES
    yield Line("warn", "devices", f"{cpu} Close other programs.") if low else Line("ok", "devices", cpu)
    for kind in ("cuda", "xpu"):
        part: Any = getattr(torch, kind, None)
        try:
            for index in range(part.device_count() if part and part.is_available() else 0):
                left, whole = part.mem_get_info(index)
                told = f"{kind}:{index} {part.get_device_name(index)}, {size(left)} of {size(whole)} free."
                yield Line("ok", "devices", told)
        except (RuntimeError, AttributeError) as error:
            told = f"{kind} is there and fails: {' '.join(str(error).split())[:200]}. Update its driver, or train.device=cpu."
            yield Line("warn", "devices", told)
    if torch.backends.mps.is_available():
        yield Line("ok", "devices", "mps is available.")


def _free_memory_bytes() -> int | None:
    try:
        return host_memory()[1]
    except ConfigError:
        return None


def state(folder: Path) -> Iterator[Line]:
    """Whether the site's state can be written durably: a file is written, flushed and removed.

    Args:
        folder: It, or where it will be made.

    Yields:
        One finding.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".lamina-doctor-") as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(there).free
    except OSError as error:
        told = f"{there}: expected a folder to write in, got: {error.strerror}. Make it writable, or set client.state."
        yield Line("FAIL", "state", told)
        return
    if free < LOW_DISK_BYTES:
        told = f"{there}: writable, but only {size(free)} are free. A release and an update must fit; make room."
        yield Line("warn", "state", told)
    else:
        yield Line("ok", "state", f"{there} is writable, {size(free)} are free.")


def listening(text: str) -> Iterator[Line]:
    """Whether a coordinator could listen here.

    Args:
        text: `host:port`.

    Yields:
        One finding.

    Raises:
        ConfigError: If it is no host:port.
    """
    host, port = address("listen", text)
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as one:
            if os.name == "posix":  # elsewhere the option would let two programs have one port
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(where)
            one.listen(1)
    except (OSError, UnicodeError) as error:
        then = {
            errno.EADDRINUSE: "Another program has it: stop that one, or take another port.",
            errno.EACCES: "Ports below 1024 need a privilege: take one above.",
            errno.EADDRNOTAVAIL: "This machine has no such address: take 0.0.0.0 for every interface.",
        }.get(getattr(error, "errno", None) or 0, "Check the host.")
        yield Line(
            "FAIL", "listen", f"{text}: cannot listen ({getattr(error, 'strerror', None) or 'no host name'}). {then}"
        )
        return
    yield Line("ok", "listen", f"{text} is free.")


def identity(folder: Path, now: datetime, revocations: Path | None = None) -> Iterator[Line]:
    """The identity alone.

    Args:
        folder: Of the certificate and keys.
        now: This machine's time, aware.
        revocations: The consortium's list of revoked certificates, or None.

    Yields:
        Findings.
    """
    yield from map(_line, check(folder, now, None, revocations))


def coordinator(
    folder: Path | None, where: str, now: datetime, *, revocations: Path | None = None, timeout_s: float = 5.0
) -> Iterator[Line]:
    """The identity, the way to the coordinator, and its clock.

    Args:
        folder: Of the certificate and keys; None for a coordinator without certificates.
        where: `host:port`.
        now: This machine's time, aware.
        revocations: The consortium's list of revoked certificates, or None.
        timeout_s: Longest wait for each step.

    Yields:
        Findings.

    Raises:
        ConfigError: If `where` is no host:port.
    """
    yield from _proxies(address("coordinator", where)[0])
    if folder is None:
        yield from map(_line, plain(where, timeout_s=timeout_s))
        return
    began = time.monotonic()
    found = preflight(folder, where, now, None, revocations=revocations, timeout_s=timeout_s)
    yield from map(_line, found)
    if all(one.ok for one in found):
        yield from _asked(folder, where, now + timedelta(seconds=time.monotonic() - began), timeout_s)


def _line(found: Finding) -> Line:
    soon = found.ok and found.what == "dates" and "Renew it now" in found.message
    level: Level = "warn" if soon else "ok" if found.ok else "FAIL"
    return Line(level, found.what, found.message, trust=found.what not in NETWORK)


def _proxies(host: str) -> Iterator[Line]:
    spared = ",".join(os.environ.get(name, "") for name in ("no_grpc_proxy", "no_proxy")).split(",")
    if any(one.strip() and host.endswith(one.strip()) for one in spared):
        return
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        if os.environ.get(name):
            told = f"{name} is set: gRPC dials through that proxy, these checks do not. To dial directly set no_proxy={host}"
            yield Line("warn", "proxy", told)
            return


def _asked(folder: Path, where: str, now: datetime, timeout_s: float) -> Iterator[Line]:
    """A sign of life over gRPC: what the coordinator says of us, which TLS cannot say, and its clock."""
    try:
        # Only here, so that a package of the wrong version is a finding before it is a failed import.
        grpc: Any = importlib.import_module("grpc")
        messages: Any = importlib.import_module("lamina.protos.coordinator_pb2")
        service: Any = importlib.import_module("lamina.protos.coordinator_pb2_grpc")
    except (ImportError, RuntimeError) as error:
        told = f"gRPC cannot be used ({' '.join(str(error).split())[:200]}). pip install '{DISTRIBUTION}'"
        yield Line("FAIL", "packages", told)
        return
    require_tls13()
    try:
        one = load(folder)
        if one.peer.role != "client":
            return  # signs of life are for those who train
        credentials = grpc.ssl_channel_credentials(one.ca_pem, one.tls_key_pem, one.certificate_pem)
        with grpc.secure_channel(where, credentials) as channel:
            reply = service.CoordinatorStub(channel).Heartbeat(messages.HeartbeatRequest(), timeout=timeout_s)
    except IdentityError as error:
        yield Line("FAIL", "keys", str(error), trust=True)
        return
    except grpc.RpcError as error:
        yield _answer(where, error.code().name, one_line(error.details() or "").rstrip("."))
        return
    skew = reply.time - now.timestamp()
    if not abs(skew) <= MAX_SKEW_S:
        told = f"This machine's clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the coordinator's. Set it."
        yield Line("warn", "clock", told)
    else:
        yield Line("ok", "clock", f"This machine's clock and the coordinator's differ by about {abs(skew):.0f} s.")


def _answer(where: str, code: str, details: str) -> Line:
    """What a call means that gave no time."""
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        told = f"TLS lets this site in, the coordinator does not: {details}. Ask its operator, or enroll anew."
        return Line("FAIL", "accepted", told, trust=True)
    if code == "UNIMPLEMENTED":
        return Line("FAIL", "reach", f"{where} speaks gRPC, but is no coordinator. Take the coordinator's port.")
    if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        told = f"{where}: TLS works, a call over gRPC does not ({details}). A proxy may be between, or the coordinator hangs."
        return Line("FAIL", "reach", told)
    return Line("ok", "clock", f"The coordinator did not say its time ({code}); the dates of the certificates fit.")
