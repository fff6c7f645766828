"""Attack: becoming somebody in the consortium without the CA's leave. Refused, and nothing is issued."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lamina.protos import identity
from lamina.protos.errors import ConfigError, IdentityError
from lamina.protos.identity import authority as pki
from lamina.protos.identity import certificates, requests, site
from lamina.protos.identity.authority import MAX_ATTEMPTS, Authority
from lamina.protos.identity.ledger import read_ledger
from lamina.protos.identity.requests import MAX_REQUEST_BYTES, Invite, enrollment_request
from lamina.server.port.enrollment import TokenBucket
from tests.consortium import NOW, changed, csr, enrolled, invited, new_ca, new_tls_key, refused


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return new_ca(tmp_path / "ca")


@pytest.fixture
def invite(ca: Authority) -> Invite:
    return invited(ca, "north")


# --- requests ---------------------------------------------------------------------------------------------------------


def test_an_honest_request_is_answered(ca: Authority, invite: Invite) -> None:
    assert identity.peer_of(pki.fulfil(ca, enrollment_request(invite, csr()), NOW)).name == "north"


@pytest.mark.parametrize(
    "asked",
    [csr(role="coordinator"), csr(role="operator"), csr(name="south"), csr(name="NORTH"), csr(consortium="banks")],
)
def test_a_request_for_another_name_or_role_than_invited(ca: Authority, invite: Invite, asked: str) -> None:
    refused(ca, enrollment_request(invite, asked), "expected name, role and consortium north, client, hospitals, got")


def test_an_edited_invite_gives_no_other_role(ca: Authority, invite: Invite) -> None:
    edited = replace(invite, role="coordinator", hosts=("evil.example.org",))
    refused(ca, enrollment_request(edited, csr(role="coordinator")), "expected name, role and consortium north, client")


def test_a_used_invite(ca: Authority, invite: Invite) -> None:
    pki.fulfil(ca, enrollment_request(invite, csr()), NOW)
    refused(ca, enrollment_request(invite, csr()), "was used already")


def test_a_replayed_request_gives_no_second_certificate_and_none_once_revoked(ca: Authority, invite: Invite) -> None:
    request = enrollment_request(invite, csr())
    pem = pki.fulfil(ca, request, NOW)
    assert pki.fulfil(ca, request, NOW) == pem
    assert len(read_ledger(ca.folder).certificates) == 1
    pki.revoke(ca, NOW, name="north")
    refused(ca, request, "north")


def test_an_expired_invite(ca: Authority, invite: Invite, tmp_path: Path) -> None:
    late = NOW + timedelta(days=7, seconds=1)
    refused(ca, enrollment_request(invite, csr()), "expired at 2026-03-08T12:00:00Z", now=late)
    with pytest.raises(IdentityError, match="expired"):
        site.prepare(tmp_path / "north", invite, late)


def test_a_longer_expiry_written_into_the_file_changes_nothing(ca: Authority, invite: Invite) -> None:
    edited = replace(invite, expires=NOW + timedelta(days=700))
    refused(ca, enrollment_request(edited, csr()), "expired", now=NOW + timedelta(days=8))


def test_an_invite_cancelled_by_revoking_the_name(ca: Authority, invite: Invite) -> None:
    pki.revoke(ca, NOW, name="north")
    refused(ca, enrollment_request(invite, csr()), "was cancelled")


def test_an_invite_of_another(ca: Authority, invite: Invite) -> None:
    south = invited(ca, "south")
    refused(
        ca, enrollment_request(replace(south, id=invite.id), csr()), "expected one signed with the invite for north"
    )
    refused(ca, enrollment_request(south, csr()), "expected name, role and consortium south")


def test_an_invite_id_without_its_token(ca: Authority, invite: Invite) -> None:
    refused(ca, enrollment_request(replace(invite, token=bytes(32)), csr()), "expected one signed with the invite")


def test_what_the_ledger_holds_enrols_nobody(ca: Authority, invite: Invite) -> None:
    (held,) = read_ledger(ca.folder).invites
    refused(ca, enrollment_request(replace(invite, token=bytes.fromhex(held.key)), csr()), "expected one signed")


def test_an_invite_of_another_ca_of_the_same_name(ca: Authority, tmp_path: Path) -> None:
    foreign = invited(new_ca(tmp_path / "other"), "north")
    refused(ca, enrollment_request(foreign, csr()), "got an unknown one")


def test_a_request_whose_csr_was_replaced_on_the_way(ca: Authority, invite: Invite) -> None:
    refused(ca, changed(enrollment_request(invite, csr()), csr=csr()), "was changed")


@pytest.mark.parametrize("at", [40, 120, 200, 300, 400])
def test_a_csr_with_one_character_changed_and_the_proof_made_anew(ca: Authority, invite: Invite, at: int) -> None:
    text = csr()
    flipped = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
    refused(ca, enrollment_request(invite, flipped), "The request")


def built(
    signing_public: bytes,
    possession: bytes,
    key: Any = None,
    extra: tuple[tuple[Any, bool], ...] = (),
    names: tuple[str, ...] = ("north",),
) -> str:
    """A request made by hand, with whatever in it."""
    key = key or new_tls_key()
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names]
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "hospitals"), *subject]))
        .add_extension(certificates.role_extension("client"), critical=False)
        .add_extension(certificates.octets_extension(certificates.SIGNING_KEY_OID, signing_public), critical=False)
        .add_extension(certificates.octets_extension(certificates.POSSESSION_OID, possession), critical=False)
    )
    for extension, critical in extra:
        builder = builder.add_extension(extension, critical)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def possession(signing: Ed25519PrivateKey, key: Any) -> bytes:
    return identity.signing.sign_with(signing, "enrollment/possession", requests._spki(key.public_key()))


def test_the_hand_made_request_is_good_where_nothing_is_wrong(ca: Authority, invite: Invite) -> None:
    key, signing = new_tls_key(), Ed25519PrivateKey.generate()
    good = built(certificates.raw_public(signing.public_key()), possession(signing, key), key)
    assert pki.fulfil(ca, enrollment_request(invite, good), NOW)


def test_a_signing_key_of_another_without_proof(ca: Authority, invite: Invite, tmp_path: Path) -> None:
    victim = identity.load(enrolled(ca, tmp_path / "victim", "victim")).peer.signing_key
    own, key = Ed25519PrivateKey.generate(), new_tls_key()
    for proof in (bytes(64), possession(own, key)):
        refused(ca, enrollment_request(invite, built(victim, proof, key)), "does not prove possession")


def test_a_proof_of_possession_taken_from_anothers_request(ca: Authority, invite: Invite) -> None:
    signing, key = Ed25519PrivateKey.generate(), new_tls_key()
    seen = possession(signing, key)  # made for the victim's TLS key
    refused(
        ca, enrollment_request(invite, built(certificates.raw_public(signing.public_key()), seen)), "does not prove"
    )


@pytest.mark.parametrize(
    "extra",
    [
        x509.BasicConstraints(ca=True, path_length=None),
        x509.SubjectAlternativeName([x509.DNSName("hub.example.org")]),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
    ],
)
def test_a_request_that_asks_for_more(ca: Authority, invite: Invite, extra: x509.ExtensionType) -> None:
    signing, key = Ed25519PrivateKey.generate(), new_tls_key()
    asked = built(certificates.raw_public(signing.public_key()), possession(signing, key), key, ((extra, True),))
    refused(ca, enrollment_request(invite, asked), "got more or less")


@pytest.mark.parametrize("names", [("north", "south"), ("../north",), ("a/b",), ("north\n",), ("north\0",)])
def test_a_request_with_other_names(ca: Authority, invite: Invite, names: tuple[str, ...]) -> None:
    signing, key = Ed25519PrivateKey.generate(), new_tls_key()
    asked = built(certificates.raw_public(signing.public_key()), possession(signing, key), key, names=names)
    refused(ca, enrollment_request(invite, asked), "The request")


@pytest.mark.parametrize(
    "key", [lambda: rsa.generate_private_key(65537, 2048), lambda: ec.generate_private_key(ec.SECP384R1())]
)
def test_keys_of_another_kind(ca: Authority, invite: Invite, key: Callable[[], Any]) -> None:
    made, signing = key(), Ed25519PrivateKey.generate()
    asked = built(certificates.raw_public(signing.public_key()), possession(signing, made), made)
    refused(ca, enrollment_request(invite, asked), "expected an ECDSA P-256 key")


MALFORMED = {
    "nothing": b"",
    "zeros": bytes(100),
    "a list": b"[]",
    "deep": b"[" * 8000,
    "no fields": b'{"schema": 1}',
    "numbers": b'{"schema": 1, "kind": 1, "base": 2, "csr": 3, "proof": 4}',
    "another kind": b'{"schema": 1, "kind": "admin", "base": "", "csr": "", "proof": ""}',
    "a proof that is not hex": b'{"schema": 1, "kind": "enroll", "base": "", "csr": "", "proof": "zz"}',
    "not ascii": '{"schema": 1, "kind": "enroll", "base": "\u00e9", "csr": "", "proof": ""}'.encode(),
    "a lone surrogate": b'{"schema": 1, "kind": "enroll", "base": "\\ud800", "csr": "", "proof": ""}',
    "a renewal of nothing": b'{"schema": 1, "kind": "renew", "base": "", "csr": "", "proof": ""}',
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_malformed_requests_are_refusals_not_faults(ca: Authority, content: bytes) -> None:
    refused(ca, content, "expected")


def test_an_oversized_request_is_not_parsed(ca: Authority, invite: Invite) -> None:
    padded = changed(enrollment_request(invite, csr()), padding="x" * MAX_REQUEST_BYTES)
    refused(ca, padded, f"expected at most {MAX_REQUEST_BYTES} bytes")


def torsion() -> list[bytes]:
    """Encodings of the points whose order divides 8: y = ±1, y = 0, and those that double to y = 0."""
    p = 2**255 - 19
    d = -121665 * pow(121666, -1, p) % p
    ys = {0, 1, p - 1}
    # 2P = (±i, 0) needs x² + y² = 0, and the curve -x² + y² = 1 + d x² y² then reads d y⁴ + 2 y² - 1 = 0.
    root = square_root((1 + d) % p, p)
    for square in ((-1 + root) * pow(d, -1, p) % p, (-1 - root) * pow(d, -1, p) % p):
        if pow(square, (p - 1) // 2, p) == 1:
            y = square_root(square, p)
            ys |= {y, p - y}
    assert len(ys) == 5
    return [(y | sign << 255).to_bytes(32, "little") for y in (*ys, p, p + 1) for sign in (0, 1)]


def square_root(value: int, p: int) -> int:
    """A square root modulo p = 5 mod 8 (Atkin)."""
    b = pow(2 * value, (p - 5) // 8, p)
    i = 2 * value * b * b % p
    found = value * b * (i - 1) % p
    assert found * found % p == value
    return found


def holds(key: bytes, message: bytes, signature: bytes) -> bool:
    """What plain Ed25519 says."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def test_a_signing_key_under_which_one_signature_fits_all(ca: Authority, invite: Invite) -> None:
    key = new_tls_key()
    statement = b"lamina\0enrollment/possession\0" + hashlib.sha256(requests._spki(key.public_key())).digest()
    forged = [
        (point, r + bytes(32)) for point in torsion() for r in torsion() if holds(point, statement, r + bytes(32))
    ]
    assert len({point for point, _ in forged}) > 4  # plain Ed25519 takes them
    for point, signature in forged:
        assert not identity.verify(point, "enrollment/possession", requests._spki(key.public_key()), signature)
        refused(ca, enrollment_request(invite, built(point, signature, key)), "does not prove possession")


# --- guessing ---------------------------------------------------------------------------------------------------------


def test_an_invite_bears_few_wrong_guesses_at_the_listener(ca: Authority, invite: Invite) -> None:
    for guess in range(MAX_ATTEMPTS):
        wrong = replace(invite, token=guess.to_bytes(32, "big"))
        refused(ca, enrollment_request(wrong, csr()), "expected one signed", counted=True)
    refused(ca, enrollment_request(invite, csr()), "5 requests were refused already", counted=True)
    assert pki.fulfil(ca, enrollment_request(invite, csr()), NOW)  # by files the operator decides


def test_the_limit_on_all_callers_lets_through_a_burst_and_then_its_rate() -> None:
    clock = [0.0]
    bucket = TokenBucket(burst=3, per_s=0.5, clock=lambda: clock[0])
    assert [bucket.take() for _ in range(5)] == [True, True, True, False, False]
    clock[0] = 2.0
    assert [bucket.take() for _ in range(2)] == [True, False]
    clock[0] = 1e9
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]


# --- names ------------------------------------------------------------------------------------------------------------

NAMES = ["", ".", "..", "../north", "a/b", "a\\b", "-rf", ".hidden", "a b", "a\n", "a\0", "é", "a" * 65, "a:b", "$(x)"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_like_a_path_is_not_invited(ca: Authority, name: str) -> None:
    with pytest.raises(ConfigError, match="expected a letter or digit"):
        invited(ca, name)
    assert not read_ledger(ca.folder).invites


@pytest.mark.parametrize("name", ["north", "North", "NORTH"])
def test_a_name_in_use_is_not_invited_again(ca: Authority, tmp_path: Path, name: str) -> None:
    enrolled(ca, tmp_path / "north", "north")
    with pytest.raises(ConfigError, match="north has a certificate"):
        invited(ca, name)


def test_a_revoked_name_may_be_invited_again(ca: Authority, tmp_path: Path) -> None:
    old = identity.load(enrolled(ca, tmp_path / "north", "north")).peer
    pki.revoke(ca, NOW, name="north")
    new = identity.load(enrolled(ca, tmp_path / "again", "north")).peer
    revoked = identity.read_revocations(ca.folder / "crl.pem", ca.ca_pem).serials
    assert old.serial in revoked
    assert new.serial not in revoked
