"""Messages of a secure sum as JSON values and back; of what comes, every field is of its type before it is a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamina.protos.secagg.context import Context, Participant
from lamina.protos.secagg.coordinates import Rule
from lamina.protos.secagg.messages import (
    Advertised,
    Advertisement,
    Agreed,
    Agreement,
    Declined,
    Delivered,
    Opening,
    Revealed,
    Shares,
    Survivors,
)
from lamina.protos.secagg.server import Down, Up
from lamina.protos.statements import BadStatement, bounded, field

# Of a key, box, share or signature, in bytes: the longest is a box of two shares.
_MOST_BYTES = 256
_MOST_NAME = 128


def document_of(message: Down | Up) -> dict[str, Any]:
    """A message as JSON values.

    Args:
        message: Any but a vector, which is uploaded.

    Returns:
        The document.
    """
    match message:
        case Opening():
            return {"kind": "opening", "context": _context_document(message.context), **_layout_document(message)}
        case Advertised():
            return {"kind": "advertised", "keys": [_keys_document(one) for one in message.advertisements]}
        case Advertisement():
            return {"kind": "keys", **_keys_document(message)}
        case Shares() | Delivered():
            return {"kind": type(message).__name__.lower(), "boxes": _hexes(message.boxes)}
        case Survivors():
            return {"kind": "survivors", "names": list(message.names)}
        case Agreement():
            return {"kind": "agreement", "signature": message.signature.hex()}
        case Agreed():
            return {"kind": "agreed", "signatures": _hexes(message.signatures)}
        case Revealed():
            return {"kind": "revealed", "seeds": _hexes(message.seeds), "keys": _hexes(message.keys)}
        case Declined():
            return {"kind": "declined"}
    raise TypeError(f"{type(message).__name__} has no document")


def up_of(document: Mapping[str, Any], name: str) -> Up:
    """What a participant says.

    Args:
        document: JSON values.
        name: The participant, as the channel authenticated it.

    Returns:
        The message.

    Raises:
        BadStatement: If it is none.
    """
    match document.get("kind"):
        case "keys":
            return _keys(document, name)
        case "shares":
            return Shares(name, _bytes_by_name(document, "boxes"))
        case "agreement":
            return Agreement(name, _bytes(document, "signature"))
        case "revealed":
            return Revealed(name, _bytes_by_name(document, "seeds"), _bytes_by_name(document, "keys"))
        case "declined":
            return Declined(name)
    raise BadStatement("malformed", "expected a participant's message of a secure sum.")


def down_of(document: Mapping[str, Any]) -> Down:
    """What a coordinator says.

    Args:
        document: JSON values.

    Returns:
        The message.

    Raises:
        BadStatement: If it is none.
        SecureSumRefused: If it opens an attempt that cannot be.
    """
    match document.get("kind"):
        case "opening":
            return _opening(document)
        case "advertised":
            found = [_document(one) for one in field(document, "keys", list)]
            return Advertised(tuple(_keys(one, _name(one.get("name"))) for one in found))
        case "delivered":
            return Delivered(_bytes_by_name(document, "boxes"))
        case "survivors":
            return Survivors(tuple(_name(one) for one in field(document, "names", list)))
        case "agreed":
            return Agreed(_bytes_by_name(document, "signatures"))
    raise BadStatement("malformed", "expected a coordinator's message of a secure sum.")


def _context_document(context: Context) -> dict[str, Any]:
    return {
        "run_id": context.run_id,
        "round": context.round,
        "nonce": context.nonce.hex(),
        "layout": context.layout,
        "train": context.train,
        "version": context.version,
        "participants": [[one.name, one.signing_key.hex()] for one in context.participants],
        "threshold": context.threshold,
    }


def _layout_document(opening: Opening) -> dict[str, Any]:
    rule = {"weights": opening.rule.weights, "examples": opening.rule.examples, "bound": opening.rule.bound}
    return {"ranks": dict(opening.ranks), "scales": dict(opening.scales), "rule": rule}


def _opening(document: Mapping[str, Any]) -> Opening:
    about, rule = field(document, "context", dict), field(document, "rule", dict)
    if about.get("train") not in ("A", "B", "core") or rule.get("weights") not in ("uniform", "num_examples"):
        raise BadStatement("malformed", "expected a secure sum of one factor, by known weights.")
    participants = []
    for one in field(about, "participants", list):
        if not isinstance(one, list) or len(one) != 2:
            raise BadStatement("malformed", "expected a name and a key of each participant.")
        participants.append(Participant(_name(one[0]), _hex(one[1])))
    context = Context(
        run_id=field(about, "run_id", str),
        round=bounded(about, "round", 1),
        nonce=_bytes(about, "nonce"),
        layout=field(about, "layout", str),
        train=about["train"],
        version=bounded(about, "version", 0),
        participants=tuple(participants),
        threshold=bounded(about, "threshold", 1),
    )
    ranks, scales = field(document, "ranks", dict), field(document, "scales", dict)
    for module in ranks:
        bounded(ranks, module, 0)
    numbers = {module: _number(value) for module, value in scales.items()}
    return Opening(
        context, ranks, numbers, Rule(rule["weights"], bounded(rule, "examples", 1), _number(rule.get("bound")))
    )


def _keys_document(message: Advertisement) -> dict[str, Any]:
    return {
        "name": message.name,
        "mask_key": message.mask_key.hex(),
        "share_key": message.share_key.hex(),
        "commitment": message.commitment.hex(),
        "signature": message.signature.hex(),
    }


def _keys(document: Mapping[str, Any], name: str) -> Advertisement:
    fields = (_bytes(document, key) for key in ("mask_key", "share_key", "commitment", "signature"))
    return Advertisement(name, *fields)


def _document(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadStatement("malformed", "expected a JSON object in a message of a secure sum.")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MOST_NAME:
        raise BadStatement("malformed", f"expected a name of at most {_MOST_NAME} characters.")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise BadStatement("malformed", "expected a number in a message of a secure sum.")
    return float(value)


def _hex(value: Any) -> bytes:
    try:
        found = bytes.fromhex(value)
    except (ValueError, TypeError):
        found = None
    if found is None or len(found) > _MOST_BYTES or found.hex() != value:
        raise BadStatement("malformed", f"expected at most {_MOST_BYTES} bytes as lower-case hex digits.")
    return found


def _bytes(document: Mapping[str, Any], key: str) -> bytes:
    return _hex(document.get(key))


def _bytes_by_name(document: Mapping[str, Any], key: str) -> dict[str, bytes]:
    return {_name(name): _hex(value) for name, value in field(document, key, dict).items()}


def _hexes(values: Mapping[str, bytes]) -> dict[str, str]:
    return {name: value.hex() for name, value in values.items()}
