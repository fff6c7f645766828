"""Writing the event log: durable with the change of state that an event records, then mirrored to `events.jsonl`.

An event goes into the coordinator's database in the transaction of its change of state, so that neither is ever there
without the other. After the commit its line is copied to the file and leaves the outbox. A crash in between leaves lines in
both, or part of a line in the file: every `flush` and `reconcile` looks at the file's end first, so none is written twice.

The database keeps the hash of every record, and the file must agree with it. It can be ahead of the database only if a
commit was lost, so the database must run with `PRAGMA synchronous=FULL`. One thread at a time: the lock is the caller's.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from lamina.protos import chain
from lamina.protos.chain import GENESIS, Fault, Head
from lamina.protos.errors import CheckpointError, LaminaError, StorageError

FILE_NAME = "events.jsonl"


def create_tables(db: sqlite3.Connection) -> None:
    """Make the two tables if they are not there: `chain`, the head after every record, and `outbox`, lines to be mirrored.

    Args:
        db: The coordinator's database.
    """
    db.execute("CREATE TABLE IF NOT EXISTS chain (n INTEGER PRIMARY KEY, hash TEXT NOT NULL)")
    db.execute("CREATE TABLE IF NOT EXISTS outbox (n INTEGER PRIMARY KEY, line TEXT NOT NULL)")


def head(db: sqlite3.Connection) -> Head:
    """Where the log ends, as far as this connection sees.

    Args:
        db: The coordinator's database.

    Returns:
        The head, `GENESIS` where there is no record.
    """
    row = db.execute("SELECT n, hash FROM chain ORDER BY n DESC LIMIT 1").fetchone()
    return GENESIS if row is None else Head(*row)


def hash_at(db: sqlite3.Connection, n: int) -> str | None:
    """The hash of one record: what a site's countersignature is checked against.

    Args:
        db: The coordinator's database.
        n: From 0, at most 2**63 - 1.

    Returns:
        The hash, or None where there is no such record.
    """
    row = db.execute("SELECT hash FROM chain WHERE n = ?", (n,)).fetchone()
    return None if row is None else str(row[0])


def append(
    db: sqlite3.Connection, kind: str, fields: Mapping[str, Any], now: datetime, sign: Callable[[bytes], bytes]
) -> Head:
    """Add an event within the caller's open transaction; it is in the log once the caller commits.

    Args:
        db: The coordinator's database, in a transaction.
        kind: See `protos.record`.
        fields: See `protos.record`.
        now: With its time zone.
        sign: Signs the 32 bytes of the hash in the domain `log-head`; gives b"" in a run without keys.

    Returns:
        The new head.

    Raises:
        LaminaError: If no transaction is open, or a check of the log would refuse the record.
    """
    if not db.in_transaction:
        raise LaminaError(f"event log: expected {kind!r} within the transaction of what it records, got none open.")
    line, after = chain.extended(head(db), kind, fields, chain.timestamp(now), sign)
    db.execute("INSERT INTO outbox (n, line) VALUES (?, ?)", (after.n, line))
    db.execute("INSERT INTO chain (n, hash) VALUES (?, ?)", (after.n, after.hash))
    return after


def flush(db: sqlite3.Connection, path: Path) -> list[str]:
    """Mirror committed events to the file, then drop them from the outbox. Looks at the end of the file only.

    Args:
        db: The coordinator's database, outside a transaction.
        path: `RUN_DIR/events.jsonl`.

    Returns:
        Their lines.

    Raises:
        CheckpointError: If the file's end is not what the database knows.
        StorageError: If it cannot be read or written; the events stay in the outbox.
        LaminaError: If a transaction is open.
    """
    return _mirror(db, path, _last)


def reconcile(db: sqlite3.Connection, path: Path) -> None:
    """Bring the file to agree with the database after a start: `flush`, once every record of the file is checked.

    A torn last line is cut: its event is still in the outbox, which it leaves only after the whole line is on disk.

    Args:
        db: The coordinator's database, outside a transaction.
        path: `RUN_DIR/events.jsonl`.

    Raises:
        CheckpointError: If the file lacks records, has others, or has more than the database; nothing but a torn line is
            changed. Signatures are not checked.
        StorageError: If it cannot be read or written.
        LaminaError: If a transaction is open.
    """
    _mirror(db, path, _all)


def _mirror(db: sqlite3.Connection, path: Path, last: Callable[[sqlite3.Connection, Path, int], int]) -> list[str]:
    if db.in_transaction:
        raise LaminaError(f"{path}: expected to mirror committed events, got an open transaction.")
    waiting: list[tuple[int, str]] = db.execute("SELECT n, line FROM outbox ORDER BY n").fetchall()
    try:
        size, whole = _sizes(path)
        there = last(db, path, whole)
        mirrored = waiting[0][0] - 1 if waiting else head(db).n
        if there < mirrored:
            raise _disagreement(db, path, f"record {mirrored}, which was written to it", f"{there} as its last record")
        if waiting or whole < size:
            # Also where all lines are there: they may be in memory only, and the outbox is about to forget them.
            _write(path, whole, "".join(line for n, line in waiting if n > there).encode("ascii"))
    except OSError as error:
        raise StorageError(
            f"{path}: expected to read and write the event log, got {error.strerror}. What it lacks is safe in the "
            "coordinator's database and is written at the next start: make room or give access, and start again."
        ) from None
    if waiting:
        with db:
            db.execute("DELETE FROM outbox WHERE n <= ?", (waiting[-1][0],))
    return [line for _, line in waiting]


def _sizes(path: Path) -> tuple[int, int]:
    """The file's size and the part of it that is whole lines, in bytes."""
    if not path.exists():
        return 0, 0
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        return size, _line_start(file, size)


def _line_start(file: BinaryIO, end: int) -> int:
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _write(path: Path, offset: int, content: bytes) -> None:
    new = not path.exists()
    with path.open("x+b" if new else "r+b") as file:
        file.truncate(offset)
        file.seek(offset)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if new:  # the name, too, must outlive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _last(db: sqlite3.Connection, path: Path, whole: int) -> int:
    """The n of the file's last whole line, which alone is checked."""
    if not whole:
        return GENESIS.n
    with path.open("rb") as file:
        file.seek(_line_start(file, whole - 1))
        line = next(chain.lines_of(file))
    n = chain.claims(line).get("n")
    if type(n) is not int:
        raise _disagreement(db, path, "a record as its last line", chain.shortened(line))
    return _known(db, path, line, n)


def _all(db: sqlite3.Connection, path: Path, whole: int) -> int:
    """The n of the file's last whole line, each of which is checked."""
    n = GENESIS.n
    if whole:
        with path.open("rb") as file:
            for line in chain.lines_of(file):
                if file.tell() > whole:
                    break
                n = _known(db, path, line, n + 1)
    return n


def _known(db: sqlite3.Connection, path: Path, line: bytes, n: int) -> int:
    """Check that a line is the record n of the database."""
    end = head(db)
    if n > end.n:
        raise _disagreement(db, path, f"record {end.n} as its last", f"a record {n} or more lines")
    before = GENESIS if n == 0 else Head(n - 1, hash_at(db, n - 1) or "")
    record, wanted = chain.read(line, before), hash_at(db, n)
    if isinstance(record, Fault):
        raise _disagreement(db, path, f"as record {n} {record.expected}", record.found)
    if record.hash != wanted:
        raise _disagreement(db, path, f"record {n} with the hash {wanted}", record.hash)
    return n


def _disagreement(db: sqlite3.Connection, path: Path, expected: str, got: str) -> CheckpointError:
    database = db.execute("PRAGMA database_list").fetchone()[2] or "the coordinator's database"
    end = head(db)
    return CheckpointError(
        f"{path}: expected {expected}, as {database} has it (head {end.n} {end.hash}), got {got}. The two are not of one run "
        "and one moment: restore both from the same copy, or begin a new run in another directory."
    )
