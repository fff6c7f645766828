"""What is signed: canonical JSON documents, and how instructions and claims are written in them and read back.

A statement is read from the very bytes that were signed. In a run without certificates the signature is empty.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from lamina.protos.blobs import Blob
from lamina.protos.coordinator_pb2 import Signed
from lamina.protos.errors import LaminaError
from lamina.protos.identity import canonical
from lamina.protos.messages import Budget, Instruction

PROTOCOL = 1
MAX_STATEMENT_BYTES = 4 * 1024**2
MAX_NUMBER = 2**53
TERMS, INSTRUCTION, CLAIM, REPORT, REGISTER = "terms", "instruction", "update", "report", "register"
MASKING = "masking"

Sign = Callable[[str, bytes], bytes]
Verify = Callable[[str, bytes, bytes], bool]
Find = Callable[[str, int], Blob]


class BadStatement(LaminaError):
    """A statement that is not signed by whom it should be, or does not say what it should.

    Args:
        reason: `signature` or `malformed`.
        message: The sentence for the log.
    """

    exit_code = 5

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def signed(domain: str, document: Mapping[str, Any], sign: Sign) -> Signed:
    """A document as a signed statement.

    Args:
        domain: Which kind of statement.
        document: JSON values.
        sign: Domain and bytes to a signature.

    Returns:
        The message.
    """
    statement = canonical(document)
    return Signed(statement=statement, signature=sign(domain, statement))


def read(message: Signed, domain: str, verify: Verify) -> dict[str, Any]:
    """The document of a signed statement.

    Args:
        message: From a peer.
        domain: Which kind of statement it must be.
        verify: Domain, bytes and signature to whether it holds.

    Returns:
        The document; the types of its fields are the caller's to check.

    Raises:
        BadStatement: If the signature does not hold or the content is no JSON object.
    """
    if len(message.statement) > MAX_STATEMENT_BYTES:
        raise BadStatement("malformed", f"expected a statement of at most {MAX_STATEMENT_BYTES} bytes.")
    if not verify(domain, message.statement, message.signature):
        raise BadStatement(
            "signature", f"expected a signature over the {domain} statement, got one that does not hold."
        )
    try:
        document = json.loads(message.statement)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise BadStatement("malformed", f"expected a JSON object as {domain} statement.")
    return document


def field(document: Mapping[str, Any], name: str, kind: type) -> Any:
    """One field of a statement, of the type that it must have.

    Args:
        document: A statement.
        name: Of the field.
        kind: Its type; bool is no int.

    Returns:
        The value.

    Raises:
        BadStatement: If it is absent or of another type.
    """
    value = document.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadStatement("malformed", f"expected {name} to be {kind.__name__}, got {type(value).__name__}.")
    return value


def bounded(document: Mapping[str, Any], name: str, least: int) -> int:
    """An integer field that any database, file and message can hold.

    Args:
        document: A statement.
        name: Of the field.
        least: Its lowest value.

    Returns:
        The value.

    Raises:
        BadStatement: If it is absent, of another type, below `least` or above 2**53.
    """
    value = int(field(document, name, int))
    if not least <= value <= MAX_NUMBER:
        raise BadStatement("malformed", f"expected {least} <= {name} <= {MAX_NUMBER}, got another number.")
    return value


def instruction_document(instruction: Instruction) -> dict[str, Any]:
    """An instruction as JSON values, its blobs by name.

    Args:
        instruction: Any.

    Returns:
        The document.
    """
    return {
        "kind": instruction.kind,
        "run_id": instruction.run_id,
        "round": instruction.round,
        "client_id": instruction.client_id,
        "version": instruction.version,
        "release": [instruction.release.sha256, instruction.release.num_bytes],
        "frozen": instruction.frozen and [instruction.frozen.sha256, instruction.frozen.num_bytes],
        "frozen_since": instruction.frozen_since,
        "keep_frozen": instruction.keep_frozen,
        "train": instruction.train,
    }


def instruction_of(document: Mapping[str, Any], find: Find) -> Instruction:
    """The inverse of `instruction_document`.

    Args:
        document: From a statement or the store.
        find: Hash and length to a blob.

    Returns:
        The instruction.

    Raises:
        BadStatement: If it is none.
    """
    try:
        frozen = document["frozen"]
        return Instruction(
            run_id=field(document, "run_id", str),
            round=field(document, "round", int),
            client_id=field(document, "client_id", str),
            release=find(*_name(document["release"])),
            frozen=None if frozen is None else find(*_name(frozen)),
            version=field(document, "version", int),
            frozen_since=None if document["frozen_since"] is None else field(document, "frozen_since", int),
            keep_frozen=field(document, "keep_frozen", bool),
            train=_one_of(document["train"], ("AB", "A", "B", "core")),
            kind=_one_of(document["kind"], ("train", "evaluate")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadStatement("malformed", f"expected an instruction, got one without {error}.") from None


def _name(value: Any) -> tuple[str, int]:
    sha256, num_bytes = value
    if not (isinstance(sha256, str) and len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")):
        raise ValueError("a SHA-256 in hex")
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, int) or num_bytes < 0:
        raise ValueError("a length")
    return sha256, num_bytes


def _one_of(value: Any, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise ValueError(f"one of {known}")
    return value


def budget_document(budget: Budget) -> dict[str, Any]:
    """A budget as JSON values.

    Args:
        budget: Any.

    Returns:
        The document.
    """
    return {
        "train": dict(budget.train),
        "download": dict(budget.download),
        "scale": dict(budget.scale),
        "held_version": budget.held_version,
    }


def budget_of(document: Mapping[str, Any]) -> Budget:
    """The inverse of `budget_document`.

    Args:
        document: From terms or the store.

    Returns:
        The budget.

    Raises:
        BadStatement: If it is none.
    """
    try:
        ranks = [{str(k): int(v) for k, v in document[name].items()} for name in ("train", "download")]
        scale = {str(k): float(v) for k, v in document["scale"].items()}
        return Budget(ranks[0], ranks[1], scale, int(document["held_version"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadStatement("malformed", "expected a budget of ranks and scales by module.") from None
