"""One record of a run's event log: its one text, how the next is made, and how a line is read.

A record is one line of canonical JSON (ASCII, sorted keys, no spaces, no NaN) with the fields

    n          from 0, one more than the line before
    time       RFC 3339 in UTC, `2026-05-01T12:00:00.000Z`; informative, a clock may step back
    kind       `begin`, `register`, `round`, `countersign`, ...
    fields     an object
    prev       the hash of the record before, 64 zeros for the first
    hash       SHA-256(prev as 32 bytes || canonical JSON of {n, time, kind, fields, prev})
    signature  the coordinator's over the 32 bytes of `hash`, in the domain `log-head`; empty in a run without keys

What holds for all lines together is in `chain.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO

from lamina.protos.errors import LaminaError

LINE_CAP_BYTES = 1 << 20
DEPTH_CAP = 32
KIND = re.compile(r"[a-z][a-z0-9_-]{0,63}")
SIGNATURE = re.compile(r"([0-9a-f]{128})?")

_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Head:
    """A place in a log: the number of a record and its hash. A log with no record has the head `GENESIS`."""

    n: int
    hash: str


GENESIS = Head(-1, "0" * 64)


@dataclass(frozen=True)
class Record:
    """One line, read."""

    n: int
    time: str
    kind: str
    fields: Mapping[str, Any]
    prev: str
    hash: str
    signature: str


@dataclass(frozen=True)
class Fault:
    """What is wrong with a record.

    Attributes:
        why: A short code: `length`, `newline`, `form`, `number`, `prev`, `hash`, `signature`, `countersignature`, `rewritten`,
            or one of the caller's.
        expected: In words.
        found: In words, cut short.
    """

    why: str
    expected: str
    found: str


def canonical_json(value: object) -> bytes:
    """The one text that a value has in a log, and under a signature.

    Args:
        value: What JSON can hold.

    Returns:
        ASCII with sorted keys and no spaces.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def timestamp(now: datetime) -> str:
    """A record's `time`.

    Args:
        now: With its time zone.

    Returns:
        RFC 3339 in UTC, to the millisecond.

    Raises:
        LaminaError: If the time zone is missing.
    """
    if now.tzinfo is None:
        raise LaminaError(f"event log: expected a time with its zone, got {now.isoformat()}.")
    return now.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def extended(
    head: Head, kind: str, fields: Mapping[str, Any], time: str, sign: Callable[[bytes], bytes]
) -> tuple[str, Head]:
    """The record after a head.

    Args:
        head: Where the log ends; `GENESIS` for the first record.
        kind: Lower-case letters, digits, `-` and `_`.
        fields: What JSON can hold, with text keys.
        time: From `timestamp`.
        sign: Signs the 32 bytes of the new hash in the domain `log-head`; gives b"" in a run without keys.

    Returns:
        The line with its newline, and the new head.

    Raises:
        LaminaError: If a check of the log would refuse the record: it is refused here, before it is in the log.
    """
    body = {"n": head.n + 1, "time": time, "kind": kind, "fields": dict(fields), "prev": head.hash}
    try:
        digest = _digest(body)
        line = canonical_json({**body, "hash": digest, "signature": sign(bytes.fromhex(digest)).hex()}) + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise LaminaError(
            f"event log, record {head.n + 1} ({kind}): expected plain JSON values, got {error}."
        ) from None
    written = read(line, head)
    if isinstance(written, Fault):
        raise LaminaError(
            f"event log, record {head.n + 1} ({kind}): expected {written.expected}, got {written.found} ({written.why})."
        )
    return line.decode("ascii"), Head(written.n, written.hash)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(bytes.fromhex(body["prev"]) + canonical_json(body)).hexdigest()


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, each with its newline, and none held in memory beyond the cap.

    Args:
        file: Opened for reading bytes.

    Yields:
        A line; one that is too long is cut one byte after the cap, so that `verify` sees that it is.
    """
    while line := file.readline(LINE_CAP_BYTES + 1):
        part = line
        while len(part) > LINE_CAP_BYTES and not part.endswith(b"\n"):
            part = file.readline(LINE_CAP_BYTES + 1)
        yield line


def read(line: bytes, head: Head) -> Record | Fault:
    """Read one line and check its form, its number and its hashes; not its signature, which needs a key.

    Args:
        line: With its newline.
        head: Of the record before.

    Returns:
        The record, or what is wrong with it. Nothing is raised, whatever the bytes.
    """
    if len(line) > LINE_CAP_BYTES:
        return Fault("length", f"a line of at most {LINE_CAP_BYTES} bytes", "a longer one")
    if not line.endswith(b"\n"):
        return Fault("newline", "a newline after the record", shortened(line[-20:]))
    value = _parsed(line[:-1])
    if isinstance(value, Fault):
        return value
    fault = _form(value)
    if fault is not None:
        return fault
    record = Record(**value)
    if record.n != head.n + 1:
        return Fault("number", f"n {head.n + 1}", f"n {record.n}")
    if record.prev != head.hash:
        return Fault("prev", f"prev {head.hash}", record.prev)
    computed = _digest({key: value[key] for key in ("n", "time", "kind", "fields", "prev")})
    if record.hash != computed:
        return Fault("hash", f"hash {computed} by its content", record.hash)
    return record


def _parsed(text: bytes) -> dict[str, Any] | Fault:
    wanted = "one JSON object of plain values"
    try:
        value = json.loads(text.decode("ascii"))
        depth = _depth(value)
        if depth > DEPTH_CAP:
            return Fault("form", f"values nested at most {DEPTH_CAP} deep", f"{depth} deep")
        # Also finds repeated keys, other spellings of a number or a character, NaN and infinities.
        again = canonical_json(value)
    except (ValueError, RecursionError):
        return Fault("form", wanted, shortened(text))
    if again != text:
        return Fault("form", "canonical JSON: sorted keys, each once, no spaces", shortened(text))
    return value if isinstance(value, dict) else Fault("form", wanted, shortened(text))


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level:  # by levels: a recursive walk would be at the mercy of the depth itself
        depth += 1
        inner: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inner.extend(one.values())
            elif isinstance(one, list):
                inner.extend(one)
        level = inner
    return depth


def _form(value: Mapping[str, Any]) -> Fault | None:
    names = ("fields", "hash", "kind", "n", "prev", "signature", "time")
    if tuple(value) != names:
        return Fault("form", f"the fields {' '.join(names)}", shown(list(value)))
    if type(value["n"]) is not int:
        return Fault("form", "n to be a whole number", shown(value["n"]))
    if not isinstance(value["fields"], dict):
        return Fault("form", "fields to be an object", shown(value["fields"]))
    for name, pattern in (
        ("kind", KIND),
        ("time", _TIME),
        ("prev", _HASH),
        ("hash", _HASH),
        ("signature", SIGNATURE),
    ):
        if not isinstance(value[name], str) or not pattern.fullmatch(value[name]):
            return Fault("form", f"{name} like {pattern.pattern}", shown(value[name]))
    try:
        datetime.fromisoformat(value["time"])
    except ValueError:
        return Fault("form", "a time that exists", value["time"])
    return None


def claims(line: bytes) -> Mapping[str, Any]:
    """What a line says of itself, for a message about one that does not hold.

    Args:
        line: Any bytes.

    Returns:
        Its values, unchecked; nothing where it cannot be read.
    """
    value = _parsed(line.removesuffix(b"\n"))
    return value if isinstance(value, dict) else {}


def shown(value: object) -> str:
    """A foreign value in a message: JSON in ASCII, and short.

    Args:
        value: What JSON can hold.

    Returns:
        At most 100 characters.
    """
    text = canonical_json(value).decode("ascii")
    return text if len(text) <= 100 else f"{text[:97]}..."


def shortened(text: bytes) -> str:
    """Foreign bytes in a message: quoted, in ASCII, and short.

    Args:
        text: Any bytes.

    Returns:
        At most 82 characters.
    """
    shown = ascii(text)[2:-1]
    return f"'{shown}'" if len(shown) <= 80 else f"'{shown[:77]}...'"
