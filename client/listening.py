"""A site's two threads beside the one that trains: the stream of instructions, which dials again for as long as it takes, and
signs of life. Neither can be starved by training, and neither touches the model.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.client import policy as policies
from lamina.client.policy import Policy
from lamina.protos import coordinator_pb2 as pb
from lamina.protos import statements as st
from lamina.protos.clock import Clock
from lamina.protos.errors import IdentityError, LaminaError
from lamina.protos.identity import Identity, check_in_force, sign, verified_peer, verify
from lamina.protos.link import Address, Link, Refused, Unreachable
from lamina.protos.messages import Wish

VERSIONS = (st.PROTOCOL,)
BACKOFF_S = (0.5, 15.0)
Log = Callable[..., None]


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
    """What the two threads leave for each other: the newest of each, and an error that ends all.

    The listening thread leaves `offer`, `terms` and `document`; the training one `wish`, its answer to an offer.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.offer: Terms | None = None
        self.wish: tuple[str, Wish] | None = None
        self.terms: Terms | None = None
        self.document: Mapping[str, Any] | None = None
        self.error: LaminaError | None = None

    def put(self, **found: Any) -> None:
        """Leave something."""
        with self._changed:
            for name, value in found.items():
                setattr(self, name, value)
            self._changed.notify_all()

    def wait(self, ready: Callable[[], Any], seconds: float | None) -> Any:
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
        sized: Whether the site first looks at what is offered and then registers for what it can hold.
        stay: Wait for the next run after the end of one.
        give_up_s: End when the coordinator was out of reach for so long; None never.
        revocations: The consortium's list of revoked certificates, read at every registration; None where the site has none.
        explain: Why the coordinator cannot be reached, as an error where trying again will not help.
    """

    address: Address
    policy: Policy
    folder: Path
    rank: int | None = None
    sized: bool = False
    stay: bool = False
    give_up_s: float | None = None
    revocations: Path | None = None
    explain: Callable[[], LaminaError | None] = lambda: None


class Listener:
    """Registers, listens, and gives signs of life.

    Args:
        settings: What the agent is.
        link: The connection.
        clock: For waits.
        log: Told what happens.
    """

    def __init__(self, settings: Settings, link: Link, clock: Clock, log: Log) -> None:
        self._settings, self._link, self._clock, self._log = settings, link, clock, log
        self.inbox = Inbox()
        self.over = threading.Event()
        self.at = (0, 0)
        self.held: tuple[str, int] = ("", -1)

    def start(self) -> None:
        """Start both threads."""
        for target in (self._listen, self._live):
            threading.Thread(target=target, daemon=True, name=target.__name__).start()

    def _listen(self) -> None:
        """Register and read instructions; dial again when the connection breaks."""
        attempt, lost = 0, self._clock.monotonic()
        while not self.over.is_set():
            try:
                terms = self._register()
                attempt, lost = 0, self._clock.monotonic()
                self.inbox.put(terms=terms)
                request = pb.InstructionsRequest(run_id=terms.run_id)
                for message in self._link.stream("Instructions", request):
                    document = st.read(message, st.INSTRUCTION, verifier(terms.key))
                    lost = self._clock.monotonic()
                    self.inbox.put(document=document)
            except Unreachable as error:
                if self.over.is_set():
                    return  # we hung up ourselves
                fatal = self._unreachable(error, attempt, lost)
                if fatal is not None:
                    self.inbox.put(error=fatal)
                    return
            except LaminaError as error:
                if not (isinstance(error, Refused) and "Register again" in str(error)):
                    self.inbox.put(error=error)
                    return
            low, high = BACKOFF_S
            pause = min(high, low * 2**attempt) * (0.5 + random.random() / 2)
            attempt = min(attempt + 1, 10)
            self.over.wait(self._clock.real(pause))

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
        while not self.over.is_set():
            terms = self.inbox.terms
            if terms is not None:
                number, step = self.at
                try:
                    request = pb.HeartbeatRequest(run_id=terms.run_id, round=number, step=step)
                    self._link.call("Heartbeat", request, 10.0)
                except LaminaError:
                    pass  # the other thread notices, and says so
            beat = float(terms.document["heartbeat_s"]) if terms else 1.0
            self.over.wait(self._clock.real(beat))

    def _register(self) -> Terms:
        wish = Wish(self._settings.rank)
        if self._settings.sized:
            offer = self._ask(Wish(), ask=True)
            self.inbox.put(offer=offer)
            wish = self.inbox.wait(lambda: self._answered(offer), None)
        return self._ask(wish)

    def _answered(self, offer: Terms) -> Wish | None:
        """What the training thread wants of an offer, once it knows."""
        wish = self.inbox.wish
        return wish[1] if wish is not None and wish[0] == offer.run_id else None

    def _ask(self, wish: Wish, ask: bool = False) -> Terms:
        """Register, or with `ask` learn the terms on which one could."""
        identity, policy = self._settings.address.identity, self._settings.policy
        run_id, held = self.held
        document: dict[str, Any] = {
            "kind": st.REGISTER,
            "versions": list(VERSIONS),
            "rank": wish.rank,
            "held": held,
            "run_id": run_id,
        }
        document |= {"ask": True} if ask else {}
        document |= {} if wish.ranks is None else {"ranks": dict(wish.ranks)}
        document |= {"format": wish.format} if wish.format else {}
        request = st.signed(st.REGISTER, document, signer(identity))
        answer = self._link.call("Register", request)
        name, key = None, None
        if identity is not None:
            coordinator = verified_peer(answer.certificate, identity.ca_pem, self._clock.now(), "coordinator")
            if self._settings.revocations is not None:
                check_in_force(coordinator, self._settings.revocations, identity.ca_pem)
            name, key = coordinator.name, coordinator.signing_key
        terms = st.read(answer.terms, st.TERMS, verifier(key))
        policies.check_terms(policy, terms, name)
        if terms["client_id"] != self.name:
            raise IdentityError(f"terms: expected those of client {self.name}, got those of another. Register again.")
        return Terms(terms, key)

    @property
    def name(self) -> str:
        """The client's id."""
        address = self._settings.address
        return address.identity.peer.name if address.identity else address.name


def signer(identity: Identity | None) -> st.Sign:
    """Signs statements as an identity; with nothing where there is none.

    Args:
        identity: The site's, or None.

    Returns:
        Domain and bytes to a signature.
    """
    if identity is None:
        return lambda domain, statement: b""
    return lambda domain, statement: sign(identity, domain, statement)


def verifier(key: bytes | None) -> st.Verify:
    """Checks statements against a key; all hold where there is none.

    Args:
        key: The coordinator's, or None.

    Returns:
        Domain, bytes and signature to whether it holds.
    """
    return lambda domain, statement, signature: key is None or verify(key, domain, statement, signature)
