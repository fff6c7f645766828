"""The site's side of enrollment and renewal: keys that never leave, a request, and the certificate that answers it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lamina.protos.errors import ConfigError, IdentityError
from lamina.protos.files import write_atomic
from lamina.protos.identity.certificates import Peer, verified_peer
from lamina.protos.identity.folder import (
    CA,
    CERTIFICATE,
    FILES,
    SIGNING_KEY,
    TLS_KEY,
    Identity,
    install,
    key_pem,
    load,
    read_files,
    signing_key,
    write_private,
)
from lamina.protos.identity.requests import (
    Invite,
    certificate_request,
    enrollment_request,
    read_request,
    renewal_request,
)

# The address of the CA's listener, kept beside the certificate for the next renewal.
ADDRESS = "enrollment.txt"
_REQUEST = "request.json"


def prepare(folder: Path, invite: Invite, now: datetime) -> bytes:
    """Make keys and a request. Asked again with the same invite, it gives the same request.

    Args:
        folder: Where the identity will be.
        invite: What the site was given.
        now: This machine's time, aware.

    Returns:
        The request, which also lies in DIR/request.json.

    Raises:
        ConfigError: If the folder holds an identity already.
        IdentityError: If the invite has expired.
    """
    if any((folder / name).exists() for name in (*FILES, "current")):
        raise ConfigError(f"{folder}: holds an identity already. Renew it with `lamina pki renew {folder}`.")
    if now > invite.expires:
        raise IdentityError(
            f"The invite for {invite.name} expired at {invite.expires}; the clock says {now}. Ask anew."
        )
    pending = _pending(folder, "enroll", invite.id)
    if pending is not None:
        return pending
    tls_key, signing = ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()
    csr = certificate_request(tls_key, signing, name=invite.name, role=invite.role, consortium=invite.consortium)
    return _keep(folder, tls_key, signing, enrollment_request(invite, csr))


def prepare_renewal(folder: Path, rotate: bool) -> bytes:
    """Make a new TLS key and a request signed with the old signing key.

    Args:
        folder: Holds the identity.
        rotate: Whether the signing key is new too.

    Returns:
        The request, which also lies in DIR/request.json.

    Raises:
        IdentityError: If the folder holds no sound identity.
    """
    identity = load(folder)
    pending = _pending(folder, "renew", identity.certificate_pem.decode("ascii"))
    if pending is not None and _rotates(folder, identity) == rotate:
        return pending
    tls_key = ec.generate_private_key(ec.SECP256R1())
    signing = Ed25519PrivateKey.generate() if rotate else identity.signing_key
    peer = identity.peer
    csr = certificate_request(tls_key, signing, name=peer.name, role=peer.role, consortium=peer.consortium)
    return _keep(folder, tls_key, signing, renewal_request(identity.certificate_pem, identity.signing_key, csr))


def accept(folder: Path, certificate_pem: bytes, invite: Invite, now: datetime) -> Peer:
    """Install the certificate that answers an invite's request.

    Args:
        folder: Where `prepare` left the keys.
        certificate_pem: What the CA issued.
        invite: The invite.
        now: This machine's time, aware.

    Returns:
        Who the site is now.

    Raises:
        IdentityError: If the certificate is of another CA, name or role, or does not fit the keys.
    """
    return _accept(folder, certificate_pem, invite.ca_pem, (invite.name, invite.role), invite.enrollment, now)


def accept_renewal(folder: Path, certificate_pem: bytes, now: datetime) -> Peer:
    """Replace the identity by the renewed one, all at once.

    Args:
        folder: Where `prepare_renewal` left the new keys.
        certificate_pem: What the CA issued.
        now: This machine's time, aware.

    Returns:
        Who the site still is.

    Raises:
        IdentityError: If the certificate is of another CA, name or role, or does not fit the keys.
    """
    old = load(folder)
    return _accept(folder, certificate_pem, old.ca_pem, (old.peer.name, old.peer.role), address_of(folder), now)


def address_of(folder: Path) -> str:
    """Where the CA's listener was when the site enrolled.

    Args:
        folder: Holds the identity.

    Returns:
        `host:port`, or ``.
    """
    path = folder / "current" / ADDRESS
    return path.read_text().strip() if path.is_file() else ""


def _accept(
    folder: Path, certificate_pem: bytes, ca_pem: bytes, expected: tuple[str, str], address: str, now: datetime
) -> Peer:
    peer = verified_peer(certificate_pem, ca_pem, now, role=expected[1])
    if peer.name != expected[0]:
        raise IdentityError(f"The certificate: expected one for {expected[0]}, got one for {peer.name}.")
    pending = folder / "pending"
    if (folder / "current").is_symlink() and read_files(folder)[CERTIFICATE] == certificate_pem:
        keys = read_files(folder)  # installed before a crash; what is left is to tidy up
    elif pending.is_dir():
        keys = {name: (pending / name).read_bytes() for name in (TLS_KEY, SIGNING_KEY)}
    else:
        raise IdentityError(
            f"{pending}: expected the keys of a request, found none. Make the request in this folder first."
        )
    files = {CERTIFICATE: certificate_pem, CA: ca_pem, TLS_KEY: keys[TLS_KEY], SIGNING_KEY: keys[SIGNING_KEY]}
    install(folder, files | ({ADDRESS: address.encode()} if address else {}))
    return peer


def _pending(folder: Path, kind: str, base: str) -> bytes | None:
    path = folder / "pending" / _REQUEST
    if not path.is_file():
        return None
    content = path.read_bytes()
    request = read_request(content)
    if (request.kind, request.base) != (kind, base):
        return None
    write_atomic(folder / _REQUEST, content)
    return content


def _rotates(folder: Path, identity: Identity) -> bool:
    path = folder / "pending" / SIGNING_KEY
    return signing_key(path.read_bytes(), path).public_key() != identity.signing_key.public_key()


def _keep(folder: Path, tls_key: ec.EllipticCurvePrivateKey, signing: Ed25519PrivateKey, request: bytes) -> bytes:
    # Keys and request appear together, before the request can reach anyone: an answer always finds its keys.
    write_private(folder / "pending", {TLS_KEY: key_pem(tls_key), SIGNING_KEY: key_pem(signing), _REQUEST: request})
    write_atomic(folder / _REQUEST, request)
    return request
