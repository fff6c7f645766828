"""The folder that holds a site's identity: read whole, replaced whole.

    DIR/certificate.pem tls.key signing.key ca.pem   links into the current set
    DIR/current                                      a link to it; replacing this link replaces all four at once
    DIR/sets/<serial>/                               the files themselves
    DIR/pending/                                     keys of a request that the CA has not answered yet

Four plain files without `current` are read as well: a deployment may mount them from a secret store.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from lamina.protos.errors import IdentityError
from lamina.protos.files import fsync_folder
from lamina.protos.identity.certificates import (
    Peer,
    certificate,
    consortium_of,
    fingerprint,
    issued_by,
    peer_of,
    raw_public,
)
from lamina.protos.identity.signing import sign_with

CERTIFICATE, TLS_KEY, SIGNING_KEY, CA = "certificate.pem", "tls.key", "signing.key", "ca.pem"
FILES = (CERTIFICATE, TLS_KEY, SIGNING_KEY, CA)
KEYS = (TLS_KEY, SIGNING_KEY)

PrivateKey = ec.EllipticCurvePrivateKey | Ed25519PrivateKey


@dataclass(frozen=True)
class Identity:
    """What a site needs to speak and to sign. Its repr shows no key.

    Args:
        peer: Who the certificate names.
        certificate_pem: The certificate, for TLS.
        tls_key_pem: Its ECDSA key, for TLS.
        ca_pem: The only CA to trust.
        signing_key: The Ed25519 key that the certificate names.
    """

    peer: Peer
    certificate_pem: bytes = field(repr=False)
    tls_key_pem: bytes = field(repr=False)
    ca_pem: bytes = field(repr=False)
    signing_key: Ed25519PrivateKey = field(repr=False)


def sign(identity: Identity, domain: str, statement: bytes) -> bytes:
    """Sign a statement as this identity.

    Args:
        identity: Who signs.
        domain: What the statement is for, such as `update`; the signature holds in no other domain.
        statement: Any bytes.

    Returns:
        64 bytes, for `verify`.
    """
    return sign_with(identity.signing_key, domain, statement)


def load(folder: Path) -> Identity:
    """Read an identity. Dates are not checked here; see `check` and `verified_peer`.

    Args:
        folder: Holds certificate.pem, tls.key, signing.key and ca.pem.

    Returns:
        The identity.

    Raises:
        IdentityError: If a file is missing, a key may be read by others, or the files do not belong together.
    """
    files = read_files(folder)
    identity = Identity(
        peer=peer_of(files[CERTIFICATE]),
        certificate_pem=files[CERTIFICATE],
        tls_key_pem=files[TLS_KEY],
        ca_pem=files[CA],
        signing_key=signing_key(files[SIGNING_KEY], folder / SIGNING_KEY),
    )
    problem = mismatch(files, folder) or stranger(files, folder)
    if problem:
        raise IdentityError(problem)
    return identity


def read_files(folder: Path) -> dict[str, bytes]:
    """The four files of one set. A set that is replaced meanwhile is read again, whole.

    Args:
        folder: The identity's folder.

    Returns:
        File name -> content.

    Raises:
        IdentityError: If one is missing or a key may be read by others.
    """
    for attempt in range(3):
        base = set_of(folder)
        try:
            for name in KEYS:
                require_private(base / name)
            return {name: (base / name).read_bytes() for name in FILES}
        except OSError as error:
            if attempt == 2 or set_of(folder) == base:
                raise IdentityError(
                    f"{folder}: expected {', '.join(FILES)}; {Path(error.filename or folder).name} cannot be read"
                    f" ({error.strerror}). Make an identity with `lamina pki enroll INVITE output={folder}`."
                ) from error
    raise IdentityError(f"{folder}: the identity changed three times while it was read. Try again.")


def set_of(folder: Path) -> Path:
    """Where the current files lie.

    Args:
        folder: The identity's folder.

    Returns:
        The target of `current`, or the folder itself where it holds plain files.

    Raises:
        IdentityError: If it has both.
    """
    current = folder / "current"
    if not current.is_symlink():
        return folder
    plain = [name for name in FILES if (folder / name).exists() and not (folder / name).is_symlink()]
    if plain:
        raise IdentityError(
            f"{folder}: expected links into {current}, got also a plain {plain[0]}, and it is not said which holds."
            " Remove the one that is not wanted."
        )
    return folder / os.readlink(current)


def require_private(path: Path) -> None:
    """Refuse a key file that others can read.

    Args:
        path: The file.

    Raises:
        IdentityError: If group or others have any right to it.
    """
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise IdentityError(
            f"{path}: expected a key that only its owner can read, got mode {mode:04o}. chmod 600 {path}"
        )


def mismatch(files: Mapping[str, bytes], folder: Path) -> str:
    """Why keys and certificate do not belong together, or the empty string.

    Args:
        files: From `read_files`.
        folder: For the message.

    Returns:
        A sentence, or ``.

    Raises:
        IdentityError: If one of them cannot be parsed.
    """
    found = certificate(files[CERTIFICATE], f"{folder / CERTIFICATE}")
    peer = peer_of(files[CERTIFICATE])
    again = f"Restore the folder, or enroll again with `lamina pki enroll INVITE output={folder}`."
    tls = private_key(files[TLS_KEY], folder / TLS_KEY)
    if tls.public_key() != found.public_key():
        return f"{folder / TLS_KEY}: expected the key of {CERTIFICATE} ({peer.name}), got another key. {again}"
    if raw_public(signing_key(files[SIGNING_KEY], folder / SIGNING_KEY).public_key()) != peer.signing_key:
        return f"{folder / SIGNING_KEY}: expected the key that {CERTIFICATE} names ({peer.name}), got another. {again}"
    return ""


def stranger(files: Mapping[str, bytes], folder: Path) -> str:
    """Why the certificate is not of the CA beside it, or the empty string.

    Args:
        files: From `read_files`.
        folder: For the message.

    Returns:
        A sentence, or ``.

    Raises:
        IdentityError: If one of them cannot be parsed.
    """
    ca: x509.Certificate = certificate(files[CA], f"{folder / CA}")
    peer = peer_of(files[CERTIFICATE])
    if issued_by(certificate(files[CERTIFICATE], CERTIFICATE), ca) and consortium_of(ca) == peer.consortium:
        return ""
    return (
        f"{folder / CERTIFICATE}: expected a certificate issued by {CA} ({fingerprint(files[CA])}), got one of another CA."
        f" Take ca.pem from the same invite, or enroll again."
    )


def private_key(pem: bytes, where: Path, passphrase: bytes | None = None) -> PrivateKey:
    """A private key from PEM.

    Args:
        pem: The text.
        where: For the message.
        passphrase: If it is encrypted.

    Returns:
        An ECDSA or Ed25519 key.

    Raises:
        IdentityError: If it cannot be read; the message holds nothing of the key.
    """
    try:
        key = load_pem_private_key(pem, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey | Ed25519PrivateKey):
        raise IdentityError(f"{where}: expected a private key in PEM, got one that cannot be read. Restore the file.")
    return key


def signing_key(pem: bytes, where: Path) -> Ed25519PrivateKey:
    """The Ed25519 key in a PEM text.

    Args:
        pem: The text.
        where: For the message.

    Returns:
        The key.

    Raises:
        IdentityError: If it is none.
    """
    key = private_key(pem, where)
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(f"{where}: expected an Ed25519 key, got a key of another kind. Restore the file.")
    return key


def key_pem(key: PrivateKey, passphrase: bytes | None = None) -> bytes:
    """A private key as PEM, PKCS #8.

    Args:
        key: The key.
        passphrase: Encrypts it where given.

    Returns:
        The text.
    """
    how: KeySerializationEncryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)


def install(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make these files the folder's identity, all at once. A crash leaves the old set or the new one.

    Args:
        folder: The identity's folder.
        files: The four files, and any others that belong to the set.

    Raises:
        IdentityError: If the folder holds plain files, or the files do not belong together.
    """
    plain = [name for name in FILES if (folder / name).exists() and not (folder / name).is_symlink()]
    if plain:
        raise IdentityError(
            f"{folder}: holds a plain {plain[0]}, which is not replaced. Use an empty folder for output=."
        )
    problem = mismatch(files, folder) or stranger(files, folder)
    if problem:
        raise IdentityError(problem)
    relative = Path("sets") / f"{peer_of(files[CERTIFICATE]).serial:x}"
    if not (folder / "current").is_symlink() or set_of(folder) != folder / relative:
        write_private(folder / relative, files)
        _link(folder / "current", relative)
    for name in FILES:
        if not (folder / name).is_symlink():
            _link(folder / name, Path("current") / name)
    for other in (folder / "sets").iterdir():
        if other != folder / relative:
            shutil.rmtree(other, ignore_errors=True)
    shutil.rmtree(folder / "pending", ignore_errors=True)
    (folder / "request.json").unlink(missing_ok=True)


def write_private(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of secrets that appears with all its files or not at all, and that only its owner can read.

    Args:
        folder: Where; an older one of the name is replaced.
        files: Name -> content.
    """
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    for name, content in files.items():
        write_secret(partial / name, content)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    fsync_folder(folder.parent)


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that nobody else can read at any moment; never over another.

    Args:
        path: Where.
        content: Its bytes.

    Raises:
        FileExistsError: If there is a file of the name.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _link(path: Path, target: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    os.replace(partial, path)
    fsync_folder(path.parent)
