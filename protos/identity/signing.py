"""Ed25519 signatures over statements, each bound to the domain that it was made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

# The y coordinates of Ed25519's points of order 1, 2, 4 and 8, also as written unreduced. Under such a key one signature
# fits many statements, so that its owner could deny any of them (Chalkias et al. 2020, "Taming the many EdDSAs").
_P = 2**255 - 19
_ORDER_8 = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
_SMALL_ORDER = frozenset({0, 1, _P - 1, _P, _P + 1, _ORDER_8, _P - _ORDER_8})


def canonical(document: Mapping[str, Any]) -> bytes:
    """The one JSON text of a document, to be signed or hashed.

    Args:
        document: JSON values; nested mappings must be dicts.

    Returns:
        ASCII with sorted keys and no spaces.

    Raises:
        ValueError: For NaN or an infinity.
        TypeError: For what JSON cannot hold.
    """
    text = json.dumps(dict(document), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def sign_with(key: Ed25519PrivateKey, domain: str, statement: bytes) -> bytes:
    """Sign a statement with a bare key.

    Args:
        key: The signing key.
        domain: What the statement is for, such as `update`; a signature holds in no other domain.
        statement: Any bytes.

    Returns:
        64 bytes.
    """
    return key.sign(_bound(domain, statement))


def verify(signing_key: bytes, domain: str, statement: bytes, signature: bytes) -> bool:
    """Whether a signature holds. Nothing malformed raises: it is simply no signature.

    Args:
        signing_key: The raw Ed25519 public key, as in `Peer.signing_key`.
        domain: What the statement is for.
        statement: The signed bytes.
        signature: What came with them.

    Returns:
        True if the key signed this statement for this domain.
    """
    if int.from_bytes(signing_key, "little") % 2**255 in _SMALL_ORDER:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(signing_key).verify(signature, _bound(domain, statement))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def invite_key(token: bytes) -> Ed25519PrivateKey:
    """The key that the holder of an invite signs a request with. The CA keeps only its public half.

    A ledger that is read by others then lets nobody enroll, which a stored hash that keys a MAC would.

    Args:
        token: 32 random bytes.

    Returns:
        The key.
    """
    seed = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"lamina invite").derive(token)
    return Ed25519PrivateKey.from_private_bytes(seed)


def _bound(domain: str, statement: bytes) -> bytes:
    # The digest has a fixed length and the domain comes before it, so no two pairs give the same bytes.
    return b"lamina\0" + domain.encode() + b"\0" + hashlib.sha256(statement).digest()
