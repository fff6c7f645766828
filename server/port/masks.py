"""The method Mask: the steps of a secure sum, of which each call carries an answer up and the next step down."""

from __future__ import annotations

from typing import Any

import grpc

from lamina.protos import coordinator_pb2 as pb
from lamina.protos import statements as st
from lamina.protos.coordinator_pb2_grpc import CoordinatorServicer
from lamina.protos.messages import Instruction, Reply
from lamina.protos.secagg.context import NONCE_BYTES
from lamina.protos.secagg.server import Up
from lamina.protos.secagg.wire import document_of, up_of
from lamina.server.port.access import Caller, refuse
from lamina.server.port.run import EARLY, Run, count, verifier
from lamina.server.port.sums import Told

_OVER = Told()


class Masks(CoordinatorServicer):
    """The method Mask.

    Args:
        run: What the port's methods share.
    """

    run: Run

    def Mask(self, request: pb.Signed, context: Any) -> pb.Signed:
        """Take an answer in, and wait a while for what is to come next. Whoever asks has its update ready."""
        run, caller = self.run, context.caller
        try:
            document = st.read(request, st.MASKING, verifier(caller))
            attempt, step, message = _said(document, caller)
            about = (st.field(document, "run_id", str), st.bounded(document, "round", 1))
            parent = st.field(document, "parent", str)
        except st.BadStatement as error:
            count(run, caller, error.reason, str(error))
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, f"{error.reason}: {error}")
        if not run.mailbox.begun:
            refuse(context, grpc.StatusCode.UNAVAILABLE, EARLY)
        instruction = self._current(caller)
        open_now = instruction is not None and run.campaign.masking is not None
        if not open_now or instruction is None or (*about, parent) != _about(instruction):
            return self._told(document, _OVER, over=True)
        run.mailbox.deliver(Reply(caller.name, None, trained=True), instruction)
        told = run.sums.ask(caller, instruction.round, attempt, step, message)
        run.access.check_open(caller, context)
        return self._told(document, told, over=self._current(caller) != instruction)

    def _current(self, caller: Caller) -> Instruction | None:
        offer = self.run.mailbox.current(caller.name)
        return None if offer is None or offer.instruction.kind != "train" else offer.instruction

    def _told(self, document: dict[str, Any], told: Told, over: bool) -> pb.Signed:
        answer: dict[str, Any] = {
            "kind": st.MASKING,
            "run_id": document["run_id"],
            "round": document["round"],
            "attempt": told.attempt.hex(),
            "step": told.step,
            "message": None if told.message is None else document_of(told.message),
            "over": over,
        }
        answer |= {} if told.certificates is None else {"certificates": dict(told.certificates)}
        return st.signed(st.MASKING, answer, self.run.sign)


def _about(instruction: Instruction) -> tuple[str, int, str]:
    return instruction.run_id, instruction.round, instruction.release_hash


def _said(document: dict[str, Any], caller: Caller) -> tuple[bytes, int, Up | None]:
    """Attempt, step and message of a client."""
    try:
        attempt = bytes.fromhex(st.field(document, "attempt", str))
    except ValueError:
        raise st.BadStatement("malformed", "expected an attempt in hex.") from None
    if len(attempt) not in (0, NONCE_BYTES):
        raise st.BadStatement("malformed", f"expected an attempt of {NONCE_BYTES} bytes, or none.")
    message = document.get("message")
    if message is not None and not isinstance(message, dict):
        raise st.BadStatement("malformed", "expected a JSON object as message of a secure sum.")
    return attempt, st.bounded(document, "step", 0), None if message is None else up_of(message, caller.name)
