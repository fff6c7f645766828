"""Disks that are full and disks that forget: what is said and kept, and that a run ends with the bits of one without faults.

Stated difference: while the coordinator's disk is full, an upload waits and is tried again; everything else that cannot be
written ends the run with exit code 1, and a start with room goes on.
"""

from __future__ import annotations

import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lamina.protos.errors import ConfigError, StorageError
from lamina.server.store import run_directory
from lamina.server.store.database import Database
from tests import deployment
from tests.deployment import NAMES, in_thread
from tests.e2e.faults.disks import full_at, served, sites, whole, words_in
from tests.hostile import eventually

# --- a coordinator's disk that is full ---


POINTS = {
    "the config": (r"run/\.config\.yaml", 1),
    "a release": (r"run/blobs/partial/put-", 3),
    "the names of blobs": (r"run/blobs/[0-9a-f]{2}$", 2),
    "the event log, at first": (r"run/events\.jsonl", 1),
    "a checkpoint's tensors": (r"round-0002.*global", 1),
    "the checkpoint's folder": (r"run/checkpoints$", 2),
    "the adapter": (r"run/adapter", 1),
    "the summary": (r"run/\.?summary", 1),
}


@pytest.mark.parametrize("point", list(POINTS))
def test_a_full_disk_ends_the_run_in_words_and_a_start_with_room_goes_on(tmp_path: Path, point: str) -> None:
    pattern, time = POINTS[point]
    port = deployment.free_port()
    words = words_in(tmp_path, f"coordinator.listen=127.0.0.1:{port}")
    with sites(tmp_path, port) as started:
        with pytest.MonkeyPatch.context() as patched:
            hits = full_at(patched, pattern, time)
            found = served(tmp_path / "run", words)
        assert len(hits) >= time
        assert isinstance(found, StorageError | ConfigError), found
        assert isinstance(found, StorageError) or point == "the config"
        assert found.exit_code == (1 if isinstance(found, StorageError) else 2)
        assert "No space left on device" in str(found)
        if point != "the config":
            assert "start again" in str(found)
        if not (tmp_path / "run" / "coordinator.sqlite").exists():
            shutil.rmtree(tmp_path / "run")  # nothing had begun
        assert served(tmp_path / "run", words) == 0
        for thread, _ in started:
            thread.join(20)
        assert [outcome for _, outcome in started] == [[0]] * 3
    whole(tmp_path / "run", words)


def test_an_upload_waits_for_room(tmp_path: Path) -> None:
    """The site tries again until there is room; the run neither ends nor loses the update."""
    port = deployment.free_port()
    words = words_in(tmp_path, f"coordinator.listen=127.0.0.1:{port}")
    with sites(tmp_path, port) as started, pytest.MonkeyPatch.context() as patched:
        hits = full_at(patched, r"run/blobs/partial/2-north-", 1)

        def make_room() -> None:
            eventually(lambda: len(hits) >= 2)
            patched.undo()

        helper = threading.Thread(target=make_room)
        helper.start()
        assert served(tmp_path / "run", words) == 0
        helper.join(20)
        assert len(hits) >= 2
        for thread, _ in started:
            thread.join(20)
    whole(tmp_path / "run", words)


@pytest.mark.parametrize("pages", [24, 34])
def test_a_full_database_ends_the_run_in_words(tmp_path: Path, pages: int) -> None:
    """SQLite's own answer for a full disk, wherever a transaction meets it: at the start, in a site's call, in the round loop."""
    port = deployment.free_port()
    words = words_in(tmp_path, f"coordinator.listen=127.0.0.1:{port}", "clients.deadline_s=30")
    connect = sqlite3.connect

    def small(*given: Any, **named: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*given, **named)
        connection.execute("PRAGMA page_size=512")
        connection.execute(f"PRAGMA max_page_count={pages}")
        return connection

    with sites(tmp_path, port) as started:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sqlite3, "connect", small)
            found = served(tmp_path / "run", words)
        assert isinstance(found, StorageError), found
        assert "database or disk is full" in str(found)
        assert "make room" in str(found)
        assert served(tmp_path / "run", words) == 0
        for thread, _ in started:
            thread.join(20)
    whole(tmp_path / "run", words)


def test_a_commit_that_fails_leaves_no_transaction_open(tmp_path: Path) -> None:
    """As with a disk that is full at that very moment; here a constraint is looked at only then."""
    database = Database(tmp_path / "db")
    with database.alone() as connection:
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("CREATE TABLE child (a REFERENCES facts (name) DEFERRABLE INITIALLY DEFERRED)")

    def write() -> None:
        with database.change() as connection:
            connection.execute("INSERT INTO child VALUES ('none such')")

    with pytest.raises(sqlite3.IntegrityError):
        write()
    with database.change() as connection:
        connection.execute("INSERT INTO facts VALUES ('a', 'b')")
    assert database.rows("SELECT count(*) FROM child") == [(0,)]
    assert database.fact("a") == "b"
    database.close()


def test_a_database_that_fails_in_a_sites_call_ends_the_run_too(tmp_path: Path) -> None:
    """The round loop would only wait for sites that can never be answered."""
    port = deployment.free_port()
    words = words_in(tmp_path, f"coordinator.listen=127.0.0.1:{port}")
    begin = Database.change

    def change(self: Database) -> Any:
        if threading.current_thread().name.startswith("port"):
            raise StorageError("make room")
        return begin(self)

    with sites(tmp_path, port) as started:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Database, "change", change)
            assert isinstance(served(tmp_path / "run", words), StorageError)
        assert served(tmp_path / "run", words) == 0
        for thread, _ in started:
            thread.join(20)
    whole(tmp_path / "run", words)


@pytest.mark.parametrize("limit", [24_000, 120_000])
def test_a_process_that_may_write_no_more(tmp_path: Path, limit: int) -> None:
    """`lamina coordinator` under a limit on the size of its files, as the kernel enforces it: exit code 1 and no traceback."""
    port = deployment.free_port()
    words = words_in(tmp_path, f"coordinator.listen=127.0.0.1:{port}", f"output={tmp_path / 'run'}")
    command = [sys.executable, "-m", "lamina", "coordinator", "--json", *words]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with sites(tmp_path, port) as started:
        first = subprocess.run(
            command,
            env=deployment.environment() | {"PYTHONDONTWRITEBYTECODE": "1"},
            cwd=deployment.ROOT,
            preexec_fn=limited,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in first.stderr, first.stderr
        assert first.returncode == 1, first.stderr
        assert "start again" in first.stderr
        assert served(tmp_path / "run", words) == 0
        for thread, _ in started:
            thread.join(20)
    whole(tmp_path / "run", words)


def test_a_small_file_system(tmp_path: Path) -> None:
    """A real one, full in the middle of the run, made larger afterwards."""
    place = tmp_path / "disk"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a file system")
    try:
        port = deployment.free_port()
        words = words_in(tmp_path, f"coordinator.listen=127.0.0.1:{port}", "keep_updates=true")
        with sites(tmp_path, port) as started:
            found = served(place / "run", words)
            assert isinstance(found, StorageError), found
            subprocess.run(["mount", "-o", "remount,size=50m", str(place)], check=True)
            assert served(place / "run", words) == 0
            for thread, _ in started:
                thread.join(20)
        whole(place / "run", words)
    finally:
        subprocess.run(["umount", str(place)], check=True)


# --- a site's disk that is full ---


@pytest.mark.parametrize("pattern", [r"west/.*finished-000002", r"west/.*releases/.*part", r"west/.*witness\.txt"])
def test_a_site_whose_disk_is_full_says_disk_and_lives_on(tmp_path: Path, pattern: str) -> None:
    """Stated difference: it does not count in the rounds in which it could not write."""
    words = words_in(tmp_path)
    said: list[dict[str, Any]] = []
    with deployment.coordinator(tmp_path / "run", words) as running, pytest.MonkeyPatch.context() as patched:
        first = 1 if "finished" in pattern else 4 if "part" in pattern else 2
        hits = full_at(patched, pattern, first)
        with sites(tmp_path, running.port, NAMES[:2]) as others:
            west = deployment.agent(
                "west", running.port, tmp_path / "west", log=lambda event, **more: said.append({"event": event, **more})
            )
            thread, outcome = in_thread(west)
            eventually(lambda: any(one.get("code") == "disk" for one in said))
            patched.undo()
            assert running.join() == 0
            thread.join(20)
            assert outcome == [0]
            for other, result in others:
                other.join(20)
                assert result == [0]
        assert hits
    records = run_directory.read_records(running.path)
    missed = [(one["client_id"], record["round"]) for record in records for one in record["rejections"]]
    assert {client for client, _ in missed} <= {"west"}
    whole(running.path, words, tuple(missed))
    failed = [one for one in said if one["event"] == "failed"]
    assert failed
    assert {one["code"] for one in failed} == {"disk"}
    rejections = [one for record in records for one in record["rejections"]]
    assert all(one["reason"] == "failed" for one in rejections)
    if "finished" in pattern:
        assert missed == [("west", 2)]


def test_a_site_that_cannot_write_at_its_start_says_so(tmp_path: Path) -> None:
    words = words_in(tmp_path, "rounds=1", "clients.start=2", "clients.deadline_s=20")
    with deployment.coordinator(tmp_path / "run", words) as running, pytest.MonkeyPatch.context() as patched:
        full_at(patched, r"west/.*releases/", 1)
        thread, outcome = in_thread(deployment.agent("west", running.port, tmp_path / "west"))
        thread.join(20)
        (error,) = outcome
        assert isinstance(error, StorageError)
        assert "No space left on device" in str(error)
        assert "Make room" in str(error)
        patched.undo()
        with sites(tmp_path, running.port):
            assert running.join() == 0
