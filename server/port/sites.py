"""The sites' methods of the port. Handlers check, store and hand over; what an update is worth the round loop decides.

Refusals that come before the round loop are counted here, by round, client and reason. What is sent up is in `uploads.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import grpc

from lamina.protos import coordinator_pb2 as pb
from lamina.protos import statements as st
from lamina.protos.config import FORMATS
from lamina.protos.errors import ConfigError, shown
from lamina.protos.messages import Instruction, Reply, Wish
from lamina.server.port.access import Caller, refuse
from lamina.server.port.roster import Hasty
from lamina.server.port.run import EARLY, Run, count, verifier
from lamina.server.port.terms import terms
from lamina.server.port.uploads import Uploads

# All that waits to be sent down, and the least that is worth a message.
_DOWNLOAD_BYTES, _LEAST_PART_BYTES = 16 * 1024**2, 64 * 1024
_OUT_OF_TURN = grpc.StatusCode.FAILED_PRECONDITION
_FAILURES = (
    "out-of-memory", "training", "release", "policy", "privacy", "data", "disk", "held-version", "base", "internal",
)  # fmt: skip


class Sites(Uploads):
    """Register, Instructions, Heartbeat, Download, Upload, Report.

    Args:
        run: What they share.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)

    # Registration and signs of life.

    def Register(self, request: pb.Signed, context: Any) -> pb.Registered:
        """Take a client in and tell it the terms."""
        run, caller = self.run, context.caller
        document = self._read(request, st.REGISTER, caller, context)
        try:
            versions = st.field(document, "versions", list)
            held, wish = st.bounded(document, "held", -1), _wish(document, len(run.campaign.spec.modules))
            if st.field(document, "run_id", str) != run.campaign.run_id:
                held = -1  # what it holds is of another run
            if st.PROTOCOL not in versions:
                raise ConfigError(
                    f"expected protocol {st.PROTOCOL} among the client's, got {str(versions[:8])[:60]}. "
                    "Install a matching version."
                )
            equal = run.campaign.strategy.equal_ranks
            if document.get("ask") is True:  # the client sizes itself by the terms before it comes
                budget = run.roster.ask(caller.name, wish, equal)
            else:
                budget = run.roster.register(caller, wish, held, equal)
        except st.BadStatement as error:
            count(run, caller, error.reason, str(error))
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except ConfigError as error:
            refuse(context, _OUT_OF_TURN, str(error))
        except Hasty as error:
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        chosen = wish.rank or run.roster.offered[caller.name]
        told = terms(run.config, run.campaign, run.spec, caller.name, chosen, budget, run.consortium)
        return pb.Registered(terms=st.signed(st.TERMS, told, run.sign), certificate=run.certificate)

    def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatReply:
        """Note that a client lives, and what it is at."""
        self.run.roster.saw(context.caller.name, request.round, request.step)
        return pb.HeartbeatReply(time=self.run.clock.now().timestamp())

    def Instructions(self, request: pb.InstructionsRequest, context: Any) -> Iterator[pb.Signed]:
        """What the client is asked, from now until it hangs up or leaves, or the run ends."""
        run, caller, after = self.run, context.caller, 0
        while context.is_active():
            run.access.check_open(caller, context)
            if not run.roster.takes_part(caller.name):
                refuse(context, grpc.StatusCode.UNAVAILABLE, f"{caller.name} has not registered, or has left since.")
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
            refuse(context, grpc.StatusCode.UNAVAILABLE, EARLY)
        if blob is None:
            refuse(context, grpc.StatusCode.NOT_FOUND, f"{request.sha256[:12]}: nothing of this name is for you now.")
        if request.offset > blob.num_bytes:
            refuse(context, grpc.StatusCode.OUT_OF_RANGE, f"expected an offset of at most {blob.num_bytes}.")
        with run.live.counted("downloads"), open(str(blob.content), "rb", buffering=0) as file:
            file.seek(request.offset)
            while data := file.read(self._part_bytes()):
                run.access.check_open(caller, context)
                yield pb.Part(data=data)

    def _part_bytes(self) -> int:
        """Bytes in one message down: less where many clients download, so that what waits to be sent stays within bounds."""
        share = _DOWNLOAD_BYTES // max(1, self.run.live.downloads)
        return max(_LEAST_PART_BYTES, min(self.run.config.wire.chunk_bytes, share))

    # What else a client has to say.

    def Report(self, request: pb.Signed, context: Any) -> pb.Done:
        """A failure, figures, or farewell."""
        run, caller = self.run, context.caller
        document = self._read(request, st.REPORT, caller, context)
        if document.get("kind") == "leave":
            run.roster.leave(caller.name)
            run.mailbox.deliver(Reply(caller.name, None, "left"))
            return pb.Done()
        offer = run.mailbox.current(caller.name)
        about = (document.get("run_id"), document.get("round"), document.get("instruction"))
        if offer is None or about != (offer.instruction.run_id, offer.instruction.round, offer.instruction.kind):
            return pb.Done()  # about something that is over
        if document.get("kind") == "figures" and offer.instruction.kind == "evaluate":
            reply = Reply(caller.name, None, figures=_figures(document.get("figures")))
        else:
            code = document.get("code")
            reply = Reply(caller.name, None, code if code in _FAILURES else "internal")
        run.mailbox.deliver(reply, offer.instruction)
        return pb.Done()

    def _read(self, message: pb.Signed, domain: str, caller: Caller, context: Any) -> dict[str, Any]:
        try:
            return st.read(message, domain, verifier(caller))
        except st.BadStatement as error:
            count(self.run, caller, error.reason, str(error))
            self._end(context, error)

    def _end(self, context: Any, error: st.BadStatement) -> NoReturn:
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, f"{error.reason}: {error}")


def _wish(document: Mapping[str, Any], modules: int) -> Wish:
    """What a registration asks for; what was left out is what is offered."""
    if document.get("rank") is not None:
        st.bounded(document, "rank", 1)
    ranks = document.get("ranks")
    if ranks is not None:
        if len(st.field(document, "ranks", dict)) > modules:
            raise st.BadStatement("malformed", f"expected ranks of at most {modules} modules, got {len(ranks)}.")
        for module, rank in ranks.items():
            if type(rank) is not int or not 1 <= rank <= st.MAX_NUMBER:
                where = shown(module)
                raise st.BadStatement(
                    "malformed", f"expected 1 <= rank <= {st.MAX_NUMBER} for {where}, got {shown(rank)}."
                )
    number_format = document.get("format", "")
    if number_format not in ("", *FORMATS):
        raise st.BadStatement("malformed", f"expected format to be one of {', '.join(FORMATS)}, or empty.")
    return Wish(document.get("rank"), ranks, number_format)


def _figures(found: Any) -> dict[str, float]:
    """Figures of an evaluation that can be: finite, not negative; otherwise none."""
    if not isinstance(found, dict):
        return {}
    least = {"nats": 0, "targets": 1, "hits": 0}
    values: dict[str, Any] = {name: found.get(name) for name in least}
    fine = all(type(v) in (int, float) and least[name] <= v < 1e15 for name, v in values.items())
    return {name: float(value) for name, value in values.items()} if fine else {}
