"""Who signed an event log: its certificates against a CA, and then every record."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from lamina.protos import chain, identity
from lamina.protos.chain import GENESIS, BadRecord, Fault, Record, Verified
from lamina.protos.errors import IdentityError
from lamina.protos.identity import Peer
from lamina.server.store.log_files import Said

BEGIN = "begin"
REGISTER = "register"


@dataclass(frozen=True)
class Checked:
    """What a check of a run's log found.

    Attributes:
        verified: Of the chain.
        coordinator: Who signed it; None for a run without certificates.
        run_id: By the first record, empty where it says none.
        rounds: Numbers of the rounds that good records name.
        said: What good records say of the run's files.
    """

    verified: Verified
    coordinator: Peer | None
    run_id: str
    rounds: frozenset[int]
    said: Said = field(default_factory=Said)


def check(path: Path, ca_pem: bytes | None, ca_name: str) -> Checked:
    """Check `events.jsonl` against a CA, or where there is none against its own first record.

    A certificate is checked at the time of the record that holds it, which is the coordinator's word.

    Args:
        path: The log.
        ca_pem: The CA's certificate, or None.
        ca_name: What to call it in messages.

    Returns:
        What was found. An unsigned log where a CA is given is a bad one: a signed log could be swapped for it.
    """
    log = _Log(ca_pem, ca_name)
    with path.open("rb") as file:
        first = next(chain.lines_of(file), b"")
        begin = chain.read(first, GENESIS)
        coordinator = log.coordinator(begin) if isinstance(begin, Record) else None
        if isinstance(coordinator, Fault):
            bad = BadRecord(1, 0, begin.kind if isinstance(begin, Record) else None, coordinator)
            return Checked(Verified(GENESIS, bad, 0, 1, (), {}), None, "", frozenset())
        file.seek(0)
        log.signed = coordinator is not None
        key = None if coordinator is None else coordinator.signing_key
        verified = chain.verify(chain.lines_of(file), key, log.keys.get, identity.verify, log.accept)
    if not first:
        bad = BadRecord(1, 0, None, Fault(BEGIN, "a first record of kind begin", "an empty file"))
        verified = Verified(GENESIS, bad, 0, 0, (), {})
    return Checked(verified, coordinator, log.run_id, frozenset(log.rounds), log.said)


@dataclass
class _Log:
    """What the records of a log have said so far."""

    ca_pem: bytes | None
    ca_name: str
    signed: bool = False
    run_id: str = ""
    keys: dict[str, bytes] = field(default_factory=dict)
    rounds: set[int] = field(default_factory=set)
    said: Said = field(default_factory=Said)

    def coordinator(self, begin: Record) -> Peer | Fault | None:
        """The signer by the first record, None where it has no certificate and needs none."""
        if begin.kind != BEGIN:
            return Fault(BEGIN, "a first record of kind begin", f"kind {begin.kind}")
        certificate = begin.fields.get("certificate") or ""
        if certificate:
            return self.peer(begin, "coordinator")
        if self.ca_pem is None:
            return None
        return Fault(
            "certificate", f"a coordinator's certificate, since there is a CA ({self.ca_name})", "an unsigned log"
        )

    def peer(self, record: Record, role: str) -> Peer | Fault:
        """Whose certificate a record holds."""
        pem = record.fields.get("certificate")
        if not isinstance(pem, str):
            return Fault("certificate", f"a {role}'s certificate in PEM", chain.shown(pem))
        text = pem.encode("utf-8", "surrogatepass")
        try:
            if self.ca_pem is not None:
                return identity.verified_peer(text, self.ca_pem, datetime.fromisoformat(record.time), role)
            found = identity.peer_of(text)
        except IdentityError as error:
            return Fault("certificate", f"a {role}'s certificate that was trusted at {record.time}", str(error))
        return (
            found
            if found.role == role
            else Fault("certificate", f"a {role}'s certificate", f"one of role {found.role}")
        )

    def accept(self, record: Record) -> Fault | None:
        """Take note of a good record; refuse a client whose certificate does not hold."""
        if record.n == 0:
            self.run_id = str(record.fields.get("run_id") or "")
        number = record.fields.get("round")
        if type(number) is int and number > 0:
            self.rounds.add(number)
        self.said.hear(record)
        if record.kind != REGISTER or not self.signed:
            return None
        client_id = record.fields.get("client_id")
        peer = self.peer(record, "client")
        if isinstance(peer, Fault):
            return peer
        if peer.name != client_id:
            return Fault(
                "certificate",
                f"the certificate of client {peer.name}",
                chain.shown(client_id),
            )
        self.keys[peer.name] = peer.signing_key
        return None
