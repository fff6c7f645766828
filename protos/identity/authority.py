"""The CA of a consortium: a folder with one key, a ledger, and a signed list of what is revoked."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from lamina.protos.errors import ConfigError, IdentityError, nearest
from lamina.protos.files import write_atomic
from lamina.protos.identity.certificates import (
    ROLES,
    Peer,
    certificate,
    consortium_of,
    general_name,
    is_name,
    raw_public,
    stamp,
    verified_peer,
)
from lamina.protos.identity.folder import key_pem, private_key, require_private, write_private
from lamina.protos.identity.issuing import issue, issue_ca, issue_crl, issue_listener
from lamina.protos.identity.ledger import LEDGER, Invited, Issued, Ledger, changing, ledger_bytes
from lamina.protos.identity.requests import Invite, Request, Wanted, proven, read_request, wanted
from lamina.protos.identity.revocations import CRL
from lamina.protos.identity.signing import invite_key

CA_KEY, CA_CERTIFICATE = "ca.key", "ca.pem"
MAX_ATTEMPTS = 5
MAX_LIVE = 5


@dataclass(frozen=True)
class Authority:
    """An opened CA. Its repr shows no key.

    Args:
        folder: The CA folder.
        consortium: Whose.
        ca_pem: Its certificate.
        key: Its key.
    """

    folder: Path
    consortium: str
    ca_pem: bytes = field(repr=False)
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def certificate(self) -> x509.Certificate:
        """Its certificate, parsed."""
        return certificate(self.ca_pem, f"{self.folder / CA_CERTIFICATE}")


def create(folder: Path, consortium: str, days: int, passphrase: bytes | None, now: datetime) -> Authority:
    """Make a CA folder: key, certificate, empty ledger, empty revocation list.

    Args:
        folder: New or empty.
        consortium: Its name, for every certificate.
        days: How long the CA is valid.
        passphrase: Encrypts the key where given.
        now: The time, aware.

    Returns:
        The CA.

    Raises:
        ConfigError: If the folder is not empty, the name unfit, or the days not positive.
    """
    if not is_name(consortium):
        raise ConfigError(f"consortium={consortium[:80]!r}: {_NAME_RULE}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"{folder}: expected a new or empty folder, got one in use. A CA is never written over another."
        )
    key = ec.generate_private_key(ec.SECP256R1())
    ca_pem = issue_ca(key, consortium, _days("days", days), now)
    files = {
        CA_KEY: key_pem(key, passphrase),
        CA_CERTIFICATE: ca_pem,
        LEDGER: ledger_bytes(Ledger()),
        CRL: issue_crl(key, certificate(ca_pem, CA_CERTIFICATE), [], 0, now),
    }
    write_private(folder, files)
    return Authority(folder, consortium, ca_pem, key)


def opened(folder: Path, passphrase: bytes | None) -> Authority:
    """Open a CA folder.

    Args:
        folder: From `lamina pki init`.
        passphrase: Of its key, where that is encrypted.

    Returns:
        The CA.

    Raises:
        ConfigError: If it is no CA folder.
        IdentityError: If others can read the key, the passphrase is missing or wrong, or key and certificate differ.
    """
    path = folder / CA_KEY
    if not path.is_file() or not (folder / CA_CERTIFICATE).is_file():
        raise ConfigError(f"{folder}: expected a CA folder, found no {CA_KEY}. Make one: lamina pki init {folder}")
    require_private(path)
    pem, ca_pem = path.read_bytes(), (folder / CA_CERTIFICATE).read_bytes()
    if b"ENCRYPTED" in pem:
        try:
            load_pem_private_key(pem, passphrase)
        except (ValueError, TypeError):
            how = "a wrong passphrase" if passphrase else "no passphrase"
            raise IdentityError(f"{path}: is encrypted, got {how}. Set LAMINA_CA_PASSPHRASE.") from None
    else:
        passphrase = None
    key = private_key(pem, path, passphrase)
    ca = certificate(ca_pem, f"{folder / CA_CERTIFICATE}")
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
        raise IdentityError(f"{path}: expected the key of {CA_CERTIFICATE}, got another. Restore the CA folder.")
    return Authority(folder, consortium_of(ca), ca_pem, key)


def invite(
    authority: Authority,
    name: str,
    role: str,
    hosts: Sequence[str],
    now: datetime,
    *,
    days: int = 7,
    certificate_days: int = 365,
) -> Invite:
    """Give an invite. The ledger keeps only what checks it, not what uses it.

    Args:
        authority: The CA.
        name: Who the site will be.
        role: As what.
        hosts: Where a coordinator will be reached; of others none.
        now: The time, aware.
        days: Until the invite expires.
        certificate_days: How long the certificate will be valid.

    Returns:
        The invite, with its token.

    Raises:
        ConfigError: If name, role or hosts are unfit, or the name is taken.
    """
    _check_invite(name, role, hosts)
    token = secrets.token_bytes(32)
    given = Invite(
        id=secrets.token_hex(16),
        consortium=authority.consortium,
        name=name,
        role=role,
        hosts=tuple(hosts),
        expires=now + timedelta(days=_days("days", days)),
        enrollment="",
        ca_pem=authority.ca_pem,
        token=token,
    )
    with changing(authority.folder) as ledger:
        # Names that differ in case alone would be one file on some disks.
        _check_free(ledger, name, now, authority.folder)
        ledger.invites.append(
            Invited(
                id=given.id,
                name=name,
                role=role,
                hosts=list(hosts),
                expires=stamp(given.expires),
                certificate_days=_days("certificate_days", certificate_days),
                key=raw_public(invite_key(token).public_key()).hex(),
            )
        )
    return given


def fulfil(authority: Authority, content: bytes, now: datetime, *, kind: str = "", counted: bool = False) -> bytes:
    """Answer a request with a certificate. The same request gets the same certificate, so an answer that was lost is no loss.

    Args:
        authority: The CA.
        content: The request's JSON.
        now: The time, aware.
        kind: `enroll` or `renew` where only that is expected.
        counted: Whether a refusal counts against the invite, as it does at the listener.

    Returns:
        The certificate, PEM.

    Raises:
        IdentityError: If the request is refused.
    """
    request = read_request(content)
    if kind and request.kind != kind:
        raise IdentityError(f"The request: expected one to {kind}, got one to {request.kind}.")
    refusal = None
    with changing(authority.folder) as ledger:
        invited = next((one for one in ledger.invites if one.id == request.base), None)
        try:
            if request.kind == "enroll":
                answer = _enrolled(authority, ledger, invited, request, now, counted)
            else:
                answer = _renewed(authority, ledger, request, now)
        except IdentityError as error:
            refusal = error  # raised below, so that the count is written
            if invited is not None and counted:
                invited.attempts += 1
    if refusal is not None:
        raise refusal
    return answer


def revoke(authority: Authority, now: datetime, *, name: str = "", serial: str = "") -> list[str]:
    """Revoke by name, with the name's open invites, or one certificate by serial; rewrite the revocation list.

    Args:
        authority: The CA.
        now: The time, aware.
        name: Whose certificates.
        serial: Which certificate, hex as listed.

    Returns:
        The serials that are revoked now; a second time the same.

    Raises:
        ConfigError: If there is none such.
    """
    with changing(authority.folder) as ledger:
        found = [one for one in ledger.certificates if (one.name == name if name else one.serial == serial)]
        invites = [one for one in ledger.invites if name and one.name == name]
        if not found and not invites:
            known = {one.name for one in ledger.certificates} | {one.name for one in ledger.invites}
            what = f"no certificate or invite of {name!r}.{nearest(name, known)}" if name else f"no serial {serial!r}."
            raise ConfigError(f"{authority.folder}: {what} See `lamina pki list {authority.folder}`.")
        for one in found:
            one.revoked = one.revoked or stamp(now)
        for waiting in invites:
            waiting.cancelled = waiting.cancelled or ("" if waiting.used else stamp(now))
        ledger.crl_number += 1
        revoked = [(int(one.serial, 16), one.revoked) for one in ledger.certificates if one.revoked]
        crl = issue_crl(authority.key, authority.certificate, revoked, ledger.crl_number, now)
        # Under the lock, or an older list could overwrite a newer one; before the ledger, so that a crash revokes too much.
        write_atomic(authority.folder / CRL, crl)
    return [one.serial for one in found]


def listener_pair(authority: Authority, now: datetime) -> tuple[bytes, bytes]:
    """A key and certificate for the enrollment listener, which name no peer and are never written down.

    Args:
        authority: The CA.
        now: The time, aware.

    Returns:
        Key and certificate, PEM.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    return key_pem(key), issue_listener(
        authority.key, authority.certificate, key.public_key(), authority.consortium, now
    )


_NAME_RULE = "expected a letter or digit, then at most 63 letters, digits, '.', '_' or '-'."


def _check_invite(name: str, role: str, hosts: Sequence[str]) -> None:
    if not is_name(name):
        raise ConfigError(f"name {name[:80]!r}: {_NAME_RULE}")
    if role not in ROLES:
        raise ConfigError(f"role={role}: expected one of {', '.join(ROLES)}.{nearest(role, ROLES)}")
    if (role == "coordinator") != bool(hosts):
        need = "host=NAME,… where clients reach it" if role == "coordinator" else "no host="
        raise ConfigError(f"role={role}: expected {need}, got {len(hosts)} hosts.")
    for host in hosts:
        if general_name(host) is None:
            raise ConfigError(f"host={host[:80]}: expected a DNS name or an IP address without a port.")


def _check_free(ledger: Ledger, name: str, now: datetime, folder: Path) -> None:
    # Names that differ in case alone would be one file on some disks.
    certificates = [one for one in ledger.certificates if one.name.lower() == name.lower() and one.live(now)]
    invites = [one for one in ledger.invites if one.name.lower() == name.lower() and one.open(now)]
    if certificates or invites:
        what, holder = ("a certificate", certificates[0].name) if certificates else ("an open invite", invites[0].name)
        free = f"`lamina pki revoke {folder} {holder}` frees the name"
        raise ConfigError(f"{name}: expected a new name, but {holder} has {what}. Renew it, choose another, or {free}.")


def _days(key: str, days: int) -> int:
    if not 1 <= days <= 36500:
        raise ConfigError(f"{key}={days}: expected 1 to 36500 days.")
    return days


def _enrolled(
    authority: Authority, ledger: Ledger, invited: Invited | None, request: Request, now: datetime, counted: bool
) -> bytes:
    if invited is None:
        raise IdentityError(
            "The request: expected an invite in the ledger, got an unknown one. Give the site a new invite."
        )
    new = f"Give a new one: lamina pki invite {authority.folder} {invited.name} role={invited.role} …"
    if counted and invited.attempts >= MAX_ATTEMPTS:
        raise IdentityError(f"The invite for {invited.name}: {MAX_ATTEMPTS} requests were refused already. {new}")
    if not proven(request, bytes.fromhex(invited.key)):
        raise IdentityError(
            f"The request: expected one signed with the invite for {invited.name}; it is not, or was changed."
        )
    if invited.cancelled:
        raise IdentityError(f"The invite for {invited.name} was cancelled at {invited.cancelled}. {new}")
    if invited.used:
        return _again(ledger, request, f"The invite for {invited.name} was used already. {new}")
    if not invited.open(now):
        raise IdentityError(f"The invite for {invited.name} expired at {invited.expires}. {new}")
    asked = wanted(request.csr_pem)
    _same(asked, invited.name, invited.role, authority.consortium)
    issued = _issued(authority, ledger, asked, request, invited.hosts, invited.certificate_days, now)
    invited.used = issued.serial
    return issued.certificate.encode()


def _renewed(authority: Authority, ledger: Ledger, request: Request, now: datetime) -> bytes:
    peer: Peer = verified_peer(request.base.encode(), authority.ca_pem, now)
    old = next((one for one in ledger.certificates if one.serial == f"{peer.serial:x}"), None)
    if old is None or old.revoked:
        state = "unknown to the ledger" if old is None else f"revoked at {old.revoked}"
        raise IdentityError(
            f"{peer.name}: expected a certificate in force to renew, got one {state}. Invite the site anew."
        )
    if not proven(request, peer.signing_key):
        raise IdentityError(
            f"The request: expected one signed by {peer.name}'s signing key; it is not, or was changed."
        )
    asked = wanted(request.csr_pem)
    _same(asked, peer.name, peer.role, peer.consortium)
    if any(one.request == _digest(request) for one in ledger.certificates):
        return _again(ledger, request, "")
    if sum(one.name == peer.name and one.live(now) for one in ledger.certificates) >= MAX_LIVE:
        raise IdentityError(
            f"{peer.name}: has {MAX_LIVE} certificates in force already. Revoke those that are not used."
        )
    days = max(1, (peer.not_after - peer.not_before).days)
    return _issued(authority, ledger, asked, request, old.hosts, days, now).certificate.encode()


def _again(ledger: Ledger, request: Request, refusal: str) -> bytes:
    found = next((one for one in ledger.certificates if one.request == _digest(request)), None)
    if found is None or found.revoked:
        raise IdentityError(refusal or f"{found.name if found else 'This request'}: its certificate was revoked.")
    return found.certificate.encode()


def _same(asked: Wanted, name: str, role: str, consortium: str) -> None:
    got, expected = (asked.name, asked.role, asked.consortium), (name, role, consortium)
    if got != expected:
        told = ["name, role and consortium " + ", ".join(three) for three in (expected, got)]
        raise IdentityError(f"The request: expected {told[0]}, got {told[1]}.")


def _issued(
    authority: Authority, ledger: Ledger, asked: Wanted, request: Request, hosts: list[str], days: int, now: datetime
) -> Issued:
    pem = issue(authority.key, authority.certificate, asked, hosts, days, now)
    found = certificate(pem, "the new certificate")
    issued = Issued(
        serial=f"{found.serial_number:x}",
        name=asked.name,
        role=asked.role,
        hosts=list(hosts),
        not_after=stamp(found.not_valid_after_utc),
        issued=stamp(now),
        request=_digest(request),
        certificate=pem.decode("ascii"),
    )
    ledger.certificates.append(issued)
    return issued


def _digest(request: Request) -> str:
    return hashlib.sha256(f"{request.kind}\n{request.base}\n{request.csr_pem}".encode()).hexdigest()
