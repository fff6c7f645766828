"""The store of a deployment: each step of a round is in SQLite, its adapters in blobs beside it, before anyone is told.

What is there after a crash is enough to go on to the same bits: the open round with its releases, the updates that were
admitted, whether the round was closed, and the checkpoint. Events go into the log in the transaction of what they record.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lamina.protos import record as log_record
from lamina.protos.blobs import Blob
from lamina.protos.chain import countersignature
from lamina.protos.clock import Clock
from lamina.protos.codec import opened as opened_adapter
from lamina.protos.codec import opened_update
from lamina.protos.errors import CheckpointError, UpdateRejected
from lamina.protos.messages import Instruction, Rejection, Release, Reply
from lamina.protos.statements import BadStatement, budget_document, budget_of, instruction_document, instruction_of
from lamina.server.releases import Sent
from lamina.server.store import events
from lamina.server.store.base import Collected, Completed, Opened
from lamina.server.store.blobs import BlobStore, is_whole
from lamina.server.store.database import Database, set_fact
from lamina.server.store.run_directory import RunDirectory

EVENTS = events.FILE_NAME


@dataclass(frozen=True)
class Received:
    """An update that is whole on disk.

    Attributes:
        instruction: What it answers.
        blob: Its content.
        claim: The signed statement that came with it.
        signature: Over the claim.
        witness: A countersignature over a head of the log: n, hash, signature in hex; or None.
    """

    instruction: Instruction
    blob: Blob
    claim: bytes
    signature: bytes
    witness: tuple[int, str, str] | None = None


@dataclass(frozen=True)
class DeploymentStore(RunDirectory):
    """A store that survives a kill at any point.

    Attributes:
        db: The database.
        blobs: Encoded releases and updates.
        clock: For times in the log.
        sign: Signs the hash of a record of the log.
        carry_rounds: See `Campaign`.
        told: Given each record of the log once it is on disk.
        lock: Held while a blob is there that the database does not name yet.
    """

    db: Database = field(kw_only=True)
    blobs: BlobStore = field(kw_only=True)
    clock: Clock = field(kw_only=True)
    sign: Callable[[bytes], bytes] = field(kw_only=True)
    carry_rounds: int = field(default=0, kw_only=True)
    told: Callable[[Mapping[str, Any]], None] = field(default=lambda record: None, kw_only=True)
    lock: threading.RLock = field(default_factory=threading.RLock, kw_only=True)

    # The log.

    def log(self, connection: Any, kind: str, **fields: Any) -> None:
        """Add an event within the transaction of what it records."""
        events.append(connection, kind, fields, self.clock.now(), self.sign)

    def mirror(self) -> None:
        """Copy committed events to `events.jsonl`."""
        with self.db.alone() as connection:
            lines = events.flush(connection, self.path / EVENTS)
        for line in lines:
            self.told(json.loads(line))

    def head(self) -> log_record.Head:
        """Where the log ends."""
        with self.db.alone() as connection:
            return events.head(connection)

    def hash_at(self, n: int) -> str | None:
        """The hash of a record of the log."""
        with self.db.alone() as connection:
            return events.hash_at(connection, n)

    def note(self, kind: str, facts: Mapping[str, str] | None = None, unless: str = "", **fields: Any) -> bool:
        """An event by itself, with facts that change with it; False, and nothing, where the fact `unless` is set."""
        with self.db.change() as connection:
            if unless and self.db.fact(unless):
                return False
            for name, value in (facts or {}).items():
                set_fact(connection, name, value)
            self.log(connection, kind, **fields)
        self.mirror()
        return True

    # A round's steps, in their order.

    def keep(self, content: bytes) -> Blob:
        """Keep an encoded release."""
        return self.blobs.put(content)

    def open(self, opened: Opened) -> None:
        """The round with everyone's instruction."""
        with self.db.change() as connection:
            query = "INSERT INTO rounds (round, opened) VALUES (?, ?)"
            connection.execute(query, (opened.round, _document(opened)))
            self._log_open(connection, opened)
        self.mirror()

    def open_again(self, opened: Opened) -> None:
        """The round with more clients; refusals in it are still counted, but answer nothing."""
        with self.db.change() as connection:
            query = "UPDATE rounds SET opened = ? WHERE round = ?"
            connection.execute(query, (_document(opened), opened.round))
            connection.execute("UPDATE rejections SET final = 0 WHERE round = ?", (opened.round,))
            set_fact(connection, "missed", "")
            self._log_open(connection, opened)
        self.mirror()

    def _log_open(self, connection: Any, opened: Opened) -> None:
        releases = sorted({one.instruction.release_hash for one in opened.sent.values()})
        self.log(connection, "round", round=opened.round, asked=sorted(opened.sent), releases=releases)

    def miss(self, round_number: int) -> None:
        """The round had too few updates."""
        self.note("missed", {"missed": str(round_number)}, round=round_number)

    def missed(self, round_number: int) -> bool:
        """Whether the open round had too few updates."""
        return self.db.fact("missed") == str(round_number)

    def opened(self, round_number: int) -> Opened | None:
        """The round as it was opened, its releases read from their blobs."""
        found = self.db.rows("SELECT opened FROM rounds WHERE round = ?", round_number)
        if not found:
            return None
        try:
            return self._opened(round_number, json.loads(found[0][0]))
        except (ValueError, KeyError, TypeError, AttributeError, BadStatement, UpdateRejected) as error:
            raise CheckpointError(
                f"{self.path}: expected round {round_number} in the database as it was opened, got {error!r}. "
                "Restore the directory from a copy, or begin again in a new one."
            ) from None

    def _opened(self, round_number: int, document: Mapping[str, Any]) -> Opened:
        budgets = {name: budget_of(budget) for name, budget in document["budgets"].items()}
        sent = {}
        for client, one in document["sent"].items():
            instruction = instruction_of(one["instruction"], self._whole)
            frozen = None if instruction.frozen is None else opened_adapter(instruction.frozen)
            decoded = Release(
                version=instruction.version,
                trainable=opened_adapter(instruction.release),
                frozen=frozen,
                train=instruction.train,
                frozen_since=instruction.frozen_since,
                keep_frozen=instruction.keep_frozen,
            )
            sent[client] = Sent(instruction, budgets[one["budget"]], decoded)
        return Opened(round_number, sent, document["wanted"])

    def _whole(self, sha256: str, num_bytes: int) -> Blob:
        blob = self.blobs.find(sha256)
        if blob is None or blob.num_bytes != num_bytes or not is_whole(blob):
            raise CheckpointError(
                f"{self.blobs.root}: expected the release {sha256[:12]}… of the open round, it is gone or changed. "
                "Restore the folder from a copy, or remove the run directory and begin again."
            )
        return blob

    def stragglers(self, round_number: int) -> Mapping[str, Sent]:
        """Who was asked in a round and has not answered."""
        before = self.opened(round_number)
        if before is None:
            return {}
        answered = {client for (client,) in self.db.rows("SELECT client_id FROM updates WHERE round = ?", round_number)}
        answered |= {rejection.client_id for rejection in self._rejections(round_number, final=True)}
        return {client: one for client, one in before.sent.items() if client not in answered}

    def receive(self, round_number: int, received: Received) -> None:
        """An update is whole on disk: remember it before the client is told so.

        Args:
            round_number: In which it counts.
            received: The update.

        Raises:
            UpdateRejected: If its round has closed and its client is not waited for longer.
        """
        claim, blob, client = received.instruction, received.blob, received.instruction.client_id
        self.check_awaited(round_number, claim)
        values = (round_number, client, blob.sha256, blob.num_bytes, received.claim, received.signature, "received")
        before = self.known(round_number, client)
        with self.db.change() as connection:
            connection.execute("INSERT OR REPLACE INTO updates VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            if received.witness is not None:
                n, seen, signature = received.witness
                head = log_record.Head(n, seen)
                self.log(connection, "countersign", **countersignature(client, head, bytes.fromhex(signature)))
            self.log(connection, "received", round=claim.round, client_id=client, sha256=blob.sha256)
        if before is not None and not self.db.rows("SELECT 1 FROM updates WHERE sha256 = ?", before[0]):
            self.blobs.drop(before[0])  # it was rejected; a client could otherwise fill the disk with such
        self.mirror()

    def check_awaited(self, round_number: int, instruction: Instruction) -> None:
        """Raise `UpdateRejected` unless an answer to an instruction would still count in a round."""
        if round_number - instruction.round > self.carry_rounds:
            raise UpdateRejected(
                "late",
                f"client {instruction.client_id}, round {instruction.round}: expected an update before the round closed.",
            )

    def unjudged(self, round_number: int) -> list[Reply]:
        """Updates that were received and neither admitted nor rejected when the loop ended."""
        query = "SELECT client_id, sha256 FROM updates WHERE round = ? AND status = 'received' ORDER BY client_id"
        found = ((client, self.blobs.find(sha256)) for client, sha256 in self.db.rows(query, round_number))
        return [Reply(client, blob) for client, blob in found if blob is not None and is_whole(blob)]

    def known(self, round_number: int, client_id: str) -> tuple[str, str] | None:
        """Hash and status of the update that a client has sent for a round, or None."""
        query = "SELECT sha256, status FROM updates WHERE round = ? AND client_id = ?"
        found = self.db.rows(query, round_number, client_id)
        return None if not found else (found[0][0], found[0][1])

    def known_anywhere(self, client_id: str, about: int, sha256: str) -> bool:
        """Whether this very update of a client is here already, in the round that it is about or a later one."""
        query = "SELECT 1 FROM updates WHERE client_id = ? AND sha256 = ? AND round >= ? AND status != 'rejected'"
        return bool(self.db.rows(query, client_id, sha256, about))

    def admit(self, round_number: int, reply: Reply) -> None:
        """The update counts."""
        self._judge(round_number, reply.client_id, "admitted")

    def reject(self, round_number: int, rejection: Rejection) -> None:
        """The update does not count; one line for each client and reason, however often it comes."""
        with self.db.change() as connection:
            query = "SELECT times FROM rejections WHERE round = ? AND client_id = ? AND reason = ?"
            key = (round_number, rejection.client_id, rejection.reason)
            if connection.execute(query, key).fetchone() is None:
                code = {"code": rejection.message} if rejection.reason == "failed" else {}  # from a fixed list
                who = {"client_id": rejection.client_id, "reason": rejection.reason}
                self.log(connection, "reject", round=round_number, **who, **code)
            connection.execute(
                "INSERT INTO rejections VALUES (?, ?, ?, ?, ?, 1) "
                "ON CONFLICT (round, client_id, reason) DO UPDATE SET times = times + 1, final = max(final, excluded.final)",
                (*key, rejection.message[:500], rejection.final),
            )
            if rejection.final:
                connection.execute(
                    "UPDATE updates SET status = 'rejected' WHERE round = ? AND client_id = ? AND status = 'received'",
                    key[:2],
                )
        self.mirror()

    def times_refused(self, round_number: int, client_id: str) -> int:
        """How many updates of a client were judged and refused in a round."""
        query = "SELECT COALESCE(SUM(times), 0) FROM rejections WHERE round = ? AND client_id = ? AND final"
        return int(self.db.rows(query, round_number, client_id)[0][0])

    def refused(self, round_number: int) -> list[Rejection]:
        """Refusals of messages that were no answer."""
        return self._rejections(round_number, final=False)

    def _rejections(self, round_number: int, final: bool) -> list[Rejection]:
        query = (
            "SELECT client_id, reason, message FROM rejections WHERE round = ? AND final = ? ORDER BY client_id, reason"
        )
        return [
            Rejection(client, reason, message, final)
            for client, reason, message in self.db.rows(query, round_number, final)
        ]

    def counting_round(self) -> int:
        """The round whose report counts what happens now: the open one, or the next."""
        (last, closed), *_ = self.db.rows("SELECT round, closed FROM rounds ORDER BY round DESC LIMIT 1") or [(0, True)]
        return int(last) + bool(closed)

    def _judge(self, round_number: int, client_id: str, status: str) -> None:
        with self.db.change() as connection:
            connection.execute(
                "UPDATE updates SET status = ? WHERE round = ? AND client_id = ?", (status, round_number, client_id)
            )
            self.log(connection, status, round=round_number, client_id=client_id)
        self.mirror()

    def collected(self, round_number: int) -> Collected:
        """What was admitted and rejected before; an update whose file a disk has changed counts as not sent."""
        collected = Collected(
            closed=bool(self.db.rows("SELECT 1 FROM rounds WHERE round = ? AND closed", round_number))
        )
        query = "SELECT client_id, sha256, num_bytes FROM updates WHERE round = ? AND status = 'admitted' ORDER BY client_id"
        for client, sha256, num_bytes in self.db.rows(query, round_number):
            blob = self.blobs.find(sha256)
            if blob is None or not is_whole(blob):
                self._forget(round_number, client)
                collected.closed = False
                continue
            try:
                collected.updates[client] = opened_update(blob)
            except UpdateRejected:
                self._forget(round_number, client)
                continue
            collected.num_bytes += num_bytes
        collected.rejections = self._rejections(round_number, final=True)
        return collected

    def _forget(self, round_number: int, client_id: str) -> None:
        with self.db.change() as connection:
            connection.execute("DELETE FROM updates WHERE round = ? AND client_id = ?", (round_number, client_id))
            connection.execute("UPDATE rounds SET closed = 0 WHERE round = ?", (round_number,))
            self.log(connection, "lost", round=round_number, client_id=client_id)
        self.mirror()

    def reveal(self, round_number: int, survivors: tuple[str, ...]) -> None:
        """A sum of the round is about to be shown."""
        self.note(
            "reveal", {"revealed": json.dumps([round_number, *survivors])}, round=round_number, clients=list(survivors)
        )

    def revealed(self, round_number: int) -> tuple[str, ...]:
        """Whose sum may have been shown in a round."""
        about, *survivors = json.loads(self.db.fact("revealed") or "[0]")
        return tuple(survivors) if about == round_number else ()

    def summed(self, round_number: int, survivors: tuple[str, ...]) -> None:
        """These clients have answered; their updates are with them."""
        with self.db.change() as connection:
            for client in survivors:
                values = (round_number, client, "", 0, b"", b"", "summed")
                connection.execute("INSERT OR REPLACE INTO updates VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            self.log(connection, "summed", round=round_number, clients=list(survivors))
        self.mirror()

    def close(self, round_number: int) -> None:
        """No further update counts: a restarted loop aggregates just those that this one does."""
        with self.lock:
            received = "SELECT client_id FROM updates WHERE round = ? AND status = 'received'"
            late = [client for (client,) in self.db.rows(received, round_number)]
            carried = [client for client in late if self._counts_next(round_number, client)]
            for client in sorted({*late} - {*carried}):
                self.reject(round_number, Rejection(client, "late", "it came as the round closed.", final=False))
            with self.db.change() as connection:
                for client in carried:
                    connection.execute(
                        "UPDATE updates SET round = ? WHERE round = ? AND client_id = ?",
                        (round_number + 1, round_number, client),
                    )
                connection.execute("UPDATE rounds SET closed = 1 WHERE round = ?", (round_number,))
        self.mirror()

    def _counts_next(self, round_number: int, client_id: str) -> bool:
        """Whether what a client was asked may still be answered in the round after this one."""
        ((document,),) = self.db.rows("SELECT opened FROM rounds WHERE round = ?", round_number)
        asked = json.loads(document)["sent"][client_id]["instruction"]["round"]
        return bool(round_number + 1 - asked <= self.carry_rounds)

    def held(self, held: Mapping[str, int]) -> dict[str, int]:
        """What clients hold, but nothing for one that has lost it: it said less when it registered."""
        said = dict(self.db.rows("SELECT client_id, held FROM clients"))
        return {client: version if said.get(client, -1) >= version else -1 for client, version in held.items()}

    def save(self, completed: Completed) -> None:
        """Checkpoint, then the log, then what no restart can need any more is deleted."""
        super().save(completed)
        self.settle(completed)

    def settled(self) -> int:
        """The last round for which `settle` was done."""
        return int(self.db.fact("settled") or 0)

    def settle(self, completed: Completed) -> None:
        """What follows from a checkpoint; a restart does it where a kill came in between."""
        number, clients = completed.state.round, completed.record["clients"]
        with self.db.change() as connection:
            self.log(
                connection,
                "aggregate",
                round=number,
                clients=clients,
                relative_error=_finite(completed.state.relative_error),
            )
            for client in clients:
                connection.execute("UPDATE clients SET held = ? WHERE client_id = ?", (completed.held[client], client))
            set_fact(connection, "settled", str(number))
            # The checkpoint before this one can be gone on from, with this round's updates.
            oldest = number - max(1, self.keep_checkpoints - 1)
            for table in ("rounds", "updates", "rejections"):
                connection.execute(f"DELETE FROM {table} WHERE round <= ?", (oldest,))
        self.mirror()
        self.sweep(number + 1 - self.carry_rounds)

    def sweep(self, first_round: int) -> None:
        """Delete blobs that no round in the database names, and partial uploads for rounds before the first."""
        with self.lock:
            kept = {sha256 for (sha256,) in self.db.rows("SELECT sha256 FROM updates")}
            kept |= {value for (value,) in self.db.rows("SELECT value FROM facts WHERE name = 'spec'")}
            for (text,) in self.db.rows("SELECT opened FROM rounds"):
                for one in json.loads(text)["sent"].values():
                    instruction = one["instruction"]
                    kept |= {part[0] for part in (instruction["release"], instruction["frozen"]) if part}
            self.blobs.sweep(kept, first_round)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _document(opened: Opened) -> str:
    """A round as the database keeps it; equal budgets are written once."""
    budgets = {repr(one.budget): budget_document(one.budget) for one in opened.sent.values()}
    names = {key: str(index) for index, key in enumerate(budgets)}
    document = {
        "wanted": opened.wanted,
        "budgets": {names[key]: budget for key, budget in budgets.items()},
        "sent": {
            client: {"instruction": instruction_document(one.instruction), "budget": names[repr(one.budget)]}
            for client, one in opened.sent.items()
        },
    }
    return json.dumps(document)
