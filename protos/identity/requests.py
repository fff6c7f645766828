"""The documents that pass between a site and the CA: the invite one way, the request the other.

The token in an invite never travels back. The site signs its request with a key derived from the token, and the CA, which
keeps only that key's public half, checks the signature: what it stores, and what a listener sees, enrolls nobody.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from lamina.protos.errors import IdentityError
from lamina.protos.identity.certificates import (
    POSSESSION_OID,
    ROLE_OID,
    ROLES,
    SIGNING_KEY_OID,
    certificate,
    consortium_of,
    is_name,
    octets_extension,
    octets_in,
    raw_public,
    role_extension,
    role_in,
    stamp,
)
from lamina.protos.identity.signing import canonical, invite_key, sign_with, verify

# A request is about 3 kB; nothing larger is parsed.
MAX_REQUEST_BYTES = 16 * 1024
_POSSESSION = "enrollment/possession"
_KINDS = ("enroll", "renew")


@dataclass(frozen=True)
class Invite:
    """What a site is given, once, to become somebody.

    Args:
        id: Public; names the invite in the CA's ledger.
        consortium: Whose CA.
        name: Who the site will be.
        role: As what.
        hosts: Where a coordinator will be reached.
        expires: After this the CA refuses it, aware.
        enrollment: `host:port` of the CA's listener, or ``.
        ca_pem: The CA's certificate, the root of the site's trust.
        token: 32 secret bytes.
    """

    id: str
    consortium: str
    name: str
    role: str
    hosts: tuple[str, ...]
    expires: datetime
    enrollment: str
    ca_pem: bytes = field(repr=False)
    token: bytes = field(repr=False)


@dataclass(frozen=True)
class Request:
    """What a site asks of the CA.

    Args:
        kind: `enroll` or `renew`.
        base: The invite's id, or the certificate (PEM) to renew.
        csr_pem: The certificate request.
        proof: Signature over base and request, with the invite's key or with the signing key of the old certificate.
    """

    kind: str
    base: str
    csr_pem: str
    proof: bytes


@dataclass(frozen=True)
class Wanted:
    """What a certificate request asks for, its own proofs checked.

    Args:
        name: Subject's CN.
        role: From the role extension.
        consortium: Subject's O.
        tls_key: The ECDSA public key; the request is signed with it.
        signing_key: The raw Ed25519 public key, whose holder has signed the TLS key.
    """

    name: str
    role: str
    consortium: str
    tls_key: ec.EllipticCurvePublicKey
    signing_key: bytes


def invite_bytes(invite: Invite) -> bytes:
    """An invite as the file that is given to the site.

    Args:
        invite: The invite.

    Returns:
        JSON.
    """
    document = {
        "schema": 1,
        "kind": "lamina invite",
        "id": invite.id,
        "consortium": invite.consortium,
        "name": invite.name,
        "role": invite.role,
        "hosts": list(invite.hosts),
        "expires": stamp(invite.expires),
        "enrollment": invite.enrollment,
        "ca_pem": invite.ca_pem.decode("ascii"),
        "token": invite.token.hex(),
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def read_invite(content: bytes, where: str) -> Invite:
    """An invite from its file.

    Args:
        content: JSON.
        where: The file's name, for messages.

    Returns:
        The invite.

    Raises:
        IdentityError: If it is not an invite, or contradicts the CA's certificate in it.
    """
    problem = IdentityError(
        f"{where}: expected an invite from `lamina pki invite`, got something else. Ask for it again."
    )
    document = _object(content, problem)
    try:
        invite = Invite(
            id=_text(document, "id"),
            consortium=_text(document, "consortium"),
            name=_text(document, "name"),
            role=_text(document, "role"),
            hosts=tuple(str(host) for host in document["hosts"]),
            expires=datetime.fromisoformat(_text(document, "expires")),
            enrollment=_text(document, "enrollment"),
            ca_pem=_text(document, "ca_pem").encode("ascii"),
            token=bytes.fromhex(_text(document, "token")),
        )
    except (KeyError, TypeError, ValueError):
        raise problem from None  # the parser's message may quote the token
    if invite.expires.tzinfo is None or len(invite.token) != 32 or invite.role not in ROLES or not is_name(invite.name):
        raise problem
    if consortium_of(certificate(invite.ca_pem, where)) != invite.consortium:
        raise IdentityError(
            f"{where}: expected the CA of {invite.consortium!r}, got another's. Ask for the invite again."
        )
    return invite


def certificate_request(
    tls_key: ec.EllipticCurvePrivateKey, signing_key: Ed25519PrivateKey, *, name: str, role: str, consortium: str
) -> str:
    """A certificate request that proves possession of both keys.

    Args:
        tls_key: Signs the request.
        signing_key: Signs the TLS key, so that nobody can have another's signing key certified.
        name: Subject's CN.
        role: For the role extension.
        consortium: Subject's O.

    Returns:
        PEM.
    """
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, consortium), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )
    possession = sign_with(signing_key, _POSSESSION, _spki(tls_key.public_key()))
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(role_extension(role), critical=False)
        .add_extension(octets_extension(SIGNING_KEY_OID, raw_public(signing_key.public_key())), critical=False)
        .add_extension(octets_extension(POSSESSION_OID, possession), critical=False)
        .sign(tls_key, hashes.SHA256())
    )
    return request.public_bytes(Encoding.PEM).decode("ascii")


def wanted(csr_pem: str) -> Wanted:
    """Read a certificate request and check what it proves by itself.

    Args:
        csr_pem: The request.

    Returns:
        What it asks for. Whether it may have it, only the ledger knows.

    Raises:
        IdentityError: If it is malformed, asks for more than ours do, or does not prove possession of both keys.
    """
    try:
        csr = x509.load_pem_x509_csr(csr_pem.encode("ascii"))
        key, valid, extensions = csr.public_key(), csr.is_signature_valid, csr.extensions
        named = {
            oid: [str(attribute.value) for attribute in csr.subject.get_attributes_for_oid(oid)]
            for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME)
        }
    except (ValueError, TypeError, x509.DuplicateExtension) as error:
        raise IdentityError(
            "The request: expected a certificate request in PEM, got one that cannot be read."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError("The request: expected an ECDSA P-256 key, got another kind.")
    if not valid:
        raise IdentityError("The request: its own signature does not hold; it was changed on the way.")
    if {one.oid for one in extensions} != {ROLE_OID, SIGNING_KEY_OID, POSSESSION_OID} or len(csr.subject) != 2:
        raise IdentityError("The request: expected name, consortium, role and signing key alone, got more or less.")
    names, consortia = named[NameOID.COMMON_NAME], named[NameOID.ORGANIZATION_NAME]
    if len(names) != 1 or len(consortia) != 1 or not is_name(names[0]) or not is_name(consortia[0]):
        raise IdentityError("The request: expected one name and one consortium of letters, digits, '.', '_' and '-'.")
    signing_key = octets_in(extensions, SIGNING_KEY_OID, 32, "signing key")
    possession = octets_in(extensions, POSSESSION_OID, 64, "proof of possession")
    if not verify(signing_key, _POSSESSION, _spki(key), possession):
        raise IdentityError("The request: it does not prove possession of the signing key that it names.")
    return Wanted(names[0], role_in(extensions), consortia[0], key, signing_key)


def enrollment_request(invite: Invite, csr_pem: str) -> bytes:
    """The request of a site that holds an invite.

    Args:
        invite: The invite.
        csr_pem: From `certificate_request`.

    Returns:
        JSON.
    """
    return _request("enroll", invite.id, csr_pem, invite_key(invite.token))


def renewal_request(certificate_pem: bytes, signing_key: Ed25519PrivateKey, csr_pem: str) -> bytes:
    """The request of a site that holds a certificate.

    Args:
        certificate_pem: The certificate to renew.
        signing_key: The key that it names.
        csr_pem: From `certificate_request`, with the new keys.

    Returns:
        JSON.
    """
    return _request("renew", certificate_pem.decode("ascii"), csr_pem, signing_key)


def read_request(content: bytes) -> Request:
    """A request from what a site sent. Only its form is checked.

    Args:
        content: JSON.

    Returns:
        The request.

    Raises:
        IdentityError: If it is too large or not a request.
    """
    if len(content) > MAX_REQUEST_BYTES:
        raise IdentityError(f"The request: expected at most {MAX_REQUEST_BYTES} bytes, got {len(content)}.")
    problem = IdentityError(
        "The request: expected one from `lamina pki enroll` or `lamina pki renew`, got something else."
    )
    document = _object(content, problem)
    try:
        request = Request(
            kind=_text(document, "kind"),
            base=_text(document, "base"),
            csr_pem=_text(document, "csr"),
            proof=bytes.fromhex(_text(document, "proof")),
        )
    except (KeyError, TypeError, ValueError):
        raise problem from None
    if request.kind not in _KINDS or document.get("schema") != 1 or not (request.base + request.csr_pem).isascii():
        raise problem
    return request


def proven(request: Request, key: bytes) -> bool:
    """Whether a request was signed with this key, as it stands.

    Args:
        request: The request.
        key: The invite's public key, or the old certificate's signing key.

    Returns:
        True if it was.
    """
    return verify(key, f"enrollment/{request.kind}", _statement(request.base, request.csr_pem), request.proof)


def _request(kind: str, base: str, csr_pem: str, key: Ed25519PrivateKey) -> bytes:
    proof = sign_with(key, f"enrollment/{kind}", _statement(base, csr_pem))
    document = {"schema": 1, "kind": kind, "base": base, "csr": csr_pem, "proof": proof.hex()}
    return (json.dumps(document, indent=1) + "\n").encode()


def _statement(base: str, csr_pem: str) -> bytes:
    return canonical(
        {name: hashlib.sha256(text.encode()).hexdigest() for name, text in (("base", base), ("csr", csr_pem))}
    )


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _object(content: bytes, problem: IdentityError) -> Mapping[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise problem from None
    if not isinstance(document, dict):
        raise problem
    return document


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document[key]
    if not isinstance(value, str):
        raise TypeError(key)
    return value
