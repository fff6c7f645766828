"""Attack: a coordinator that lies to a site about the base, asks again and again, or says what nobody should say.

A policy's limits hold against it, the agent lives on, and what it keeps for an auditor is not spoiled.
"""

from __future__ import annotations

import contextlib
import json
import queue
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import pytest

from lamina.client.agent import Agent
from lamina.client.listening import Settings
from lamina.client.policy import Policy
from lamina.client.spool import Spool
from lamina.client.work import Allow, Trained
from lamina.protos import coordinator_pb2 as pb
from lamina.protos.chain import Head
from lamina.protos.clock import SYSTEM, Clock
from lamina.protos.coordinator_pb2_grpc import CoordinatorServicer, add_CoordinatorServicer_to_server
from lamina.protos.errors import ConfigError, IdentityError, LaminaError
from lamina.protos.files import sha256
from lamina.protos.link import Address, Link
from lamina.protos.messages import Instruction
from tests import deployment
from tests.deployment import Synthetic
from tests.hostile import eventually
from tests.unit.test_policy import terms

RUN = "3f2a5c6b7d8e"
ANSWERS = ("sent", "refused", "policy", "failed")
FAST = Clock(rate=200.0)


def unsigned(document: Mapping[str, Any]) -> pb.Signed:
    return pb.Signed(statement=json.dumps(document).encode())


class Liar(CoordinatorServicer):
    """Says what it is told to say.

    Args:
        schema: What it gives for the run's schema.
        changed: Of its terms.
    """

    def __init__(self, schema: bytes | None = None, **changed: Any) -> None:
        content = deployment.spec().to_json().encode() if schema is None else schema
        self.blobs = {sha256(content): content}
        self.spec = sha256(content)
        hashes = dict(deployment.spec().hashes)
        self.terms = (
            terms({"seed": 5}, run_id=RUN, client_id="north", spec=[self.spec, len(content)], hashes=hashes) | changed
        )
        self.asked: queue.Queue[Mapping[str, Any]] = queue.Queue()
        self.claims: list[dict[str, Any]] = []
        self.said: list[dict[str, Any]] = []
        self.registered, self.streams = 0, []  # type: int, list[int]
        self.refuse_upload, self.refuse_instructions = 0, 0

    def __enter__(self) -> Self:
        self.server = grpc.server(futures.ThreadPoolExecutor(8))
        add_CoordinatorServicer_to_server(self, self.server)  # type: ignore[no-untyped-call]
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.stop(None)

    def train(self, number: Any, content: bytes = b"release", **changed: Any) -> dict[str, Any]:
        """An instruction to train from some release."""
        self.blobs[sha256(content)] = content
        return {
            "kind": "train",
            "run_id": RUN,
            "round": number,
            "client_id": "north",
            "version": 0,
            "release": [sha256(content), len(content)],
            "frozen": None,
            "frozen_since": None,
            "keep_frozen": False,
            "train": "AB",
            "spec": self.spec,
            "base": self.terms["hashes"],
            "log": [0, "ab" * 32],
        } | changed

    def Register(self, request: pb.Signed, context: Any) -> pb.Registered:
        self.registered += 1
        return pb.Registered(terms=unsigned(self.terms))

    def Instructions(self, request: Any, context: Any) -> Iterator[pb.Signed]:
        if self.refuse_instructions:
            self.refuse_instructions -= 1
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "expected a client that is registered. Register again.")
        mine = self.registered
        self.streams.append(mine)
        try:
            while context.is_active() and mine == self.registered:
                with contextlib.suppress(queue.Empty):
                    yield unsigned(self.asked.get(timeout=0.02))
        finally:
            self.streams.remove(mine)

    def Heartbeat(self, request: Any, context: Any) -> pb.HeartbeatReply:
        return pb.HeartbeatReply(time=0.0)

    def Download(self, request: pb.DownloadRequest, context: Any) -> Iterator[pb.Part]:
        yield pb.Part(data=self.blobs[request.sha256][request.offset :])

    def Upload(self, parts: Iterator[pb.UploadPart], context: Any) -> Iterator[pb.UploadAck]:
        self.claims.append(json.loads(next(parts).claim.statement))
        if self.refuse_upload:
            self.refuse_upload -= 1
            told = "wrong-client: expected a client that is registered. Register again."
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, told)
        yield pb.UploadAck(offset=self.claims[-1]["num_bytes"], stored=True)

    def Report(self, request: pb.Signed, context: Any) -> pb.Done:
        self.said.append(json.loads(request.statement))
        return pb.Done()


@dataclass
class Site:
    """An agent in a thread, whose training is nothing but noted.

    Attributes:
        liar: Whom it works for.
        folder: Its state.
        policy: What it allows.
        worker: What trains.
    """

    liar: Liar
    folder: Path
    policy: Policy = field(default_factory=Policy)
    worker: Synthetic = field(default_factory=lambda: Noted("north"))
    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def __enter__(self) -> Self:
        settings = Settings(Address(f"127.0.0.1:{self.liar.port}", None, "north"), self.policy, self.folder, stay=True)
        self.agent = Agent(settings, self.worker, FAST, lambda event, **said: self.events.append((event, said)))
        self.thread, self.outcome = deployment.in_thread(self.agent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.agent.stop()
        self.thread.join(20)
        eventually(lambda: not self.liar.streams)

    @property
    def answers(self) -> list[str]:
        """What became of what it was asked."""
        return [event for event, _ in list(self.events) if event in ANSWERS]

    def asked(self, document: Mapping[str, Any]) -> str:
        """What becomes of an instruction."""
        before = len(self.answers)
        eventually(lambda: self.liar.streams == [self.liar.registered] or bool(self.outcome))  # the old ones are gone
        self.liar.asked.put(document)
        eventually(lambda: len(self.answers) > before or bool(self.outcome))
        assert self.outcome == []
        return self.answers[before]

    def error(self) -> LaminaError:
        """What it ended with."""
        self.thread.join(20)
        (found,) = self.outcome
        assert isinstance(found, LaminaError), found
        return found


class Noted(Synthetic):
    """Trains nothing."""

    def train(self, instruction: Instruction, progress: Callable[[int], None], allow: Allow) -> Trained:
        self.trained.append(instruction.round)
        return Trained(b"update", {})


def heads(folder: Path) -> Head | None:
    return Spool(folder / RUN).witnessed()


# --- the policy's limits


@pytest.mark.parametrize("hashes", [{}, {"config": "cd" * 32}, {"weights": "00" * 32, "config": "cd" * 32}])
def test_a_schema_of_another_base_than_the_terms_is_refused(tmp_path: Path, hashes: dict[str, str]) -> None:
    schema = replace(deployment.spec(), hashes=hashes).to_json().encode()
    with Liar(schema) as liar, Site(liar, tmp_path, Policy(base_hashes=("ab" * 32,))) as site:
        error = site.error()
    assert isinstance(error, IdentityError)
    assert "expected the hashes of the base that the terms name" in str(error)
    assert not hasattr(site.worker, "spec")  # it never began


def test_one_round_is_trained_once_whatever_it_is_asked_from(tmp_path: Path) -> None:
    policy = Policy(max_rounds=20)
    with Liar() as liar:
        with Site(liar, tmp_path, policy) as site:
            assert site.asked(liar.train(1)) == "sent"
            for number in range(3):
                assert site.asked(liar.train(1, b"another %d" % number)) == "policy"
            assert site.asked(liar.train(3)) == "sent"
            assert site.asked(liar.train(2)) == "policy"
            assert site.asked(liar.train(21)) == "policy"
            assert site.worker.trained == [1, 3]
        with Site(liar, tmp_path, policy) as site:
            assert site.asked(liar.train(3, b"another")) == "policy"
            assert site.asked(liar.train(1)) == "policy"
            # A coordinator that was restarted and has lost it: the same update, not trained again.
            assert site.asked(liar.train(3)) == "sent"
            assert site.worker.trained == []
        for folder in (tmp_path / RUN).glob("finished-*"):
            folder.rename(tmp_path / "gone")
        with Site(liar, tmp_path, policy) as site:
            assert site.asked(liar.train(3, b"another")) == "policy"
            assert site.asked(liar.train(3)) == "sent"
            assert site.worker.trained == [3]
    assert [claim["round"] for claim in liar.claims] == [1, 3, 3, 3]
    assert {claim["parent"] for claim in liar.claims} == {liar.claims[0]["parent"]}


# --- what nobody should say


@pytest.mark.parametrize(
    "schema",
    [
        b"\xff\xfe\xff",
        b"[" * 200_000,
        b"{}",
        b'{"modules": {"a": [1e999, 1]}, "dense": {}, "hashes": {}, "labels": [], "task": "t", "base_model": "m"}',
        b'{"modules": {}, "dense": {}, "hashes": {}, "labels": [[]], "task": "t", "base_model": "m"}',
        b'{"modules": {}, "dense": {}, "hashes": {"weights": 5}, "labels": [], "task": "t", "base_model": "m"}',
    ],
    ids=["no text", "too deep", "nothing in it", "no number", "no labels", "no hash"],
)
def test_a_schema_that_is_none_ends_in_words(tmp_path: Path, schema: bytes) -> None:
    with Liar(schema) as liar, Site(liar, tmp_path) as site:
        error = site.error()
        assert isinstance(error, ConfigError)
        assert "the coordinator's schema: expected a spec" in str(error)
        assert len(str(error)) < 400
        eventually(lambda: [one["kind"] for one in liar.said] == ["leave"])


@pytest.mark.parametrize(
    "strange",
    [
        {"kind": "changed"},
        {"kind": ["ended"]},
        {"kind": "dance", "round": float("nan")},
        {"kind": "train", "round": 10**400},
        {"kind": "train", "round": "x" * 10_000},
        {"kind": "train", "run_id": "\ud800", "round": 1},
        {},
    ],
)
def test_a_strange_instruction_is_refused_once_and_the_next_is_done(tmp_path: Path, strange: dict[str, Any]) -> None:
    with Liar() as liar, Site(liar, tmp_path) as site:
        assert site.asked(strange) == "failed"
        assert site.asked(liar.train(1)) == "sent"
    assert site.answers == ["failed", "sent"]
    assert [event for event, _ in site.events].count("ready") == 1
    assert all(len(str(said)) < 400 for _, said in site.events)


@pytest.mark.parametrize(
    "log",
    [
        [5, "xxx\nnot a head"],
        [1e300, "ab" * 32],
        [True, "ab" * 32],
        [-1, "ab" * 32],
        [2**53, "ab" * 32],
        [5, "AB" * 32],
        [5, "ab" * 32 + "\n"],
        [5, None],
        [5],
        {"5": "ab"},
        None,
    ],
)
def test_a_head_that_is_none_spoils_no_witness_file(tmp_path: Path, log: Any) -> None:
    with Liar() as liar, Site(liar, tmp_path) as site:
        assert site.asked(liar.train(1)) == "sent"
        assert site.asked(liar.train(2, log=log)) == "sent"
        assert heads(tmp_path) == Head(0, "ab" * 32)
        assert site.asked(liar.train(3, log=[7, "cd" * 32])) == "sent"
    assert heads(tmp_path) == Head(7, "cd" * 32)
    assert [claim["witness"] and claim["witness"][0] for claim in liar.claims] == [0, None, 7]


def test_a_witness_file_that_cannot_be_read_is_told_in_words(tmp_path: Path) -> None:
    with Liar() as liar, Site(liar, tmp_path) as site:
        assert site.asked(liar.train(1)) == "sent"
        kept = tmp_path / RUN / "witness.txt"
        for content in (b"not a head\n", b"\xff\n"):
            kept.write_bytes(content)
            assert site.asked(liar.train(2, log=[7, "cd" * 32], keep_frozen=content == b"\xff\n")) == "failed"
            said = next(said for event, said in reversed(site.events) if event == "failed")
            assert said["code"] == "disk"
            assert f"{kept}: expected the heads" in said["message"]
            assert "Move it away" in said["message"]


# --- refused with the word to register again


def test_an_agent_that_is_to_register_again_does_so_and_sends(tmp_path: Path) -> None:
    with Liar() as liar, Site(liar, tmp_path) as site:
        liar.refuse_upload = 2
        assert site.asked(liar.train(1)) == "refused"
        eventually(lambda: "sent" in site.answers)
        assert site.answers == ["refused", "refused", "sent"]
        assert liar.registered == 3
        assert site.worker.trained == [1]
        assert site.asked(liar.train(2)) == "sent"


def test_a_stream_that_is_refused_so_is_dialled_anew(tmp_path: Path) -> None:
    liar = Liar()
    liar.refuse_instructions = 2
    with liar, Site(liar, tmp_path) as site:
        assert site.asked(liar.train(1)) == "sent"
        assert liar.registered == 3


def test_a_call_on_a_link_that_has_hung_up_is_no_crash() -> None:
    link = Link(Address("127.0.0.1:1", None, "north"), SYSTEM)
    link.close()
    with pytest.raises(LaminaError, match="hung up"):
        link.call("Heartbeat", pb.HeartbeatRequest())
    with pytest.raises(LaminaError, match="hung up"):
        list(link.stream("Instructions", pb.InstructionsRequest()))


# --- what is left on the site's disk


def test_two_agents_do_not_share_a_folder(tmp_path: Path) -> None:
    with Liar() as liar, Site(liar, tmp_path) as first:
        assert first.asked(liar.train(1)) == "sent"
        second, outcome = deployment.in_thread(deployment.agent("north", liar.port, tmp_path))
        second.join(20)
        (error,) = outcome
        assert isinstance(error, ConfigError)
        assert f"client.state={tmp_path}: expected one agent, but another agent uses this folder" in str(error)
        assert liar.registered == 1
        assert liar.said == []  # it takes the first one out of nothing
        assert first.asked(liar.train(2)) == "sent"
    with Liar() as liar, Site(liar, tmp_path) as third:
        assert third.asked(liar.train(3)) == "sent"


def test_an_older_run_leaves_its_witness_and_what_was_not_accepted(tmp_path: Path) -> None:
    for name in ("accepted", "not-accepted"):
        with Liar(run_id=name) as liar, Site(liar, tmp_path) as site:
            assert site.asked(liar.train(1, run_id=name)) == "sent"
    (tmp_path / "not-accepted" / "finished-000001" / "sent").unlink()
    (tmp_path / "the-sites-own" / "releases").mkdir(parents=True)
    (tmp_path / "the-sites-own" / "releases" / "notes").touch()
    with Liar(run_id="new") as liar, Site(liar, tmp_path) as site:
        assert site.asked(liar.train(1, run_id="new")) == "sent"
        left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        old = {path for path in left if not path.startswith("new/")}
    assert old == {
        "accepted/trained.txt",
        "accepted/witness.txt",
        "not-accepted/trained.txt",
        "not-accepted/witness.txt",
        "not-accepted/finished-000001/meta.json",
        "not-accepted/finished-000001/update.safetensors",
        "the-sites-own/releases/notes",
    }
    with Liar(run_id="accepted") as liar, Site(liar, tmp_path) as site:  # what was trained is not forgotten
        assert site.asked(liar.train(1, b"another", run_id="accepted")) == "policy"
        assert site.asked(liar.train(2, run_id="accepted")) == "sent"


def test_fetched_releases_go_with_the_end_of_their_run(tmp_path: Path) -> None:
    with Liar() as liar, Site(liar, tmp_path) as site:
        assert site.asked(liar.train(1)) == "sent"
        liar.asked.put({"kind": "ended", "run_id": RUN, "why": "\x1b[2J" * 100})
        eventually(lambda: any(event == "ended" for event, _ in site.events))
        eventually(lambda: {path.name for path in (tmp_path / RUN / "releases").iterdir()} == {liar.spec})
    said = next(said for event, said in site.events if event == "ended")
    assert "\x1b" not in said["why"]
    assert len(said["why"]) < 500
