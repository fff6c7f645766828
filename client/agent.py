"""The resident agent of a site: it registers, is told what to do, trains, keeps what it made, and sends it.

Two threads beside the one that trains: signs of life, and the stream of instructions, which dials again for as long as it
takes. Neither can be starved by training, and neither touches the model. What goes wrong while training is reported as a code
from a fixed list and the agent lives on; no text of an error leaves the site.
"""

from __future__ import annotations

import random
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lamina.client import policy as policies
from lamina.client.policy import Policy
from lamina.client.spool import Finished, Spool
from lamina.protos import coordinator_pb2 as pb
from lamina.protos import statements as st
from lamina.protos.blobs import Blob, blob
from lamina.protos.chain import WITNESS_DOMAIN, Head, witness_statement
from lamina.protos.clock import Clock
from lamina.protos.errors import (
    AdapterMismatch,
    CheckpointError,
    ConfigError,
    DataError,
    IdentityError,
    LaminaError,
    PolicyRefused,
    TrainingError,
    UpdateRejected,
)
from lamina.protos.identity import Identity, sign, verified_peer, verify
from lamina.protos.link import Address, Link, Refused, Unreachable
from lamina.protos.messages import Instruction
from lamina.protos.spec import AdapterSpec, from_json

VERSIONS = (st.PROTOCOL,)
_BACKOFF_S = (0.5, 15.0)
Log = Callable[..., None]


class Superseded(LaminaError):
    """The coordinator asks for something else by now; what was being trained is given up."""


@dataclass(frozen=True)
class Trained:
    """What a worker made.

    Attributes:
        update: The encoded update.
        state: The client's state after it, by file name.
    """

    update: bytes
    state: Mapping[str, bytes]


class Worker(Protocol):
    """What trains and measures. It knows no network and no disk of the agent's."""

    def begin(self, terms: Mapping[str, Any], spec: AdapterSpec, state: Mapping[str, bytes], version: int) -> None:
        """Load what a run needs and take up the client's state."""
        ...

    def train(self, instruction: Instruction, progress: Callable[[int], None]) -> Trained:
        """Train from a release; `progress` may raise."""
        ...

    def measure(self, instruction: Instruction) -> Mapping[str, float]:
        """Sums over held-out examples: `nats`, `targets`, `hits`."""
        ...


@dataclass(frozen=True)
class Terms:
    """A registration.

    Attributes:
        document: What the coordinator signed.
        key: Its signing key, or None without certificates.
    """

    document: Mapping[str, Any]
    key: bytes | None

    @property
    def run_id(self) -> str:
        """Of the run."""
        return str(self.document["run_id"])


class Inbox:
    """What the listening thread leaves for the training one: the newest of each, and an error that ends all."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.terms: Terms | None = None
        self.document: Mapping[str, Any] | None = None
        self.error: LaminaError | None = None

    def put(self, **found: Any) -> None:
        """Leave something."""
        with self._changed:
            for name, value in found.items():
                setattr(self, name, value)
            self._changed.notify_all()

    def wait(self, ready: Callable[[], Any], seconds: float) -> Any:
        """What `ready` gives once it gives something; None after so long. Raises the error that ends all."""
        with self._changed:
            self._changed.wait_for(lambda: self.error is not None or ready() is not None, seconds)
            if self.error is not None:
                raise self.error
            return ready()


@dataclass(frozen=True)
class Settings:
    """What an agent is.

    Attributes:
        address: Where and as whom to dial.
        policy: What the site allows.
        folder: For what must outlive a restart.
        rank: To ask for; None takes what is offered.
        stay: Wait for the next run after the end of one.
        give_up_s: End when the coordinator was out of reach for so long; None never.
        explain: Why the coordinator cannot be reached, as an error where trying again will not help.
    """

    address: Address
    policy: Policy
    folder: Path
    rank: int | None = None
    stay: bool = False
    give_up_s: float | None = None
    explain: Callable[[], LaminaError | None] = lambda: None


class Agent:
    """One site's agent.

    Args:
        settings: What it is.
        worker: What trains.
        clock: For waits.
        log: Told what happens; no text of an error, no row of data.
    """

    def __init__(self, settings: Settings, worker: Worker, clock: Clock, log: Log) -> None:
        self._settings, self._worker, self._clock, self._log = settings, worker, clock, log
        self._inbox = Inbox()
        self._over = threading.Event()
        self._at = (0, 0)
        self._done: set[tuple[Any, ...]] = set()
        self._rounds: set[tuple[str, int]] = set()
        self._link = Link(settings.address, clock)
        self._held = -1

    # The threads.

    def run(self) -> int:
        """Take part until the run is over.

        Returns:
            Exit code 0.

        Raises:
            Unreachable: If the coordinator was out of reach for `give_up_s`.
            Refused: If the coordinator does not take this client.
            PolicyRefused: If the site's policy does not allow the run.
            IdentityError: If the coordinator is not whom it should be.
        """
        threads = [
            threading.Thread(target=target, daemon=True, name=target.__name__) for target in (self._listen, self._live)
        ]
        for thread in threads:
            thread.start()
        try:
            while True:
                terms = self._inbox.wait(lambda: self._inbox.terms, 3600.0)
                if terms is not None and self._take_part(terms) and not self._settings.stay:
                    return 0
        finally:
            self._over.set()
            self._link.close()

    def stop(self) -> None:
        """Make `run` return soon, as on SIGTERM; what was finished is kept."""
        self._over.set()
        self._inbox.put(error=Superseded("stopped"))

    def _listen(self) -> None:
        """Register and read instructions; dial again when the connection breaks."""
        attempt, lost = 0, self._clock.monotonic()
        while not self._over.is_set():
            try:
                terms = self._register()
                attempt, lost = 0, self._clock.monotonic()
                self._inbox.put(terms=terms)
                request = pb.InstructionsRequest(run_id=terms.run_id)
                for message in self._link.stream("Instructions", request):
                    document = st.read(message, st.INSTRUCTION, _verifier(terms.key))
                    lost = self._clock.monotonic()
                    self._inbox.put(document=document)
            except Unreachable as error:
                fatal = self._unreachable(error, attempt, lost)
                if fatal is not None:
                    self._inbox.put(error=fatal)
                    return
            except LaminaError as error:
                self._inbox.put(error=error)
                return
            low, high = _BACKOFF_S
            pause = min(high, low * 2**attempt) * (0.5 + random.random() / 2)
            attempt = min(attempt + 1, 10)
            self._over.wait(self._clock.real(pause))

    def _unreachable(self, error: Unreachable, attempt: int, lost: float) -> LaminaError | None:
        """Whether to give up."""
        if attempt == 0:
            self._log("unreachable", message=str(error))
        if attempt in (1, 5):
            found = self._settings.explain()
            if found is not None:
                return found
        patience = self._settings.give_up_s
        if patience is not None and self._clock.monotonic() - lost > patience:
            return Unreachable(
                f"{self._settings.address.target}: expected a coordinator within {patience:g} s, last: {error} "
                "See `lamina doctor`; the last update is kept and is offered again."
            )
        return None

    def _live(self) -> None:
        """Signs of life."""
        while not self._over.is_set():
            terms = self._inbox.terms
            if terms is not None:
                number, step = self._at
                try:
                    request = pb.HeartbeatRequest(run_id=terms.run_id, round=number, step=step)
                    self._link.call("Heartbeat", request, 10.0)
                except (LaminaError, ValueError):
                    pass  # the other thread notices, and says so
            beat = float(terms.document["heartbeat_s"]) if terms else 1.0
            self._over.wait(self._clock.real(beat))

    # Registering.

    def _register(self) -> Terms:
        identity, policy = self._settings.address.identity, self._settings.policy
        document = {"kind": st.REGISTER, "versions": list(VERSIONS), "rank": self._settings.rank, "held": self._held}
        request = st.signed(st.REGISTER, document, _signer(identity))
        answer = self._link.call("Register", request)
        name, key = None, None
        if identity is not None:
            coordinator = verified_peer(answer.certificate, identity.ca_pem, self._clock.now(), "coordinator")
            name, key = coordinator.name, coordinator.signing_key
        terms = st.read(answer.terms, st.TERMS, _verifier(key))
        policies.check_terms(policy, terms, name)
        if terms["client_id"] != self.name:
            raise IdentityError(f"terms: expected those of client {self.name}, got those of another. Register again.")
        return Terms(terms, key)

    @property
    def name(self) -> str:
        """The client's id."""
        address = self._settings.address
        return address.identity.peer.name if address.identity else address.name

    # A run.

    def _take_part(self, terms: Terms) -> bool:
        """One run, from its terms to its end; False where another has begun."""
        spool = Spool(self._settings.folder / terms.run_id)
        last = spool.load()
        self._log("run", run_id=terms.run_id, rounds=terms.document["rounds"], rank=terms.document["rank"])
        spec = self._spec(terms, spool)
        self._worker.begin(terms.document, spec, last.state if last else {}, last.version if last else -1)
        if last is not None:
            self._held = last.version
        self._log("ready", last_finished_round=last.round if last else None)
        while True:
            document = self._inbox.wait(lambda: self._next(terms), 3600.0)
            if document is None:
                continue
            if document.get("kind") == "changed":
                return False
            if document.get("kind") == "ended":
                self._log("ended", why=str(document.get("why"))[:20])
                self._inbox.put(terms=None, document=None)
                return True
            last = self._answer(terms, spool, document, last)

    def _next(self, terms: Terms) -> Mapping[str, Any] | None:
        """The newest instruction of the run that has not been dealt with."""
        if self._inbox.terms is not None and self._inbox.terms.run_id != terms.run_id:
            return {"kind": "changed"}
        document = self._inbox.document
        return None if document is None or _key(document) in self._done else document

    def _spec(self, terms: Terms, spool: Spool) -> AdapterSpec:
        name, num_bytes = terms.document["spec"]
        found = self._persist(lambda: self._link.download(Blob(name, num_bytes, b""), spool.releases))
        return from_json(found.read().decode(), "the coordinator's spec")

    def _persist(self, action: Callable[[], Any]) -> Any:
        """Try again while the network is down, for as long as the listening thread has not given up."""
        attempt = 0
        while True:
            try:
                return action()
            except (Unreachable, ValueError) as error:  # ValueError: the channel was closed to dial again
                if isinstance(error, ValueError) and "closed channel" not in str(error):
                    raise
                low, high = _BACKOFF_S
                self._inbox.wait(lambda: None, self._clock.real(min(high, low * 2**attempt)))
                attempt = min(attempt + 1, 10)

    def _answer(
        self, terms: Terms, spool: Spool, document: Mapping[str, Any], last: Finished | None
    ) -> Finished | None:
        """Do what one instruction asks. Whatever goes wrong is reported as a code."""
        key = _key(document)
        try:
            if document.get("kind") == "evaluate":
                self._measure(terms, spool, document)
            else:
                last = self._train(terms, spool, document, last)
        except Superseded:
            if self._over.is_set():
                raise
            self._log("superseded", round=document.get("round"))
        except Refused as error:
            self._log("refused", round=document.get("round"), message=str(error))
        except (PolicyRefused, IdentityError) as error:
            self._log("policy", round=document.get("round"), message=str(error))
            self._report(document, code="policy")
        except LaminaError as error:
            code = failure_code(error)
            self._log("failed", round=document.get("round"), code=code, message=str(error))
            self._report(document, code=code)
        except Exception as error:  # noqa: BLE001  an entry point: the agent lives on, and the error's text stays here
            code = failure_code(error)
            self._log("failed", round=document.get("round"), code=code, where=_where(error))
            self._report(document, code=code)
        self._done.add(key)
        self._at = (0, 0)
        return last

    def _instruction(self, spool: Spool, document: Mapping[str, Any], terms: Terms) -> Instruction:
        """An instruction with its release fetched and checked."""
        asked = st.instruction_of(document, lambda sha256, num_bytes: Blob(sha256, num_bytes, b""))
        if asked.run_id != terms.run_id or asked.client_id != self.name:
            raise IdentityError("instruction: expected one of this run for this client, got another.")
        if document.get("base") != terms.document["hashes"] or document.get("spec") != terms.document["spec"][0]:
            raise IdentityError("instruction: expected the base and schema of the terms, got others.")
        policies.check_instruction(
            self._settings.policy,
            asked.kind,
            asked.round,
            asked.num_bytes,
            len(self._rounds - {(asked.run_id, asked.round)}),
        )
        names = [part for part in (asked.release, asked.frozen) if part is not None]
        spool.sweep({part.sha256 for part in names} | {terms.document["spec"][0]})
        fetched = {part.sha256: self._fetched(spool, part, document) for part in names}
        return st.instruction_of(document, lambda sha256, num_bytes: fetched[sha256])

    def _fetched(self, spool: Spool, part: Blob, document: Mapping[str, Any]) -> Blob:
        def fetch() -> Blob:
            self._still(document)
            return self._link.download(part, spool.releases)

        found: Blob = self._persist(fetch)
        return found

    def _still(self, document: Mapping[str, Any]) -> None:
        """Raise where the coordinator asks for something else by now."""
        newest = self._inbox.document
        if self._over.is_set() or (newest is not None and _key(newest) != _key(document)):
            raise Superseded(
                f"round {document.get('round')} was given up: the coordinator asks for something else now."
            )

    def _train(self, terms: Terms, spool: Spool, document: Mapping[str, Any], last: Finished | None) -> Finished | None:
        asked = st.instruction_of(document, lambda sha256, num_bytes: Blob(sha256, num_bytes, b""))
        if last is None or (last.round, last.parent) != (asked.round, asked.release_hash):
            instruction = self._instruction(spool, document, terms)

            def progress(step: int) -> None:
                self._at = (instruction.round, step)
                self._still(document)

            self._log("training", round=instruction.round, bytes_down=instruction.num_bytes)
            made = self._worker.train(instruction, progress)
            finished = Finished(
                instruction.round, instruction.release_hash, instruction.version, blob(made.update), made.state
            )
            last = spool.save(finished)
            self._held = last.version
        policies.check_upload(self._settings.policy, last.update.num_bytes)
        self._rounds.add((terms.run_id, last.round))
        self._upload(terms, spool, document, last)
        return last

    def _upload(self, terms: Terms, spool: Spool, document: Mapping[str, Any], last: Finished) -> None:
        claim = {
            "kind": st.CLAIM,
            "run_id": terms.run_id,
            "round": last.round,
            "client_id": self.name,
            "parent": last.parent,
            "sha256": last.update.sha256,
            "num_bytes": last.update.num_bytes,
            "spec": terms.document["spec"][0],
            "witness": self._witness(spool, document),
        }
        signed = st.signed(st.CLAIM, claim, _signer(self._settings.address.identity))
        path = Path(str(last.update.content))

        def send() -> None:
            self._still(document)
            self._link.upload(signed, path, int(terms.document["chunk_bytes"]))

        self._persist(send)
        self._log("sent", round=last.round, bytes_up=last.update.num_bytes)

    def _witness(self, spool: Spool, document: Mapping[str, Any]) -> list[Any] | None:
        """A countersignature over the head of the log that the instruction names, unless the log has gone back."""
        try:
            n, seen = document["log"]
            head = Head(int(n), str(seen))
        except (KeyError, TypeError, ValueError):
            return None
        before = spool.witnessed()
        if before is not None and (head.n < before.n or (head.n == before.n and head.hash != before.hash)):
            raise IdentityError(
                f"the coordinator's log: expected record {before.n} with hash {before.hash[:12]}… or a later one, got "
                f"{head.n} with {head.hash[:12]}…: it was cut or rewritten. Ask its operator; if it was restored from a copy, "
                f"remove {spool.root / 'witness.txt'}."
            )
        if before != head:
            spool.witness(head)
        signature = _signer(self._settings.address.identity)(WITNESS_DOMAIN, witness_statement(self.name, head))
        return [head.n, head.hash, signature.hex()]

    def _measure(self, terms: Terms, spool: Spool, document: Mapping[str, Any]) -> None:
        if not self._settings.policy.leave.evaluation:
            self._report(document, code="policy")
            return
        instruction = self._instruction(spool, document, terms)
        figures = dict(self._worker.measure(instruction))
        self._report(document, figures=figures)

    def _report(self, document: Mapping[str, Any], **said: Any) -> None:
        about = {"run_id": document.get("run_id"), "round": document.get("round"), "instruction": document.get("kind")}
        kind = "figures" if "figures" in said else "failure"
        message = st.signed(st.REPORT, {"kind": kind, **about, **said}, _signer(self._settings.address.identity))

        def tell() -> None:
            self._still(document)
            self._link.call("Report", message)

        try:
            self._persist(tell)
        except (Superseded, Refused):
            if self._over.is_set():
                raise


def _key(document: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(str(document.get(name)) for name in ("kind", "run_id", "round", "release", "frozen", "why"))


def _signer(identity: Identity | None) -> st.Sign:
    if identity is None:
        return lambda domain, statement: b""
    return lambda domain, statement: sign(identity, domain, statement)


def _verifier(key: bytes | None) -> st.Verify:
    return lambda domain, statement, signature: key is None or verify(key, domain, statement, signature)


def failure_code(error: BaseException) -> str:
    """What a coordinator is told of an error: a word from a fixed list, and nothing else.

    Args:
        error: Anything.

    Returns:
        The code.
    """
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return "out-of-memory"
    kinds: tuple[tuple[type[BaseException], str], ...] = (
        (TrainingError, "training"),
        (CheckpointError, "disk"),
        (DataError, "data"),
        (AdapterMismatch, "release"),
        (UpdateRejected, "release"),
        (st.BadStatement, "release"),
        (ConfigError, "base"),
        (OSError, "disk"),
    )
    return next((code for kind, code in kinds if isinstance(error, kind)), "internal")


def _where(error: BaseException) -> str:
    """Kind and place of an error, without its text, which may quote data."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {place}"
