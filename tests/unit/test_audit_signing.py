"""An audit's signature: what it covers, who may make it, and what is refused."""

from __future__ import annotations

import base64
import copy
import json
import string
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from lamina.audits import page
from lamina.audits.signing import check, check_page, parsed, signed
from lamina.protos import identity as identities
from lamina.protos.errors import IdentityError
from lamina.protos.identity import authority as pki
from lamina.protos.identity import canonical
from lamina.protos.identity.revocations import CRL
from tests.audited import private
from tests.consortium import NOW, enrolled, new_ca

Json = dict[str, Any]
ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, an auditor and somebody of another role."""
    folder = tmp_path_factory.mktemp("consortium")
    ca = new_ca(folder / "ca")
    enrolled(ca, folder / "auditor", "board", "auditor")
    for role in ("client", "operator"):
        enrolled(ca, folder / role, role, role)
    return folder


@pytest.fixture(scope="module")
def ca_pem(place: Path) -> bytes:
    return (place / "auditor" / "ca.pem").read_bytes()


@pytest.fixture(scope="module")
def document(place: Path) -> Json:
    return signed(private() | {"made_at": "2026-03-01T12:00:00Z"}, place / "auditor")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every leaf, empty containers included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [place for key, one in inner for place in places(one, (*path, key))]
    yield from found or [path]


def with_leaf(document: Json, path: tuple[Any, ...], change: Any) -> Json:
    other = copy.deepcopy(document)
    at = other
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = change(at[path[-1]])
    return other


def another(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case str():
            return value + "x"
        case int() | float():
            return value + 1
        case None:
            return 0
        case _:
            return ["x"]


def test_a_signed_document_names_its_auditor(document: Json, ca_pem: bytes) -> None:
    written = parsed(json.dumps(document, indent=1).encode())
    peer = check(written, ca_pem, NOW)
    assert (peer.name, peer.role, peer.consortium) == ("board", "auditor", "hospitals")
    assert written["signature"]["name"] == "board"
    assert written["signature"]["organisation"] == "hospitals"
    assert {key: value for key, value in written.items() if key != "signature"} == {
        key: value for key, value in private().items() if key != "signature"
    }


def test_no_leaf_can_be_changed(document: Json, ca_pem: bytes) -> None:
    leaves = list(places(document))
    assert len(leaves) > 300
    assert ("verdict",) in leaves
    assert ("signature", "name") in leaves
    # Curves have hundreds of points; every tenth of them stands for the others.
    for path in [path for n, path in enumerate(leaves) if "roc" not in path or n % 10 == 0]:
        with pytest.raises(IdentityError):
            check(with_leaf(document, path, another), ca_pem, NOW)


def test_nothing_can_be_added_or_taken_away(document: Json, ca_pem: bytes) -> None:
    for name in document:
        with pytest.raises(IdentityError):
            check({key: value for key, value in document.items() if key != name}, ca_pem, NOW)
    with pytest.raises(IdentityError, match="that board signed"):
        check(document | {"note": "checked by nobody"}, ca_pem, NOW)
    with pytest.raises(IdentityError, match="expected a signature of"):
        check(document | {"signature": document["signature"] | {"note": "x"}}, ca_pem, NOW)


def test_a_signature_has_one_spelling(document: Json, ca_pem: bytes) -> None:
    value = document["signature"]["value"]
    # The last four bits of the last digit stand for nothing.
    loose = value[:-3] + ALPHABET[ALPHABET.index(value[-3]) + 1] + value[-2:]
    assert base64.b64decode(loose) == base64.b64decode(value)
    for other in (loose, value + "\n", value.rstrip("="), "", "é"):
        with pytest.raises(IdentityError):
            check(with_leaf(document, ("signature", "value"), lambda _, other=other: other), ca_pem, NOW)


def test_a_name_that_stands_twice_is_refused(document: Json) -> None:
    text = json.dumps(document)
    with pytest.raises(IdentityError, match="reads in one way"):
        parsed(('{"verdict": "no-claim", ' + text[1:]).encode())
    for broken in (b"", b"[]", b"[" * 100_000, text.replace("171.3", "NaN").encode(), b"\xff"):
        with pytest.raises(IdentityError):
            parsed(broken)


@pytest.mark.parametrize("role", ["client", "operator"])
def test_only_an_auditor_may_sign(place: Path, ca_pem: bytes, document: Json, role: str) -> None:
    with pytest.raises(IdentityError, match=f"expected role auditor, got {role}") as refused:
        signed(private(), place / role)
    assert refused.value.exit_code == 5
    # Nor does it help to sign by hand with the right domain.
    who = identities.load(place / role)
    forged = copy.deepcopy(document)
    forged["signature"] |= {
        "certificate": who.certificate_pem.decode(),
        "name": who.peer.name,
        "fingerprint": identities.certificates.fingerprint(who.certificate_pem),
    }
    value = forged["signature"].pop("value")
    assert value
    forged["signature"]["value"] = base64.b64encode(identities.sign(who, "audit", canonical(forged))).decode()
    with pytest.raises(IdentityError, match="expected role auditor"):
        check(forged, ca_pem, NOW)


def test_a_name_that_the_certificate_does_not_have_is_refused(place: Path, ca_pem: bytes, document: Json) -> None:
    """The auditor signs, and calls itself another."""
    who = identities.load(place / "auditor")
    for field in ("name", "organisation", "fingerprint", "algorithm"):
        forged = copy.deepcopy(document)
        forged["signature"].pop("value")
        forged["signature"][field] = "regulator"
        forged["signature"]["value"] = base64.b64encode(identities.sign(who, "audit", canonical(forged))).decode()
        with pytest.raises(IdentityError, match="name board as its certificate does"):
            check(forged, ca_pem, NOW)


def test_a_signature_for_something_else_is_none(place: Path, ca_pem: bytes, document: Json) -> None:
    who = identities.load(place / "auditor")
    other = copy.deepcopy(document)
    other["signature"].pop("value")
    other["signature"]["value"] = base64.b64encode(identities.sign(who, "update", canonical(other))).decode()
    with pytest.raises(IdentityError, match="that board signed"):
        check(other, ca_pem, NOW)


def test_another_consortium_is_refused(tmp_path: Path, document: Json) -> None:
    """Also one of the same name."""
    stranger = enrolled(new_ca(tmp_path / "ca"), tmp_path / "other", "board", "auditor")
    with pytest.raises(IdentityError, match="issued by another"):
        check(document, (stranger / "ca.pem").read_bytes(), NOW)


def test_an_audit_outlives_its_certificate_but_not_a_revocation(tmp_path: Path) -> None:
    ca = new_ca(tmp_path / "ca")
    auditor = enrolled(ca, tmp_path / "auditor", "board", "auditor")
    ca_pem = (auditor / "ca.pem").read_bytes()
    document = signed(private(), auditor)
    end = identities.load(auditor).peer.not_after
    assert check(document, ca_pem, end + timedelta(days=400), tmp_path / "ca" / CRL).name == "board"
    with pytest.raises(IdentityError, match="expired"):
        signed(private() | {"made_at": (end + timedelta(days=1)).isoformat()}, auditor)
    pki.revoke(ca, NOW, name="board")
    with pytest.raises(IdentityError, match="revoked"):
        check(document, ca_pem, NOW, tmp_path / "ca" / CRL)


@pytest.mark.parametrize("made_at", [None, "", "yesterday", 5, "9999-12-31T23:59:59-23:59"])
def test_a_document_without_a_time_is_not_signed(place: Path, made_at: Any) -> None:
    with pytest.raises(IdentityError, match="made_at"):
        signed(private() | {"made_at": made_at}, place / "auditor")


def test_an_audit_of_the_future_is_refused(document: Json, ca_pem: bytes) -> None:
    with pytest.raises(IdentityError, match="expected a time before now"):
        check(document, ca_pem, NOW - timedelta(hours=1))
    assert check(document, ca_pem, NOW - timedelta(minutes=5))


def test_unsigned_is_said_and_odd_keys_hold(place: Path, ca_pem: bytes) -> None:
    with pytest.raises(IdentityError, match="expected a signature, got none"):
        check(private(), ca_pem, NOW)
    # As text "10" comes before "9": the order of keys is that of what is read.
    odd = json.loads(json.dumps(signed(private() | {"more": {9: 1, 10: (1, 2)}}, place / "auditor")))
    assert check(odd, ca_pem, NOW)
    with pytest.raises(ValueError, match="not JSON compliant"):
        signed(private() | {"more": float("nan")}, place / "auditor")


def test_the_page_is_held_against_the_document(document: Json) -> None:
    text = page.render(document)
    check_page(json.loads(json.dumps(document)), text)
    assert "board" in text
    with pytest.raises(IdentityError, match="expected the page that is made"):
        check_page(document, text.replace("consistent", "proved"))
