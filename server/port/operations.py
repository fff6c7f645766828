"""The operators' and auditors' methods of the port: look, pause, stop, fetch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc

from lamina.protos import coordinator_pb2 as pb
from lamina.protos.coordinator_pb2_grpc import CoordinatorServicer
from lamina.server.export import write_adapter
from lamina.server.port.access import refuse
from lamina.server.port.run import Run
from lamina.server.store.run_directory import read_records

_FILES = (
    "config.yaml", "rounds.jsonl", "summary.json", "layers.json", "events.jsonl", "ca.pem", "report.html",
    "adapter/*", "latest/*",
)  # fmt: skip
_PIECE_BYTES = 1024**2
# Individual updates leave the coordinator to auditors only.
_AUDITORS_FILES = ("rounds/*/*.safetensors", "rounds/*/*/*.safetensors")


class Operators(CoordinatorServicer):
    """Status, Watch, Pause, Stop, ListFiles, Fetch."""

    run: Run

    def Status(self, request: pb.StatusRequest, context: Any) -> pb.Document:
        """Where the run stands."""
        return pb.Document(json=json.dumps(status(self.run)))

    def Watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.Document]:
        """The record of each round after one, as they are announced, with the status in between."""
        run, after, last = self.run, request.after_round, None
        while context.is_active():
            run.access.check_open(context.caller, context)
            for record in read_records(run.store.path):
                if record["round"] > after:
                    after = record["round"]
                    yield pb.Document(json=json.dumps({"record": record}))
            now = status(run)
            # Silences alone are no news: they grow all the time.
            clients = [{key: one[key] for key in one if key != "silent_s"} for one in now["clients"]]
            shown = {key: now[key] for key in ("state", "round", "rejections")} | {"clients": clients}
            if shown != last:
                last = shown
                yield pb.Document(json=json.dumps({"status": now}))
            if run.live.ended:
                return
            run.clock.sleep(0.5)

    def Pause(self, request: pb.PauseRequest, context: Any) -> pb.Document:
        """Open no further round, or go on."""
        kind = "pause" if request.paused else "unpause"
        self._order(context, kind, {"paused": str(int(request.paused))})
        self.run.mailbox.poke()
        return pb.Document(json=json.dumps(status(self.run)))

    def Stop(self, request: pb.StopRequest, context: Any) -> pb.Document:
        """End the run after the open round, or at once."""
        self._order(context, "stop", {"stopping": "1"}, now=request.now)
        if request.now:
            self.run.mailbox.end("stopped")
        else:
            self.run.mailbox.poke()
        return pb.Document(json=json.dumps(status(self.run)))

    def _order(self, context: Any, kind: str, facts: Mapping[str, str], **fields: Any) -> None:
        """Remember what an operator wants, unless the run is over."""
        if not self.run.store.note(kind, facts, unless="ended", by=context.caller.name, **fields):
            refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "the run is over; nothing was changed.")

    def ListFiles(self, request: pb.FilesRequest, context: Any) -> pb.Document:
        """Names, lengths and hashes of the files that the caller may fetch."""
        with self.run.live.files:
            self._latest()
            found = self._allowed(context.caller.role)
            files = [{"name": name} | _version(path) for name, path in found.items()]
        return pb.Document(json=json.dumps(files))

    def Fetch(self, request: pb.FetchRequest, context: Any) -> Iterator[pb.Part]:
        """One file, from a byte on."""
        with self.run.live.files:
            path = self._allowed(context.caller.role).get(request.name)
            if path is None:
                told = f"{request.name[:200]!r}: no such file. See what ListFiles names."
                refuse(context, grpc.StatusCode.NOT_FOUND, told)
            file = path.open("rb")
        with file:
            if request.offset > os.fstat(file.fileno()).st_size:
                refuse(context, grpc.StatusCode.OUT_OF_RANGE, f"{request.name}: expected an offset within the file.")
            file.seek(request.offset)
            while data := file.read(self.run.config.wire.chunk_bytes):
                self.run.access.check_open(context.caller, context)
                yield pb.Part(data=data)

    def _allowed(self, role: str) -> dict[str, Path]:
        root = self.run.store.path
        patterns = (*_FILES, *(_AUDITORS_FILES if role == "auditor" else ()))
        found = (path for pattern in patterns for path in sorted(root.glob(pattern)))
        return {path.relative_to(root).as_posix(): path for path in found if path.is_file() and not path.is_symlink()}

    def _latest(self) -> None:
        """While the run goes on, the adapter of its last round under `latest/`."""
        run, last = self.run, self.run.live.latest
        if last is None or not last.round or (run.store.path / "adapter").exists():
            return
        folder, stamp = run.store.path / "latest", f"{last.round}\n"
        if not (folder / "round.txt").exists() or (folder / "round.txt").read_text() != stamp:
            write_adapter(folder, last.adapter, run.campaign.spec, {"round.txt": stamp.encode()})


def _version(path: Path) -> dict[str, Any]:
    """Length and hash of a file as it is now; it may grow at any time."""
    found = path.stat()
    return {"num_bytes": found.st_size, "sha256": _sha256(path, found.st_size, found.st_mtime_ns, found.st_ino)}


@lru_cache(maxsize=65536)
def _sha256(path: Path, num_bytes: int, *version: int) -> str:
    """Of a file's first bytes, kept for as long as it is the same version."""
    running = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(min(_PIECE_BYTES, num_bytes)):
            running.update(data)
            num_bytes -= len(data)
    return running.hexdigest()


def status(run: Run) -> dict[str, Any]:
    """Where a run stands.

    Args:
        run: The run.

    Returns:
        JSON values.
    """
    number = run.store.counting_round()
    done = {client for (client,) in run.store.db.rows("SELECT client_id FROM updates WHERE round = ?", number)}
    records = read_records(run.store.path)
    registered = run.roster.registered()
    clients = []
    for client, rank, number_format in run.store.db.rows(
        "SELECT client_id, rank, format FROM clients ORDER BY client_id"
    ):
        silent = run.roster.silent_s(client)
        asked = run.mailbox.unanswered(client)
        training = asked.instruction.round if asked and asked.instruction.kind == "train" else 0
        said, step = run.roster.progress(client)
        clients.append(
            {
                "client_id": client,
                "rank": rank,
                "format": number_format or None,
                "registered": client in registered,
                "silent_s": None if silent == float("inf") else round(silent, 1),
                "asked": asked.instruction.kind if asked else None,
                "training_round": training,
                "step": step if said == training else 0,
                "answered": client in done,
            }
        )
    head = run.store.head()
    return {
        "run_id": run.campaign.run_id,
        "state": _state(run, number),
        "round": min(number, run.campaign.rounds),
        "round_open": _is_open(run, number),
        "rounds": run.campaign.rounds,
        "steps": run.config.train.local_steps,
        "clients_to_start": run.config.clients.start or run.config.clients.count,
        "rounds_done": records[-1]["round"] if records else 0,
        "loss": records[-1]["loss"] if records else None,
        "privacy": _privacy(run, records[-1]["epsilon"] if records else 0.0),
        "clients": clients,
        "rejections": run.store.db.rows("SELECT coalesce(sum(times), 0) FROM rejections WHERE round = ?", number)[0][0],
        "log": {"n": head.n, "hash": head.hash},
        "revocations": run.access.fault or "in force",
    }


def _privacy(run: Run, epsilon: float) -> dict[str, Any] | None:
    """What was promised and what is spent; None without privacy."""
    promise = run.campaign.promise
    if promise is None:
        return None
    remaining = None if promise.budget is None else max(0.0, promise.budget - epsilon)
    told = {"mode": promise.mode, "unit": promise.unit, "delta": promise.target_delta, "epsilon": epsilon}
    return told | {"budget": promise.budget, "remaining": remaining}


def _state(run: Run, number: int) -> str:
    if ended := run.live.ended or run.store.db.fact("ended"):
        return ended
    if run.store.db.fact("stopping") == "1":
        return "stopping"
    if _is_open(run, number):
        return "collecting"
    if run.store.db.fact("paused") == "1":
        return "paused"
    return "between rounds"


def _is_open(run: Run, number: int) -> bool:
    return bool(run.store.db.rows("SELECT 1 FROM rounds WHERE round = ? AND NOT closed", number))
