"""A site's privacy ledger: a line for every charge, over all runs, on disk before what it pays for is.

The file lies in `client.state` itself, above the runs' folders, so that it outlives them. Its lines are those of an event log
(`protos.record`), each standing on the one before. Nothing is ever taken out: an update that was made and lost stays paid for.

A charge is on disk before its update is stored or sent. So a last line that is not finished, which a kill amid the write leaves,
paid for nothing, and is cut off; one that lacks its newline alone counts, which is safe. Whatever else does not hold may hide a
charge, and ends all training until the operator decides.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from lamina.protos.errors import BudgetSpent, ConfigError
from lamina.protos.files import append_durably, fsync_folder
from lamina.protos.privacy.events import Event, from_json, to_json
from lamina.protos.record import GENESIS, Fault, Head, Record, extended, lines_of, read, timestamp

FILE_NAME = "privacy.jsonl"
CHARGE = "charge"


@dataclass(frozen=True)
class Charge:
    """What one training cost, and the update that it paid for.

    Attributes:
        run_id: Of the run.
        event: What the mechanism did.
        update: SHA-256 of the encoded update.
    """

    run_id: str
    event: Event
    update: str


@dataclass(frozen=True)
class Ledger:
    """What a ledger's file holds.

    Attributes:
        path: The file; one that is not there has no charges.
        charges: In the order in which they were made.
        hashes: Of their lines.
        num_bytes: Of all whole lines.
        torn_bytes: Of a line after them that was never finished.
        unwritten: That line, where it lacks no more than its newline; it is among the charges, and written again with the next.
    """

    path: Path
    charges: tuple[Charge, ...] = ()
    hashes: tuple[str, ...] = ()
    num_bytes: int = 0
    torn_bytes: int = 0
    unwritten: str = ""

    @property
    def head(self) -> Head:
        """The last line."""
        return Head(len(self.hashes) - 1, self.hashes[-1]) if self.hashes else GENESIS

    def pays_for(self, run_id: str, update: str) -> bool:
        """Whether there is a charge for these bytes."""
        return any((one.run_id, one.update) == (run_id, update) for one in self.charges)

    def events(self, run_id: str | None = None) -> list[Event]:
        """What was charged, of one run or of all."""
        return [one.event for one in self.charges if run_id in (None, one.run_id)]


def opened(folder: Path) -> Ledger:
    """Read a site's ledger. The file stays as it is: an unfinished line goes with the next charge.

    Args:
        folder: `client.state`.

    Returns:
        The ledger, empty where there is no file.

    Raises:
        BudgetSpent: If any whole line does not hold.
    """
    path = folder / FILE_NAME
    head, charges, hashes, size, torn = GENESIS, list[Charge](), list[str](), 0, b""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(lines_of(file), 1):
                if not line.endswith(b"\n"):
                    torn = line
                    break
                record = read(line, head)
                charges.append(_charge(record, path, number))
                head = Head(record.n, record.hash) if isinstance(record, Record) else head
                hashes.append(head.hash)
                size += len(line)
    except FileNotFoundError:
        return Ledger(path)
    except OSError as error:
        raise _damaged(path, f"a file that can be read, got {error.strerror}") from None
    if path.stat().st_size != size + len(torn):
        raise _damaged(path, f"its end after line {len(hashes)}, got more")
    found = Ledger(path, tuple(charges), tuple(hashes), size, len(torn))
    for text in (torn, torn[:-1]):  # all but its newline is there, or another byte is in the newline's place
        record = read(text + b"\n", head)
        if isinstance(record, Record):
            last = _charge(record, path, len(hashes) + 1)
            whole = text.decode("ascii") + "\n"
            return replace(found, charges=(*charges, last), hashes=(*hashes, record.hash), unwritten=whole)
    return found


def check_has(ledger: Ledger, heads: Iterable[Head]) -> None:
    """Raise where a ledger lacks lines that were there before: it was cut, or restored from an old copy.

    Args:
        ledger: As it is on disk.
        heads: Lines that updates of this site were paid by.

    Raises:
        BudgetSpent: If one is not there.
    """
    for head in heads:
        if not (0 <= head.n < len(ledger.hashes) and ledger.hashes[head.n] == head.hash):
            raise _damaged(ledger.path, f"the charge in line {head.n + 1} that an update was paid by, got another end")


def charged(ledger: Ledger, charge: Charge, now: datetime) -> Ledger:
    """Add a charge; it is on disk when this returns.

    Args:
        ledger: As it is on disk.
        charge: What to pay for.
        now: The time, with its zone.

    Returns:
        The ledger with the charge.

    Raises:
        BudgetSpent: If the file is not as the ledger says: another process has it, or a disk has lost some.
        OSError: If the disk does not take the line. What it took of it is no charge.
    """
    fields = {"run_id": charge.run_id, "update": charge.update, "event": to_json(charge.event)}
    line, head = extended(ledger.head, CHARGE, fields, timestamp(now), lambda digest: b"")
    _cut(ledger)
    new = not ledger.path.exists()
    append_durably(ledger.path, ledger.unwritten + line)
    if new:
        fsync_folder(ledger.path.parent)
    return replace(
        ledger,
        charges=(*ledger.charges, charge),
        hashes=(*ledger.hashes, head.hash),
        num_bytes=ledger.num_bytes + len(ledger.unwritten) + len(line),
        torn_bytes=0,
        unwritten="",
    )


def _cut(ledger: Ledger) -> None:
    """Cut off a line that was never finished, of this process or of one before it."""
    if not ledger.path.exists() and not ledger.num_bytes:
        return
    try:
        with ledger.path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(ledger.num_bytes)
            if size < ledger.num_bytes or b"\n" in file.read():
                raise _damaged(ledger.path, f"{ledger.num_bytes} bytes of whole lines, got others")
            file.truncate(ledger.num_bytes)
    except FileNotFoundError:
        raise _damaged(ledger.path, f"a file with {len(ledger.charges)} charges, got none") from None


def _charge(record: Record | Fault, path: Path, number: int) -> Charge:
    where = f"{path}, line {number}"
    if isinstance(record, Fault):
        raise _damaged(path, f"{record.expected} in line {number}, got {record.found}")
    fields: Any = record.fields
    if record.kind != CHARGE or set(fields) != {"run_id", "update", "event"}:
        raise _damaged(path, f"a charge in line {number}, got another record")
    if not isinstance(fields["run_id"], str) or not isinstance(fields["update"], str):
        raise _damaged(path, f"a run and an update in line {number}, got others")
    try:
        return Charge(fields["run_id"], from_json(fields["event"], where), fields["update"])
    except ConfigError as error:
        raise BudgetSpent(f"{error} {_THEN}") from None


_THEN = (
    "What this site has spent is not known, so it trains nothing under example-dp. Restore the newest copy of the ledger if "
    "nothing was trained since; else keep the file, and start with another client.state on data that no run has seen."
)


def _damaged(path: Path, what: str) -> BudgetSpent:
    return BudgetSpent(f"{path}: expected {what}. {_THEN}")


def runs_of(ledger: Ledger) -> Sequence[str]:
    """The runs that were charged for.

    Args:
        ledger: Any.

    Returns:
        Their ids, in the order of their first charge.
    """
    return list(dict.fromkeys(one.run_id for one in ledger.charges))
