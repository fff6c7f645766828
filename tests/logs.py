"""Event logs for tests: a coordinator and two sites, each with a key made of its name."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lamina.protos import chain
from lamina.protos.chain import GENESIS, Head, Verified

TIME = "2026-05-01T12:00:00.000Z"
SITES = ("north", "south")


def key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def public(name: str) -> bytes:
    return key(name).public_key().public_bytes_raw()


def sign(name: str, domain: str, statement: bytes) -> bytes:
    return key(name).sign(domain.encode() + b"\0" + statement)


def verify_signature(public_key: bytes, domain: str, statement: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, domain.encode() + b"\0" + statement)
    except InvalidSignature:
        return False
    return True


def coordinator(digest: bytes) -> bytes:
    return sign("coordinator", chain.HEAD_DOMAIN, digest)


def unsigned(digest: bytes) -> bytes:
    return b""


def witnessed(site: str, head: Head) -> dict[str, Any]:
    return chain.countersignature(site, head, sign(site, chain.WITNESS_DOMAIN, chain.witness_statement(site, head)))


Event = tuple[str, Mapping[str, Any]]


def written(
    events: Sequence[Event], signer: Callable[[bytes], bytes] = coordinator, after: Head = GENESIS
) -> tuple[list[str], list[Head]]:
    """Lines of these events after a head, and the head after each."""
    lines, heads = [], []
    for kind, fields in events:
        line, after = chain.extended(after, kind, fields, TIME, signer)
        lines.append(line)
        heads.append(after)
    return lines, heads


def history(rounds: int = 2, signer: Callable[[bytes], bytes] = coordinator) -> tuple[list[str], list[Head]]:
    """begin, register twice, and each round followed by both sites' countersignatures of it."""
    lines, heads = written([("begin", {"run_id": "r"}), *(("register", {"client_id": site}) for site in SITES)], signer)
    for number in range(1, rounds + 1):
        more, after = written([("round", {"round": number, "loss": 1.5 / number})], signer, heads[-1])
        lines, heads = lines + more, heads + after
        round_head = heads[-1]
        for site in SITES:
            more, after = written([("countersign", witnessed(site, round_head))], signer, heads[-1])
            lines, heads = lines + more, heads + after
    return lines, heads


def keys_of_sites(client_id: str) -> bytes | None:
    return public(client_id) if client_id in SITES else None


def verified(lines: Sequence[str | bytes] | bytes) -> Verified:
    """Checked with the right keys; bytes are cut into lines first, as from a file."""
    given = chain.lines_of(io.BytesIO(lines)) if isinstance(lines, bytes) else lines
    return chain.verify(given, public("coordinator"), keys_of_sites, verify_signature)
