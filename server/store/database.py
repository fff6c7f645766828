"""The coordinator's SQLite file: its tables, one connection, one lock, and transactions that are durable when they return."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamina.protos.errors import CheckpointError, StorageError
from lamina.server.store import events

SCHEMA = 2
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS clients (
  client_id TEXT PRIMARY KEY, rank INTEGER NOT NULL, held INTEGER NOT NULL, present INTEGER NOT NULL, certificate TEXT NOT NULL,
  ranks TEXT NOT NULL, format TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rounds (round INTEGER PRIMARY KEY, opened TEXT NOT NULL, closed INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS updates (
  round INTEGER NOT NULL, client_id TEXT NOT NULL, sha256 TEXT NOT NULL, num_bytes INTEGER NOT NULL, claim BLOB NOT NULL,
  signature BLOB NOT NULL, status TEXT NOT NULL, PRIMARY KEY (round, client_id));
CREATE TABLE IF NOT EXISTS rejections (
  round INTEGER NOT NULL, client_id TEXT NOT NULL, reason TEXT NOT NULL, message TEXT NOT NULL, final INTEGER NOT NULL,
  times INTEGER NOT NULL, PRIMARY KEY (round, client_id, reason));
"""

# SQLite's names of what a full or failing disk gives; every other is about the file's content.
_DISK = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_BUSY")


class Database:
    """One connection, used by one thread at a time.

    Args:
        path: The file; made if need be.

    Raises:
        CheckpointError: If it is no database of ours.
    """

    def __init__(self, path: Path) -> None:
        self._lock, self._path = threading.RLock(), path
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute("PRAGMA journal_size_limit=4194304")
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA):
                raise CheckpointError(
                    f"{path}: expected schema {SCHEMA}, got {version}. Use the version that wrote it."
                )
            self._connection.executescript(_TABLES)
            self._connection.execute(f"PRAGMA user_version={SCHEMA}")
            events.create_tables(self._connection)
            (found, *_), *_ = self._connection.execute("PRAGMA quick_check(1)").fetchall()
            if found != "ok":
                raise sqlite3.DatabaseError(found)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if getattr(error, "sqlite_errorname", "").startswith(_DISK):
                raise _storage_error(path, error) from None
            raise CheckpointError(
                f"{path}: expected the coordinator's database, got: {error}. Restore it, or start in a new directory."
            ) from None

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is on disk when the block is left, or none of it.

        Yields:
            The connection.

        Raises:
            StorageError: If the disk is full or fails.
        """
        with self._lock, self._translated():
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.commit()
            except BaseException:
                self._connection.rollback()
                raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's word for a full disk or a damaged file as one of ours."""
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InternalError):
            raise  # ours
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise _storage_error(self._path, error) from None

    @contextmanager
    def alone(self) -> Iterator[sqlite3.Connection]:
        """The connection outside a transaction, with nobody else using it.

        Yields:
            The connection.
        """
        with self._lock, self._translated():
            yield self._connection

    def rows(self, query: str, *values: Any) -> list[Any]:
        """All rows of a query."""
        with self._lock, self._translated():
            return self._connection.execute(query, values).fetchall()

    def fact(self, name: str) -> str | None:
        """A value by name, or None."""
        found = self.rows("SELECT value FROM facts WHERE name = ?", name)
        return None if not found else str(found[0][0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()


def _storage_error(path: Path, error: Exception) -> StorageError:
    """SQLite's error as one of ours."""
    return StorageError(
        f"{path}: expected to read and write the coordinator's database, got: {error}. What was completed is kept: make "
        "room, or restore the disk, and start again with the same output."
    )


def set_fact(connection: sqlite3.Connection, name: str, value: str) -> None:
    """Set a value by name within a transaction.

    Args:
        connection: In a transaction.
        name: Which.
        value: Its text.
    """
    connection.execute(
        "INSERT INTO facts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value)
    )
