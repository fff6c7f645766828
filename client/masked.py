"""A site in a round's secure sums, over whatever carries its messages: attempt after attempt, until the round is over.

Each state replaces the one before it ahead of any message, and all of them are in memory alone: a site that is started again has
lost its keys, drops out of the attempt, and takes part in the next one with the update that it has kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.client.summing import Part, answered
from lamina.protos import statements as st
from lamina.protos.adapter import Array
from lamina.protos.clock import Clock
from lamina.protos.errors import LaminaError, SecureSumRefused
from lamina.protos.identity import Identity, check_in_force, verified_peer
from lamina.protos.secagg.client import Finished, Me, State
from lamina.protos.secagg.messages import Declined, Masked, Opening, Revealed
from lamina.protos.secagg.server import Down, Up
from lamina.protos.secagg.wire import document_of, down_of
from lamina.protos.statements import BadStatement


@dataclass(frozen=True)
class Line:
    """What a site needs to take part.

    Attributes:
        ask: Tells the coordinator a document, waits a while, and returns its answer, whose signature holds.
        upload: Sends a vector for an attempt; False where the coordinator does not want it any more.
        shown: Returns when a restart of the site would know whose sum it has helped to show.
        certified: Raises SecureSumRefused or IdentityError unless participants are whom their certificates name.
        log: Told what happens.
    """

    ask: Callable[[dict[str, Any]], Mapping[str, Any]]
    upload: Callable[[str, Array], bool]
    shown: Callable[[tuple[str, ...]], None]
    certified: Callable[[Opening, Mapping[str, Any]], None]
    log: Callable[..., None]


def follow(part: Part, me: Me, line: Line) -> bool:
    """Take part in a round's secure sums until the coordinator is done with the round.

    Args:
        part: What is put in.
        me: The participant.
        line: To the coordinator.

    Returns:
        Whether the site has answered to the end of an attempt.

    Raises:
        AdapterMismatch: If the update does not fit the global factors.
        TrainingError: If a change is out of range.
        BadStatement: If the coordinator's answer is none.
    """
    attempt, step, answer = "", 0, None
    state: State | None = None
    while True:
        said = line.ask({"attempt": attempt, "step": step, "message": None if answer is None else document_of(answer)})
        answer = None
        if (said.get("run_id"), said.get("round")) != (part.instruction.run_id, part.instruction.round):
            raise BadStatement("malformed", "expected an answer about this run and round, got one about another.")
        if st.field(said, "over", bool):
            return isinstance(state, Finished)
        if said.get("message") is None:
            continue
        before, (attempt, step) = (attempt, step), (st.field(said, "attempt", str), st.bounded(said, "step", 0))
        try:
            message = _message(said, before)
            if isinstance(message, Opening):
                line.certified(message, st.field(said, "certificates", dict))
            part, state, answer = answered(part, me, state, message)
            if isinstance(answer, Revealed):
                line.shown(part.shown)
        except LaminaError as error:
            state = None
            line.ask({"attempt": attempt, "step": step, "message": document_of(Declined(me.name))})
            if not isinstance(error, SecureSumRefused | BadStatement):
                raise
            line.log("declined", round=part.instruction.round, message=str(error))
            answer = None
        answer = _uploaded(line, attempt, answer)


def _message(said: Mapping[str, Any], before: tuple[str, int]) -> Down:
    """The coordinator's next message, of the attempt that it opens or of the step that follows."""
    message = down_of(st.field(said, "message", dict))
    attempt, step = said["attempt"], said["step"]
    opens = isinstance(message, Opening) and (message.context.nonce.hex(), 0) == (attempt, step)
    if not opens and (isinstance(message, Opening) or (attempt, step) != (before[0], before[1] + 1)):
        raise SecureSumRefused("secure sum: expected the next step of the attempt under way, got another.")
    return message


def _uploaded(line: Line, attempt: str, answer: Up | None) -> Up | None:
    """What is left to be told once a vector is sent."""
    if not isinstance(answer, Masked):
        return answer
    line.upload(attempt, answer.values)
    return None


def certified(
    identity: Identity | None, revocations: Path | None, clock: Clock, opening: Opening, certificates: Mapping[str, Any]
) -> None:
    """Raise unless each participant's key is the one in its certificate, of the site's own consortium.

    Args:
        identity: The site's, None in a run without certificates.
        revocations: The consortium's list of revoked certificates, or None.
        clock: For the dates of certificates.
        opening: With the participants and their keys.
        certificates: Participant -> PEM, as the coordinator sent them.

    Raises:
        SecureSumRefused: If one has no certificate, or another key or name.
        IdentityError: If one is not of the consortium, out of date, or revoked.
    """
    if identity is None:
        return  # nobody has a key then; see `secagg.context.Context`
    for one in opening.context.participants:
        pem = certificates.get(one.name)
        if not isinstance(pem, str):
            raise SecureSumRefused(f"secure sum: expected the certificate of {one.name}, got none.")
        peer = verified_peer(pem.encode(), identity.ca_pem, clock.now(), "client")
        if (peer.name, peer.signing_key) != (one.name, one.signing_key):
            raise SecureSumRefused(
                f"secure sum: expected {one.name} under the key of its own certificate, got another."
            )
        if revocations is not None:
            check_in_force(peer, revocations, identity.ca_pem)
