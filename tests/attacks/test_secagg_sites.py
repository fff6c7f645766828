"""Over the network: a site that sends what it must not in a secure sum, and a coordinator that lies to a site about one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamina.client.masked import Line, certified, follow
from lamina.client.summing import Part
from lamina.protos import identity as identities
from lamina.protos import statements as st
from lamina.protos.adapter import EMPTY, Adapter, Array
from lamina.protos.blobs import blob
from lamina.protos.clock import SYSTEM
from lamina.protos.codec import encode, encode_update
from lamina.protos.errors import CheckpointError, IdentityError, SecureSumRefused, TrainingError
from lamina.protos.messages import Budget, Instruction, Update
from lamina.protos.secagg.client import Me
from lamina.protos.secagg.context import Context, Participant
from lamina.protos.secagg.coordinates import Rule, layout
from lamina.protos.secagg.messages import Advertised, Advertisement, Opening
from lamina.protos.secagg.wire import document_of, down_of, up_of
from lamina.protos.statements import BadStatement
from tests import consortium, deployment, summing
from tests.deployment import Running
from tests.hostile import Hostile, encoded, end, eventually, no_exception_in_a_handler
from tests.masking import Attempt, attempt

FOUR = summing.SIX[:4]


# A site.


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[dict[str, Hostile], Running]]:
    """An open round with four raw clients, all with certificates."""
    who = deployment.certificates(tmp_path / "pki", FOUR)
    spec_file = tmp_path / "spec.json"
    spec_file.write_text(deployment.spec().to_json())
    more = (f"coordinator.spec={spec_file}", f"coordinator.identity={who['coordinator']}", "privacy.secagg_wait_s=20")
    with deployment.coordinator(tmp_path / "run", summing.words(*more, names=FOUR)) as running:
        found = {name: Hostile(name, running.port, who[name], tmp_path / name) for name in FOUR}
        for one in found.values():
            one.register()
        yield found, running
        for one in found.values():
            one.close()
        end(running, who["op"])


def masking(site: Hostile, asked: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    document = {
        "kind": st.MASKING,
        "run_id": site.terms["run_id"],
        "round": 1,
        "attempt": "",
        "step": 0,
        "message": None,
    }
    return document | {"parent": site.claim(asked, b"")["parent"]} | changes


def ask(site: Hostile, document: Mapping[str, Any]) -> dict[str, Any]:
    answer = site.link.call("Mask", site.statement(st.MASKING, document))
    return st.read(answer, st.MASKING, lambda *_: True)


def test_what_a_site_must_not_send(sites: tuple[dict[str, Hostile], Running], caplog: pytest.LogCaptureFixture) -> None:
    found, running = sites
    asked = {name: site.instruction(round_number=1) for name, site in found.items()}
    amber, birch = found["amber"], found["birch"]
    with no_exception_in_a_handler(caplog):
        clear = encoded(amber.honest(asked["amber"]))
        refused = amber.upload(amber.statement(st.CLAIM, amber.claim(asked["amber"], clear)), clear)
        assert refused.startswith("INVALID_ARGUMENT: unmasked")
        for changes in (
            {"attempt": "zz"},
            {"attempt": "ab"},
            {"attempt": 1},
            {"step": -1},
            {"step": True},
            {"message": [1]},
            {"message": {"kind": "opening"}},
            {"message": {"kind": "keys", "mask_key": "AB"}},
            {"message": {"kind": "shares", "boxes": {"birch": "ab" * 300}}},
            {"message": {"kind": "revealed", "seeds": {}}},
            {"round": "1"},
            {"parent": None},
        ):
            said = amber.call("Mask", amber.statement(st.MASKING, masking(amber, asked["amber"], **changes)))
            assert said.startswith("INVALID_ARGUMENT: malformed"), changes
        for raw in (b"", b"[]", b"{", b"null"):
            assert amber.call("Mask", amber.raw(st.MASKING, raw)).startswith("INVALID_ARGUMENT: malformed")
        as_birch = birch.statement(st.MASKING, masking(birch, asked["birch"]))
        assert amber.call("Mask", as_birch).startswith("INVALID_ARGUMENT: signature")
        assert ask(amber, masking(amber, asked["amber"], round=2))["over"] is True
        assert ask(amber, masking(amber, asked["amber"], parent="00" * 32))["over"] is True
        # No attempt is open: no vector is awaited, of any size, and nothing is written.
        claim = amber.claim(asked["amber"], b"x" * 100, attempt="ab" * 16)
        assert amber.upload(amber.statement(st.CLAIM, claim), b"x" * 100).startswith("FAILED_PRECONDITION: late")
        for odd in ("", "AB" * 16, "ab", 7, None):
            claim = amber.claim(asked["amber"], b"x", attempt=odd)
            assert amber.upload(amber.statement(st.CLAIM, claim), b"x").startswith("INVALID_ARGUMENT: malformed")
    assert not list((running.path / "blobs" / "partial").glob("*"))


def to_vectors(
    found: Mapping[str, Hostile], asked: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, dict[str, Any]], Attempt, str]:
    """Raw clients up to where vectors are awaited."""
    from concurrent.futures import ThreadPoolExecutor

    def all_ask(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        def until(name: str) -> dict[str, Any]:
            for _ in range(30):
                answer = ask(found[name], documents[name])
                if answer["message"] is not None:
                    return answer
            raise AssertionError("nothing came")

        with ThreadPoolExecutor(len(documents)) as pool:
            return dict(zip(documents, pool.map(until, documents), strict=True))

    told = all_ask({name: masking(site, asked[name]) for name, site in found.items()})
    opening = down_of(told["amber"]["message"])
    assert isinstance(opening, Opening)
    length = layout(deployment.spec(), "B", opening.ranks, opening.scales, opening.rule).length
    signing = {n: identities.load(site.folder.parent / "pki" / n).signing_key for n, site in found.items()}
    one = Attempt(opening.context, dict.fromkeys(FOUR, np.zeros(length, np.uint32)), signing)
    nonce = opening.context.nonce.hex()
    for step in (0, 1):
        answers = {}
        for name in FOUR:
            message = one.begin(name) if step == 0 else one.advance(name, down_of(told[name]["message"]))
            answers[name] = masking(found[name], asked[name], attempt=nonce, step=step, message=document_of(message))
        told = all_ask(answers)
    return told, one, nonce


def test_a_vector_is_of_the_right_size_and_attempt_or_no_byte_is_taken(
    sites: tuple[dict[str, Hostile], Running], caplog: pytest.LogCaptureFixture
) -> None:
    found, running = sites
    asked = {name: site.instruction(round_number=1) for name, site in found.items()}
    told, one, nonce = to_vectors(found, asked)
    amber, size = found["amber"], 4 * len(one.vectors["amber"])
    with no_exception_in_a_handler(caplog):
        for num_bytes in (0, size - 4, size + 1, 2**40):
            claim = amber.claim(asked["amber"], b"", attempt=nonce, num_bytes=num_bytes)
            assert amber.upload(amber.statement(st.CLAIM, claim)).startswith("INVALID_ARGUMENT: too-large")
        content = one.advance("amber", down_of(told["amber"]["message"])).values.tobytes()
        wrong = amber.claim(asked["amber"], content, attempt="00" * 16)
        assert amber.upload(amber.statement(st.CLAIM, wrong), content).startswith("FAILED_PRECONDITION: late")
        lied = amber.claim(asked["amber"], content, attempt=nonce, sha256="00" * 32)
        assert amber.upload(amber.statement(st.CLAIM, lied), content).startswith("DATA_LOSS: malformed")
        other = found["birch"].claim(asked["birch"], content, attempt=nonce)
        assert amber.upload(found["birch"].statement(st.CLAIM, other), content).startswith(
            "INVALID_ARGUMENT: signature"
        )
        good = amber.claim(asked["amber"], content, attempt=nonce)
        assert amber.upload(amber.statement(st.CLAIM, good), content) == "stored"
        assert amber.upload(amber.statement(st.CLAIM, good)) == "stored"  # told again, and no byte sent again
    assert not list((running.path / "blobs" / "partial").glob("*"))


def test_a_site_that_has_lost_its_keys_is_out_of_the_attempt(sites: tuple[dict[str, Hostile], Running]) -> None:
    found, running = sites
    asked = {name: site.instruction(round_number=1) for name, site in found.items()}
    to_vectors(found, asked)
    answer = ask(found["amber"], masking(found["amber"], asked["amber"]))  # as after a restart
    assert answer["message"] is None
    eventually(lambda: "declined" in (running.path / "events.jsonl").read_text())


# A coordinator.


def instruction(**changes: Any) -> Instruction:
    one = Instruction("run", 1, "site1", blob(encode(EMPTY, "fp32")), None, 0, train="B")
    return replace(one, **changes)


def part(**changes: Any) -> Part:
    spec = deployment.spec()
    adapter = Adapter({}, dict(spec.dense))
    update = Update("run", 1, "site1", "", adapter, num_examples=5)
    budget = Budget({}, {}, {})
    return replace(Part(instruction(), blob(encode_update(update, "fp32")), spec, budget, 0), **changes)


def opening(one: Context, **changes: Any) -> Opening:
    ranks, scales = dict.fromkeys(deployment.MODULES, 2), dict.fromkeys(deployment.MODULES, 2.0)
    rule = Rule("uniform", 1, 1.0)
    digest = layout(deployment.spec(), "B", ranks, scales, rule).digest
    return replace(Opening(replace(one, layout=digest), ranks, scales, rule), **changes)


class Told:
    """A line whose coordinator says what it is told to say, and then that all is over."""

    def __init__(self, *answers: Mapping[str, Any]) -> None:
        self.answers = [*answers, {"over": True}]
        self.heard: list[Mapping[str, Any]] = []
        self.logged: list[str] = []
        self.shown: list[tuple[str, ...]] = []
        self.vectors: list[Array] = []

    def line(self, known: Callable[..., None] = lambda *_: None) -> Line:
        def ask(document: dict[str, Any]) -> dict[str, Any]:
            self.heard.append(document)
            declined = document["message"] is not None and document["message"]["kind"] == "declined"
            answer = {} if declined else self.answers.pop(0)
            base = {"run_id": "run", "round": 1, "attempt": "", "step": 0, "message": None, "over": False}
            return base | {"certificates": {}} | dict(answer)

        def upload(attempt: str, values: Array) -> bool:
            self.vectors.append(values)
            return True

        def log(event: str, **fields: Any) -> None:
            self.logged.append(str(fields.get("message", event)))

        return Line(ask, upload, self.shown.append, known, log)


def opened(one: Opening, **changes: Any) -> dict[str, Any]:
    return {"attempt": one.context.nonce.hex(), "step": 0, "message": document_of(one)} | changes


@pytest.mark.parametrize(
    ("changes", "of_context", "said"),
    [
        ({}, {"run_id": "other"}, "in this round"),
        ({}, {"round": 2}, "in round 2"),
        ({}, {"train": "A"}, "lora_B"),
        ({}, {"version": 1}, "from 1"),
        ({}, {"layout": "00" * 32}, "own digest"),
        ({"rule": Rule("num_examples", 3, 1.0)}, {}, "own digest"),
        ({"ranks": dict.fromkeys(deployment.MODULES, 99)}, {}, "Ask the operator"),
    ],
)
def test_an_attempt_about_something_else_is_declined(
    changes: Mapping[str, Any], of_context: Mapping[str, Any], said: str
) -> None:
    one = opening(attempt(4, signed=False).context)
    lie = replace(one, context=replace(one.context, **of_context), **changes)
    told = Told(opened(lie))
    assert follow(part(), Me("site1"), told.line()) is False
    assert [heard["message"] and heard["message"]["kind"] for heard in told.heard] == [None, "declined", None]
    assert said in told.logged[0]


def test_a_good_opening_is_answered_with_keys() -> None:
    told = Told(opened(opening(attempt(4, signed=False).context)))
    follow(part(), Me("site1"), told.line())
    assert told.heard[1]["message"]["kind"] == "keys"


def test_fewer_than_the_sites_own_least_are_declined() -> None:
    told = Told(opened(opening(attempt(4, signed=False).context)))
    follow(part(), Me("site1", least=5), told.line())
    assert "at least 5" in told.logged[0]


def test_once_a_sum_was_shown_no_other_is() -> None:
    one = opening(attempt(4, signed=False).context)
    for shown in (("site0", "site1", "site2"), ("site0", "site1", "site2", "site3", "site4")):
        told = Told(opened(one))
        follow(part(shown=shown), Me("site1"), told.line())
        assert "single updates" in told.logged[0]
    told = Told(opened(one))
    follow(part(shown=one.context.names), Me("site1"), told.line())
    assert told.heard[1]["message"]["kind"] == "keys"


@pytest.mark.parametrize(
    "change", [{"step": 1}, {"attempt": "00" * 16}, {"message": {"kind": "opening"}}, {"message": {}}]
)
def test_an_opening_that_is_none_is_declined(change: Mapping[str, Any]) -> None:
    told = Told(opened(opening(attempt(4, signed=False).context), **change))
    follow(part(), Me("site1"), told.line())
    assert told.heard[1]["message"]["kind"] == "declined"


@pytest.mark.parametrize("about", [{"round": 2}, {"run_id": "other"}])
def test_an_answer_about_another_round_ends_it(about: Mapping[str, Any]) -> None:
    with pytest.raises(BadStatement, match="about another"):
        follow(part(), Me("site1"), Told(about).line())


def test_a_step_out_of_turn_or_from_another_attempt_is_declined() -> None:
    one = attempt(4, signed=False)
    first = opening(one.context)
    later = {"attempt": one.context.nonce.hex(), "message": {"kind": "survivors", "names": list(one.context.names)}}
    for wrong in ({**later, "step": 3}, {**later, "step": 1}, {**later, "step": 1, "attempt": "00" * 16}):
        told = Told(opened(first), wrong)
        follow(part(), Me("site1"), told.line())
        assert told.heard[2]["message"]["kind"] == "declined"
        assert not told.vectors
        assert not told.shown


def test_the_right_message_under_another_step_or_attempt_is_declined() -> None:
    first = opening(attempt(4, signed=False).context)
    one = Attempt(first.context, dict.fromkeys(first.context.names, np.zeros(1, np.uint32)), {})
    others = [one.begin(name) for name in first.context.names if name != "site1"]
    nonce = first.context.nonce.hex()
    for place, kind in (((nonce, 1), "shares"), ((nonce, 2), "declined"), (("00" * 16, 1), "declined")):
        told = Told(opened(first))
        line = told.line()

        def ask(
            document: dict[str, Any], line: Line = line, told: Told = told, place: Any = place
        ) -> Mapping[str, Any]:
            if document["message"] is not None and document["message"]["kind"] == "keys":
                mine = up_of(document["message"], "site1")
                assert isinstance(mine, Advertisement)
                message = document_of(Advertised((mine, *others)))
                told.answers.insert(0, {"attempt": place[0], "step": place[1], "message": message})
            return line.ask(document)

        follow(part(), Me("site1"), replace(line, ask=ask))
        assert told.heard[2]["message"]["kind"] == kind


def test_a_change_out_of_range_ends_the_round_for_the_site_and_is_told() -> None:
    spec = deployment.spec()
    far = Adapter({}, {name: value + 50 for name, value in spec.dense.items()})
    update = blob(encode_update(Update("run", 1, "site1", "", far, num_examples=5), "fp32"))
    told = Told(opened(opening(attempt(4, signed=False).context)))
    with pytest.raises(TrainingError, match="secagg_range"):
        follow(part(update=update), Me("site1"), told.line())
    assert told.heard[-1]["message"]["kind"] == "declined"


# Certificates.


@pytest.fixture
def peers(tmp_path: Path) -> tuple[dict[str, Path], Opening, dict[str, str]]:
    who = deployment.certificates(tmp_path, FOUR)
    loaded = {name: identities.load(who[name]) for name in FOUR}
    participants = tuple(Participant(name, loaded[name].peer.signing_key) for name in FOUR)
    one = opening(replace(attempt(4, signed=False).context, participants=participants))
    return who, one, {name: loaded[name].certificate_pem.decode() for name in FOUR}


def test_participants_are_whom_their_certificates_name(
    peers: tuple[dict[str, Path], Opening, dict[str, str]], tmp_path: Path
) -> None:
    who, one, pems = peers
    mine, now = identities.load(who["amber"]), datetime.now(UTC)
    certified(mine, None, SYSTEM, one, pems)
    with pytest.raises(SecureSumRefused, match="the certificate of dune"):
        certified(mine, None, SYSTEM, one, {name: pem for name, pem in pems.items() if name != "dune"})
    with pytest.raises(SecureSumRefused, match="its own certificate"):
        certified(mine, None, SYSTEM, one, {**pems, "dune": pems["cedar"]})
    with pytest.raises(IdentityError, match="expected role client"):
        certified(mine, None, SYSTEM, one, {**pems, "dune": identities.load(who["op"]).certificate_pem.decode()})
    foreign = consortium.enrolled(consortium.new_ca(tmp_path / "x", now=now), tmp_path / "dune2", "dune", "client", now)
    stranger = identities.load(foreign)
    forged = tuple(
        replace(p, signing_key=stranger.peer.signing_key) if p.name == "dune" else p for p in one.context.participants
    )
    lie = replace(one, context=replace(one.context, participants=forged))
    with pytest.raises(IdentityError, match="issued by"):
        certified(mine, None, SYSTEM, lie, {**pems, "dune": stranger.certificate_pem.decode()})
    with pytest.raises(SecureSumRefused, match="its own certificate"):
        certified(mine, None, SYSTEM, lie, pems)


def test_a_bad_certificate_is_no_end_of_the_agent_but_of_the_attempt(
    peers: tuple[dict[str, Path], Opening, dict[str, str]],
) -> None:
    who, one, pems = peers
    mine = identities.load(who["amber"])

    def known(opening: Opening, certificates: Mapping[str, Any]) -> None:
        certified(mine, None, SYSTEM, opening, certificates)

    told = Told(opened(one, certificates={}))
    me = Me("amber", mine.peer.signing_key, lambda domain, statement: identities.sign(mine, domain, statement))
    follow(part(), me, told.line(known))
    assert "the certificate of" in told.logged[0]
    told = Told(opened(one, certificates=pems))
    follow(part(), me, told.line(known))
    sent = up_of(told.heard[1]["message"], "amber")
    assert isinstance(sent, Advertisement)
    assert one.context.signed("amber", "secagg-keys", sent.statement(one.context.digest), sent.signature)


# What a site remembers.


def test_whose_sum_was_shown_outlives_a_restart_and_a_damaged_file_opens_nothing(tmp_path: Path) -> None:
    from lamina.client.spool import Spool

    Spool(tmp_path).show(3, ("a", "b", "c"))
    assert Spool(tmp_path).shown(3) == ("a", "b", "c")
    assert Spool(tmp_path).shown(4) == ()
    for damaged in ("", "{}", '["3"]', "[3, 4]", "x"):
        (tmp_path / "shown.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="whose sum"):
            Spool(tmp_path).shown(3)


@pytest.mark.parametrize(
    "text",
    [
        "{}", '{"kind": "advertised"}', '{"kind": "advertised", "keys": [1]}', '{"kind": "advertised", "keys": [{"name": ""}]}',
        '{"kind": "delivered", "boxes": {"a": 1}}', '{"kind": "survivors", "names": [1]}', '{"kind": "agreed", "signatures": []}',
        '{"kind": "opening", "context": {}, "rule": {}}', '{"kind": "keys"}',
    ],
)  # fmt: skip
def test_what_is_no_message_of_a_coordinator_is_refused(text: str) -> None:
    with pytest.raises(BadStatement):
        down_of(json.loads(text))


def test_messages_come_back_as_they_were() -> None:
    one = attempt(5, 4)
    one.run({"site4": "vector"})
    for message in one.sent:
        if not hasattr(message, "values"):
            assert up_of(json.loads(json.dumps(document_of(message))), message.name) == message
    told = opening(one.context)
    assert down_of(json.loads(json.dumps(document_of(told)))) == told
