"""Disks that are full and disks that forget: what is said and kept, and that a run ends with the bits of one without faults.

Stated difference: while the coordinator's disk is full, an upload waits and is tried again; everything else that cannot be
written ends the run with exit code 1, and a start with room goes on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.client.spool import Spool
from lamina.protos import files
from lamina.protos.clock import SYSTEM
from lamina.protos.errors import CheckpointError, ConfigError, LaminaError, StorageError
from lamina.server import coordinator as coordinators
from lamina.server import opening
from lamina.server.store import checkpoint, database, run_directory
from tests import deployment
from tests.deployment import NAMES, Synthetic, in_thread
from tests.hostile import eventually
from tests.runs import same_bits


def words_in(folder: Path, *more: str) -> list[str]:
    spec_file = folder / "spec.json"
    spec_file.write_text(deployment.spec().to_json())
    return deployment.words(spec_file, "insecure=true", "wire.heartbeat_s=0.2", *more)


@contextlib.contextmanager
def sites(folder: Path, port: int, names: tuple[str, ...] = NAMES, **more: Any) -> Iterator[list[Any]]:
    """Agents that stay through whatever the coordinator does."""
    found = [deployment.agent(name, port, folder / name, **more) for name in names]
    started = [in_thread(one) for one in found]
    try:
        yield started
    finally:
        for one in found:
            one.stop()
        for thread, _ in started:
            thread.join(20)


def served(path: Path, words: list[str]) -> int | BaseException:
    """A coordinator from start to end in this thread."""
    try:
        return coordinators.serve(deployment.config_of(words), path, lambda *_, **__: None)
    except LaminaError as error:
        return error


# --- a coordinator's disk that is full ---


def full_at(monkeypatch: pytest.MonkeyPatch, pattern: str, time: int) -> list[str]:
    """The disk is full from the n-th flush of a file of this name on: what was written of it is half there, and says so."""
    real, hits, once = os.fsync, list[str](), threading.Lock()

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not re.search(pattern, path):
            return real(descriptor)
        with once:
            hits.append(path)
            late = len(hits) >= time
        if not late:
            return real(descriptor)
        if os.path.isfile(path):
            os.truncate(path, os.path.getsize(path) // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(os, "fsync", fsync)
    return hits


POINTS = {
    "the config": (r"run/\.config\.yaml", 1),
    "the schema": (r"run/blobs/partial/put-", 1),
    "a release": (r"run/blobs/partial/put-", 3),
    "the names of blobs": (r"run/blobs/[0-9a-f]{2}$", 4),
    "the event log, at first": (r"run/events\.jsonl", 1),
    "the event log, later": (r"run/events\.jsonl", 17),
    "a checkpoint's tensors": (r"round-0002.*global", 1),
    "a checkpoint's state": (r"round-0002.*state", 1),
    "the checkpoint's folder": (r"run/checkpoints$", 2),
    "a record": (r"run/rounds\.jsonl", 3),
    "the adapter": (r"run/adapter", 1),
    "the summary": (r"run/\.?summary", 1),
    "the report": (r"run/\.?report", 1),
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


def whole(path: Path, words: list[str], without: tuple[tuple[str, int], ...] = ()) -> None:
    """The bits of a run without faults, one record a round, and nothing half-written."""
    assert same_bits(deployment.final(path), deployment.fault_free(words, without=without))
    assert [record["round"] for record in run_directory.read_records(path)] == [1, 2, 3]
    for line in (path / "events.jsonl").read_text().splitlines():
        json.loads(line)
    assert json.loads((path / "summary.json").read_text())["rounds"] == 3
    assert not [one for one in path.rglob("*.partial") if one.is_file()]


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


@pytest.mark.parametrize("pages", [0, 3, 12])
def test_a_full_database_ends_the_run_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: int) -> None:
    """SQLite's own answer for a full disk, wherever a transaction meets it: in the round loop or in a site's call."""
    port = deployment.free_port()
    words = words_in(tmp_path, f"coordinator.listen=127.0.0.1:{port}", "clients.deadline_s=30")

    class Small(database.Database):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            with self.alone() as connection:
                used = connection.execute("PRAGMA page_count").fetchone()[0]
                connection.execute(f"PRAGMA max_page_count={used + pages}")

    with sites(tmp_path, port) as started:
        with pytest.MonkeyPatch.context() as patched:
            for module in (coordinators, sys.modules.get("lamina.server.opening")):
                if module is not None and hasattr(module, "Database"):
                    patched.setattr(module, "Database", Small)
            found = served(tmp_path / "run", words)
        assert isinstance(found, StorageError), found
        assert "database or disk is full" in str(found)
        assert "make room" in str(found)
        assert served(tmp_path / "run", words) == 0
        for thread, _ in started:
            thread.join(20)
    whole(tmp_path / "run", words)


@pytest.mark.parametrize("limit", [24_000, 60_000, 120_000, 250_000])
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
        if first.returncode != 0:  # the largest limit may be enough
            assert first.returncode == 1, first.stderr
            assert "start again" in first.stderr
            assert served(tmp_path / "run", words) == 0
        else:
            assert limit > 200_000
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


# --- a coordinator's disk that forgets ---


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the directory of a finished run and its words."""
    folder = tmp_path_factory.mktemp("ended")
    words = words_in(folder)
    with deployment.coordinator(folder / "run", words) as running, sites(folder, running.port):
        assert running.join() == 0
    return folder


def copied(ended: Path, folder: Path) -> tuple[Path, list[str]]:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ended / "run", folder)
    words = deployment.words(
        ended / "spec.json", "insecure=true", "wire.heartbeat_s=0.05", "coordinator.listen=127.0.0.1:0"
    )
    return folder, words


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << (at % 8)
    path.write_bytes(bytes(content))


def cut(path: Path, at: int) -> None:
    os.truncate(path, at % path.stat().st_size)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "no byte is left": lambda path: cut(path, 0),
    "half is left": lambda path: cut(path, path.stat().st_size // 2),
    "the last byte is gone": lambda path: cut(path, path.stat().st_size - 1),
    "a bit at the front": lambda path: flipped(path, 0),
    "a bit in the middle": lambda path: flipped(path, path.stat().st_size // 2),
    "a bit at the end": lambda path: flipped(path, path.stat().st_size - 2),
    "the file is gone": lambda path: path.unlink(),
}


def relaunched(path: Path, words: list[str]) -> tuple[int | BaseException, list[dict[str, Any]]]:
    said: list[dict[str, Any]] = []
    try:
        code = coordinators.serve(
            deployment.config_of(words), path, lambda event, **more: said.append({"event": event, **more})
        )
    except LaminaError as error:
        return error, said
    return code, said


@pytest.mark.parametrize("name", ["global.safetensors", "state.json"])
def test_a_damaged_newest_checkpoint_is_made_again(ended: Path, tmp_path: Path, name: str) -> None:
    """From the one before and the updates of its round, without a site on the line."""
    for what, damage in DAMAGES.items():
        path, words = copied(ended, tmp_path / "run")
        damage(checkpoint.folder(path, 3) / name)
        code, said = relaunched(path, words)
        assert code == 0, (what, code)
        whole(path, words)
        (told,) = [one for one in said if one["event"] == "damaged"]
        assert "round-0003" in told["message"]
        assert '"kind":"damaged"' in (path / "events.jsonl").read_text()
        assert (path / "checkpoints" / "damaged-round-0003").is_dir()


@pytest.mark.parametrize("name", ["global.safetensors", "state.json"])
def test_no_bit_of_a_checkpoint_changes_unseen(ended: Path, tmp_path: Path, name: str) -> None:
    path, _ = copied(ended, tmp_path / "run")
    target = checkpoint.folder(path, 3) / name
    content = target.read_bytes()
    for at in range(0, len(content), 7):
        flipped(target, at)
        with pytest.raises(CheckpointError):
            checkpoint.load_last(path)
        target.write_bytes(content)
    assert checkpoint.load_last(path) is not None


def test_two_damaged_checkpoints_end_the_start_in_words(ended: Path, tmp_path: Path) -> None:
    path, words = copied(ended, tmp_path / "run")
    for number in (2, 3):
        flipped(checkpoint.folder(path, number) / "global.safetensors", 300)
    code, said = relaunched(path, words)
    assert isinstance(code, CheckpointError)
    assert code.exit_code == 2
    assert "restore the directory from a copy" in str(code)
    assert len([one for one in said if one["event"] == "damaged"]) == 2


def test_a_damaged_update_of_a_finished_round_is_not_needed(ended: Path, tmp_path: Path) -> None:
    path, words = copied(ended, tmp_path / "run")
    for blob in (path / "blobs").glob("??/*"):
        flipped(blob, 40)
    assert relaunched(path, words)[0] == 0
    whole(path, words)


@contextlib.contextmanager
def interrupted(tmp_path: Path) -> Iterator[tuple[Path, int, list[str], dict[str, str]]]:
    """A coordinator killed in round 2 with the updates of two sites, whose agents go on dialling; yields hashes by site."""
    port = deployment.free_port()
    words = words_in(tmp_path, f"coordinator.listen=127.0.0.1:{port}")
    path, log = tmp_path / "run", tmp_path / "log"
    process = deployment.start_coordinator(path, port, words[:-1] if "listen" in words[-1] else words, log)
    gate = threading.Event()

    class Held(Synthetic):
        def train(self, instruction: Any, progress: Any) -> Any:
            if instruction.round == 2:
                eventually(gate.is_set, 60)
            return super().train(instruction, progress)

    try:
        with sites(tmp_path, port, NAMES[:2]), sites(tmp_path, port, ("west",), worker=Held("west")):

            def admitted() -> dict[str, str]:
                lines = (path / "events.jsonl").read_text().splitlines() if (path / "events.jsonl").exists() else []
                events = [json.loads(line) for line in lines if '"round":2' in line]
                done = {one["client_id"] for one in events if one["kind"] == "admitted"}
                return {
                    e["client_id"]: e["sha256"] for e in events if e["kind"] == "received" and e["client_id"] in done
                }

            eventually(lambda: len(admitted()) == 2)
            deployment.kill(process)
            hashes = admitted()
            gate.set()
            yield path, port, words, hashes
    finally:
        gate.set()
        if process.poll() is None:
            deployment.kill(process)


def blob_of(path: Path, sha256: str) -> Path:
    return path / "blobs" / sha256[:2] / sha256


@pytest.mark.parametrize("damage", ["a bit in the middle", "half is left", "the file is gone"])
def test_a_damaged_update_is_asked_for_again(tmp_path: Path, damage: str) -> None:
    with interrupted(tmp_path) as (path, _, words, hashes):
        DAMAGES[damage](blob_of(path, hashes["north"]))
        assert served(path, words) == 0
    whole(path, words)
    assert '"kind":"lost"' in (path / "events.jsonl").read_text()


def test_a_damaged_release_of_the_open_round_ends_the_start_in_words(tmp_path: Path) -> None:
    with interrupted(tmp_path) as (path, _, words, _):
        db = sqlite3.connect(path / "coordinator.sqlite")
        (opened,) = db.execute("SELECT opened FROM rounds WHERE round = 2").fetchone()
        db.close()
        sha256 = json.loads(opened)["sent"]["north"]["instruction"]["release"][0]
        flipped(blob_of(path, sha256), 200)
        found = served(path, words)
        assert isinstance(found, CheckpointError), found
        assert found.exit_code == 2
        assert sha256[:12] in str(found)
        assert "restore the folder" in str(found).lower()
        flipped(blob_of(path, sha256), 200)  # restored from a copy
        assert served(path, words) == 0
    whole(path, words)


def test_a_release_that_a_disk_changes_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site notices by its hash, says so, and the round goes on. Stated difference: the site does not count in it."""
    words = words_in(tmp_path)
    seen = threading.Event()

    class Slow(Synthetic):
        def train(self, instruction: Any, progress: Any) -> Any:
            if instruction.round == 1:
                eventually(seen.is_set, 30)
            return super().train(instruction, progress)

    from lamina.server.store.blobs import BlobStore

    put = BlobStore.put
    kept: list[Path] = []

    def damaged(self: Any, content: bytes) -> Any:
        blob = put(self, content)
        with contextlib.suppress(Exception):
            if len(kept) == 0 and b"lora_A" in content and len(content) > 1000 and b"block" in content:
                kept.append(Path(str(blob.content)))
                flipped(kept[0], len(content) - 5)
        return blob

    monkeypatch.setattr(BlobStore, "put", damaged)
    with deployment.coordinator(tmp_path / "run", words) as running, sites(tmp_path, running.port):
        seen.set()
        assert running.join() == 0
    assert kept
    records = run_directory.read_records(running.path)
    missed = [(one["client_id"], record["round"]) for record in records for one in record["rejections"]]
    assert missed
    assert {one["reason"] for record in records for one in record["rejections"]} == {"failed"}


# --- database and log ---


def opened(path: Path, words: list[str]) -> BaseException | None:
    """What a start says, up to the point where it would listen."""
    try:
        run = opening.open_run(deployment.config_of(words), path, lambda *_, **__: None, SYSTEM).run
    except LaminaError as error:
        return error
    run.store.db.close()
    return None


def test_a_cut_database_ends_the_start_in_words(ended: Path, tmp_path: Path) -> None:
    size = (ended / "run" / "coordinator.sqlite").stat().st_size
    for length in (0, 1, 15, 99, 100, 4095, 4096, 4097, size // 2, size - 4096, size - 1):
        path, words = copied(ended, tmp_path / "run")
        os.truncate(path / "coordinator.sqlite", length)
        found = opened(path, words)
        assert isinstance(found, CheckpointError | StorageError), (length, found)
        assert "expected" in str(found)


def test_no_byte_of_a_database_makes_a_start_fail_without_words(ended: Path, tmp_path: Path) -> None:
    """SQLite keeps no checksums, so a bit may pass unseen; then the run goes on to its end, or says what is wrong."""
    content = (ended / "run" / "coordinator.sqlite").read_bytes()
    outcomes: dict[str, int] = {}
    for index, at in enumerate(range(3, len(content), max(1, len(content) // 150))):
        path, words = copied(ended, tmp_path / "run")
        flipped(path / "coordinator.sqlite", at)
        found = opened(path, words) if index % 10 else relaunched(path, words)[0]
        outcomes[type(found).__name__] = outcomes.get(type(found).__name__, 0) + 1
        assert not isinstance(found, BaseException) or isinstance(found, LaminaError)
    assert outcomes.keys() <= {"NoneType", "int", "CheckpointError", "StorageError", "ConfigError", "IdentityError"}
    assert outcomes.get("CheckpointError", 0) > 3


def test_a_database_that_is_gone_or_another_file(ended: Path, tmp_path: Path) -> None:
    path, words = copied(ended, tmp_path / "run")
    (path / "coordinator.sqlite").write_bytes(b"Dear operator" * 1000)
    found = opened(path, words)
    assert isinstance(found, CheckpointError)
    assert "expected the coordinator's database" in str(found)
    (path / "coordinator.sqlite").unlink()
    found = opened(path, words)
    assert isinstance(found, ConfigError)
    assert "expected a new or empty directory" in str(found)


def test_the_event_log_torn_is_mended_and_changed_is_told(ended: Path, tmp_path: Path) -> None:
    path, words = copied(ended, tmp_path / "run")
    log = path / "events.jsonl"
    before = log.read_bytes()
    with log.open("ab") as file:
        file.write(b'{"n": 99, "kind": "rou')  # as a crash leaves it
    assert opened(path, words) is None
    after = log.read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == before.count(b"\n") + 1  # the restart
    lines = before.splitlines(keepends=True)
    changes = {
        "a record changed": before.replace(b'"north"', b'"south"', 1),
        "a record gone": b"".join(lines[:3] + lines[4:]),
        "the end gone": b"".join(lines[:-2]),
        "two swapped": b"".join([*lines[:2], lines[3], lines[2], *lines[4:]]),
        "one more": before + lines[-1],
        "nothing left": b"",
    }
    for what, content in changes.items():
        path, words = copied(ended, tmp_path / "run")
        (path / "events.jsonl").write_bytes(content)
        found = opened(path, words)
        assert isinstance(found, CheckpointError), (what, found)
        assert found.exit_code == 2
        assert "restore both from the same copy" in str(found), what


# --- a site's disk that forgets ---


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("name", ["update.safetensors", "meta.json"])
def test_a_damaged_spool_is_told_and_without_it_the_round_is_trained_again(
    tmp_path: Path, name: str, damage: str
) -> None:
    """The agent does not send what it cannot vouch for: it names the folder to remove."""
    spool = Spool(tmp_path / "spool")
    from lamina.client.spool import Finished
    from lamina.protos.blobs import blob

    spool.save(Finished(2, "ab" * 32, 1, blob(b"update" * 50), {"state.json": b"{}" * 20}))
    (folder,) = (tmp_path / "spool").glob("finished-*")
    DAMAGES[damage](folder / name)
    with pytest.raises(CheckpointError, match="Remove that folder; its round is trained again") as caught:
        Spool(tmp_path / "spool").load()
    assert str(folder) in str(caught.value)
    shutil.rmtree(folder)
    assert Spool(tmp_path / "spool").load() is None


def test_a_site_with_a_damaged_spool_comes_back_without_it(tmp_path: Path) -> None:
    port = deployment.free_port()
    words = words_in(tmp_path, f"coordinator.listen=127.0.0.1:{port}")
    gate = threading.Event()

    class Held(Synthetic):
        def train(self, instruction: Any, progress: Any) -> Any:
            if instruction.round == 2:
                eventually(gate.is_set, 60)
            return super().train(instruction, progress)

    with (
        deployment.coordinator(tmp_path / "run", words) as running,
        sites(tmp_path, port, NAMES[:1]),
        sites(tmp_path, port, NAMES[1:2], worker=Held("south")),
    ):
        west = deployment.agent("west", port, tmp_path / "west")
        thread, _ = in_thread(west)
        eventually(lambda: bool(list((tmp_path / "west").glob("*/finished-000002/meta.json"))))
        west.stop()
        thread.join(20)
        (folder,) = (tmp_path / "west").glob("*/finished-000002")
        flipped(folder / "update.safetensors", 700)
        again, outcome = in_thread(deployment.agent("west", port, tmp_path / "west"))
        again.join(20)
        (error,) = outcome
        assert isinstance(error, CheckpointError)
        assert error.exit_code == 2
        assert str(folder) in str(error)
        shutil.rmtree(folder)
        with sites(tmp_path, port, ("west",)):
            gate.set()
            assert running.join() == 0
    whole(running.path, words)


def test_a_fetched_release_that_a_disk_has_changed_is_fetched_again(tmp_path: Path) -> None:
    """It is kept from the measuring before a round to the round; its content is looked at each time."""
    words = words_in(tmp_path)

    class Damaging(Synthetic):
        def measure(self, instruction: Any) -> Any:
            found = super().measure(instruction)
            for path in (tmp_path / "west").glob("*/releases/*"):
                flipped(path, path.stat().st_size - 3)
            return found

    with (
        deployment.coordinator(tmp_path / "run", words) as running,
        sites(tmp_path, running.port, NAMES[:2]),
        sites(tmp_path, running.port, ("west",), worker=Damaging("west")),
    ):
        assert running.join() == 0
    whole(running.path, words)


def test_a_folder_that_a_crash_has_left_half_written_is_no_finished_update(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        full_at(patched, r"folder.*b$|\.b\.partial", 1)
        with pytest.raises(OSError, match="No space"):
            files.write_folder(tmp_path / "folder", {"a": b"1", "b": b"2" * 100, "c": b"3"})
    assert not (tmp_path / "folder").exists()
    files.write_folder(tmp_path / "folder", {"a": b"1", "b": b"2" * 100, "c": b"3"})
    assert (tmp_path / "folder" / "b").read_bytes() == b"2" * 100
