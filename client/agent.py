"""The resident agent of a site: it registers, is told what to do, trains, keeps what it made, and sends it.

The connection is `listening.py`'s, in threads of its own; here is the one that trains. What goes wrong while training is
reported as a code from a fixed list and the agent lives on; no text of an error leaves the site.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamina.client import policy as policies
from lamina.client.failures import failure_code, on_disk, where
from lamina.client.listening import BACKOFF_S, Listener, Log, Settings, Terms, signer, verifier
from lamina.client.masked import Line, certified, follow
from lamina.client.private import account as accounts
from lamina.client.private.account import Account
from lamina.client.spool import Finished, Spool, charged_heads, clear_others, newest
from lamina.client.summing import Part
from lamina.client.terms import whole
from lamina.client.witness import countersigned
from lamina.client.work import Trained, Worker, nothing_private
from lamina.protos import statements as st
from lamina.protos.adapter import Array
from lamina.protos.blobs import Blob, blob
from lamina.protos.chain import Head
from lamina.protos.clock import Clock
from lamina.protos.errors import IdentityError, LaminaError, PolicyRefused, one_line
from lamina.protos.files import alone
from lamina.protos.link import DATA_LOSS, Link, Refused, Unreachable
from lamina.protos.messages import Instruction
from lamina.protos.secagg.client import Me
from lamina.protos.secagg.context import LEAST
from lamina.protos.spec import AdapterSpec, from_json
from lamina.protos.statements import budget_of

_TAKEN = "expected one agent, but another agent uses this folder. Stop that one, or take another client.state=."
_CHANGED: Mapping[str, Any] = {}  # in place of an instruction: another run has begun


class Superseded(LaminaError):
    """The coordinator asks for something else by now; what was being trained is given up."""


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
        self._link = Link(settings.address, clock)
        self._listener = Listener(settings, self._link, clock, log)
        self._inbox, self._over = self._listener.inbox, self._listener.over
        self._sign = signer(settings.address.identity)
        # The newest copy of the instruction that is being dealt with, and of the last one that was. A copy that comes later is
        # asked again: a coordinator that was restarted may not have kept the answer.
        self._current: Mapping[str, Any] | None = None
        self._done: Mapping[str, Any] | None = None
        self._failures = 0  # one after another
        self._last: Finished | None = None
        self._account: Account | None = None  # under example-dp

    def run(self) -> int:
        """Take part until the run is over.

        Returns:
            Exit code 0.

        Raises:
            Unreachable: If the coordinator was out of reach for `give_up_s`.
            Refused: If the coordinator does not take this client.
            PolicyRefused: If the site's policy does not allow the run.
            IdentityError: If the coordinator is not whom it should be.
            ConfigError: If another agent uses the folder.
            BudgetSpent: If the site's privacy ledger cannot be read.
        """
        with alone(self._settings.folder, "client.state", _TAKEN):
            return self._run()

    def _run(self) -> int:
        self._listener.held = newest(self._settings.folder)
        self._listener.start()
        try:
            while True:
                found = self._inbox.wait(lambda: self._unanswered() or self._inbox.terms, 3600.0)
                offer = self._unanswered()
                if offer is not None:
                    self._size(offer)
                elif found is not None and self._take_part(found) and not self._settings.stay:
                    return 0
        except (Superseded, Unreachable, Refused):
            raise
        except LaminaError:
            self._leave()
            raise
        finally:
            self.stop()  # the listening thread may be waiting for an answer to an offer
            self._link.close()

    def _leave(self) -> None:
        """Tell the coordinator that this site cannot take part, so that no round waits for it."""
        with contextlib.suppress(LaminaError):  # then it is missed in time
            self._link.call("Report", st.signed(st.REPORT, {"kind": "leave"}, self._sign), 5.0)

    def stop(self) -> None:
        """Make `run` return soon, as on SIGTERM; what was finished is kept."""
        self._over.set()
        self._inbox.put(error=Superseded("stopped"))

    # A run.

    def _unanswered(self) -> Terms | None:
        """An offer whose run this site has not been sized for."""
        offer, wish = self._inbox.offer, self._inbox.wish
        return offer if offer is not None and (wish is None or wish[0] != offer.run_id) else None

    def _size(self, offer: Terms) -> None:
        """Look at what is offered, and have the listening thread register for what the site can hold."""
        spool = Spool(self._settings.folder / offer.run_id)
        with on_disk(spool):
            spec, kept = self._spec(offer, spool), spool.plan()
            sized = self._worker.size(offer.document, spec, kept)
            if sized.kept != kept:
                spool.keep_plan(sized.kept)
        self._inbox.put(wish=(offer.run_id, sized.wish), terms=None)

    def _take_part(self, terms: Terms) -> bool:
        """One run, from its terms to its end; False where another has begun."""
        spool = Spool(self._settings.folder / terms.run_id)
        self._log("run", run_id=terms.run_id, rounds=terms.document["rounds"], rank=terms.document["rank"])
        with on_disk(spool):
            self._account = self._opened(terms)
            self._last = last = spool.load()
            spec = self._spec(terms, spool)
        # What came of training without noise, an optimizer's state say, has no place in an update that claims to be private.
        unpaid = self._account is not None and last is not None and last.charge is None
        state, version = ({}, -1) if last is None or unpaid else (last.state, last.version)
        self._worker.begin(terms.document, spec, state, version)
        self._listener.held = (terms.run_id, version)
        clear_others(self._settings.folder, terms.run_id)
        self._log("ready", last_finished_round=last.round if last else None)
        while True:
            document = self._inbox.wait(lambda: self._next(terms), 3600.0)
            if document is None:
                continue
            if document is _CHANGED:
                return False
            if document.get("kind") == "ended":
                self._log("ended", why=one_line(str(document.get("why")), 20))
                spool.sweep({terms.document["spec"][0]})
                self._inbox.put(terms=None, document=None)
                return True
            self._answer(terms, spool, document)

    def _opened(self, terms: Terms) -> Account | None:
        """The run's account in the site's ledger; None where nothing is private."""
        folder, policy = self._settings.folder, self._settings.policy
        account = accounts.opened(folder, policy, terms.document, charged_heads(folder))
        if account is not None:
            self._log("privacy", **accounts.standing(account))
        return account

    def _next(self, terms: Terms) -> Mapping[str, Any] | None:
        """The newest instruction of the run that has not been dealt with."""
        if self._inbox.terms is not None and self._inbox.terms.run_id != terms.run_id:
            return _CHANGED
        if self._unanswered() is not None:
            return _CHANGED
        document = self._inbox.document
        return None if document is self._done else document

    def _spec(self, terms: Terms, spool: Spool) -> AdapterSpec:
        name, num_bytes = terms.document["spec"]
        found = self._persist(lambda: self._link.download(Blob(name, num_bytes, b""), spool.releases))
        spec = from_json(found.read(), "the coordinator's schema")
        if spec.hashes != terms.document["hashes"]:
            raise IdentityError(
                "the coordinator's schema: expected the hashes of the base that the terms name, got others. "
                "Ask the operator of the coordinator."
            )
        return spec

    def _persist(self, action: Callable[[], Any]) -> Any:
        """Try again while the network is down, for as long as the listening thread has not given up."""
        attempt = 0
        while True:
            try:
                return action()
            except Unreachable:
                self._pause(attempt)
                attempt += 1

    def _pause(self, attempt: int) -> None:
        low, high = BACKOFF_S
        self._inbox.wait(lambda: None, self._clock.real(min(high, low * 2 ** min(attempt, 10))))

    def _answer(self, terms: Terms, spool: Spool, document: Mapping[str, Any]) -> None:
        """Do what one instruction asks. Whatever goes wrong is reported as a code."""
        self._current = document
        number = document["round"] if whole(document.get("round"), 0) else None
        code = ""
        try:
            if document.get("kind") == "evaluate":
                self._measure(terms, spool, document)
            else:
                self._train(terms, spool, document)
            self._failures = 0
        except Superseded:
            if self._over.is_set():
                raise
            self._log("superseded", round=number)
        except Refused as error:
            self._log("refused", round=number, message=str(error))
            if "Register again" in str(error):
                self._again()
                return
            code = "release" if error.code is DATA_LOSS else ""
        except (PolicyRefused, IdentityError) as error:
            self._log("policy", round=number, message=str(error))
            code = "policy"
        except LaminaError as error:
            code = failure_code(error)
            self._log("failed", round=number, code=code, message=str(error))
        except Exception as error:  # noqa: BLE001  an entry point: the agent lives on, and the error's text stays here
            code = failure_code(error)
            self._log("failed", round=number, code=code, where=where(error))
        if code:
            self._report(document, code=code)
            self._slow_down()
        self._done = self._current
        self._listener.at = (0, 0)

    def _slow_down(self) -> None:
        """Wait after a failure, longer with each, so that a coordinator cannot fill the log."""
        self._pause(self._failures)
        self._failures += 1

    def _again(self) -> None:
        """Register anew, as the coordinator says; what it asks is then answered again."""
        before = self._inbox.terms
        self._slow_down()
        if self._inbox.terms is before:
            self._link.dial()  # the listening thread registers where its stream ends
        self._inbox.wait(lambda: None if self._inbox.terms is before else self._inbox.terms, 3600.0)

    def _instruction(self, spool: Spool, document: Mapping[str, Any], terms: Terms) -> Instruction:
        """An instruction with its release fetched and checked."""
        asked = st.instruction_of(document, lambda sha256, num_bytes: Blob(sha256, num_bytes, b""))
        if asked.run_id != terms.run_id or asked.client_id != self._listener.name:
            raise IdentityError("instruction: expected one of this run for this client, got another.")
        if document.get("base") != terms.document["hashes"] or document.get("spec") != terms.document["spec"][0]:
            raise IdentityError("instruction: expected the base and schema of the terms, got others.")
        last_round, parent = spool.trained()
        if (asked.round, asked.release_hash) == (last_round, parent):
            last_round -= 1  # the same again, from a coordinator that was restarted, is no new round
        policies.check_instruction(self._settings.policy, asked.kind, asked.round, asked.num_bytes, last_round)
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
        changed = self._unanswered() is not None or (newest is not None and _key(newest) != _key(document))
        if self._over.is_set() or changed:
            raise Superseded(
                f"round {document.get('round')} was given up: the coordinator asks for something else now."
            )
        self._current = newest or document

    def _train(self, terms: Terms, spool: Spool, document: Mapping[str, Any]) -> None:
        last, asked = self._last, st.instruction_of(document, lambda sha256, num_bytes: Blob(sha256, num_bytes, b""))
        if last is None or (last.round, last.parent) != (asked.round, asked.release_hash):
            instruction = self._instruction(spool, document, terms)

            def progress(step: int) -> None:
                self._listener.at = (instruction.round, step)
                self._still(document)

            self._log("training", round=instruction.round, bytes_down=instruction.num_bytes)
            allow = nothing_private
            if self._account is not None:
                allow = functools.partial(accounts.allowed, self._account, instruction.round)
            made = self._worker.train(instruction, progress, allow)
            finished = Finished(
                instruction.round, instruction.release_hash, instruction.version, blob(made.update), made.state
            )
            # The charge is on disk before the update is, and the update before it is sent: see `private.ledger`.
            finished = replace(finished, charge=self._paid(made, finished))
            self._last = last = spool.save(finished)
            self._listener.held = (terms.run_id, last.version)
        if self._account is not None:  # also where it is masked: whatever leaves is made of these bytes
            accounts.check_paid(self._account, Path(str(last.update.content)))
        if terms.document["task"].get("privacy.secagg") is True:
            self._sum(terms, spool, document, last)
            return
        self._upload(terms, spool, document, last, last.update)
        spool.accepted(last)
        self._log("sent", round=last.round, bytes_up=last.update.num_bytes)

    def _paid(self, made: Trained, finished: Finished) -> Head | None:
        """Charge the site's ledger for an update; the line that says so."""
        if self._account is None:
            return None
        self._account = accounts.paid(
            self._account, finished.round, made.event, finished.update.sha256, self._clock.now()
        )
        self._log("privacy", round=finished.round, **accounts.standing(self._account))
        return self._account.ledger.head

    def _upload(
        self, terms: Terms, spool: Spool, document: Mapping[str, Any], last: Finished, content: Blob, **more: str
    ) -> None:
        policies.check_upload(self._settings.policy, content.num_bytes)
        claim = {
            "kind": st.CLAIM,
            "run_id": terms.run_id,
            "round": last.round,
            "client_id": self._listener.name,
            "parent": last.parent,
            "sha256": content.sha256,
            "num_bytes": content.num_bytes,
            "spec": terms.document["spec"][0],
            "witness": countersigned(spool, document.get("log"), self._listener.name, self._sign),
            **more,
        }
        signed = st.signed(st.CLAIM, claim, self._sign)
        path = Path(str(content.content))

        def send() -> None:
            self._still(document)
            self._link.upload(signed, path, int(terms.document["chunk_bytes"]))

        self._persist(send)

    def _sum(self, terms: Terms, spool: Spool, document: Mapping[str, Any], last: Finished) -> None:
        """Have the update summed with those of others; it stays here."""
        identity = self._settings.address.identity
        instruction = self._instruction(spool, document, terms)
        budget, seed = budget_of(terms.document["budget"]), int(terms.document["task"]["seed"])
        part = Part(instruction, last.update, self._spec(terms, spool), budget, seed, spool.shown(last.round))
        key = b"" if identity is None else identity.peer.signing_key
        me = Me(self._listener.name, key, self._sign, max(LEAST, self._settings.policy.min_clients))
        about = {"kind": st.MASKING, "run_id": terms.run_id, "round": last.round, "parent": last.parent}

        def ask(said: dict[str, Any]) -> Mapping[str, Any]:
            def call() -> Any:
                self._still(document)
                return self._link.call("Mask", st.signed(st.MASKING, {**about, **said}, self._sign))

            return st.read(self._persist(call), st.MASKING, verifier(terms.key))

        def upload(attempt: str, values: Array) -> bool:
            vector = spool.vector(values.tobytes())
            try:
                self._upload(terms, spool, document, last, vector, attempt=attempt)
            except Refused as error:
                self._log("refused", round=last.round, message=str(error))
                return False
            finally:
                Path(str(vector.content)).unlink(missing_ok=True)
            self._log("sent", round=last.round, bytes_up=vector.num_bytes)
            return True

        known = functools.partial(certified, identity, self._settings.revocations, self._clock)
        line = Line(ask, upload, functools.partial(spool.show, last.round), known, self._log)
        try:
            follow(part, me, line)
        except Superseded:
            if self._over.is_set() or not spool.shown(last.round):
                raise
        if spool.shown(last.round):
            spool.accepted(last)
            self._log("summed", round=last.round)

    def _measure(self, terms: Terms, spool: Spool, document: Mapping[str, Any]) -> None:
        if not self._settings.policy.leave.evaluation:
            self._report(document, code="policy")
            return
        instruction = self._instruction(spool, document, terms)
        figures = dict(self._worker.measure(instruction))
        self._report(document, figures=figures)

    def _report(self, document: Mapping[str, Any], **said: Any) -> None:
        about = {"instruction" if name == "kind" else name: document.get(name) for name in ("run_id", "round", "kind")}
        if not all(isinstance(one, str | int) for one in about.values()):
            return  # nobody waits for an answer to what is no instruction
        kind = "figures" if "figures" in said else "failure"
        message = st.signed(st.REPORT, {"kind": kind, **about, **said}, self._sign)

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
