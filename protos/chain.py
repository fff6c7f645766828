"""The hash chain of a run's event log: what a check of all its records finds, and what sites add to it.

Whoever owns the log can rewrite and sign all of it again, so the chain alone does not bind its owner. Sites do: each signs
heads that it was shown (domain `log-witness`, kept as `countersign` records) and keeps them itself (`against`).

A last line without its newline is *torn*: what a crash amid a write leaves. It is reported apart from a bad record, and
never as intact, because a cut inside a record proves no more and no less than a cut between two, which leaves no trace.

This module knows no keys and no files: verifying is a callable, so that it needs nothing of the identities.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.protos.errors import ConfigError
from lamina.protos.record import (
    GENESIS,
    KIND,
    LINE_CAP_BYTES,
    SIGNATURE,
    Fault,
    Head,
    Record,
    canonical_json,
    claims,
    extended,
    lines_of,
    read,
    shortened,
    shown,
    timestamp,
)

__all__ = [
    "COUNTERSIGN", "GENESIS", "HEAD_DOMAIN", "LINE_CAP_BYTES", "WITNESS_DOMAIN", "BadRecord", "Disagreement", "Fault", "Head",
    "Record", "Verified", "VerifySignature", "against", "canonical_json", "claims", "countersignature", "countersignature_fault",
    "extended", "lines_of", "read", "shortened", "shown", "timestamp", "verify", "witness_heads", "witness_line",
    "witness_statement",
]  # fmt: skip

HEAD_DOMAIN = "log-head"
WITNESS_DOMAIN = "log-witness"
COUNTERSIGN = "countersign"

VerifySignature = Callable[[bytes, str, bytes, bytes], bool]
"""(key, domain, statement, signature) -> whether it holds."""


@dataclass(frozen=True)
class BadRecord:
    """The first record that does not hold. Nothing after it is judged, since each record stands on the one before.

    Attributes:
        line: From 1.
        n: The number that a record has in this place.
        kind: If it could be read.
        fault: What is wrong.
    """

    line: int
    n: int
    kind: str | None
    fault: Fault

    def __str__(self) -> str:
        what = self.kind or "unreadable"
        return f"line {self.line}, n {self.n} ({what}): {self.fault.why}: expected {self.fault.expected}, got {self.fault.found}"


@dataclass(frozen=True)
class Verified:
    """What a check of a log found.

    Attributes:
        head: Of the last good record.
        bad: The first bad record, if any.
        torn_bytes: Length of a last line without its newline; 0 where there is none.
        lines: All lines, good and bad and torn.
        hashes: Of the good records, by n.
        countersigned: Client id -> the heads that it countersigned, in the log's order.
    """

    head: Head
    bad: BadRecord | None
    torn_bytes: int
    lines: int
    hashes: Sequence[str]
    countersigned: Mapping[str, Sequence[Head]]

    @property
    def records(self) -> int:
        """How many records are good; all before the first bad one."""
        return len(self.hashes)

    @property
    def intact(self) -> bool:
        """Whether every byte of the log is in a good record."""
        return self.bad is None and not self.torn_bytes


@dataclass(frozen=True)
class Disagreement:
    """A head that a site kept and that the log does not have.

    Attributes:
        witness: The site's.
        why: `truncated` (the log ends before it) or `rewritten` (another record is in its place).
        found: The log's own hash there, or its last record.
    """

    witness: Head
    why: str
    found: str


def witness_statement(client_id: str, head: Head) -> bytes:
    """What a site signs, in the domain `log-witness`, to say that it saw a head.

    Args:
        client_id: The site's own.
        head: As the coordinator sent it.

    Returns:
        Canonical JSON of the client's id, n and hash.
    """
    return canonical_json({"client_id": client_id, "n": head.n, "hash": head.hash})


def countersignature(client_id: str, head: Head, signature: bytes) -> dict[str, Any]:
    """The fields of a `countersign` record.

    Args:
        client_id: Who signed.
        head: What was signed.
        signature: Over `witness_statement`; b"" in a run without keys.

    Returns:
        The fields; check them with `countersignature_fault` before they go into the log.
    """
    return {
        "client_id": client_id,
        "n": head.n,
        "hash": head.hash,
        "statement": witness_statement(client_id, head).decode("ascii"),
        "signature": signature.hex(),
    }


def countersignature_fault(
    fields: Mapping[str, Any],
    hash_at: Callable[[int], str | None],
    key: bytes | None,
    verify_signature: VerifySignature,
) -> Fault | None:
    """What is wrong with a countersignature. The coordinator asks this before it logs one, `verify` afterwards.

    Args:
        fields: Of the record.
        hash_at: n -> hash of that record of the log, None where it has none.
        key: The site's; None in a run without keys, where the signature must be empty.
        verify_signature: See `verify`.

    Returns:
        None if it is right.
    """
    code = "countersignature"
    if tuple(sorted(fields)) != ("client_id", "hash", "n", "signature", "statement"):
        return Fault(code, "the fields client_id hash n signature statement", shown(list(fields)))
    client_id, n, seen, signature = (fields[name] for name in ("client_id", "n", "hash", "signature"))
    if not isinstance(client_id, str) or type(n) is not int or not 0 <= n < 2**53 or not isinstance(seen, str):
        return Fault(code, "a client's id, n and hash", shown([client_id, n, seen]))
    if not isinstance(signature, str) or not SIGNATURE.fullmatch(signature):
        return Fault(code, "a signature of 128 hex digits", shown(signature))
    statement = witness_statement(client_id, Head(n, seen))
    text = statement.decode("ascii")
    if fields["statement"] != text:
        return Fault(code, f"the statement {text}", shown(fields["statement"]))
    if key is None and signature:
        return Fault(code, "an empty signature in a run without keys", shown(signature))
    if key is not None and not (
        signature and verify_signature(key, WITNESS_DOMAIN, statement, bytes.fromhex(signature))
    ):
        return Fault(code, f"a signature by client {shown(client_id)}", shown(signature))
    here = hash_at(n)
    if here != seen:
        return Fault(
            "rewritten",
            f"record {n} with the hash {shown(seen)} that client {shown(client_id)} countersigned",
            here or "no such record before",
        )
    return None


@dataclass(frozen=True)
class _Keys:
    public: bytes | None
    of_client: Callable[[str], bytes | None]
    verify: VerifySignature


def verify(
    lines: Iterable[bytes | str],
    public_key: bytes | None,
    countersignature_key: Callable[[str], bytes | None],
    verify_signature: VerifySignature,
    accept: Callable[[Record], Fault | None] | None = None,
) -> Verified:
    """Check a whole log.

    Args:
        lines: Each with its newline, as `lines_of` gives them.
        public_key: The coordinator's; None for a run without keys, whose signatures must all be empty.
        countersignature_key: Client id -> key as registered so far, None for a stranger. Not asked without `public_key`.
        verify_signature: (key, domain, statement, signature) -> whether it holds.
        accept: Told of each record that is good so far, in order, and may refuse it.

    Returns:
        What was found; garbage is a finding, never an exception.
    """
    keys = _Keys(public_key, countersignature_key, verify_signature)
    head, count = GENESIS, 0
    hashes: list[str] = []
    countersigned: dict[str, list[Head]] = {}
    bad: BadRecord | None = None
    torn = b""
    for given in lines:
        line = given.encode("utf-8", "surrogatepass") if isinstance(given, str) else given
        if not line:
            continue
        if torn and bad is None:  # not the last line after all
            bad = BadRecord(
                count, head.n + 1, None, Fault("newline", "a newline after the record", shortened(torn[-20:]))
            )
        count += 1
        torn = b"" if line.endswith(b"\n") or len(line) > LINE_CAP_BYTES else line
        if bad is not None or torn:
            continue
        record = _judged(line, head, keys, hashes, accept)
        if not isinstance(record, Record):
            bad = BadRecord(count, head.n + 1, *record)
            continue
        head = Head(record.n, record.hash)
        hashes.append(record.hash)
        if record.kind == COUNTERSIGN:
            seen = Head(record.fields["n"], record.fields["hash"])
            countersigned.setdefault(record.fields["client_id"], []).append(seen)
    return Verified(head, bad, len(torn), count, hashes, countersigned)


def _judged(
    line: bytes, head: Head, keys: _Keys, hashes: Sequence[str], accept: Callable[[Record], Fault | None] | None
) -> Record | tuple[str | None, Fault]:
    record = read(line, head)
    if isinstance(record, Fault):
        kind = claims(line).get("kind")
        return (kind if isinstance(kind, str) and KIND.fullmatch(kind) else None), record
    fault = _unsigned(record, keys)
    if fault is None and record.kind == COUNTERSIGN:
        fault = _countersigned(record.fields, keys, hashes)
    if fault is None and accept is not None:
        fault = accept(record)
    return record if fault is None else (record.kind, fault)


def _unsigned(record: Record, keys: _Keys) -> Fault | None:
    found = shown(record.signature)
    if keys.public is None:
        return Fault("signature", "an empty signature in a run without keys", found) if record.signature else None
    signature = bytes.fromhex(record.signature)
    if signature and keys.verify(keys.public, HEAD_DOMAIN, bytes.fromhex(record.hash), signature):
        return None
    return Fault("signature", "the coordinator's signature over its hash", found)


def _countersigned(fields: Mapping[str, Any], keys: _Keys, hashes: Sequence[str]) -> Fault | None:
    def hash_at(n: int) -> str | None:
        return hashes[n] if n < len(hashes) else None

    client_id = fields.get("client_id")
    key = keys.of_client(client_id) if keys.public is not None and isinstance(client_id, str) else None
    if keys.public is not None and key is None:
        return Fault("countersignature", "a client that the log registered before", shown(client_id))
    return countersignature_fault(fields, hash_at, key, keys.verify)


def against(witnesses: Iterable[Head], verified: Verified) -> list[Disagreement]:
    """Compare a log with heads that sites kept.

    Args:
        witnesses: The kept heads.
        verified: What the check of the log found; only its good records count.

    Returns:
        Those that the log does not have, in the order given.
    """
    found: list[Disagreement] = []
    for witness in witnesses:
        if witness.n >= verified.records:
            found.append(Disagreement(witness, "truncated", f"n {verified.head.n} as its last good record"))
        else:
            here = verified.hashes[witness.n] if witness.n >= 0 else GENESIS.hash
            if here != witness.hash:
                found.append(Disagreement(witness, "rewritten", here))
    return found


def witness_line(head: Head) -> str:
    """A head as a site keeps it.

    Args:
        head: As the coordinator sent it.

    Returns:
        `n hash` and a newline.
    """
    return f"{head.n} {head.hash}\n"


def witness_heads(text: str, where: str) -> list[Head]:
    """The heads in a site's file of them.

    Args:
        text: One `n hash` a line.
        where: The file's name, for messages.

    Returns:
        The heads in order.

    Raises:
        ConfigError: If a line is another thing.
    """
    heads: list[Head] = []
    for number, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(r"(-1|[0-9]{1,18}) ([0-9a-f]{64})", line)
        if match is None:
            raise ConfigError(f"{where}, line {number}: expected a record's number and its hash of 64 hex digits.")
        heads.append(Head(int(match[1]), match[2]))
    return heads
