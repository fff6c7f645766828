"""The sites' methods of the port. Handlers check, store and hand over; what an update is worth the round loop decides.

An upload is answered `stored` only when it is in the database, so a client that was not told sends it again, and the second
time costs one message. Refusals that come before the round loop are counted here, by round, client and reason.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc

from lamina.protos import chain
from lamina.protos import coordinator_pb2 as pb
from lamina.protos import statements as st
from lamina.protos.blobs import Blob
from lamina.protos.chain import Head
from lamina.protos.clock import Clock
from lamina.protos.config import Config
from lamina.protos.coordinator_pb2_grpc import CoordinatorServicer
from lamina.protos.errors import ConfigError, UpdateRejected
from lamina.protos.growing import Growing
from lamina.protos.identity import verify
from lamina.protos.messages import Instruction, Rejection, Reply
from lamina.server.admission import size_cap_bytes
from lamina.server.campaign import Campaign
from lamina.server.port.access import Access, Caller, refuse
from lamina.server.port.mailbox import Mailbox
from lamina.server.port.roster import Roster
from lamina.server.port.terms import terms
from lamina.server.store.deployment import DeploymentStore, Received
from lamina.strategies.base import ServerState

_ACK_BYTES = 8 * 1024**2
# All that waits to be sent down, and the least that is worth a message.
_DOWNLOAD_BYTES, _LEAST_PART_BYTES = 16 * 1024**2, 64 * 1024
_OUT_OF_TURN = grpc.StatusCode.FAILED_PRECONDITION
_EARLY = "the coordinator is starting. Nothing is lost; try again."
_FAILURES = (
    "out-of-memory", "training", "release", "policy", "data", "disk", "held-version", "base", "internal",
)  # fmt: skip


@dataclass
class Live:
    """What changes while a run goes on, and need not outlive the process.

    Attributes:
        ended: Why the run is over, once it is: finished, stopped or drained.
        told: Clients that have been told.
        uploads: Uploads that are being written.
        downloads: Downloads that are under way.
        latest: The state after the last round.
    """

    ended: str = ""
    told: set[str] = field(default_factory=set)
    uploads: int = 0
    downloads: int = 0
    latest: ServerState | None = None


@dataclass(frozen=True)
class Run:
    """What the handlers of a run share.

    Attributes:
        config: The run's.
        campaign: Run id, schema, strategy.
        store: What is durable.
        roster: Who takes part.
        mailbox: To the round loop.
        access: Who may call.
        clock: For times.
        sign: The coordinator's signature over a statement.
        certificate: The coordinator's, PEM; empty without.
        consortium: Of the certificates.
        spec: The schema file.
        live: What changes while it runs.
    """

    config: Config
    campaign: Campaign
    store: DeploymentStore
    roster: Roster
    mailbox: Mailbox
    access: Access
    clock: Clock
    sign: st.Sign
    certificate: bytes
    consortium: str
    spec: Blob
    live: Live = field(default_factory=Live)


class _Turn:
    """One client's right to write to its partial upload: the newest of its connections has it."""

    def __init__(self) -> None:
        self.lock, self.number = threading.Lock(), 0


class _Refused(Exception):
    """An upload that is not to be taken in: counted, and the call ends."""

    def __init__(self, reason: str, message: str, code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT) -> None:
        super().__init__(message)
        self.reason, self.code = reason, code


class _NotYet(Exception):
    """A coordinator that was restarted has not asked anyone yet: what a client says is not wrong, only early."""


class Sites(CoordinatorServicer):
    """Register, Instructions, Heartbeat, Download, Upload, Report.

    Args:
        run: What they share.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._slots = threading.BoundedSemaphore(run.config.coordinator.uploads)
        self._turns: dict[str, _Turn] = {}
        self._turns_lock = threading.Lock()

    # Registration and signs of life.

    def Register(self, request: pb.Signed, context: Any) -> pb.Registered:
        """Take a client in and tell it the terms."""
        run, caller = self.run, context.caller
        document = self._read(request, st.REGISTER, caller, context)
        try:
            versions = st.field(document, "versions", list)
            held, rank = st.bounded(document, "held", -1), document.get("rank")
            if st.field(document, "run_id", str) != run.campaign.run_id:
                held = -1  # what it holds is of another run
            if rank is not None:
                st.bounded(document, "rank", 1)
            if st.PROTOCOL not in versions:
                raise ConfigError(
                    f"expected protocol {st.PROTOCOL} among the client's, got {str(versions[:8])[:60]}. "
                    "Install a matching version."
                )
            budget = run.roster.register(caller, rank, held, run.campaign.strategy.equal_ranks)
        except st.BadStatement as error:
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except ConfigError as error:
            refuse(context, _OUT_OF_TURN, str(error))
        chosen = rank or run.roster.offered[caller.name]
        told = terms(run.config, run.campaign, run.spec, caller.name, chosen, budget, run.consortium)
        return pb.Registered(terms=st.signed(st.TERMS, told, run.sign), certificate=run.certificate)

    def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatReply:
        """Note that a client lives, and what it is at."""
        self.run.roster.saw(context.caller.name, request.round, request.step)
        return pb.HeartbeatReply(time=self.run.clock.now().timestamp())

    def Instructions(self, request: pb.InstructionsRequest, context: Any) -> Iterator[pb.Signed]:
        """What the client is asked, from now until it hangs up or the run ends."""
        run, caller, after = self.run, context.caller, 0
        while context.is_active():
            run.access.check_open(caller, context)
            run.roster.saw(caller.name)
            offer = run.mailbox.await_offer(caller.name, after, 1.0)
            if offer is not None:
                after = offer.number
                yield self._instruction(offer.instruction)
            elif run.live.ended == "drained":
                refuse(
                    context, grpc.StatusCode.UNAVAILABLE, "the coordinator is restarting. Nothing is lost; dial again."
                )
            elif run.live.ended:
                told = {"kind": "ended", "run_id": run.campaign.run_id, "why": run.live.ended}
                yield st.signed(st.INSTRUCTION, told, run.sign)
                run.live.told.add(caller.name)
                return

    def _instruction(self, instruction: Instruction) -> pb.Signed:
        head = self.run.store.head()
        document = st.instruction_document(instruction) | {"log": [head.n, head.hash]}
        document |= {"spec": self.run.spec.sha256, "base": dict(self.run.campaign.spec.hashes)}
        return st.signed(st.INSTRUCTION, document, self.run.sign)

    # Adapters down and up.

    def Download(self, request: pb.DownloadRequest, context: Any) -> Iterator[pb.Part]:
        """A blob that the caller was told of, from a byte on."""
        run, caller = self.run, context.caller
        offer = run.mailbox.current(caller.name)
        parts = [offer.instruction.release, offer.instruction.frozen] if offer else []
        names = {run.spec.sha256, *(part.sha256 for part in parts if part is not None)}
        blob = run.store.blobs.find(request.sha256) if request.sha256 in names else None
        if blob is None and not run.mailbox.begun:
            refuse(context, grpc.StatusCode.UNAVAILABLE, _EARLY)
        if blob is None:
            refuse(context, grpc.StatusCode.NOT_FOUND, f"{request.sha256[:12]}: nothing of this name is for you now.")
        if request.offset > blob.num_bytes:
            refuse(context, grpc.StatusCode.OUT_OF_RANGE, f"expected an offset of at most {blob.num_bytes}.")
        run.live.downloads += 1
        try:
            with open(str(blob.content), "rb", buffering=0) as file:
                file.seek(request.offset)
                while data := file.read(self._part_bytes()):
                    run.access.check_open(caller, context)
                    yield pb.Part(data=data)
        finally:
            run.live.downloads -= 1

    def _part_bytes(self) -> int:
        """Bytes in one message down: less where many clients download, so that what waits to be sent stays within bounds."""
        share = _DOWNLOAD_BYTES // max(1, self.run.live.downloads)
        return max(_LEAST_PART_BYTES, min(self.run.config.wire.chunk_bytes, share))

    def Upload(self, parts: Iterator[pb.UploadPart], context: Any) -> Iterator[pb.UploadAck]:
        """An update, from the byte on that is not here yet."""
        caller = context.caller
        first = next(parts, None)
        if first is None:
            return
        try:
            yield from self._upload(first.claim, parts, caller, context)
        except _Refused as error:
            self.count(caller, error.reason, str(error))
            refuse(context, error.code, f"{error.reason}: {error}")
        except UpdateRejected as error:
            self.count(caller, error.reason, str(error))
            refuse(context, _OUT_OF_TURN, f"{error.reason}: {error}")
        except _NotYet:
            refuse(context, grpc.StatusCode.UNAVAILABLE, _EARLY)
        except OSError as error:
            refuse(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the coordinator's disk: {error.strerror}. Try again later.",
            )

    def _upload(
        self, claim: pb.Signed, parts: Iterator[pb.UploadPart], caller: Caller, context: Any
    ) -> Iterator[pb.UploadAck]:
        run = self.run
        document = self._claim(claim, caller)
        sha256, num_bytes = document["sha256"], document["num_bytes"]
        known = run.store.known_anywhere(caller.name, document["round"], sha256)
        if known:
            yield pb.UploadAck(offset=num_bytes, stored=True)
            return
        instruction = self._expected(document, caller)
        with self._slots:
            run.live.uploads += 1
            try:
                path = yield from self._written(instruction, document, parts, caller, context)
            finally:
                run.live.uploads -= 1
        if path is None:
            return
        with run.store.lock:
            try:
                blob = run.store.blobs.adopt(path, sha256)
            except FileNotFoundError:
                raise _Refused("wrong-round", f"round {instruction.round} closed meanwhile.", _OUT_OF_TURN) from None
            received = Received(instruction, blob, claim.statement, claim.signature, self._witness(document, caller))
            run.store.receive(run.store.counting_round(), received)
        run.mailbox.deliver(Reply(caller.name, blob))
        yield pb.UploadAck(offset=num_bytes, stored=True)

    def _claim(self, claim: pb.Signed, caller: Caller) -> dict[str, Any]:
        """The claim's fields, each of its type; nothing of them is believed yet."""
        try:
            document = st.read(claim, st.CLAIM, self._verifier(caller))
            for name in ("run_id", "client_id", "parent"):
                st.field(document, name, str)
            for name in ("round", "num_bytes"):
                st.bounded(document, name, 0)
            sha256 = st.field(document, "sha256", str)
        except st.BadStatement as error:
            raise _Refused(error.reason, str(error)) from None
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise _Refused("malformed", "expected a SHA-256 of 64 hex digits.")
        return document

    def _expected(self, document: dict[str, Any], caller: Caller) -> Instruction:
        """The instruction that a claim answers, if it is this client's and open."""
        run = self.run
        if document["client_id"] != caller.name:
            raise _Refused("wrong-client", f"expected an update of {caller.name}, got one of another client.")
        if document["run_id"] != run.campaign.run_id:
            raise _Refused("wrong-run", f"expected run {run.campaign.run_id}. Register again.")
        offer = run.mailbox.current(caller.name)
        instruction = None if offer is None or offer.instruction.kind != "train" else offer.instruction
        if instruction is None and not run.mailbox.begun:
            raise _NotYet
        if instruction is None or document["round"] != instruction.round:
            now = "none is open" if instruction is None else f"round {instruction.round} is open"
            raise _Refused("wrong-round", f"got an update for round {document['round']}, {now}.", _OUT_OF_TURN)
        if document["parent"] != instruction.release_hash:
            raise _Refused("wrong-parent", "expected an update of the release that was sent. Train from that one.")
        known = run.store.known(run.store.counting_round(), caller.name)
        if known is not None and known[1] != "rejected":
            raise _Refused("duplicate", "another update of this round is here already.", grpc.StatusCode.ALREADY_EXISTS)
        budget = run.roster.registered().get(caller.name)
        if budget is None:
            raise _Refused("wrong-client", "expected a client that is registered. Register again.", _OUT_OF_TURN)
        cap = size_cap_bytes(run.campaign.spec, budget)
        if not 0 < document["num_bytes"] <= cap:
            raise _Refused("too-large", f"expected 1 to {cap} bytes, got {document['num_bytes']}. Lower the rank.")
        return instruction

    def _written(
        self,
        instruction: Instruction,
        document: dict[str, Any],
        parts: Iterator[pb.UploadPart],
        caller: Caller,
        context: Any,
    ) -> Generator[pb.UploadAck, None, Path | None]:
        """Write what comes to disk; returns the file, or None where the stream broke off."""
        run, sha256, size = self.run, document["sha256"], document["num_bytes"]
        path = run.store.blobs.partial(instruction.round, caller.name, sha256)
        with self._turns_lock:
            turn = self._turns.setdefault(caller.name, _Turn())
        with turn.lock:
            turn.number += 1
            mine = turn.number
            path.touch()
            if path.stat().st_size > size:
                os.truncate(path, 0)
            growing = Growing(path)
        acknowledged = growing.size
        with growing:
            yield pb.UploadAck(offset=growing.size)
            for part in parts if growing.size < size else ():
                run.access.check_open(caller, context)
                data = part.data
                if growing.size + len(data) > size:
                    path.unlink(missing_ok=True)
                    raise _Refused("malformed", f"expected {size} bytes as claimed, got more.")
                with turn.lock:
                    if turn.number != mine:
                        return None  # the client has come back on another connection
                    growing.write(data)
                run.roster.saw(caller.name)
                if growing.size - acknowledged >= _ACK_BYTES:
                    acknowledged = growing.size
                    yield pb.UploadAck(offset=acknowledged)
                if growing.size == size:
                    break
            if growing.size < size:
                return None
            found = growing.finish()
        if found != sha256:
            path.unlink(missing_ok=True)
            raise _Refused(
                "malformed", "expected content of the claimed SHA-256. Send it again.", grpc.StatusCode.DATA_LOSS
            )
        return path

    def _witness(self, document: dict[str, Any], caller: Caller) -> tuple[int, str, str] | None:
        """The countersignature that came with a claim, if it holds; it is no reason to refuse an update."""
        found = document.get("witness")
        if not isinstance(found, list) or [type(one) for one in found] != [int, str, str]:
            return None
        n, seen, signature = found
        try:
            fields = chain.countersignature(caller.name, Head(n, seen), bytes.fromhex(signature))
        except ValueError:
            return None
        # The log's reader checks it with the certificate that was registered, which may be older than this connection's.
        key = self.run.roster.signing_key(caller.name)
        fault = chain.countersignature_fault(fields, self.run.store.hash_at, key, verify)
        return None if fault else (n, seen, signature)

    # What else a client has to say.

    def Report(self, request: pb.Signed, context: Any) -> pb.Done:
        """A failure, figures, or farewell."""
        run, caller = self.run, context.caller
        document = self._read(request, st.REPORT, caller, context)
        if document.get("kind") == "leave":
            run.roster.leave(caller.name)
            if run.mailbox.waits_for(caller.name):
                run.mailbox.deliver(Reply(caller.name, None, "left"))
            return pb.Done()
        offer = run.mailbox.current(caller.name)
        asked = offer and (offer.instruction.run_id, offer.instruction.round, offer.instruction.kind)
        figures = document.get("kind") == "figures"
        about = (document.get("run_id"), document.get("round"), document.get("instruction"))
        if asked is None or about != asked or not run.mailbox.waits_for(caller.name):
            return pb.Done()  # about something that is over, or said before
        if figures and asked[2] == "evaluate":
            run.mailbox.deliver(Reply(caller.name, None, figures=_figures(document.get("figures"))))
        else:
            code = document.get("code")
            run.mailbox.deliver(Reply(caller.name, None, code if code in _FAILURES else "internal"))
        return pb.Done()

    # Shared.

    def count(self, caller: Caller, reason: str, message: str) -> None:
        """Count a refusal in the report of the round."""
        rejection = Rejection(caller.name, reason, message, final=False)
        self.run.store.reject(self.run.store.counting_round(), rejection)

    def _verifier(self, caller: Caller) -> Callable[[str, bytes, bytes], bool]:
        key = caller.signing_key
        return lambda domain, statement, signature: key is None or verify(key, domain, statement, signature)

    def _read(self, message: pb.Signed, domain: str, caller: Caller, context: Any) -> dict[str, Any]:
        try:
            return st.read(message, domain, self._verifier(caller))
        except st.BadStatement as error:
            self.count(caller, error.reason, str(error))
            self._end(context, error)

    def _end(self, context: Any, error: st.BadStatement) -> NoReturn:
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, f"{error.reason}: {error}")


def _figures(found: Any) -> dict[str, float]:
    """Figures of an evaluation that can be: finite, not negative; otherwise none."""
    if not isinstance(found, dict):
        return {}
    least = {"nats": 0, "targets": 1, "hits": 0}
    values: dict[str, Any] = {name: found.get(name) for name in least}
    fine = all(type(v) in (int, float) and least[name] <= v < 1e15 for name, v in values.items())
    return {name: float(value) for name, value in values.items()} if fine else {}
