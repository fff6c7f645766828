"""Attack: a log that says another thing than what happened. Named with its record, exit code 5, or said to be out of reach."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from lamina.protos import chain
from lamina.protos.chain import GENESIS, Head
from lamina.protos.errors import CheckpointError, ConfigError, IdentityError
from lamina.protos.identity.certificates import certificate
from lamina.protos.identity.issuing import issue, issue_ca
from lamina.protos.identity.requests import Wanted
from lamina.protos.identity.signing import sign_with
from lamina.server.commands.log import main
from tests.logs import SITES, Event, key, public, unsigned

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


class Consortium:
    """A CA and what it issues; every certificate is valid for 30 days from NOW."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.pem = issue_ca(self.key, name, 365, NOW)

    def certified(self, name: str, role: str = "client", signing: str = "", now: datetime = NOW) -> str:
        tls = ec.generate_private_key(ec.SECP256R1()).public_key()
        asked = Wanted(name, role, self.name, tls, public(signing or name))
        return issue(self.key, certificate(self.pem, "ca"), asked, [], 30, now).decode()


def signer(name: str) -> Callable[[bytes], bytes]:
    return lambda digest: sign_with(key(name), chain.HEAD_DOMAIN, digest)


def seen(site: str, head: Head, signing: str = "") -> dict[str, Any]:
    statement = chain.witness_statement(site, head)
    return chain.countersignature(site, head, sign_with(key(signing or site), chain.WITNESS_DOMAIN, statement))


@dataclass
class Log:
    """A log as its coordinator writes it, one record at a time."""

    sign: Callable[[bytes], bytes]
    lines: list[str]
    heads: list[Head]
    now: datetime = NOW

    def add(self, *events: Event) -> Log:
        for kind, fields in events:
            head = self.heads[-1] if self.heads else GENESIS
            line, head = chain.extended(head, kind, fields, chain.timestamp(self.now), self.sign)
            self.lines.append(line)
            self.heads.append(head)
        return self

    def round(self, number: int, **more: Any) -> Log:
        self.add(("round", {"round": number} | more))
        head = self.heads[-1]
        return self.add(*(("countersign", seen(site, head)) for site in SITES))

    def anew(self, n: int) -> Log:
        """What its owner starts from to write everything from record n anew."""
        return Log(self.sign, self.lines[:n], self.heads[:n])


@pytest.fixture(scope="module")
def consortium() -> Consortium:
    return Consortium("hospitals")


@pytest.fixture(scope="module")
def honest(consortium: Consortium) -> Log:
    begin = {"run_id": "run-7", "certificate": consortium.certified("hub", "coordinator")}
    log = Log(signer("hub"), [], []).add(("begin", begin))
    log.add(*(("register", {"client_id": site, "certificate": consortium.certified(site)}) for site in SITES))
    return log.round(1).round(2)


@pytest.fixture
def run_dir(tmp_path: Path, consortium: Consortium) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "ca.pem").write_bytes(consortium.pem)
    return tmp_path / "run"


def verify(run_dir: Path, lines: Sequence[str] | bytes, *words: str, ca: bool = True) -> int:
    content = lines if isinstance(lines, bytes) else "".join(lines).encode()
    (run_dir / "events.jsonl").write_bytes(content)
    return main("log", ["verify", str(run_dir), *([f"ca={run_dir.parent / 'ca.pem'}"] if ca else []), *words])


def refused(run_dir: Path, lines: Sequence[str] | bytes, *words: str, ca: bool = True) -> str:
    with pytest.raises(IdentityError) as caught:
        verify(run_dir, lines, *words, ca=ca)
    assert caught.value.exit_code == 5
    return str(caught.value)


def kept(run_dir: Path, heads: Sequence[Head], name: str = "kept.txt") -> str:
    (run_dir.parent / name).write_text("".join(map(chain.witness_line, heads)))
    return f"witness={run_dir.parent / name}"


def test_an_honest_log_is_intact(run_dir: Path, honest: Log, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(run_dir, honest.lines, kept(run_dir, honest.heads)) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [
        f"{run_dir / 'events.jsonl'}: 9 good records of 9 lines, rounds 1 to 2 (2)",
        f"head: 8 {honest.heads[8].hash}",
        f"signed by coordinator hub, certificates checked against {run_dir.parent / 'ca.pem'}",
        "countersigned by 'north': 2 heads, the newest 6",
        "countersigned by 'south': 2 heads, the newest 6",
        "records after the last countersigned head: 2, which their owner could write anew",
        f"{run_dir.parent / 'kept.txt'}: 9 of 9 kept heads are in the log",
        "verdict: intact",
    ]


def test_the_machine_readable_answer(run_dir: Path, honest: Log, capsys: pytest.CaptureFixture[str]) -> None:
    witness = kept(run_dir, honest.heads[:4])
    assert verify(run_dir, honest.lines, witness, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    newest = {"n": 6, "hash": honest.heads[6].hash, "count": 2}
    assert report == {
        "records": 9,
        "rounds": [1, 2],
        "run_id": "run-7",
        "head": {"n": 8, "hash": honest.heads[8].hash},
        "signed": True,
        "coordinator": "hub",
        "ca": str(run_dir.parent / "ca.pem"),
        "countersignatures": {"north": newest, "south": newest},
        "unwitnessed": 2,
        "witnesses": {witness.removeprefix("witness="): {"heads": 4, "disagree": []}},
        "torn_bytes": 0,
        "bad": None,
        "files": [],
        "verdict": "intact",
    }
    lines = [*honest.lines[:3], honest.lines[3].replace('"round":1', '"round":3'), *honest.lines[4:]]
    refused(run_dir, lines, witness, "--json")
    report = json.loads(capsys.readouterr().out)
    bad = report["bad"]
    assert (report["records"], bad["line"], bad["n"], bad["kind"], bad["why"]) == (3, 4, 3, "round", "hash")
    assert report["witnesses"][witness.removeprefix("witness=")]["disagree"] == [
        {"witness": {"n": 3, "hash": honest.heads[3].hash}, "why": "truncated", "found": "n 2 as its last good record"}
    ]
    assert "line 4, n 3 (round): hash" in report["verdict"]


def test_a_changed_number_is_named(run_dir: Path, honest: Log, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [*honest.lines[:6], honest.lines[6].replace('"round":2', '"round":1'), *honest.lines[7:]]
    message = refused(run_dir, lines)
    assert "line 7, n 6 (round): hash" in message
    assert "Only the 6 records before it hold" in message
    told = capsys.readouterr().out
    assert "6 good records of 9 lines, rounds 1 to 1 (1)" in told
    assert "verdict" not in told
    assert "line 7, n 6 (unreadable): form" in refused(run_dir, [*honest.lines[:6], "\x1b[31m\n", *honest.lines[7:]])
    assert "\x1b" not in refused(run_dir, [*honest.lines[:6], "\x1b[31m\n"])


def test_a_record_made_by_who_lacks_the_key(run_dir: Path, honest: Log) -> None:
    """Somebody with access to the files but not to the coordinator's key repairs the chain after a change."""
    for forger in (signer("forger"), unsigned):
        forged = honest.anew(6)
        forged.sign = forger
        message = refused(run_dir, forged.round(2, clients=1).lines)
        assert "line 7, n 6 (round): signature" in message


@pytest.mark.parametrize("ca", [True, False])
def test_an_owner_who_writes_the_end_anew(run_dir: Path, honest: Log, ca: bool) -> None:
    """The coordinator's owner signs another end. With the old countersignatures kept it does not fit; without, sites tell."""
    anew = honest.anew(6).add(("round", {"round": 2, "loss": 0.1}))
    assert verify(run_dir, anew.lines, ca=ca) == 0  # by the log alone, this is out of reach
    message = refused(
        run_dir, anew.lines, kept(run_dir, honest.heads[3:4]), kept(run_dir, honest.heads[6:7], "b.txt"), ca=ca
    )
    assert f"expected record 6 with the hash {honest.heads[6].hash} that {run_dir.parent / 'b.txt'} kept" in message
    assert "was rewritten after a site saw it (1 such heads)" in message
    anew.add(("countersign", seen("north", honest.heads[6])))
    assert "line 8, n 7 (countersign): rewritten: expected record 6" in refused(run_dir, anew.lines, ca=ca)


def test_an_owner_cannot_countersign_for_a_site(run_dir: Path, honest: Log, consortium: Consortium) -> None:
    anew = honest.anew(6).add(("round", {"round": 2, "loss": 0.1}))
    head = anew.heads[-1]
    n = len(anew.lines)
    forged = [
        seen("north", head, signing="hub"),
        seen("north", head, signing="south"),
        seen("south", head) | {"client_id": "north"},
        seen("north", honest.heads[3]) | {"n": head.n, "hash": head.hash},
        seen("west", head),
    ]
    for fields in forged:
        log = Log(anew.sign, list(anew.lines), list(anew.heads)).add(("countersign", fields))
        assert f"line {n + 1}, n {n} (countersign): countersignature" in refused(run_dir, log.lines)
    # Nor by registering a key of its own in the site's name, which no CA has certified.
    other = Consortium(consortium.name)
    for pem in (other.certified("north", signing="hub"), consortium.certified("south"), "junk", "", None, 5, "\ud800"):
        log = Log(anew.sign, list(anew.lines), list(anew.heads))
        log.add(("register", {"client_id": "north", "certificate": pem}), ("countersign", seen("north", head, "hub")))
        assert f"line {n + 1}, n {n} (register): certificate" in refused(run_dir, log.lines)
    # A site that has a new key, by the CA, is another matter.
    log = Log(anew.sign, list(anew.lines), list(anew.heads))
    renewed = consortium.certified("north", signing="north-2")
    log.add(
        ("register", {"client_id": "north", "certificate": renewed}), ("countersign", seen("north", head, "north-2"))
    )
    assert verify(run_dir, log.lines) == 0
    log.add(("countersign", seen("north", head)))
    assert "(countersign): countersignature" in refused(run_dir, log.lines)


@pytest.mark.parametrize("n", [1, 3, 6, 8])
def test_a_log_that_was_cut(run_dir: Path, honest: Log, n: int) -> None:
    assert verify(run_dir, honest.lines[:n]) == 0  # by the log alone, this is out of reach
    message = refused(run_dir, honest.lines[:n], kept(run_dir, honest.heads[3:]))
    assert "the log was truncated after a site saw it" in message
    assert f"got n {n - 1} as its last good record" in message


def test_an_emptied_log(run_dir: Path, honest: Log) -> None:
    assert "line 1, n 0 (unreadable): begin" in refused(run_dir, b"")
    assert "line 1, n 0 (register): number" in refused(run_dir, honest.lines[1:])
    (run_dir / "events.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"expected a run directory with events\.jsonl"):
        main("log", ["verify", str(run_dir)])


def test_a_torn_end_is_told_apart(run_dir: Path, honest: Log, capsys: pytest.CaptureFixture[str]) -> None:
    whole = "".join(honest.lines).encode()
    for cut in (1, 100):
        with pytest.raises(
            CheckpointError, match=r"line 9: torn: expected a newline at its end, got \d+ bytes"
        ) as caught:
            verify(run_dir, whole[:-cut])
        assert caught.value.exit_code == 2
        assert "8 good records of 9 lines" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="torn"):
        verify(run_dir, whole[:10])
    # It is no excuse for what else is wrong.
    assert "truncated" in refused(run_dir, whole[:-1], kept(run_dir, honest.heads))
    assert "line 2" in refused(run_dir, whole.replace(b"north", b"nerth", 1)[:-1])


def test_a_log_swapped_for_an_unsigned_one(run_dir: Path, honest: Log, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever lacks all keys writes a new log without certificates; it passes only where nobody expects any."""
    swapped = Log(unsigned, [], []).add(("begin", {"run_id": "run-7"}), ("round", {"round": 1}))
    message = refused(run_dir, swapped.lines)
    assert "certificate: expected a coordinator's certificate, since there is a CA" in message
    (run_dir / "ca.pem").write_bytes((run_dir.parent / "ca.pem").read_bytes())
    assert "an unsigned log" in refused(run_dir, swapped.lines, ca=False)
    (run_dir / "ca.pem").unlink()
    capsys.readouterr()
    assert verify(run_dir, swapped.lines, ca=False) == 0
    told = capsys.readouterr().out
    assert "unsigned: chain only" in told
    assert "whoever can write the file can write another that passes" in told
    assert "verdict: intact, as far as an unsigned log can show" in told
    assert "rewritten" in refused(run_dir, swapped.lines, kept(run_dir, honest.heads[:1]), ca=False)


def test_a_log_signed_by_another(run_dir: Path, consortium: Consortium, capsys: pytest.CaptureFixture[str]) -> None:
    def log(certificate: object, name: str = "hub") -> list[str]:
        return Log(signer(name), [], []).add(("begin", {"certificate": certificate}), ("round", {"round": 1})).lines

    other = Consortium(consortium.name).certified("hub", "coordinator")
    assert "CA of hospitals" in refused(run_dir, log(other))
    assert "expected role coordinator, got client" in refused(run_dir, log(consortium.certified("hub")))
    assert "certificate" in refused(run_dir, log("junk"))
    assert "certificate" in refused(run_dir, log(["junk"]))
    assert "role client" in refused(run_dir, log(consortium.certified("hub")), ca=False)
    assert "line 1, n 0 (begin): signature" in refused(
        run_dir, log(consortium.certified("hub", "coordinator"), "forger")
    )
    capsys.readouterr()
    assert verify(run_dir, log(other), ca=False) == 0
    assert (
        "checked against no CA: another key could have signed another log. Give ca=ca.pem." in capsys.readouterr().out
    )


def test_a_ca_beside_the_log_is_said_to_be_there(
    run_dir: Path, honest: Log, consortium: Consortium, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "ca.pem").write_bytes(consortium.pem)
    assert verify(run_dir, honest.lines, ca=False) == 0
    assert "which lies beside the log" in capsys.readouterr().out
    (run_dir / "ca.pem").write_bytes(Consortium("hospitals").pem)
    assert "line 1, n 0 (begin): certificate" in refused(run_dir, honest.lines, ca=False)


def test_certificates_are_judged_at_the_time_of_their_record(run_dir: Path, consortium: Consortium) -> None:
    """The run is long over when somebody checks it; a site that joined with an expired certificate is found all the same."""
    log = Log(signer("hub"), [], []).add(("begin", {"certificate": consortium.certified("hub", "coordinator")}))
    log.now = NOW + timedelta(days=20)
    late = consortium.certified("south", now=log.now)
    log.add(("register", {"client_id": "north", "certificate": consortium.certified("north")}))
    assert verify(run_dir, log.lines) == 0
    log.now = NOW + timedelta(days=31)
    log.add(("register", {"client_id": "south", "certificate": late}))
    assert verify(run_dir, log.lines) == 0
    log.add(("register", {"client_id": "north", "certificate": consortium.certified("north")}))
    assert "line 4, n 3 (register): certificate" in refused(run_dir, log.lines)
    assert "expired" in refused(run_dir, log.lines)


def test_the_log_of_another_run_in_its_place(run_dir: Path, honest: Log) -> None:
    (run_dir / "summary.json").write_text('{"run_id": "run-7"}')
    assert verify(run_dir, honest.lines) == 0
    (run_dir / "summary.json").write_text('{"run_id": "run-8"}')
    message = refused(run_dir, honest.lines)
    assert "expected the log of run 'run-8' as in summary.json, got that of run 'run-7'" in message


def test_a_first_record_that_is_no_beginning(run_dir: Path) -> None:
    assert "line 1, n 0 (round): begin: expected a first record of kind begin" in refused(
        run_dir, Log(signer("hub"), [], []).round(1).lines, ca=False
    )
