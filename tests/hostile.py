"""A client that speaks the protocol by hand and says whatever it likes, and what a coordinator answers."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import pytest

from lamina.client.listening import signer
from lamina.protos import coordinator_pb2 as pb
from lamina.protos import identity as identities
from lamina.protos import statements as st
from lamina.protos.blobs import Blob
from lamina.protos.clock import SYSTEM
from lamina.protos.codec import encode_update
from lamina.protos.errors import LaminaError
from lamina.protos.files import sha256
from lamina.protos.link import Address, Link
from lamina.protos.messages import Instruction, Update
from lamina.protos.spec import AdapterSpec
from lamina.server.port.access import Gate
from tests import deployment

CHUNK = 64 * 1024


class Hostile:
    """One registered client of a running coordinator.

    Args:
        name: Its name, where there is no identity.
        port: The coordinator's.
        identity: Its folder, or None.
        folder: For what it downloads.
    """

    def __init__(self, name: str, port: int, identity: Path | None, folder: Path) -> None:
        who = None if identity is None else identities.load(identity)
        self.name, self.folder = name, folder
        self.link = Link(Address(f"127.0.0.1:{port}", who, name), SYSTEM)
        self.sign = signer(who)
        self.metadata = None if who else (("lamina-name", name), ("lamina-role", "client"))
        self.terms: dict[str, Any] = {}

    def close(self) -> None:
        self.link.close()

    def statement(self, domain: str, document: Mapping[str, Any], sign: st.Sign | None = None) -> pb.Signed:
        return st.signed(domain, document, sign or self.sign)

    def raw(self, domain: str, statement: bytes) -> pb.Signed:
        """Bytes that are signed as they are."""
        return pb.Signed(statement=statement, signature=self.sign(domain, statement))

    def register(self, **changes: Any) -> dict[str, Any]:
        document = {"kind": "register", "versions": [1], "rank": None, "held": -1, "run_id": ""} | changes
        answer = self.link.call("Register", self.statement(st.REGISTER, document))
        self.terms = st.read(answer.terms, st.TERMS, lambda *_: True)
        return self.terms

    def instruction(self, kind: str = "train", round_number: int | None = None) -> dict[str, Any]:
        """The next instruction of a kind; the stream is closed again. Other measurements are answered with no figures."""
        for message in self.link.stream("Instructions", pb.InstructionsRequest(run_id=self.terms["run_id"])):
            document = st.read(message, st.INSTRUCTION, lambda *_: True)
            if document["kind"] == kind and round_number in (None, document["round"]):
                return document
            if document["kind"] == "evaluate":
                about = {"run_id": document["run_id"], "round": document["round"], "instruction": "evaluate"}
                self.link.call("Report", self.statement(st.REPORT, {"kind": "figures", "figures": {}, **about}))
        raise AssertionError(f"no instruction to {kind}")

    def honest(self, document: Mapping[str, Any], schema: AdapterSpec | None = None) -> Update:
        """The update that an honest site would send."""
        asked = st.instruction_of(document, lambda name, size: Blob(name, size, b""))
        fetched = {one.sha256: self.link.download(one, self.folder) for one in (asked.release, asked.frozen) if one}
        whole: Instruction = st.instruction_of(document, lambda name, size: fetched[name])
        budget = st.budget_of(self.terms["budget"])
        seed = int(self.terms["task"]["seed"])
        return deployment.trained(self.name, seed, budget, schema or deployment.spec(), whole)

    def claim(self, document: Mapping[str, Any], content: bytes, **changes: Any) -> dict[str, Any]:
        """The claim that goes with some content, as an honest site would write it, but for the changes."""
        asked = st.instruction_of(document, lambda name, size: Blob(name, size, b""))
        return {
            "kind": st.CLAIM,
            "run_id": self.terms["run_id"],
            "round": asked.round,
            "client_id": self.name,
            "parent": asked.release_hash,
            "sha256": sha256(content),
            "num_bytes": len(content),
            "spec": self.terms["spec"][0],
            "witness": None,
        } | changes

    def upload(self, claim: pb.Signed, content: bytes = b"", wait_s: float = 30.0) -> str:
        """`stored`, `ended` where the coordinator hung up without a word, or the status with its details."""
        parts = [pb.UploadPart(data=content[at : at + CHUNK]) for at in range(0, len(content), CHUNK)]
        return self.send([pb.UploadPart(claim=claim), *parts], wait_s)

    def send(self, parts: Iterable[pb.UploadPart], wait_s: float = 30.0) -> str:
        try:
            for ack in self.link.stub.Upload(iter(parts), metadata=self.metadata, timeout=wait_s):
                if ack.stored:
                    return "stored"
        except grpc.RpcError as error:
            return said(error)
        return "ended"

    def poison(self, document: Mapping[str, Any]) -> str:
        """A whole update of other bytes: the round loop refuses it, and is done with this client."""
        content = b"no update"
        return self.upload(self.statement(st.CLAIM, self.claim(document, content)), content)

    def call(self, method: str, request: Any, wait_s: float = 30.0) -> str:
        """`OK`, or the status with its details."""
        try:
            getattr(self.link.stub, method)(request, metadata=self.metadata, timeout=wait_s)
        except grpc.RpcError as error:
            return said(error)
        return "OK"

    def call_stream(self, method: str, request: Any, wait_s: float = 30.0) -> str:
        """The same for a method that answers with a stream, which is read to its end."""
        try:
            for _ in getattr(self.link.stub, method)(request, metadata=self.metadata, timeout=wait_s):
                pass
        except grpc.RpcError as error:
            return said(error)
        return "OK"


def said(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}"


def encoded(update: Update) -> bytes:
    return encode_update(update, "fp32")


@contextlib.contextmanager
def no_exception_in_a_handler(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails where a handler meets what it did not expect: the gate tells it, and gRPC what passes the gate."""
    caplog.clear()
    with caplog.at_level(logging.ERROR, logger="grpc"), mock.patch.object(Gate, "_unexpected") as unexpected:
        yield
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("grpc")]
    wrong = [line for line in logged if "deserializing" not in line]  # which happens before a handler, and is answered
    assert not wrong, wrong[:3]
    assert not unexpected.mock_calls, unexpected.mock_calls[:3]


def end(running: deployment.Running, operator: Path | None) -> None:
    """Stop a run that a test has left, or its threads would outlive the test."""
    if not running.thread.is_alive():
        return
    who = None if operator is None else identities.load(operator)
    link = Link(Address(f"127.0.0.1:{running.port}", who, "operator", "operator"), SYSTEM)
    with contextlib.suppress(LaminaError):
        link.call("Stop", pb.StopRequest(now=True))
    running.thread.join(30)
    link.close()


def eventually(true: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.02)
