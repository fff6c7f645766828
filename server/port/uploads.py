"""Taking updates in: a signed claim, then the bytes that are not here yet, then a row in the database; only then `stored`.

A client that was not told sends it again, and the second time costs one message.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from lamina.protos import chain
from lamina.protos import coordinator_pb2 as pb
from lamina.protos import statements as st
from lamina.protos.chain import Head
from lamina.protos.coordinator_pb2_grpc import CoordinatorServicer
from lamina.protos.errors import UpdateRejected
from lamina.protos.growing import Growing
from lamina.protos.identity import verify
from lamina.protos.messages import Instruction, Reply
from lamina.server.admission import size_cap_bytes
from lamina.server.port.access import Caller, refuse
from lamina.server.port.places import Place, Places
from lamina.server.port.run import EARLY, Run, count, verifier
from lamina.server.store.deployment import Received

# Updates of one client that may be judged and refused in a round before no further update of it is taken in.
_TRIES = 64
_ACK_BYTES = 8 * 1024**2
_ATTEMPT = re.compile(r"[0-9a-f]{32}")
_OUT_OF_TURN = grpc.StatusCode.FAILED_PRECONDITION


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


class Uploads(CoordinatorServicer):
    """The method Upload.

    Args:
        run: What the port's methods share.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._places = Places(run.config.coordinator.uploads, run.clock)
        self._turns: dict[str, _Turn] = {}
        self._turns_lock = threading.Lock()

    def Upload(self, parts: Iterator[pb.UploadPart], context: Any) -> Iterator[pb.UploadAck]:
        """An update, from the byte on that is not here yet."""
        caller = context.caller
        first = next(parts, None)
        if first is None:
            return
        try:
            yield from self._upload(first.claim, parts, caller, context)
        except _Refused as error:
            count(self.run, caller, error.reason, str(error))
            refuse(context, error.code, f"{error.reason}: {error}")
        except UpdateRejected as error:
            count(self.run, caller, error.reason, str(error))
            refuse(context, _OUT_OF_TURN, f"{error.reason}: {error}")
        except _NotYet:
            refuse(context, grpc.StatusCode.UNAVAILABLE, EARLY)
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
        if "attempt" in document:
            yield from self._vector(document, parts, caller, context)
            return
        known = run.store.known_anywhere(caller.name, document["round"], sha256)
        if known:
            yield pb.UploadAck(offset=num_bytes, stored=True)
            return
        instruction = self._expected(document, caller)
        with self._places.one(context) as place, run.live.counted("uploads"):
            if place is None:
                return
            path = yield from self._written(instruction, document, parts, caller, context, place)
        if path is None:
            return
        with run.store.lock:  # the round closes, and a revoked client is struck, before or after, not amid
            run.access.check_open(caller, context)
            try:
                blob = run.store.blobs.adopt(path, sha256)
            except FileNotFoundError:
                raise _Refused("wrong-round", f"round {instruction.round} closed meanwhile.", _OUT_OF_TURN) from None
            received = Received(instruction, blob, claim.statement, claim.signature, self._witness(document, caller))
            run.store.receive(run.store.counting_round(), received)
            run.mailbox.deliver(Reply(caller.name, blob), instruction)
        yield pb.UploadAck(offset=num_bytes, stored=True)

    def _vector(
        self, document: dict[str, Any], parts: Iterator[pb.UploadPart], caller: Caller, context: Any
    ) -> Iterator[pb.UploadAck]:
        """A vector under its masks: 32-bit numbers and nothing else, for one attempt at a secure sum."""
        run, instruction = self.run, self._asked(document, caller)
        attempt = bytes.fromhex(document["attempt"])
        length = run.sums.awaited_bytes(caller.name, attempt)
        if length is None:
            raise _Refused("late", "expected a vector of the attempt at a secure sum that is open.", _OUT_OF_TURN)
        if length == 0:
            yield pb.UploadAck(offset=document["num_bytes"], stored=True)
            return
        if document["num_bytes"] != length:
            raise _Refused("too-large", f"expected {length} bytes, got {document['num_bytes']}.")
        with self._places.one(context) as place, run.live.counted("uploads"):
            if place is None:
                return
            path = yield from self._written(instruction, document, parts, caller, context, place)
        if path is None:
            return
        values = np.fromfile(path, "<u4")
        path.unlink()
        run.access.check_open(caller, context)
        run.sums.vector(caller.name, attempt, values)
        yield pb.UploadAck(offset=length, stored=True)

    def _claim(self, claim: pb.Signed, caller: Caller) -> dict[str, Any]:
        """The claim's fields, each of its type; nothing of them is believed yet."""
        try:
            document = st.read(claim, st.CLAIM, verifier(caller))
            for name in ("run_id", "client_id", "parent"):
                st.field(document, name, str)
            for name in ("round", "num_bytes"):
                st.bounded(document, name, 0)
            sha256 = st.field(document, "sha256", str)
        except st.BadStatement as error:
            raise _Refused(error.reason, str(error)) from None
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise _Refused("malformed", "expected a SHA-256 of 64 hex digits.")
        attempt = document.get("attempt", "")
        if "attempt" in document and not (isinstance(attempt, str) and _ATTEMPT.fullmatch(attempt)):
            raise _Refused("malformed", "expected an attempt of 32 hex digits.")
        return document

    def _asked(self, document: dict[str, Any], caller: Caller) -> Instruction:
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
        return instruction

    def _expected(self, document: dict[str, Any], caller: Caller) -> Instruction:
        """As `_asked`, of an update that may be sent now."""
        run, instruction = self.run, self._asked(document, caller)
        if run.campaign.masking is not None:
            raise _Refused(
                "unmasked", "expected a vector of a secure sum, no update by itself. Update the site's software."
            )
        known = run.store.known(run.store.counting_round(), caller.name)
        if known is not None and known[1] != "rejected":
            raise _Refused("duplicate", "another update of this round is here already.", grpc.StatusCode.ALREADY_EXISTS)
        if run.store.times_refused(run.store.counting_round(), caller.name) > _TRIES:
            raise _Refused(
                "too-many", "too many updates of this round were refused.", grpc.StatusCode.PERMISSION_DENIED
            )
        budget = run.roster.registered().get(caller.name)
        if budget is None:
            raise _Refused("wrong-client", "expected a client that is registered. Register again.", _OUT_OF_TURN)
        cap = size_cap_bytes(run.campaign.spec, budget, instruction.train)
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
        place: Place,
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
                run.store.check_awaited(run.store.counting_round(), instruction)
                data = part.data
                if growing.size + len(data) > size:
                    path.unlink(missing_ok=True)
                    raise _Refused("malformed", f"expected {size} bytes as claimed, got more.")
                place.came(len(data))
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
