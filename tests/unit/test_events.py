"""The event log on disk: durable with what it records, mirrored once, whatever a crash interrupts."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lamina.protos.chain import GENESIS, Head
from lamina.protos.errors import CheckpointError, LaminaError, StorageError
from lamina.server.store import events
from tests.logs import coordinator, verified, written

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


class Crash(BaseException):
    """The process ends here."""


class Dying(sqlite3.Connection):
    """A database that does not survive a statement that begins with `dies_at`."""

    dies_at = "nothing"

    def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
        if sql.startswith(self.dies_at):
            raise Crash
        return super().execute(sql, *rest)


def dying(descriptor: int) -> None:
    raise Crash


def opened(folder: Path, name: str = "state.db") -> Dying:
    db: Dying = sqlite3.connect(folder / name, factory=Dying)
    events.create_tables(db)
    db.execute("CREATE TABLE IF NOT EXISTS state (round INTEGER)")
    db.commit()
    return db


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Dying]:
    with closing(opened(tmp_path)) as db:
        yield db


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / events.FILE_NAME


def add(db: sqlite3.Connection, *numbers: float) -> Head:
    """One transaction: the state, and an event for each change of it."""
    with db:
        for number in numbers:
            db.execute("INSERT INTO state VALUES (?)", (number,))
            head = events.append(db, "round", {"round": number}, NOW, coordinator)
    return head


def die_before_the_commit(db: sqlite3.Connection, number: int) -> None:
    with db:
        db.execute("INSERT INTO state VALUES (?)", (number,))
        events.append(db, "round", {"round": number}, NOW, coordinator)
        raise Crash


def expected(*numbers: int) -> str:
    return "".join(written([("round", {"round": number}) for number in numbers])[0])


def waiting(db: sqlite3.Connection) -> list[int]:
    return [n for (n,) in db.execute("SELECT n FROM outbox ORDER BY n")]


def test_an_event_is_there_with_its_change_or_neither_is(db: Dying, path: Path) -> None:
    add(db, 1)
    with pytest.raises(Crash):
        die_before_the_commit(db, 2)
    events.flush(db, path)
    assert path.read_text() == expected(1)
    head = add(db, 3)
    events.flush(db, path)
    assert path.read_text() == expected(1, 3)
    assert db.execute("SELECT round FROM state").fetchall() == [(1,), (3,)]
    assert head == events.head(db) == verified(path.read_bytes()).head
    assert waiting(db) == []


def test_the_database_knows_every_hash(db: Dying, path: Path) -> None:
    assert events.head(db) == GENESIS
    assert events.hash_at(db, 0) is None
    heads = [add(db, number) for number in (1, 2, 3)]
    events.flush(db, path)
    assert [events.hash_at(db, n) for n in (-1, 0, 1, 2, 3)] == [None, *(head.hash for head in heads), None]


def test_append_wants_a_transaction_and_flush_wants_none(db: Dying, path: Path) -> None:
    with pytest.raises(LaminaError, match="transaction"):
        events.append(db, "round", {}, NOW, coordinator)
    assert events.head(db) == GENESIS
    db.execute("BEGIN")
    events.append(db, "round", {"round": 1}, NOW, coordinator)
    for mirror in (events.flush, events.reconcile):
        with pytest.raises(LaminaError, match="transaction"):
            mirror(db, path)
    assert not path.exists()
    db.commit()
    events.flush(db, path)
    assert path.read_text() == expected(1)


def test_a_record_that_cannot_be_checked_stops_its_transaction(db: Dying, path: Path) -> None:
    with pytest.raises(LaminaError, match="event log, record 0"):
        add(db, float("nan"))
    assert events.head(db) == GENESIS
    assert db.execute("SELECT * FROM state").fetchall() == []


@pytest.mark.parametrize("mirror", [events.flush, events.reconcile])
def test_mirroring_again_changes_nothing(db: Dying, path: Path, mirror: Any) -> None:
    mirror(db, path)
    assert not path.exists()
    add(db, 1, 2)
    for _ in range(3):
        mirror(db, path)
        assert path.read_text() == expected(1, 2)


@pytest.mark.parametrize("again", [events.flush, events.reconcile])
def test_a_crash_after_the_commit(tmp_path: Path, path: Path, again: Any) -> None:
    with closing(opened(tmp_path)) as db:
        add(db, 1)
        events.flush(db, path)
        add(db, 2)
    with closing(opened(tmp_path)) as db:
        again(db, path)
        assert waiting(db) == []
    assert path.read_text() == expected(1, 2)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("again", [events.flush, events.reconcile])
def test_a_crash_between_the_file_and_the_outbox(tmp_path: Path, path: Path, again: Any, restart: bool) -> None:
    db = opened(tmp_path)
    add(db, 1)
    events.flush(db, path)
    add(db, 2, 3)
    db.dies_at = "DELETE"
    with pytest.raises(Crash):
        events.flush(db, path)
    assert path.read_text() == expected(1, 2, 3)
    assert waiting(db) == [1, 2]
    db.dies_at = "nothing"
    if restart:
        db.close()
        db = opened(tmp_path)
    add(db, 4)
    again(db, path)
    assert path.read_text() == expected(1, 2, 3, 4)
    assert waiting(db) == []
    db.close()


@pytest.mark.parametrize("again", [events.flush, events.reconcile])
def test_a_crash_amid_the_write_wherever_it_is_cut(tmp_path: Path, path: Path, again: Any) -> None:
    whole = expected(1, 2, 3).encode()
    synced = len(expected(1))
    for cut in [*range(synced, len(whole), 23), len(whole) - 1, len(whole)]:
        path.unlink(missing_ok=True)
        (tmp_path / "state.db").unlink(missing_ok=True)
        with closing(opened(tmp_path)) as db:
            add(db, 1)
            events.flush(db, path)
            add(db, 2, 3)
        path.write_bytes(whole[:cut])
        with closing(opened(tmp_path)) as db:
            again(db, path)
            assert waiting(db) == []
            add(db, 4)
            again(db, path)
        assert path.read_text() == expected(1, 2, 3, 4)


def test_lines_that_may_be_in_memory_only_are_synced_before_the_outbox_forgets_them(
    db: Dying, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(db, 1)
    path.write_text(expected(1))  # written, and the process died before fsync
    monkeypatch.setattr(os, "fsync", dying)
    with pytest.raises(Crash):
        events.reconcile(db, path)
    assert waiting(db) == [0]
    monkeypatch.undo()
    events.reconcile(db, path)
    assert waiting(db) == []
    assert path.read_text() == expected(1)


def test_a_torn_end_longer_than_a_block_is_cut(db: Dying, path: Path) -> None:
    with db:
        db.execute("BEGIN")
        events.append(db, "round", {"text": "x" * 300_000}, NOW, coordinator)
        events.append(db, "round", {"text": "y" * 300_000}, NOW, coordinator)
    lines = [line for (line,) in db.execute("SELECT line FROM outbox ORDER BY n")]
    path.write_text(lines[0] + lines[1][:250_000])
    events.reconcile(db, path)
    assert path.read_text() == lines[0] + lines[1]
    events.flush(db, path)
    assert path.read_text() == lines[0] + lines[1]


@pytest.mark.parametrize("again", [events.flush, events.reconcile])
def test_a_torn_end_with_nothing_left_to_write_is_cut(db: Dying, path: Path, again: Any) -> None:
    add(db, 1)
    events.flush(db, path)
    path.write_text(expected(1) + "torn")
    again(db, path)
    assert path.read_text() == expected(1)


@pytest.mark.parametrize("again", [events.flush, events.reconcile])
def test_a_connection_that_begins_nothing_by_itself(tmp_path: Path, path: Path, again: Any) -> None:
    with closing(sqlite3.connect(tmp_path / "state.db", factory=Dying, isolation_level=None)) as db:
        events.create_tables(db)
        with pytest.raises(LaminaError, match="transaction"):
            events.append(db, "round", {"round": 1}, NOW, coordinator)
        for number in (1, 2):
            db.execute("BEGIN IMMEDIATE")
            events.append(db, "round", {"round": number}, NOW, coordinator)
            db.commit()
        db.dies_at = "DELETE"
        with pytest.raises(Crash):
            events.flush(db, path)
        db.dies_at = "nothing"
        assert waiting(db) == [0, 1]
        again(db, path)
        assert not db.in_transaction
        assert waiting(db) == []
    assert path.read_text() == expected(1, 2)


def damaged(db: Dying, path: Path, content: str | None, again: Any = events.reconcile) -> str:
    """The refusal of a file with this content; nothing in it is changed."""
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    before = waiting(db)
    with pytest.raises(CheckpointError) as caught:
        again(db, path)
    assert (path.read_text() if path.exists() else None) == content
    assert waiting(db) == before
    message = str(caught.value)
    assert str(path) in message
    assert "state.db" in message
    assert events.head(db).hash in message
    return message


OTHER = [("round", {"round": 7}), ("round", {"round": 8}), ("round", {"round": 9})]


@pytest.mark.parametrize("again", [events.flush, events.reconcile])
@pytest.mark.parametrize("more", [False, True])
def test_a_file_that_is_not_of_this_database_is_left_alone(db: Dying, path: Path, again: Any, more: bool) -> None:
    add(db, 1, 2)
    events.flush(db, path)
    if more:
        add(db, 3)
    other = written(OTHER)[0]
    last = events.head(db).n
    assert "expected record 1, which was written to it" in damaged(db, path, None, again)
    assert "got 0 as its last record" in damaged(db, path, expected(1), again)
    assert "got -1 as its last record" in damaged(db, path, "", again)
    assert "got 0 as its last record" in damaged(db, path, expected(1) + expected(1, 2)[-200:-1], again)
    assert f"expected record {last} as its last" in damaged(db, path, expected(1, 2, 3, 4, 5), again)
    damaged(db, path, other[0] + other[1], again)
    damaged(db, path, "".join(other), again)
    damaged(db, path, other[0] + other[1] + "torn", again)
    damaged(db, path, expected(1, 2) + "junk\n", again)
    damaged(db, path, expected(1, 2) + '{"n":1e400}\n', again)
    damaged(db, path, expected(1, 2) + f'{{"n":{2**70}}}\n', again)
    damaged(db, path, expected(1, 2) + '{"n":-1}\n', again)
    damaged(db, path, expected(1, 2).replace("\n", " \n"), again)
    path.write_text(expected(1, 2))
    again(db, path)
    assert path.read_text() == expected(1, 2, 3)[: None if more else len(expected(1, 2))]


def test_only_a_start_reads_all_of_the_file(db: Dying, path: Path) -> None:
    add(db, 1, 2, 3)
    events.flush(db, path)
    changed = expected(1, 2, 3).replace('"round":2', '"round":5')
    assert "expected as record 1 hash" in damaged(db, path, changed)
    path.write_text(changed)
    events.flush(db, path)
    lines = expected(1, 2, 3).splitlines(keepends=True)
    damaged(db, path, lines[0] + lines[2])
    damaged(db, path, 2 * "".join(lines))
    damaged(db, path, lines[1] + lines[0] + lines[2])
    damaged(db, path, lines[0] + lines[1] + lines[1] + lines[2])


def test_a_database_of_an_earlier_moment_is_named(tmp_path: Path, db: Dying, path: Path) -> None:
    add(db, 1)
    events.flush(db, path)
    with closing(opened(tmp_path, "older-state.db")) as older:
        db.backup(older)
        add(db, 2)
        events.flush(db, path)
        message = damaged(older, path, expected(1, 2))
        assert "older-state.db" in message
        assert "expected record 0 as its last" in message
        # And of another run that has gone on to the same number.
        add(older, 3)
        damaged(older, path, expected(1, 2))
        damaged(older, path, expected(1, 2), events.flush)


def test_a_place_that_cannot_be_written_keeps_the_events(
    db: Dying, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(db, 1)
    path.mkdir()
    with pytest.raises(StorageError, match="safe in the coordinator's database"):
        events.flush(db, path)
    path.rmdir()
    with pytest.raises(StorageError, match="No such file"):
        events.flush(db, path.parent / "absent" / "events.jsonl")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        events.flush(db, path)
    monkeypatch.undo()
    assert waiting(db) == [0]
    events.flush(db, path)
    assert path.read_text() == expected(1)


@pytest.mark.parametrize("seed", range(12))
def test_any_run_of_crashes_leaves_each_committed_event_once(
    tmp_path: Path, path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    db, numbers, sync = opened(tmp_path), list[int](), os.fsync
    for step in range(40):
        choice = rng.choice(["add", "add", "flush", "roll back", "die", "die", "stop"])
        if choice == "add":
            numbers.append(step)
            add(db, step)
        elif choice == "flush":
            events.flush(db, path)
            assert path.read_text() == expected(*numbers) if numbers else not path.exists()
        elif choice == "roll back":
            with pytest.raises(Crash):
                die_before_the_commit(db, step)
        elif choice == "die":
            before = path.stat().st_size if path.exists() else 0
            synced = rng.random() < 0.5
            if synced:
                db.dies_at = "DELETE"
            else:
                monkeypatch.setattr(os, "fsync", dying)
            with suppress(Crash):  # with nothing to write, nothing dies
                events.flush(db, path)
            monkeypatch.setattr(os, "fsync", sync)
            if not synced and path.exists():  # any part of what was written may be there
                os.truncate(path, rng.randint(before, path.stat().st_size))
        if choice in ("die", "stop"):
            db.close()
            db = opened(tmp_path)
            events.reconcile(db, path)
            assert (path.read_text() if path.exists() else "") == expected(*numbers)
    events.flush(db, path)
    db.close()
    assert verified(path.read_bytes()).records == len(numbers)
