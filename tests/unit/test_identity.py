"""Certificates, keys and signatures: what is read, what is checked, and what a folder looks like when it is changed."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from lamina.protos import identity
from lamina.protos.errors import ConfigError, IdentityError
from lamina.protos.identity import authority as pki
from lamina.protos.identity import certificates, site
from lamina.protos.identity.authority import Authority
from lamina.protos.identity.folder import FILES
from lamina.protos.identity.ledger import read_ledger
from lamina.protos.identity.requests import invite_bytes, read_invite
from tests.consortium import NOW, enrolled, invited, new_ca


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return new_ca(tmp_path / "ca")


@pytest.fixture
def north(ca: Authority, tmp_path: Path) -> Path:
    return enrolled(ca, tmp_path / "north", "north")


def parsed(place: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((place / "certificate.pem").read_bytes())


def test_a_peer_says_what_the_invite_said(ca: Authority, tmp_path: Path) -> None:
    for role in identity.ROLES:
        loaded = identity.load(enrolled(ca, tmp_path / role, f"the-{role}", role))
        peer = identity.verified_peer(loaded.certificate_pem, ca.ca_pem, NOW, role)
        assert peer == loaded.peer == identity.peer_of(loaded.certificate_pem)
        assert (peer.name, peer.role, peer.consortium) == (f"the-{role}", role, "hospitals")
        assert peer.not_before == NOW - timedelta(minutes=5)
        assert peer.not_after == NOW + timedelta(days=365)
        assert peer.signing_key == certificates.raw_public(loaded.signing_key.public_key())


def test_certificates_have_the_profile(ca: Authority, tmp_path: Path) -> None:
    client = parsed(enrolled(ca, tmp_path / "c", "c")).extensions
    hub = parsed(enrolled(ca, tmp_path / "h", "h", "coordinator")).extensions
    server, dials = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
    assert set(client.get_extension_for_class(x509.ExtendedKeyUsage).value) == {dials}
    assert set(hub.get_extension_for_class(x509.ExtendedKeyUsage).value) == {server, dials}
    names = hub.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    with pytest.raises(x509.ExtensionNotFound):
        client.get_extension_for_class(x509.SubjectAlternativeName)
    for extensions in (client, hub):
        basic = extensions.get_extension_for_class(x509.BasicConstraints)
        assert basic.critical
        assert not basic.value.ca
        assert not extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    own = ca.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (own.critical, own.value.ca, own.value.path_length) == (True, True, 0)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> str | None:
    """A TLS handshake in memory; the version that both agreed on."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[1].version()


def context(place: Path, purpose: int) -> ssl.SSLContext:
    made = ssl.SSLContext(purpose)
    made.load_cert_chain(place / "certificate.pem", place / "tls.key")
    made.load_verify_locations(place / "ca.pem")
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    return made


def test_mutual_tls_works_and_only_to_the_invited_host(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    ca = new_ca(tmp_path / "ca", now=now)
    hub = context(enrolled(ca, tmp_path / "hub", "hub", "coordinator", now), ssl.PROTOCOL_TLS_SERVER)
    client = context(enrolled(ca, tmp_path / "c", "c", now=now), ssl.PROTOCOL_TLS_CLIENT)
    assert handshake(hub, client, "localhost") == "TLSv1.3"
    assert handshake(hub, client, "127.0.0.1") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match=r"[Hh]ostname"):
        handshake(hub, client, "elsewhere.example.org")
    posing = context(tmp_path / "c", ssl.PROTOCOL_TLS_SERVER)
    with pytest.raises(ssl.SSLError, match="purpose"):  # a client cannot serve
        handshake(posing, client, "localhost")


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (
            NOW - timedelta(minutes=6),
            "valid from 2026-03-01T11:55:00Z, but this machine's clock says 2026-03-01T11:54:00Z",
        ),
        (
            NOW + timedelta(days=366),
            "expired at 2027-03-01T12:00:00Z, and this machine's clock says 2027-03-02T12:00:00Z",
        ),
    ],
)
def test_dates_are_checked_and_both_times_are_named(ca: Authority, north: Path, now: datetime, says: str) -> None:
    with pytest.raises(IdentityError, match=says):
        identity.verified_peer((north / "certificate.pem").read_bytes(), ca.ca_pem, now)
    failed = [one for one in identity.check(north, now, "client") if not one.ok]
    assert [one.what for one in failed] == ["dates"]
    assert says in failed[0].message


def test_another_role_is_refused(ca: Authority, north: Path) -> None:
    with pytest.raises(IdentityError, match="north: expected role coordinator, got client"):
        identity.verified_peer((north / "certificate.pem").read_bytes(), ca.ca_pem, NOW, "coordinator")
    (failed,) = [one for one in identity.check(north, NOW, "operator") if not one.ok]
    assert failed.what == "role"
    assert "expected role operator, got client" in failed.message


def test_a_sound_identity_has_only_good_findings(north: Path) -> None:
    findings = identity.check(north, NOW, "client")
    assert [one.what for one in findings] == ["files", "permissions", "keys", "issuer", "dates", "role"]
    assert all(one.ok for one in findings)
    assert "Valid until 2027-03-01" in findings[4].message


@pytest.mark.parametrize(("left", "warned"), [(15, False), (14, False), (13, True), (1, True)])
def test_a_certificate_that_ends_soon_is_warned_about(north: Path, left: int, warned: bool) -> None:
    (dates,) = [one for one in identity.check(north, NOW + timedelta(days=365 - left), None) if one.what == "dates"]
    assert dates.ok
    assert (f"expires in {left} days" in dates.message) == warned


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(north: Path, name: str) -> None:
    (north / name).resolve().unlink()
    with pytest.raises(IdentityError, match=f"expected certificate.pem, tls.key.*{name}"):
        identity.load(north)
    (finding,) = identity.check(north, NOW)
    assert (finding.ok, finding.what) == (False, "files")
    assert f"found no {name}" in finding.message


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="lamina pki enroll INVITE"):
        identity.load(tmp_path / "none")
    assert [one.what for one in identity.check(tmp_path / "none", NOW)] == ["files"]


@pytest.mark.parametrize("name", ["tls.key", "signing.key", "ca.pem", "certificate.pem"])
def test_a_file_of_another_site_does_not_fit(ca: Authority, north: Path, tmp_path: Path, name: str) -> None:
    other = enrolled(new_ca(tmp_path / "ca2") if name == "ca.pem" else ca, tmp_path / "south", "south")
    (north / name).resolve().write_bytes((other / name).read_bytes())
    with pytest.raises(IdentityError, match="expected"):
        identity.load(north)
    assert [one.what for one in identity.check(north, NOW) if not one.ok] == ["issuer" if name == "ca.pem" else "keys"]


@pytest.mark.parametrize(
    "content", [b"", b"not pem", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refusals_not_faults(north: Path, name: str, content: bytes) -> None:
    (north / name).resolve().write_bytes(content)
    with pytest.raises(IdentityError):
        identity.load(north)
    assert not all(one.ok for one in identity.check(north, NOW))


def test_plain_files_are_read_too(north: Path, tmp_path: Path) -> None:
    mounted = tmp_path / "secrets"
    mounted.mkdir()
    for name in FILES:
        (mounted / name).write_bytes((north / name).read_bytes())
        (mounted / name).chmod(0o600)
    assert identity.load(mounted).peer == identity.load(north).peer
    assert all(one.ok for one in identity.check(mounted, NOW))


def test_two_sets_in_one_folder_are_refused(north: Path) -> None:
    (north / "tls.key").unlink()
    (north / "tls.key").write_bytes(b"?")
    with pytest.raises(IdentityError, match="it is not said which holds"):
        identity.load(north)


def test_no_repr_shows_a_secret(ca: Authority, north: Path) -> None:
    loaded, invite = identity.load(north), invited(ca, "south")
    secrets = [invite.token.hex(), repr(invite.token), "PRIVATE", "object at"]
    for shown in (repr(loaded), repr(invite), repr(ca), str(loaded)):
        assert not [secret for secret in secrets if secret in shown]


def test_signatures_hold_for_one_key_domain_and_statement(ca: Authority, north: Path, tmp_path: Path) -> None:
    loaded = identity.load(north)
    other = identity.load(enrolled(ca, tmp_path / "south", "south"))
    key, signature = loaded.peer.signing_key, identity.sign(loaded, "update", b"x")
    assert identity.verify(key, "update", b"x", signature)
    assert not identity.verify(key, "release", b"x", signature)
    assert not identity.verify(key, "update", b"y", signature)
    assert not identity.verify(other.peer.signing_key, "update", b"x", signature)
    assert not identity.verify(key, "update", b"x", signature[:-1] + bytes([signature[-1] ^ 1]))


@pytest.mark.parametrize("signature", [b"", b"x", bytes(64), bytes(65), bytes(10_000)])
@pytest.mark.parametrize("key", [b"", bytes(31), bytes([255]) * 32, bytes(33)])
def test_malformed_signatures_and_keys_are_false(key: bytes, signature: bytes) -> None:
    assert identity.verify(key, "update", b"x", signature) is False


def test_canonical_json_has_one_form() -> None:
    assert identity.canonical({"b": [1, 2.5], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.5]}'
    assert identity.canonical({"a": 1, "b": 2}) == identity.canonical({"b": 2, "a": 1})
    with pytest.raises(ValueError):
        identity.canonical({"a": float("nan")})


@pytest.mark.parametrize("name", ["a", "A9", "site-1.example_x", "9" * 64])
def test_names_that_fit(name: str) -> None:
    assert certificates.is_name(name)


@pytest.mark.parametrize("host", ["hub.example.org", "10.0.0.5", "::1", "localhost"])
def test_hosts_that_fit(host: str) -> None:
    assert certificates.general_name(host) is not None


@pytest.mark.parametrize(
    "host",
    [
        "",
        "a b",
        "-x",
        "x:80",
        "a..b",
        "*.example.org",
        "a/b",
        "x" * 64,
        "enrollment.lamina.internal",
        "X.LAMINA.INTERNAL",
    ],
)
def test_hosts_that_do_not(host: str) -> None:
    assert certificates.general_name(host) is None


def test_an_invite_survives_its_file(ca: Authority) -> None:
    invite = invited(ca, "hub", "coordinator")
    assert read_invite(invite_bytes(invite), "x") == invite


def test_the_ledger_keeps_no_token(ca: Authority) -> None:
    invite = invited(ca, "south")
    text = (ca.folder / "issued.json").read_text()
    assert invite.id in text
    assert invite.token.hex() not in text


def test_a_lost_answer_is_given_again(ca: Authority, tmp_path: Path) -> None:
    invite = invited(ca, "south")
    request = site.prepare(tmp_path / "south", invite, NOW)
    assert site.prepare(tmp_path / "south", invite, NOW) == request
    assert pki.fulfil(ca, request, NOW) == pki.fulfil(ca, request, NOW)
    assert len(read_ledger(ca.folder).certificates) == 1


def test_an_identity_is_not_enrolled_over(ca: Authority, north: Path) -> None:
    with pytest.raises(ConfigError, match="holds an identity already"):
        site.prepare(north, invited(ca, "south"), NOW)


def test_revocations_are_read(ca: Authority, north: Path, tmp_path: Path) -> None:
    crl = ca.folder / "crl.pem"
    assert identity.read_revocations(crl, ca.ca_pem).serials == frozenset()
    serial = identity.load(north).peer.serial
    south = identity.load(enrolled(ca, tmp_path / "south", "south")).peer.serial
    pki.revoke(ca, NOW, name="north")
    assert identity.read_revocations(crl, ca.ca_pem).serials == {serial}
    pki.revoke(ca, NOW, serial=f"{south:x}")
    pki.revoke(ca, NOW, name="north")
    assert identity.read_revocations(crl, ca.ca_pem).serials == {serial, south}


def test_an_encrypted_ca_key_needs_its_passphrase(tmp_path: Path) -> None:
    pki.create(tmp_path / "ca", "x", 10, b"correct", NOW)
    assert b"ENCRYPTED" in (tmp_path / "ca" / "ca.key").read_bytes()
    assert pki.opened(tmp_path / "ca", b"correct").consortium == "x"
    for wrong in (None, b"wrong"):
        with pytest.raises(IdentityError, match="LAMINA_CA_PASSPHRASE"):
            pki.opened(tmp_path / "ca", wrong)


def test_a_certificate_never_outlives_its_ca(tmp_path: Path) -> None:
    ca = pki.create(tmp_path / "ca", "x", 30, None, NOW)
    assert identity.load(enrolled(ca, tmp_path / "a", "a")).peer.not_after == NOW + timedelta(days=30)
    with pytest.raises(ConfigError, match="expired"):
        enrolled(ca, tmp_path / "b", "b", now=NOW + timedelta(days=31))
