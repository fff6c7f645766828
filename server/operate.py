"""An operator's side of the port: ask a running coordinator, change its course, fetch its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import grpc

from lamina.protos import coordinator_pb2 as pb
from lamina.protos import identity as identities
from lamina.protos.clock import SYSTEM
from lamina.protos.errors import ConfigError, IdentityError, LaminaError, one_line
from lamina.protos.link import Address, Link, Unreachable, check_exposed
from lamina.protos.preflight import NETWORK, plain, preflight


class Remote:
    """A coordinator at the other end of a connection.

    Args:
        link: The connection.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def status(self) -> Any:
        """Where the run stands."""
        return json.loads(self._link.call("Status", pb.StatusRequest()).json)

    def watch(self) -> Iterator[Any]:
        """Records and statuses as they come, to the end of the run."""
        for document in self._link.stream("Watch", pb.WatchRequest()):
            yield json.loads(document.json)

    def pause(self, paused: bool) -> Any:
        """Open no further round, or go on."""
        return json.loads(self._link.call("Pause", pb.PauseRequest(paused=paused)).json)

    def stop(self, now: bool) -> Any:
        """End the run."""
        return json.loads(self._link.call("Stop", pb.StopRequest(now=now)).json)

    def fetch(self, output: Path) -> Any:
        """Fetch every file that may be, each from the byte where an earlier fetch broke off."""
        listed = json.loads(self._link.call("ListFiles", pb.FilesRequest()).json)
        for one in listed:
            path = output / _inside(one["name"])
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".part")
            with partial.open("ab") as file:
                for part in self._link.stream("Fetch", pb.FetchRequest(name=one["name"], offset=file.tell())):
                    file.write(part.data)
            partial.replace(path)
        return {"output": str(output), "files": len(listed), "num_bytes": sum(one["num_bytes"] for one in listed)}


def _inside(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name:
        raise ConfigError(f"{name!r}: expected a name inside the folder. Do not trust this coordinator.")
    return str(PurePosixPath(*parts))


@contextmanager
def dialled(target: str, folder: str, insecure: bool, role: str) -> Iterator[Remote]:
    """Dial a coordinator.

    Args:
        target: host:port.
        folder: The identity's, empty with `insecure`.
        insecure: Without certificates, on loopback.
        role: Where there are none.

    Yields:
        The coordinator.

    Raises:
        IdentityError: If the identity cannot be used.
        Unreachable: If the coordinator was not reached.
        LaminaError: If it said no.
    """
    check_exposed(target, insecure, "HOST:PORT")
    identity = None
    if not insecure:
        if not folder:
            raise IdentityError(
                "identity=DIR is missing: expected the folder with an operator's or auditor's certificate, from "
                "`lamina pki enroll`."
            )
        wrong = [one.message for one in identities.check(Path(folder), SYSTEM.now(), None) if not one.ok]
        if wrong:
            raise IdentityError("\n".join(wrong))
        identity = identities.load(Path(folder))
    link = Link(Address(target, identity, "operator", role), SYSTEM)
    try:
        yield Remote(link)
    except Unreachable as error:
        raise _explained(target, None if insecure else Path(folder), error) from None
    except grpc.RpcError as error:
        raise LaminaError(f"{target}: {error}") from None
    finally:
        link.close()


def _explained(target: str, folder: Path | None, error: Unreachable) -> LaminaError:
    """Why a coordinator was not reached, in the words of `lamina doctor`."""
    looked = plain(target) if folder is None else preflight(folder, target, SYSTEM.now(), None)
    wrong = [one for one in looked if not one.ok]
    trust = [one.message for one in wrong if one.what not in NETWORK]
    if trust:
        return IdentityError("\n".join(trust))
    got = wrong[0].message.removeprefix(f"{target}: ") if wrong else one_line(str(error))
    return Unreachable(
        f"{target}: expected a running coordinator, got: {got} One that has finished is gone after coordinator.linger_s; "
        "its run directory is where it ran."
    )


def shown(found: Any) -> str:
    """A status or a result for reading.

    Args:
        found: As a program gets it.

    Returns:
        Lines.
    """
    if "clients" not in found:
        return "\n".join(f"{key}: {value}" for key, value in found.items())
    loss = "-" if found["loss"] is None else f"{found['loss']:.4f}"
    lines = [
        f"run {found['run_id']}: {found['state']}, round {found['round']} of {found['rounds']}, held-out loss {loss}, "
        f"{found['rejections']} rejections in this round",
        f"{'client':<20} {'rank':>4}  {'heard of':>10}  now",
    ]
    for client in found["clients"]:
        silent = "never" if client["silent_s"] is None else f"{client['silent_s']:.0f} s ago"
        at = "answered" if client["answered"] else client["asked"] or "waits"
        if client["training_round"] and not client["answered"]:
            at = f"trains round {client['training_round']}, step {client['step']}"
        lines.append(
            f"{client['client_id']:<20} {client['rank']:>4}  {silent:>10}  {at if client['registered'] else 'left'}"
        )
    if found.get("revocations", "in force") != "in force":
        lines.append(f"revocations: {found['revocations']} The last good list is in force.")
    return "\n".join(lines)


def watched(document: Any) -> str:
    """One thing that `watch` gives, for reading.

    Args:
        document: A record or a status.

    Returns:
        A line, or several.
    """
    if "record" not in document:
        return shown(document["status"])
    record = document["record"]
    loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
    return (
        f"round {record['round']}: loss {loss}, {len(record['clients'])} of {len(record['asked'])} clients, "
        f"{len(record['rejections'])} rejections, {record['bytes_up'] / 1e6:.1f} MB up, {record['seconds']:.1f} s"
    )
