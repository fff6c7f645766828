"""The primitives: X25519 key pairs, keys derived for one purpose, streams that mask, and boxes for shares."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lamina.protos.adapter import Array
from lamina.protos.errors import SecureSumRefused
from lamina.protos.identity import canonical
from lamina.protos.secagg.shamir import Draw

KEY_BYTES = 32
_BOX_NONCE_BYTES = 12
# Numbers that are masked at a time: what the stream needs besides stays within a core's cache.
_CHUNK = 2**17
_BLOCK_BYTES = 16


@dataclass(frozen=True)
class KeyPair:
    """An ephemeral X25519 key pair.

    Attributes:
        private: 32 bytes.
        public: 32 bytes.
    """

    private: bytes = field(repr=False)
    public: bytes


def key_pair(draw: Draw) -> KeyPair:
    """A new key pair.

    Args:
        draw: Number of bytes to that many, unpredictable.

    Returns:
        The pair.
    """
    return pair_of(draw(KEY_BYTES))


def pair_of(private: bytes) -> KeyPair:
    """The pair of a private key.

    Args:
        private: 32 bytes.

    Returns:
        The pair.
    """
    return KeyPair(private, X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw())


def agreed(private: bytes, public: bytes) -> bytes:
    """What two owners of X25519 keys know and nobody else.

    Args:
        private: One's own.
        public: The other's.

    Returns:
        32 bytes, to derive keys from.

    Raises:
        SecureSumRefused: If the other's key is of small order, so that everyone would know it.
    """
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise SecureSumRefused("expected an X25519 key of full order, got another. The attempt is given up.") from None


def derived(secret: bytes, digest: bytes, purpose: str, *names: str) -> bytes:
    """A key for one purpose in one attempt.

    Args:
        secret: What it is derived from.
        digest: Of the attempt's context.
        purpose: `mask`, `self` or `share`.
        *names: Of those that it is between.

    Returns:
        32 bytes.
    """
    info = b"lamina secagg\0" + canonical({"purpose": purpose, "names": list(names)})
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=digest, info=info).derive(secret)


def pair_key(private: bytes, public: bytes, digest: bytes, names: tuple[str, str]) -> bytes:
    """The key of the mask that two participants share.

    Args:
        private: One's own mask key.
        public: The other's.
        digest: Of the attempt's context.
        names: Of both, in order.

    Returns:
        32 bytes.
    """
    return derived(agreed(private, public), digest, "mask", *sorted(names))


def self_key(seed: bytes, digest: bytes, name: str) -> bytes:
    """The key of a participant's own mask.

    Args:
        seed: Its 32 bytes b.
        digest: Of the attempt's context.
        name: Whose.

    Returns:
        32 bytes.
    """
    return derived(seed, digest, "self", name)


def commitment(seed: bytes, digest: bytes) -> bytes:
    """What a participant says of its seed beforehand, so that shares of another are noticed.

    Args:
        seed: 32 random bytes.
        digest: Of the attempt's context.

    Returns:
        32 bytes that say nothing of the seed.
    """
    return hashlib.sha256(b"lamina secagg seed\0" + digest + seed).digest()


def add_stream(values: Array, key: bytes, sign: int) -> None:
    """Add or subtract a key's stream modulo 2**32, in place: AES-256 in counter mode, as little-endian 32-bit numbers.

    Args:
        values: (n,), uint32, contiguous.
        key: 32 bytes that no other stream uses.
        sign: 1 to add, -1 to subtract.
    """
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK_BYTES))).encryptor()
    zeros = bytes(4 * min(_CHUNK, values.size))
    buffer = bytearray(len(zeros) + _BLOCK_BYTES - 1)
    stream = np.frombuffer(buffer, "<u4", len(zeros) // 4)
    change = np.add if sign > 0 else np.subtract
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK]
        encryptor.update_into(memoryview(zeros)[: 4 * part.size], buffer)
        change(part, stream[: part.size], out=part)


def sealed(key: bytes, content: bytes, aad: bytes, draw: Draw) -> bytes:
    """Content that only the holder of a key can read or make.

    Args:
        key: 32 bytes.
        content: Any.
        aad: What it is bound to.
        draw: Number of bytes to that many, unpredictable.

    Returns:
        ChaCha20-Poly1305 under a random nonce, which comes first.
    """
    nonce = draw(_BOX_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, content, aad)


def unsealed(key: bytes, box: bytes, aad: bytes, where: str) -> bytes:
    """The inverse of `sealed`.

    Args:
        key: 32 bytes.
        box: From another participant, through the coordinator.
        aad: What it must be bound to.
        where: Put before the message.

    Returns:
        The content.

    Raises:
        SecureSumRefused: If the box was changed, or made for another attempt or holder.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(box[:_BOX_NONCE_BYTES], box[_BOX_NONCE_BYTES:], aad)
    except (InvalidTag, ValueError):
        raise SecureSumRefused(
            f"{where}: expected shares that were sealed for this participant in this attempt, got others. "
            "The attempt is given up."
        ) from None
