"""An operator's side of the port: ask a running coordinator, change its course, fetch its files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import grpc

from lamina.protos import coordinator_pb2 as pb
from lamina.protos import identity as identities
from lamina.protos.blobs import Blob
from lamina.protos.clock import SYSTEM
from lamina.protos.errors import ConfigError, IdentityError, LaminaError, one_line
from lamina.protos.link import DATA_LOSS, Address, Link, Refused, Unreachable, check_exposed
from lamina.protos.preflight import NETWORK, plain, preflight
from lamina.protos.words import flag

# A file that is gone, or another version, since it was listed: as many lists are asked for, each within so long.
_CHANGED = (DATA_LOSS, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OUT_OF_RANGE)
_TRIES, _LIST_S = 5, 600.0


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
        """Fetch every file that may be, each from the byte where an earlier fetch broke off, as it was when it was listed."""
        for _ in range(_TRIES):
            listed = json.loads(self._link.call("ListFiles", pb.FilesRequest(), _LIST_S).json)
            if all(self._fetched(output, **one) for one in listed):
                num_bytes = sum(one["num_bytes"] for one in listed)
                return {"output": str(output), "files": len(listed), "num_bytes": num_bytes}
        raise LaminaError(
            f"{output}: expected files that stay as they are while they are fetched, but {_TRIES} times the run went on and "
            "changed some. What came is kept: fetch again."
        )

    def _fetched(self, output: Path, name: str, num_bytes: int, sha256: str) -> bool:
        """Whether a file is here as it was listed; not so where it has changed since, or the connection broke."""
        path = output / _inside(name)
        try:
            self._link.fetch(name, Blob(sha256, num_bytes, path), path)
        except Unreachable:
            return False
        except Refused as error:
            if error.code not in _CHANGED:
                raise
            return False
        return True


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


def shown(found: Any, before: Any = None) -> str:
    """A status or a result for reading.

    Args:
        found: As a program gets it.
        before: The status that was shown last; what is the same is left out.

    Returns:
        Lines.
    """
    if "clients" not in found:
        return "\n".join(f"{key}: {value}" for key, value in found.items())
    known = {} if before is None else {one["client_id"]: _at(before, one) for one in before["clients"]}
    lines = [] if before and _stand(before) == _stand(found) else [_stand(found)]
    if found["clients"] and not known:
        lines.append(f"{'client':<20} {'rank':>4}  {'base':<5}  {'heard of':>10}  now")
    for one in found["clients"]:
        silent, at = one["silent_s"], _at(found, one)
        if known.get(one["client_id"]) != at:
            heard = "never" if silent is None else f"{silent:.0f} s ago"
            lines.append(f"{one['client_id']:<20} {one['rank']:>4}  {one.get('format') or '-':<5}  {heard:>10}  {at}")
    fault = found["revocations"]
    if fault != "in force" and fault != (before or {}).get("revocations"):
        lines.append(f"revocations: {fault} The last good list is in force.")
    return "\n".join(lines)


def _stand(found: Any) -> str:
    """The run in a line."""
    if not found["clients"] and found["state"] != "stopped":
        waits = f"no site has registered yet; waiting for {found['clients_to_start']}"
        return f"run {found['run_id']}: {found['state']}, {waits}"
    opened = found["round_open"] and found["state"] not in ("finished", "stopped")
    said = [f"round {found['round']} of {found['rounds']}" if opened else _done(found)]
    if found["loss"] is not None:
        said.append(f"held-out loss {found['loss']:.4f}")
    if private := found.get("privacy"):
        of = "" if private["budget"] is None else f" of {private['budget']:g}, {private['remaining']:.3g} left"
        said.append(f"epsilon {private['epsilon']:.3g}{of} (worst client, delta {private['delta']:g})")
    if opened:
        said.append(f"{_rejections(found['rejections'])} in this round")
    return f"run {found['run_id']}: {found['state']}, {', '.join(said)}"


def _rejections(number: int) -> str:
    return f"{number} rejection{'' if number == 1 else 's'}"


def _done(found: Any) -> str:
    return f"{found['rounds_done']} of {found['rounds']} rounds done"


def _at(found: Any, client: Any) -> str:
    """What a client is at."""
    if not client["registered"]:
        return "has left"
    if found["state"] in ("finished", "stopped"):
        return "-"
    if client["asked"] == "evaluate":
        return "evaluates"
    if client["asked"]:
        step = f", step {client['step']} of {found['steps']}" if client["step"] else ""
        return f"trains round {client['training_round']}{step}"
    return "has answered" if client["answered"] else "waits"


def ordered(command: str, settings: Mapping[str, str], found: Any) -> str:
    """What an operator's command does, in a sentence.

    Args:
        command: `pause` or `stop`.
        settings: What was asked.
        found: The status after it.

    Returns:
        A line.
    """
    if command == "pause" and flag(settings, "resume"):
        return "resumed; the next round is opened when enough sites are there"
    if command == "stop" and flag(settings, "now"):
        return "stopping at once; the adapter so far is written"
    then = f"round {found['round']} is finished first" if found["round_open"] else "no further round is opened"
    return f"{'paused' if command == 'pause' else 'stopping'}; {then}"


def watched(document: Any, before: Any = None) -> str:
    """One thing that `watch` gives, for reading.

    Args:
        document: A record or a status.
        before: The status that was shown last.

    Returns:
        A line, or several, or none.
    """
    if "record" not in document:
        return shown(document["status"], before)
    record = document["record"]
    loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
    spent = "" if record.get("epsilon") is None else f", epsilon {record['epsilon']:.3g}"
    return (
        f"round {record['round']}: loss {loss}, {len(record['clients'])} of {len(record['asked'])} clients, "
        f"{_rejections(len(record['rejections']))}, {record['bytes_up'] / 1e6:.1f} MB up, {record['seconds']:.1f} s{spent}"
    )
