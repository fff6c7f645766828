"""X.509 builders: the CA's own certificate, those that it issues, and its revocation list."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lamina.protos.errors import ConfigError
from lamina.protos.identity.certificates import (
    RESERVED_SUFFIX,
    SIGNING_KEY_OID,
    general_name,
    octets_extension,
    role_extension,
)
from lamina.protos.identity.requests import Wanted

# The listener is known by this name alone: no coordinator can pose as it, and it cannot pose as a coordinator.
ENROLLMENT_HOST = f"enrollment{RESERVED_SUFFIX}"

# Clocks of sites differ a little.
_BACKDATED = timedelta(minutes=5)


def issue_ca(key: ec.EllipticCurvePrivateKey, consortium: str, days: int, now: datetime) -> bytes:
    """The CA's own certificate.

    Args:
        key: The CA's key.
        consortium: Its organisation.
        days: How long it is valid.
        now: The time, aware.

    Returns:
        PEM.
    """
    subject = _subject(consortium, "Lamina CA")
    builder = _builder(subject, subject, key.public_key(), now - _BACKDATED, now + timedelta(days=days))
    built = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return built.public_bytes(Encoding.PEM)


def issue(
    ca_key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    asked: Wanted,
    hosts: Sequence[str],
    days: int,
    now: datetime,
) -> bytes:
    """A certificate for a site whose request was checked.

    Args:
        ca_key: The CA's key.
        ca: The CA's certificate.
        asked: What the request asks for.
        hosts: A coordinator's, from the ledger; never from the request.
        days: How long it is valid, at most as long as the CA.
        now: The time, aware.

    Returns:
        PEM.

    Raises:
        ConfigError: If a host is unfit, or the CA has expired.
    """
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if asked.role == "coordinator":
        usages.insert(0, ExtendedKeyUsageOID.SERVER_AUTH)
    names = [name for name in map(general_name, hosts) if name is not None]
    if len(names) != len(hosts):
        raise ConfigError(f"hosts {', '.join(hosts)}: expected DNS names or IP addresses without a port.")
    subject = _subject(asked.consortium, asked.name)
    builder = _leaf(ca, subject, asked.tls_key, usages, names, days, now)
    built = (
        builder.add_extension(role_extension(asked.role), critical=False)
        .add_extension(octets_extension(SIGNING_KEY_OID, asked.signing_key), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return built.public_bytes(Encoding.PEM)


def issue_listener(
    ca_key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    tls_key: ec.EllipticCurvePublicKey,
    consortium: str,
    now: datetime,
) -> bytes:
    """The enrollment listener's certificate: no role, no signing key, one reserved host name.

    Args:
        ca_key: The CA's key.
        ca: The CA's certificate.
        tls_key: The listener's key.
        consortium: Whose.
        now: The time, aware.

    Returns:
        PEM.
    """
    subject = _subject(consortium, "enrollment")
    names = [x509.DNSName(ENROLLMENT_HOST)]
    builder = _leaf(ca, subject, tls_key, [ExtendedKeyUsageOID.SERVER_AUTH], names, 365, now)
    return builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM)


def issue_crl(
    ca_key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    revoked: Sequence[tuple[int, str]],
    number: int,
    now: datetime,
) -> bytes:
    """The revocation list.

    Args:
        ca_key: The CA's key.
        ca: The CA's certificate.
        revoked: Serial and time (ISO 8601) of each.
        number: Grows with each list.
        now: The time, aware.

    Returns:
        PEM.
    """
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(now)
        .next_update(max(ca.not_valid_after_utc, now + timedelta(days=1)))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    for serial, moment in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(datetime.fromisoformat(moment))
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _leaf(
    ca: x509.Certificate,
    subject: x509.Name,
    tls_key: ec.EllipticCurvePublicKey,
    usages: Sequence[x509.ObjectIdentifier],
    names: Sequence[x509.GeneralName],
    days: int,
    now: datetime,
) -> x509.CertificateBuilder:
    end = min(now + timedelta(days=days), ca.not_valid_after_utc)
    if end <= now:
        raise ConfigError(f"The CA expired at {ca.not_valid_after_utc}; it can issue nothing. Make a new one.")
    identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _builder(ca.subject, subject, tls_key, now - _BACKDATED, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(tls_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    return builder.add_extension(x509.SubjectAlternativeName(names), critical=False) if names else builder


def _builder(
    issuer: x509.Name, subject: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _subject(consortium: str, name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, consortium), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
