"""An auditor's signature over an audit document, and the check of it.

`signature` holds `algorithm`, the signer's `certificate` with its `fingerprint`, `name` and `organisation`, and `value`. The
value is over the canonical JSON of the whole document but for itself, so the other fields of the signature are under it too.
The page cannot be under it, as it is made from the signed document; it is made again and compared.

A certificate may expire, and the audit stays: dates are looked at as of `made_at`, which is the auditor's own word. A
certificate that was revoked is refused whenever the audit says it was made, since who has a stolen key can date as they like.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lamina.audits import page
from lamina.protos import identity as identities
from lamina.protos.errors import IdentityError
from lamina.protos.identity import Peer, canonical, check_in_force, verified_peer, verify
from lamina.protos.identity.certificates import fingerprint

__all__ = ["check", "check_page", "parsed", "signed"]

DOMAIN, ROLE, ALGORITHM = "audit", "auditor", "Ed25519"

_FIELDS = {"algorithm", "certificate", "fingerprint", "name", "organisation", "value"}
_AHEAD = timedelta(minutes=10)  # by which the clocks of auditor and reader may differ
_CHANGED = "The file was changed after it was signed, or damaged; ask the auditor for it again."


def signed(document: Mapping[str, Any], identity: Path) -> dict[str, Any]:
    """The document with the signature of an auditor.

    Args:
        document: JSON values, with `made_at`; an older `signature` is replaced.
        identity: The auditor's folder, from `lamina pki enroll`.

    Returns:
        The document as it is after a round trip through JSON, with `signature`.

    Raises:
        IdentityError: If the folder is unsound, its certificate is not in force at `made_at`, or of another role.
        ValueError: For NaN or an infinity in the document.
        TypeError: For what JSON cannot hold.
    """
    who = identities.load(identity)
    # Keys that are not text change their order when JSON makes them so; what is signed is what will be read.
    content: dict[str, Any] = json.loads(json.dumps(dict(document), allow_nan=False))
    peer = verified_peer(who.certificate_pem, who.ca_pem, _made_at(content), ROLE)
    content["signature"] = {
        "algorithm": ALGORITHM,
        "certificate": who.certificate_pem.decode("ascii"),
        "fingerprint": fingerprint(who.certificate_pem),
        "name": peer.name,
        "organisation": peer.consortium,
    }
    value = identities.sign(who, DOMAIN, canonical(content))
    content["signature"]["value"] = base64.b64encode(value).decode("ascii")
    return content


def parsed(content: bytes) -> dict[str, Any]:
    """The values of an audit.json that cannot be read in two ways.

    Args:
        content: The file.

    Returns:
        The document.

    Raises:
        IdentityError: If it is no JSON object, holds NaN or an infinity, or names something twice: readers differ in which of the
            two they take, and only one is under the signature.
    """
    try:
        found = json.loads(content, object_pairs_hook=_once, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise IdentityError(
            f"audit.json: expected one JSON document that reads in one way, got another. {_CHANGED}"
        ) from error
    if not isinstance(found, dict):
        raise IdentityError(f"audit.json: expected a JSON object, got {type(found).__name__}. {_CHANGED}")
    return found


def check(document: Mapping[str, Any], ca_pem: bytes, now: datetime, revocations: Path | None = None) -> Peer:
    """Who signed a document, once everything about the signature holds.

    Args:
        document: The values of audit.json.
        ca_pem: The certificate of the consortium's CA, from a source that is trusted.
        now: This machine's time, aware.
        revocations: The CA's list of revoked certificates, or None where there is none.

    Returns:
        The auditor.

    Raises:
        IdentityError: If there is no signature; if anything in the document or the signature was changed; or if the
            certificate is of another CA or role, was not in force at `made_at`, or is revoked.
    """
    signature = document.get("signature")
    if not isinstance(signature, Mapping):
        raise IdentityError(
            "audit.json: expected a signature, got none. Audit again with identity=FOLDER of an auditor."
        )
    if set(signature) != _FIELDS or not all(isinstance(value, str) for value in signature.values()):
        raise IdentityError(
            f"audit.json: expected a signature of {', '.join(sorted(_FIELDS))}, all of them text. {_CHANGED}"
        )
    made_at = _made_at(document)
    if made_at > now + _AHEAD:
        raise IdentityError(
            f"audit.json: expected a time before now, got made_at={made_at.isoformat()} where this machine's clock says "
            f"{now.isoformat()}. Set the clock, or do not trust the audit."
        )
    certificate = signature["certificate"].encode("utf-8", "replace")
    peer = verified_peer(certificate, ca_pem, made_at, ROLE)
    if not _holds(document, signature, peer):
        raise IdentityError(f"audit.json: expected the content that {peer.name} signed, got another. {_CHANGED}")
    named = (signature["algorithm"], signature["fingerprint"], signature["name"], signature["organisation"])
    if named != (ALGORITHM, fingerprint(certificate), peer.name, peer.consortium):
        raise IdentityError(
            f"audit.json: expected the signature to name {peer.name} as its certificate does. {_CHANGED}"
        )
    if revocations is not None:
        check_in_force(peer, revocations, ca_pem)
    return peer


def check_page(document: Mapping[str, Any], text: str) -> None:
    """Raise where a page does not say what the document says.

    Args:
        document: The values of audit.json, checked before.
        text: The page beside it.

    Raises:
        IdentityError: If the page is not the one that is made from the document.
        ConfigError: If the document is of another schema.
    """
    if page.render(document) != text:
        version = page.reading.plain(document.get("lamina"), 40)
        raise IdentityError(
            "audit.html: expected the page that is made from audit.json, got another. It was changed, or made by another "
            f"version than this one (the audit was made by {version or 'an unknown one'}). Trust audit.json alone, and make "
            "the page again."
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _finite(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _holds(document: Mapping[str, Any], signature: Mapping[str, str], peer: Peer) -> bool:
    under = {name: value for name, value in signature.items() if name != "value"}
    try:
        value = base64.b64decode(signature["value"], validate=True)
        statement = canonical({**document, "signature": under})
    except (binascii.Error, ValueError, TypeError):
        return False
    # One signature has one spelling: b64decode lets unused bits and padding differ.
    exact = base64.b64encode(value).decode("ascii") == signature["value"]
    return exact and verify(peer.signing_key, DOMAIN, statement, value)


def _made_at(document: Mapping[str, Any]) -> datetime:
    try:
        moment = datetime.fromisoformat(document["made_at"])
        return moment.astimezone(UTC) if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise IdentityError(
            "audit.json: expected made_at as a time in ISO 8601, which a signature is checked against, got none."
        ) from error
