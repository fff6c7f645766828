"""`lamina pki` as it is typed: by files, with the CA at hand, and through the listener on loopback."""

from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lamina.protos import identity
from lamina.protos.errors import ConfigError, LaminaError
from lamina.protos.identity import authority as pki
from lamina.protos.identity import certificates
from lamina.protos.identity.authority import Authority
from lamina.protos.identity.ledger import read_ledger
from lamina.server.commands.pki import _COMMANDS, main
from lamina.server.commands.pki_help import HELP


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAMINA_CA_PASSPHRASE", raising=False)


def run(line: str) -> None:
    assert main("pki", line.split()) == 0


@pytest.fixture
def ca() -> Authority:
    run("init ca consortium=hospitals")
    return pki.opened(Path("ca"), None)


def now() -> datetime:
    return datetime.now(UTC)


def failure(line: str) -> LaminaError:
    with pytest.raises(LaminaError) as caught:
        main("pki", line.split())
    return caught.value


def test_by_files(ca: Authority, capsys: pytest.CaptureFixture[str]) -> None:
    run("invite ca north role=client output=north.invite.json")
    assert stat.S_IMODE(Path("north.invite.json").stat().st_mode) == 0o600
    run("enroll north.invite.json output=north")
    assert "lamina pki enroll north.invite.json output=north certificate=FILE" in capsys.readouterr().out
    token = json.loads(Path("north.invite.json").read_text())["token"]
    request = Path("north/request.json").read_text()
    assert token not in request
    assert "PRIVATE" not in request
    run("sign ca north/request.json output=answer.pem")
    run("enroll north.invite.json output=north certificate=answer.pem")
    peer = identity.load(Path("north")).peer
    assert (peer.name, peer.role) == ("north", "client")
    assert all(one.ok for one in identity.check(Path("north"), now(), "client"))
    assert not Path("north/request.json").exists()

    fingerprint = f"fingerprint {certificates.fingerprint(ca.ca_pem)}"
    assert fingerprint in capsys.readouterr().out

    run("renew north")
    run("sign ca north/request.json")
    run("renew north certificate=certificate.pem")
    assert fingerprint not in capsys.readouterr().out  # nothing new is trusted
    renewed = identity.load(Path("north")).peer
    assert renewed.serial != peer.serial
    assert renewed.signing_key == peer.signing_key
    run("list ca")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"ca: the CA of hospitals, {fingerprint}"
    assert [line.split()[2] for line in lines] == ["superseded", "valid"]
    run(f"revoke ca serial={renewed.serial:x}")
    capsys.readouterr()
    run("list ca --json")
    listed = json.loads(capsys.readouterr().out)
    assert listed["ca"] == {"consortium": "hospitals", "fingerprint": certificates.fingerprint(ca.ca_pem)}
    assert [one["state"] for one in listed["certificates"]] == ["valid", "revoked"]


def test_with_the_ca_at_hand(ca: Authority) -> None:
    run("invite ca hub role=coordinator host=localhost,127.0.0.1 certificate_days=30")
    run("enroll hub.invite.json output=sites/hub ca=ca")
    hub = identity.load(Path("sites/hub"))
    assert hub.peer.role == "coordinator"
    assert (hub.peer.not_after - now()).days == 29
    run("renew sites/hub ca=ca rotate_signing_key=true")
    after = identity.load(Path("sites/hub"))
    assert after.peer.serial != hub.peer.serial
    assert after.peer.signing_key != hub.peer.signing_key


def test_an_encrypted_ca_works_with_its_passphrase_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_CA_PASSPHRASE", "a long one")
    run("init ca consortium=x")
    run("invite ca a")
    run("enroll a.invite.json output=a ca=ca")
    monkeypatch.setenv("LAMINA_CA_PASSPHRASE", "another")
    error = failure("invite ca b")
    assert error.exit_code == 5
    assert "another" not in str(error)


def test_revoking(ca: Authority, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        run(f"invite ca {name}")
        if name != "c":
            run(f"enroll {name}.invite.json output={name} ca=ca")
    serials = {name: identity.load(Path(name)).peer.serial for name in ("a", "b")}
    run("revoke ca a")
    run(f"revoke ca serial={serials['b']:X}")
    run("revoke ca c")
    assert identity.read_revocations(Path("ca/crl.pem"), ca.ca_pem).serials == set(serials.values())
    assert failure("renew a ca=ca").exit_code == 5
    assert failure("enroll c.invite.json output=c ca=ca").exit_code == 5
    capsys.readouterr()
    run("list ca --json")
    listed = json.loads(capsys.readouterr().out)
    assert {one["name"]: one["state"] for one in listed["certificates"]} == {"a": "revoked", "b": "revoked"}
    assert {one["name"]: one["state"] for one in listed["invites"]} == {"a": "used", "b": "used", "c": "cancelled"}
    run("list ca")
    assert f"{serials['a']:x}" in capsys.readouterr().out


def test_commands_at_the_same_time_lose_nothing(ca: Authority) -> None:
    names = [f"site-{i}" for i in range(12)]

    def whole(name: str) -> None:
        run(f"invite ca {name}")
        run(f"enroll {name}.invite.json output={name} ca=ca")
        run(f"revoke ca {name}")

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(whole, names))
    ledger = read_ledger(Path("ca"))
    assert sorted(one.name for one in ledger.certificates) == sorted(names)
    assert sorted(one.name for one in ledger.invites) == sorted(names)
    serials = {int(one.serial, 16) for one in ledger.certificates}
    assert identity.read_revocations(Path("ca/crl.pem"), ca.ca_pem).serials == serials


def test_one_name_invited_by_many_at_once_goes_to_one(ca: Authority) -> None:
    def attempt(number: int) -> bool:
        try:
            run(f"invite ca north output=invite-{number}.json")
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("", 2, "expected a command"),
        ("revok", 2, "Did you mean revoke?"),
        ("init", 2, "lamina pki init CA_DIR consortium=NAME"),
        ("init new", 2, "consortium=''"),
        ("init new consortium=a/b", 2, "expected a letter or digit"),
        ("init new consortium=x days=0", 2, "expected 1 to 36500 days"),
        ("init ca consortium=x", 2, "never written over"),
        ("invite none a", 2, "expected a CA folder"),
        ("invite ca ../a", 2, "expected a letter or digit"),
        ("invite ca a role=admin", 2, "expected one of coordinator, client"),
        ("invite ca a role=coordinator", 2, "host=NAME"),
        ("invite ca a host=b", 2, "expected no host="),
        ("invite ca a role=coordinator host=a:80", 2, "without a port"),
        ("invite ca a days=soon", 2, "expected a whole number"),
        ("invite ca a enrollment=nowhere", 2, "expected host:port"),
        ("invite ca a enrollment=h:99999", 2, "expected host:port"),
        ("invite ca a rol=client", 2, "Did you mean role?"),
        ("enroll x.json", 2, "expected output=DIR"),
        ("enroll x.json output=d", 2, "cannot be read or written"),
        ("enroll ca/ca.pem output=d", 5, "expected an invite"),
        ("sign ca none.json", 2, "none.json: cannot be read"),
        ("sign ca ca/ca.pem", 5, "expected one from"),
        ("revoke ca nobody", 2, "no certificate or invite of 'nobody'"),
        ("revoke ca serial=12", 2, "no serial '12'"),
        ("revoke ca", 2, "expected CA_DIR NAME"),
        ("renew none", 5, "lamina pki enroll INVITE"),
        ("list none", 2, "expected the ledger"),
        ("listen ca address=x", 2, "expected host:port"),
        ("listen ca address=203.0.113.7:1", 2, "not this machine's"),
    ],
)
def test_what_is_wrong_is_said(ca: Authority, line: str, code: int, says: str) -> None:
    error = failure(line)
    assert error.exit_code == code
    assert says in str(error)
    assert not read_ledger(Path("ca")).invites


def test_an_invite_is_not_written_over(ca: Authority) -> None:
    run("invite ca a output=x.json")
    assert "expected a new file" in str(failure("invite ca b output=x.json"))
    assert [one.name for one in read_ledger(Path("ca")).invites] == ["a"]


def test_every_command_has_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(HELP) == set(_COMMANDS)
    run("--help")
    overview = capsys.readouterr().out
    for name in _COMMANDS:
        assert f"  {name} " in overview
        run(f"{name} --help")
        text = capsys.readouterr().out
        assert text.startswith(f"usage: lamina pki {name} ")
        assert "examples:\n  " in text
