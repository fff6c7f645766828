"""A CA and sites in folders, made through the same calls as the commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lamina.protos.errors import IdentityError
from lamina.protos.identity import authority as pki
from lamina.protos.identity.authority import Authority
from lamina.protos.identity.ledger import read_ledger
from lamina.protos.identity.requests import Invite, certificate_request
from lamina.protos.identity.site import accept, prepare

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def new_ca(folder: Path, consortium: str = "hospitals", now: datetime = NOW) -> Authority:
    return pki.create(folder, consortium, 3650, None, now)


def invited(ca: Authority, name: str, role: str = "client", now: datetime = NOW, days: int = 7) -> Invite:
    hosts: Sequence[str] = ("localhost", "127.0.0.1") if role == "coordinator" else ()
    return pki.invite(ca, name, role, hosts, now, days=days)


def enrolled(ca: Authority, folder: Path, name: str, role: str = "client", now: datetime = NOW) -> Path:
    """A site's folder, after an invite, a request and an answer."""
    invite = invited(ca, name, role, now)
    accept(folder, pki.fulfil(ca, prepare(folder, invite, now), now), invite, now)
    return folder


def new_tls_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def csr(name: str = "north", role: str = "client", consortium: str = "hospitals") -> str:
    return certificate_request(new_tls_key(), Ed25519PrivateKey.generate(), name=name, role=role, consortium=consortium)


def refused(ca: Authority, request: bytes, says: str, **options: Any) -> None:
    """The CA refuses, and its ledger has no certificate more than before."""
    before = len(read_ledger(ca.folder).certificates)
    with pytest.raises(IdentityError, match=says):
        pki.fulfil(ca, request, options.pop("now", NOW), **options)
    assert len(read_ledger(ca.folder).certificates) == before


def changed(request: bytes, **fields: Any) -> bytes:
    return json.dumps(json.loads(request) | fields).encode()


def revoked(folder: Path, name: str) -> None:
    """Revoke all of a name's certificates in the CA of a folder, now; its crl.pem is replaced."""
    pki.revoke(pki.opened(folder, None), datetime.now(UTC), name=name)
