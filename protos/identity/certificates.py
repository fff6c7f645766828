"""What a Lamina certificate says and how it is checked: name, role, consortium and signing key under one CA.

A certificate is X.509 v3 over ECDSA P-256. Its subject holds the name (CN) and the consortium (O). Two extensions of our own
hold the role and the Ed25519 key that signs updates and releases, so that whoever TLS has let in is also who signed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from lamina.protos.errors import IdentityError

ROLES = ("coordinator", "client", "operator", "auditor")

# OIDs below 2.25 need no registry: the rest is a random UUID as one integer (ITU-T X.667).
ROLE_OID = x509.ObjectIdentifier("2.25.167163493070045777754491345562522247145")
SIGNING_KEY_OID = x509.ObjectIdentifier("2.25.340261988842107895320488042527897888437")
POSSESSION_OID = x509.ObjectIdentifier("2.25.318845457000665164685697113011856538220")

_UTF8, _OCTETS = 0x0C, 0x04  # DER tags

# Host names that only the CA may carry; an invite cannot ask for one.
RESERVED_SUFFIX = ".lamina.internal"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Peer:
    """Who a certificate names.

    Args:
        name: Unique in the consortium; safe as a file name.
        role: One of `ROLES`.
        consortium: The subject's organisation.
        serial: The certificate's serial number.
        not_before: Start of validity, aware.
        not_after: End of validity, aware.
        signing_key: The raw Ed25519 public key, 32 bytes.
        certificate_pem: The certificate itself.
    """

    name: str
    role: str
    consortium: str
    serial: int
    not_before: datetime
    not_after: datetime
    signing_key: bytes
    certificate_pem: bytes = field(repr=False)


def is_name(name: str) -> bool:
    """Whether `name` may stand in a certificate and as a file name.

    Args:
        name: What was given.

    Returns:
        True for `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
    """
    return _NAME.fullmatch(name) is not None


def general_name(host: str) -> x509.GeneralName | None:
    """A host as a subject alternative name.

    Args:
        host: A DNS name or an IP address, without a port.

    Returns:
        The name, or None where it is neither, or is reserved for the CA.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        labels = host.split(".")
        fits = len(host) <= 253 and all(_HOST_LABEL.fullmatch(label) for label in labels)
        reserved = host.lower().endswith(RESERVED_SUFFIX)
        return x509.DNSName(host) if fits and not reserved else None


def certificate(pem: bytes, where: str) -> x509.Certificate:
    """The one certificate in a PEM text.

    Args:
        pem: The text.
        where: What to name in the message.

    Returns:
        The certificate.

    Raises:
        IdentityError: If it is not one, or more than one.
    """
    try:
        (found,) = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise IdentityError(f"{where}: expected one X.509 certificate in PEM, got something else.") from error
    return found


def consortium_of(ca: x509.Certificate) -> str:
    """The consortium that a CA certificate stands for.

    Args:
        ca: The CA's certificate.

    Returns:
        Its organisation.

    Raises:
        IdentityError: If it has none, or is no CA.
    """
    with _understood("the CA's certificate"):
        basic = ca.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not basic.ca:
            raise IdentityError(
                "The CA's certificate: expected one that may issue others, got an ordinary certificate."
            )
        return _only(ca.subject, NameOID.ORGANIZATION_NAME, "consortium")


def peer_of(certificate_pem: bytes) -> Peer:
    """Who a certificate names. For certificates that TLS has verified already: no signature or date is checked here.

    Args:
        certificate_pem: One certificate in PEM.

    Returns:
        Its peer.

    Raises:
        IdentityError: If name, consortium, role or signing key are missing or malformed.
    """
    found = certificate(certificate_pem, "the peer's certificate")
    with _understood("the peer's certificate"):
        role = role_in(found.extensions)
        return Peer(
            name=_only(found.subject, NameOID.COMMON_NAME, "name"),
            role=role,
            consortium=_only(found.subject, NameOID.ORGANIZATION_NAME, "consortium"),
            serial=found.serial_number,
            not_before=found.not_valid_before_utc,
            not_after=found.not_valid_after_utc,
            signing_key=octets_in(found.extensions, SIGNING_KEY_OID, 32, "signing key"),
            certificate_pem=certificate_pem,
        )


def verified_peer(certificate_pem: bytes, ca_pem: bytes, now: datetime, role: str | None = None) -> Peer:
    """Who a certificate names, once its issuer, dates and role are checked.

    Args:
        certificate_pem: One certificate in PEM.
        ca_pem: The certificate of the CA that must have issued it.
        now: The time to check the dates against, aware.
        role: The role that it must have; None accepts any.

    Returns:
        Its peer.

    Raises:
        IdentityError: If it was issued by another, is out of date, or has another role.
    """
    peer = peer_of(certificate_pem)
    found = certificate(certificate_pem, "the peer's certificate")
    ca = certificate(ca_pem, "the CA's certificate")
    consortium = consortium_of(ca)
    if not issued_by(found, ca) or peer.consortium != consortium:
        raise IdentityError(
            f"{peer.name}: expected a certificate issued by the CA of {consortium} ({fingerprint(ca_pem)}), got one issued"
            f" by another. Enroll with an invite of this consortium."
        )
    for what, start, end in (
        (f"the certificate of {peer.name}", peer.not_before, peer.not_after),
        (f"the CA of {consortium}", ca.not_valid_before_utc, ca.not_valid_after_utc),
    ):
        problem = date_problem(what, start, end, now)
        if problem:
            raise IdentityError(problem)
    if role is not None and peer.role != role:
        raise IdentityError(
            f"{peer.name}: expected role {role}, got {peer.role}. Enroll with an invite for role={role}."
        )
    return peer


def date_problem(what: str, start: datetime, end: datetime, now: datetime) -> str:
    """Why something is not valid at this time, or the empty string.

    Args:
        what: Its name in the sentence.
        start: Start of validity.
        end: End of validity.
        now: This machine's time.

    Returns:
        A sentence with the clock's time and the limit, or ``.
    """
    clock = f"this machine's clock says {stamp(now)}"
    if now < start:
        return f"{what}: valid from {stamp(start)}, but {clock}. Set the clock, or wait."
    if now > end:
        return f"{what}: expired at {stamp(end)}, and {clock}. If the clock is right, ask whoever keeps the CA for a new invite."
    return ""


def issued_by(found: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether a CA signed a certificate that may not itself sign others.

    Args:
        found: The certificate.
        ca: The CA's certificate.

    Returns:
        True if issuer and signature fit and it is no CA.
    """
    try:
        found.verify_directly_issued_by(ca)
        return not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return False


def role_in(extensions: x509.Extensions) -> str:
    """The role that certificate or request extensions hold.

    Args:
        extensions: Of a certificate or a request.

    Returns:
        One of `ROLES`.

    Raises:
        IdentityError: If there is none, or an unknown one.
    """
    value = _raw(extensions, ROLE_OID, "role")
    text = value[2:].decode("ascii", "replace")
    if value[:2] != bytes([_UTF8, len(value) - 2]) or text not in ROLES:
        raise IdentityError(f"Expected a role among {', '.join(ROLES)}, got {text[:40]!r}.")
    return text


def octets_in(extensions: x509.Extensions, oid: x509.ObjectIdentifier, size: int, what: str) -> bytes:
    """An octet string of a fixed length in an extension of ours.

    Args:
        extensions: Of a certificate or a request.
        oid: Which.
        size: Its length in bytes.
        what: Its name in a message.

    Returns:
        The bytes.

    Raises:
        IdentityError: If it is missing or of another length.
    """
    value = _raw(extensions, oid, what)
    if value[:2] != bytes([_OCTETS, size]) or len(value) != size + 2:
        raise IdentityError(f"Expected a {what} of {size} bytes, got {len(value)} bytes that are none.")
    return value[2:]


def role_extension(role: str) -> x509.UnrecognizedExtension:
    """The extension that `role_in` reads.

    Args:
        role: One of `ROLES`.

    Returns:
        It.
    """
    return x509.UnrecognizedExtension(ROLE_OID, bytes([_UTF8, len(role)]) + role.encode("ascii"))


def octets_extension(oid: x509.ObjectIdentifier, value: bytes) -> x509.UnrecognizedExtension:
    """The extension that `octets_in` reads.

    Args:
        oid: Which.
        value: At most 127 bytes.

    Returns:
        It.
    """
    return x509.UnrecognizedExtension(oid, bytes([_OCTETS, len(value)]) + value)


def raw_public(key: Ed25519PublicKey) -> bytes:
    """An Ed25519 public key as its 32 bytes.

    Args:
        key: The key.

    Returns:
        The bytes.
    """
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def fingerprint(pem: bytes) -> str:
    """What two people compare over the telephone: the start of a certificate's SHA-256.

    Args:
        pem: The certificate.

    Returns:
        32 hex digits in groups of four.

    Raises:
        IdentityError: If it is no certificate.
    """
    digest = certificate(pem, "the certificate").fingerprint(SHA256()).hex()
    return " ".join(digest[i : i + 4] for i in range(0, 32, 4))


def stamp(moment: datetime) -> str:
    """A moment as people and ledgers read it.

    Args:
        moment: Aware.

    Returns:
        UTC in ISO 8601, to the second.
    """
    return moment.astimezone(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")


def _only(subject: x509.Name, oid: x509.ObjectIdentifier, what: str) -> str:
    values = [str(attribute.value) for attribute in subject.get_attributes_for_oid(oid)]
    if len(values) != 1 or not is_name(values[0]):
        raise IdentityError(f"Expected one {what} of letters, digits, '.', '_' and '-', got {str(values)[:80]}.")
    return values[0]


def _raw(extensions: x509.Extensions, oid: x509.ObjectIdentifier, what: str) -> bytes:
    try:
        value = extensions.get_extension_for_oid(oid).value
    except x509.ExtensionNotFound as error:
        raise IdentityError(
            f"Expected a Lamina {what} in the certificate, got none. Is it from `lamina pki`?"
        ) from error
    if not isinstance(value, x509.UnrecognizedExtension):
        raise IdentityError(f"Expected a Lamina {what} in the certificate, got another extension.")
    return value.value


@contextmanager
def _understood(where: str) -> Iterator[None]:
    """What the parser raises late, while fields are read, becomes one kind of refusal."""
    try:
        yield
    except (ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise IdentityError(
            f"{where}: expected a certificate made by `lamina pki`, got one that cannot be read."
        ) from error
