"""What can be wrong with an identity before anything is dialled, each with what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from lamina.protos.errors import IdentityError
from lamina.protos.identity.certificates import Peer, certificate, date_problem, fingerprint, peer_of, stamp
from lamina.protos.identity.folder import CA, CERTIFICATE, FILES, KEYS, mismatch, require_private, set_of, stranger
from lamina.protos.identity.revocations import check_in_force

# A certificate that ends sooner is worth a warning: renewing by files takes people.
WARN = timedelta(days=14)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        ok: Whether it would let the site work now.
        what: One of `files`, `permissions`, `keys`, `issuer`, `dates`, `role`, `revocations`.
        message: A sentence; of a failure with what to do next.
    """

    ok: bool
    what: str
    message: str


def check(folder: Path, now: datetime, role: str | None = None, revocations: Path | None = None) -> list[Finding]:
    """Look at an identity as `lamina doctor` and `lamina client` do before they dial.

    Args:
        folder: The identity's folder.
        now: This machine's time, aware.
        role: The role that is needed; None accepts any.
        revocations: The consortium's list of revoked certificates, or None.

    Returns:
        The findings in order; what cannot be looked at because of an earlier failure is left out.
    """
    try:
        base = set_of(folder)
    except IdentityError as error:
        return [Finding(False, "files", str(error))]
    missing = [name for name in FILES if not (base / name).is_file()]
    if missing:
        message = (
            f"{folder}: expected {', '.join(FILES)}, found no {', '.join(missing)}."
            f" Make an identity with `lamina pki enroll INVITE output={folder}`."
        )
        return [Finding(False, "files", message)]
    findings = [Finding(True, "files", f"{folder} holds {', '.join(FILES)}."), _permissions(base)]
    try:
        files = {name: (base / name).read_bytes() for name in FILES}
    except OSError as error:
        name = Path(error.filename or folder).name
        return [
            *findings,
            Finding(False, "files", f"{folder}: expected to read {name}, got: {error.strerror}. chown it."),
        ]
    try:
        peer = peer_of(files[CERTIFICATE])
        foreign = stranger(files, folder)
        wrong = mismatch(files, folder)
    except IdentityError as error:
        return [*findings, Finding(False, "keys", str(error))]
    findings.append(Finding(not wrong, "keys", wrong or f"Both keys are those of {peer.name}'s certificate."))
    issuer = foreign or f"Issued by the CA of {peer.consortium}, {fingerprint(files[CA])}."
    findings.append(Finding(not foreign, "issuer", issuer))
    findings.append(_dates(folder, files, now))
    if role is not None:
        told = f"{folder}: expected role {role}, got {peer.role} ({peer.name}). Enroll with an invite for role={role}."
        fits = peer.role == role
        findings.append(Finding(fits, "role", f"{peer.name} is {peer.role}." if fits else told))
    if revocations is not None:
        findings.append(in_force("revocations", peer, revocations, files[CA]))
    return findings


def in_force(what: str, peer: Peer, revocations: Path, ca_pem: bytes) -> Finding:
    """Whether a certificate is revoked.

    Args:
        what: The finding's name.
        peer: Whose certificate.
        revocations: The consortium's list.
        ca_pem: The certificate of the CA that must have signed it.

    Returns:
        The finding.
    """
    try:
        found = check_in_force(peer, revocations, ca_pem)
    except IdentityError as error:
        return Finding(False, what, str(error))
    return Finding(True, what, f"{peer.name} is not on {revocations}, list {found.number} of revoked certificates.")


def _permissions(base: Path) -> Finding:
    try:
        for name in KEYS:
            require_private(base / name)
    except IdentityError as error:
        return Finding(False, "permissions", str(error))
    return Finding(True, "permissions", "The keys can be read by their owner alone.")


def _dates(folder: Path, files: dict[str, bytes], now: datetime) -> Finding:
    spans = {
        f"{folder / CA}": certificate(files[CA], CA),
        f"{folder / CERTIFICATE}": certificate(files[CERTIFICATE], CERTIFICATE),
    }
    for what, found in spans.items():
        problem = date_problem(what, found.not_valid_before_utc, found.not_valid_after_utc, now)
        if problem:
            return Finding(False, "dates", problem)
    what, found = min(spans.items(), key=lambda item: item[1].not_valid_after_utc)
    end = found.not_valid_after_utc
    if end - now < WARN:
        days = (end - now).days
        told = f"{what}: expires in {days} days, at {stamp(end)}. Renew it now: lamina pki renew {folder}"
        return Finding(True, "dates", told)
    return Finding(True, "dates", f"Valid until {stamp(end)}.")
