"""The CA's list of revoked certificates: read, and held against what was seen before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from lamina.protos.errors import IdentityError
from lamina.protos.identity.certificates import Peer, certificate, fingerprint

CRL = "crl.pem"
_AGAIN = "Copy crl.pem from the CA folder again."


@dataclass(frozen=True)
class Revocations:
    """A list of revoked certificates.

    Attributes:
        number: Grows with each list of the CA; -1 where there has been none.
        serials: Serial numbers of the certificates.
    """

    number: int = -1
    serials: frozenset[int] = frozenset()

    def check_follows(self, before: Revocations, path: Path) -> None:
        """Raise where a list is older than one that was in force.

        Args:
            before: The one in force.
            path: Of this one, for the message.

        Raises:
            IdentityError: If its number is lower, or the same and a certificate is not on it any more.
        """
        if self.number < before.number or (self.number == before.number and not self.serials >= before.serials):
            raise IdentityError(
                f"{path}: expected the list in force, number {before.number}, or a later one, got number {self.number} with "
                f"{len(self.serials)} certificates: an older list would let revoked ones in. {_AGAIN}"
            )


def read_revocations(path: Path, ca_pem: bytes) -> Revocations:
    """What the CA has revoked. Nothing is assumed when the list cannot be trusted.

    Args:
        path: A CRL in PEM.
        ca_pem: The certificate of the CA that must have signed it.

    Returns:
        The list.

    Raises:
        IdentityError: If the list is missing, unreadable, without a number, or signed by another.
    """
    try:
        crl = x509.load_pem_x509_crl(path.read_bytes())
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"{path}: expected a revocation list in PEM, got none that can be read. {_AGAIN}"
        ) from error
    key = certificate(ca_pem, "the CA's certificate").public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not crl.is_signature_valid(key):
        raise IdentityError(f"{path}: expected a list signed by the CA {fingerprint(ca_pem)}, got another's. {_AGAIN}")
    try:
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        raise IdentityError(f"{path}: expected a list with a number, got one without. {_AGAIN}") from None
    return Revocations(number, frozenset(entry.serial_number for entry in crl))


def check_in_force(peer: Peer, path: Path, ca_pem: bytes) -> Revocations:
    """Raise where a certificate is revoked.

    Args:
        peer: Whose certificate.
        path: The list.
        ca_pem: The certificate of the CA that must have signed it.

    Returns:
        The list.

    Raises:
        IdentityError: If the certificate is on the list, or the list cannot be trusted.
    """
    found = read_revocations(path, ca_pem)
    if peer.serial in found.serials:
        raise IdentityError(
            f"{path}: expected {peer.name}'s certificate ({peer.role}) to be in force, got it on the list of revoked ones "
            f"(number {found.number}). Ask whoever keeps the CA; a new invite gives a new certificate."
        )
    return found


def list_of(named: str, folder: Path) -> Path | None:
    """Where a list of revoked certificates is.

    Args:
        named: The path in the settings, or empty.
        folder: Of the identity.

    Returns:
        What is named, else crl.pem in the identity's folder if it is there, else None.
    """
    beside = folder / CRL
    return Path(named) if named else beside if beside.exists() else None
