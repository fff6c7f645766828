"""Disks that forget: what is damaged is noticed by its hash and made, asked for or fetched again; where it cannot be, it is said.

Every file that a coordinator or a site needs after a restart is cut and changed here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.client.spool import Finished, Spool
from lamina.protos import files
from lamina.protos.blobs import blob
from lamina.protos.clock import SYSTEM, Clock
from lamina.protos.errors import CheckpointError, ConfigError, LaminaError, StorageError
from lamina.server import coordinator as coordinators
from lamina.server.opening import DATABASE, open_run
from lamina.server.store import checkpoint, run_directory
from lamina.server.store.blobs import BlobStore
from tests import deployment
from tests.deployment import NAMES, Synthetic, in_thread
from tests.e2e.faults.disks import full_at, served, sites, whole, words_in
from tests.hostile import eventually

# Nobody dials in where only the coordinator's own files are in question: its waits for sites are short.
FAST = Clock(rate=200.0)


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
        ended / "spec.json", "insecure=true", "wire.heartbeat_s=1", "coordinator.listen=127.0.0.1:0"
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
            deployment.config_of(words), path, lambda event, **more: said.append({"event": event, **more}), FAST
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
    for kept in (path / "blobs").glob("??/*"):
        flipped(kept, 40)
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
        def train(self, instruction: Any, progress: Any, allow: Any) -> Any:
            if instruction.round == 2:
                eventually(gate.is_set, 60)
            return super().train(instruction, progress, allow)

    try:
        with sites(tmp_path, port, NAMES[:2]), sites(tmp_path, port, ("west",), worker=Held("west")):

            def admitted() -> dict[str, str]:
                text = (path / "events.jsonl").read_text() if (path / "events.jsonl").exists() else ""
                whole_lines = text.rpartition("\n")[0].splitlines()  # the last may be half written yet
                events = [(one["kind"], one["fields"]) for one in map(json.loads, whole_lines)]
                mine = [(kind, fields) for kind, fields in events if fields.get("round") == 2]
                done = {fields["client_id"] for kind, fields in mine if kind == "admitted"}
                sent = {fields["client_id"]: fields["sha256"] for kind, fields in mine if kind == "received"}
                return {client: sha256 for client, sha256 in sent.items() if client in done}

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


@pytest.mark.parametrize("damage", ["a bit in the middle", "the file is gone"])
def test_a_damaged_update_is_asked_for_again(tmp_path: Path, damage: str) -> None:
    with interrupted(tmp_path) as (path, _, words, hashes):
        DAMAGES[damage](blob_of(path, hashes["north"]))
        assert served(path, words) == 0
    whole(path, words)
    assert '"kind":"lost"' in (path / "events.jsonl").read_text()


def test_a_damaged_release_of_the_open_round_ends_the_start_in_words(tmp_path: Path) -> None:
    with interrupted(tmp_path) as (path, _, words, _):
        db = sqlite3.connect(path / DATABASE)
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


def test_a_release_that_a_disk_changes_while_the_run_goes_on(tmp_path: Path) -> None:
    """The site notices by its hash and says so; the run ends in words before it would go on from what it does not have.

    Stated difference: the site does not count in that round once the file is restored.
    """
    port = deployment.free_port()
    words = words_in(tmp_path, f"coordinator.listen=127.0.0.1:{port}")
    put = BlobStore.put
    kept: list[Path] = []
    said: list[dict[str, Any]] = []

    def damaged(self: BlobStore, content: bytes) -> Any:
        made = put(self, content)
        if not kept and b"lora_A" in content and len(content) > 1500:  # of one site's rank, after a round
            kept.append(Path(str(made.content)))
            flipped(kept[0], len(content) - 5)
        return made

    with sites(tmp_path, port, log=lambda event, **more: said.append({"event": event, **more})):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(BlobStore, "put", damaged)
            found = served(tmp_path / "run", words)
        assert isinstance(found, CheckpointError), found
        assert kept[0].name[:12] in str(found)
        assert {one["code"] for one in said if one["event"] == "failed"} <= {"release"}
        assert [one for one in said if "other content" in str(one.get("message"))]
        flipped(kept[0], kept[0].stat().st_size - 5)
        assert served(tmp_path / "run", words) == 0
    records = run_directory.read_records(tmp_path / "run")
    missed = [(one["client_id"], record["round"]) for record in records for one in record["rejections"]]
    assert [number for _, number in missed] == [2]
    whole(tmp_path / "run", words, tuple(missed))


# --- database and log ---


def opened(path: Path, words: list[str]) -> BaseException | None:
    """What a start says, up to the point where it would listen."""
    try:
        run = open_run(deployment.config_of(words), path, lambda *_, **__: None, SYSTEM).run
    except LaminaError as error:
        return error
    run.store.db.close()
    return None


def test_a_cut_database_ends_the_start_in_words(ended: Path, tmp_path: Path) -> None:
    size = (ended / "run" / DATABASE).stat().st_size
    for length in (0, 1, 15, 99, 100, 4095, 4096, 4097, size // 2, size - 4096, size - 1):
        path, words = copied(ended, tmp_path / "run")
        os.truncate(path / DATABASE, length)
        found = opened(path, words)
        if found is None:  # what is cut off was on a page that holds nothing
            assert length == size - 1
            assert relaunched(path, words)[0] == 0
            whole(path, words)
            continue
        assert isinstance(found, CheckpointError | StorageError), (length, found)
        assert "expected" in str(found)


def test_no_byte_of_a_database_makes_a_start_fail_without_words(ended: Path, tmp_path: Path) -> None:
    """SQLite keeps no checksums, so a bit may pass unseen; then the run goes on to its end, or says what is wrong."""
    content = (ended / "run" / DATABASE).read_bytes()
    outcomes: dict[str, int] = {}
    for index, at in enumerate(range(3, len(content), max(1, len(content) // 110))):
        path, words = copied(ended, tmp_path / "run")
        flipped(path / DATABASE, at)
        found = opened(path, words) if index % 30 else relaunched(path, words)[0]
        outcomes[type(found).__name__] = outcomes.get(type(found).__name__, 0) + 1
        assert not isinstance(found, BaseException) or isinstance(found, LaminaError)
    assert outcomes.keys() <= {"NoneType", "int", "CheckpointError", "StorageError", "ConfigError", "IdentityError"}
    assert outcomes.get("CheckpointError", 0) > 3


def test_a_database_that_is_gone_or_another_file(ended: Path, tmp_path: Path) -> None:
    path, words = copied(ended, tmp_path / "run")
    (path / DATABASE).write_bytes(b"Dear operator" * 1000)
    found = opened(path, words)
    assert isinstance(found, CheckpointError)
    assert "expected the coordinator's database" in str(found)
    content = (ended / "run" / DATABASE).read_bytes()
    (path / DATABASE).write_bytes(content.replace(b"CREATE TABLE rounds", b"CREATE T\xf4BLE rounds", 1))
    found = opened(path, words)  # SQLite's own message quotes it and is then no text
    assert isinstance(found, CheckpointError), found
    (path / DATABASE).unlink()
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

    spool.save(Finished(2, "ab" * 32, 1, blob(b"update" * 50), {"state.json": b"{}" * 20}))
    (folder,) = (tmp_path / "spool").glob("finished-*")
    DAMAGES[damage](folder / name)
    with pytest.raises(CheckpointError, match="Remove that folder; its round is trained again") as caught:
        Spool(tmp_path / "spool").load()
    assert str(folder) in str(caught.value)
    shutil.rmtree(folder)
    assert Spool(tmp_path / "spool").load() is None


def admitted_in(path: Path) -> list[dict[str, Any]]:
    """Updates that count, as the log says; a line that is being written is left out."""
    text = (path / "events.jsonl").read_text() if (path / "events.jsonl").exists() else ""
    found = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
    return [{"kind": one["kind"]} | one["fields"] for one in found if one["kind"] == "admitted"]


def test_a_site_with_a_damaged_spool_comes_back_without_it(tmp_path: Path) -> None:
    port = deployment.free_port()
    words = words_in(tmp_path, f"coordinator.listen=127.0.0.1:{port}")
    gate = threading.Event()

    class Held(Synthetic):
        def train(self, instruction: Any, progress: Any, allow: Any) -> Any:
            if instruction.round == 2:
                eventually(gate.is_set, 60)
            return super().train(instruction, progress, allow)

    with (
        deployment.coordinator(tmp_path / "run", words) as running,
        sites(tmp_path, port, NAMES[:1]),
        sites(tmp_path, port, NAMES[1:2], worker=Held("south")),
    ):
        west = deployment.agent("west", port, tmp_path / "west")
        thread, _ = in_thread(west)
        taken_in = {"kind": "admitted", "round": 2, "client_id": "west"}
        eventually(lambda: taken_in in admitted_in(running.path))
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
