"""Attack: certificates, keys and revocation lists that are not what they say. Refused, wherever they are read."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from lamina.protos import identity
from lamina.protos.errors import ConfigError, IdentityError
from lamina.protos.identity import authority as pki
from lamina.protos.identity import certificates, requests, site
from lamina.protos.identity.authority import Authority
from lamina.protos.identity.issuing import issue
from lamina.protos.identity.ledger import read_ledger
from lamina.protos.identity.requests import Invite, certificate_request, enrollment_request
from tests.consortium import NOW, changed, csr, enrolled, invited, new_ca, new_tls_key, refused


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return new_ca(tmp_path / "ca")


@pytest.fixture
def invite(ca: Authority) -> Invite:
    return invited(ca, "north")


# --- certificates -----------------------------------------------------------------------------------------------------


def certificate_by(
    issuer: x509.Name, issuer_key: ec.EllipticCurvePrivateKey, role: str | None = "coordinator", ca: bool = False
) -> bytes:
    """A certificate for `hub`, made by hand."""
    name = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "hospitals"), x509.NameAttribute(NameOID.COMMON_NAME, "hub")]
    )
    signing = certificates.raw_public(Ed25519PrivateKey.generate().public_key())
    builder = (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(name)
        .public_key(new_tls_key().public_key())
        .serial_number(7)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(certificates.octets_extension(certificates.SIGNING_KEY_OID, signing), critical=False)
    )
    if role is not None:
        builder = builder.add_extension(certificates.role_extension(role), critical=False)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_the_hand_made_certificate_is_good_where_the_ca_made_it(ca: Authority) -> None:
    pem = certificate_by(ca.certificate.subject, ca.key)
    assert identity.verified_peer(pem, ca.ca_pem, NOW, "coordinator").name == "hub"


def test_a_forged_role_under_the_cas_name(ca: Authority) -> None:
    pem = certificate_by(ca.certificate.subject, new_tls_key())
    with pytest.raises(IdentityError, match="got one issued by another"):
        identity.verified_peer(pem, ca.ca_pem, NOW, "coordinator")


def test_a_role_edited_into_a_real_certificate(ca: Authority, tmp_path: Path) -> None:
    pem = (enrolled(ca, tmp_path / "x", "x", "operator") / "certificate.pem").read_bytes()
    der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    edited = x509.load_der_x509_certificate(der.replace(b"operator", b"auditors")).public_bytes(Encoding.PEM)
    with pytest.raises(IdentityError, match="Expected a role among"):
        identity.verified_peer(edited, ca.ca_pem, NOW)
    der = der.replace(b"\x0c\x08operator", b"\x0c\x07auditor\0")
    edited = x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
    with pytest.raises(IdentityError):
        identity.verified_peer(edited, ca.ca_pem, NOW)


def test_a_self_signed_certificate(ca: Authority) -> None:
    key = new_tls_key()
    name = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "hospitals"), x509.NameAttribute(NameOID.COMMON_NAME, "hub")]
    )
    with pytest.raises(IdentityError, match="got one issued by another"):
        identity.verified_peer(certificate_by(name, key), ca.ca_pem, NOW)


def test_a_ca_of_the_same_name(ca: Authority, tmp_path: Path) -> None:
    other = new_ca(tmp_path / "other")
    assert other.certificate.subject == ca.certificate.subject
    pem = (enrolled(other, tmp_path / "hub", "hub", "coordinator") / "certificate.pem").read_bytes()
    with pytest.raises(IdentityError, match="got one issued by another"):
        identity.verified_peer(pem, ca.ca_pem, NOW)


def test_a_site_as_a_ca(ca: Authority, tmp_path: Path) -> None:
    place = enrolled(ca, tmp_path / "north", "north")
    loaded = identity.load(place)
    key = identity.folder.private_key(loaded.tls_key_pem, place)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    pem = certificate_by(x509.load_pem_x509_certificate(loaded.certificate_pem).subject, key)
    with pytest.raises(IdentityError):
        identity.verified_peer(pem, ca.ca_pem, NOW)
    with pytest.raises(IdentityError, match="expected one that may issue others"):
        identity.verified_peer(pem, loaded.certificate_pem, NOW)


def test_a_certificate_that_is_itself_a_ca_is_no_peer(ca: Authority) -> None:
    pem = certificate_by(ca.certificate.subject, ca.key, ca=True)
    with pytest.raises(IdentityError):
        identity.verified_peer(pem, ca.ca_pem, NOW)


@pytest.mark.parametrize("role", [None, "root", "Coordinator", "client\0", ""])
def test_a_certificate_without_a_known_role(ca: Authority, role: str | None) -> None:
    with pytest.raises(IdentityError, match="role"):
        identity.peer_of(certificate_by(ca.certificate.subject, ca.key, role))


def test_neither_the_ca_nor_its_listener_is_a_peer(ca: Authority) -> None:
    for pem in (ca.ca_pem, pki.listener_pair(ca, NOW)[1]):
        with pytest.raises(IdentityError):
            identity.verified_peer(pem, ca.ca_pem, NOW)


def test_two_certificates_in_one_text(ca: Authority, tmp_path: Path) -> None:
    pems = [(enrolled(ca, tmp_path / name, name) / "certificate.pem").read_bytes() for name in ("a", "b")]
    with pytest.raises(IdentityError, match=r"expected one X.509 certificate"):
        identity.peer_of(b"".join(pems))


# --- at the site ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o610])
@pytest.mark.parametrize("name", ["tls.key", "signing.key"])
def test_a_key_that_others_can_read(ca: Authority, tmp_path: Path, name: str, mode: int) -> None:
    place = enrolled(ca, tmp_path / "north", "north")
    (place / name).resolve().chmod(mode)
    with pytest.raises(IdentityError, match=f"got mode {mode:04o}. chmod 600 .*{name}"):
        identity.load(place)
    assert [one.what for one in identity.check(place, NOW) if not one.ok] == ["permissions"]


def test_a_ca_key_that_others_can_read(ca: Authority) -> None:
    (ca.folder / "ca.key").chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        pki.opened(ca.folder, None)


def test_keys_are_never_readable_by_others(ca: Authority, tmp_path: Path) -> None:
    place = enrolled(ca, tmp_path / "north", "north")
    site.prepare_renewal(place, True)
    keys = [*ca.folder.rglob("*.key"), *place.rglob("*.key")]
    assert len({path.resolve() for path in keys}) == 5
    assert all(path.resolve().stat().st_mode & 0o077 == 0 for path in keys)


def test_an_answer_for_another_site_is_not_installed(ca: Authority, invite: Invite, tmp_path: Path) -> None:
    place = tmp_path / "north"
    request = site.prepare(place, invite, NOW)
    foreign = new_ca(tmp_path / "other")
    answers = {
        "role coordinator": (enrolled(ca, tmp_path / "a", "a", "coordinator"), "expected role client"),
        "another name": (enrolled(ca, tmp_path / "b", "b"), "expected one for north, got one for b"),
        "another CA": (enrolled(foreign, tmp_path / "c", "north"), "issued by another"),
    }
    for other, says in answers.values():
        with pytest.raises(IdentityError, match=says):
            site.accept(place, (other / "certificate.pem").read_bytes(), invite, NOW)
    with pytest.raises(IdentityError):
        identity.load(place)
    stolen = tmp_path / "stolen"  # the right certificate without the keys
    with pytest.raises(IdentityError, match="expected the keys of a request"):
        site.accept(stolen, pki.fulfil(ca, request, NOW), invite, NOW)
    site.prepare(stolen, invite, NOW)
    with pytest.raises(IdentityError, match=r"expected the key of certificate.pem"):
        site.accept(stolen, pki.fulfil(ca, request, NOW), invite, NOW)


def test_an_invite_whose_ca_is_no_ca(ca: Authority, invite: Invite, tmp_path: Path) -> None:
    leaf = (enrolled(ca, tmp_path / "x", "x") / "certificate.pem").read_bytes()
    with pytest.raises(IdentityError):
        requests.read_invite(requests.invite_bytes(replace(invite, ca_pem=leaf)), "x")


def test_a_damaged_invite_does_not_show_its_token(invite: Invite) -> None:
    content = requests.invite_bytes(invite).replace(b'"expires"', b'"expired"')
    with pytest.raises(IdentityError) as caught:
        requests.read_invite(content, "x")
    assert invite.token.hex() not in str(caught.value)
    assert caught.value.__cause__ is None


# --- renewing and revoking --------------------------------------------------------------------------------------------


def test_a_revoked_site_renews_nothing(ca: Authority, tmp_path: Path) -> None:
    place = enrolled(ca, tmp_path / "north", "north")
    request = site.prepare_renewal(place, False)
    pki.revoke(ca, NOW, name="north")
    refused(ca, request, "got one revoked at")


def test_an_answered_renewal_is_not_given_again_once_revoked(ca: Authority, tmp_path: Path) -> None:
    place = enrolled(ca, tmp_path / "north", "north")
    request = site.prepare_renewal(place, False)
    serial = identity.peer_of(pki.fulfil(ca, request, NOW)).serial
    pki.revoke(ca, NOW, serial=f"{serial:x}")
    refused(ca, request, "was revoked")


def test_an_expired_certificate_renews_nothing(ca: Authority, tmp_path: Path) -> None:
    request = site.prepare_renewal(enrolled(ca, tmp_path / "north", "north"), False)
    refused(ca, request, "expired", now=NOW + timedelta(days=366))


def test_renewing_with_anothers_signing_key(ca: Authority, tmp_path: Path) -> None:
    north = identity.load(enrolled(ca, tmp_path / "north", "north"))
    south = identity.load(enrolled(ca, tmp_path / "south", "south"))
    stolen = requests.renewal_request(north.certificate_pem, south.signing_key, csr())
    refused(ca, stolen, "expected one signed by north's signing key")


@pytest.mark.parametrize("asked", [csr(name="south"), csr(role="coordinator"), csr(consortium="banks")])
def test_renewing_into_another(ca: Authority, tmp_path: Path, asked: str) -> None:
    north = identity.load(enrolled(ca, tmp_path / "north", "north"))
    request = requests.renewal_request(north.certificate_pem, north.signing_key, asked)
    refused(ca, request, "expected name, role and consortium north, client")


def test_renewing_a_certificate_of_another_ca(ca: Authority, tmp_path: Path) -> None:
    place = enrolled(new_ca(tmp_path / "other"), tmp_path / "north", "north")
    refused(ca, site.prepare_renewal(place, False), "issued by another")


def test_renewing_what_the_ca_signed_but_the_ledger_does_not_know(ca: Authority) -> None:
    signing = Ed25519PrivateKey.generate()
    asked = requests.wanted(
        certificate_request(new_tls_key(), signing, name="x", role="client", consortium="hospitals")
    )
    pem = issue(ca.key, ca.certificate, asked, [], 365, NOW)
    refused(ca, requests.renewal_request(pem, signing, csr("x")), "unknown to the ledger")


def test_certificates_of_one_name_do_not_multiply_without_end(ca: Authority, tmp_path: Path) -> None:
    north = identity.load(enrolled(ca, tmp_path / "north", "north"))
    for _ in range(pki.MAX_LIVE - 1):
        pki.fulfil(ca, requests.renewal_request(north.certificate_pem, north.signing_key, csr()), NOW)
    refused(ca, requests.renewal_request(north.certificate_pem, north.signing_key, csr()), "5 certificates in force")


def test_a_renewal_request_is_no_enrollment(ca: Authority, invite: Invite, tmp_path: Path) -> None:
    renewal = site.prepare_renewal(enrolled(ca, tmp_path / "south", "south"), False)
    refused(ca, renewal, "expected one to enroll", kind="enroll")
    refused(ca, changed(enrollment_request(invite, csr()), kind="renew"), "expected one X.509 certificate")


def test_a_revocation_list_signed_by_another(ca: Authority, tmp_path: Path) -> None:
    other = new_ca(tmp_path / "other")
    with pytest.raises(IdentityError, match=r"expected a list signed by the CA .* got another's"):
        identity.read_revocations(other.folder / "crl.pem", ca.ca_pem)


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"])
def test_a_revocation_list_that_cannot_be_read_revokes_everything(ca: Authority, content: bytes | None) -> None:
    path = ca.folder / "crl.pem"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IdentityError, match="expected a revocation list"):
        identity.read_revocations(path, ca.ca_pem)


def test_a_revocation_list_with_an_entry_taken_out(ca: Authority, tmp_path: Path) -> None:
    enrolled(ca, tmp_path / "north", "north")
    pki.revoke(ca, NOW, name="north")
    path = ca.folder / "crl.pem"
    der = x509.load_pem_x509_crl(path.read_bytes()).public_bytes(Encoding.DER)
    serial = read_ledger(ca.folder).certificates[0].serial
    edited = der.replace(bytes.fromhex(serial.zfill(40)), bytes.fromhex("11" * 20))
    assert edited != der
    path.write_bytes(x509.load_der_x509_crl(edited).public_bytes(Encoding.PEM))
    with pytest.raises(IdentityError, match="got another's"):
        identity.read_revocations(path, ca.ca_pem)


def test_a_damaged_ledger_issues_nothing(ca: Authority, invite: Invite) -> None:
    (ca.folder / "issued.json").write_text('{"certificates": [')
    with pytest.raises(IdentityError, match="damaged"):
        pki.fulfil(ca, enrollment_request(invite, csr()), NOW)


def test_a_ca_is_never_written_over(ca: Authority) -> None:
    with pytest.raises(ConfigError, match="never written over"):
        new_ca(ca.folder)
