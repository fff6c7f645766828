"""What the port's methods share of a run, and what several of them do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from lamina.protos import statements as st
from lamina.protos.blobs import Blob
from lamina.protos.clock import Clock
from lamina.protos.config import Config
from lamina.protos.identity import verify
from lamina.protos.messages import Rejection
from lamina.server.campaign import Campaign
from lamina.server.port.access import Access, Caller
from lamina.server.port.mailbox import Mailbox
from lamina.server.port.roster import Roster
from lamina.server.port.sums import PortSums
from lamina.server.store.deployment import DeploymentStore
from lamina.strategies.base import ServerState

# What is said while the first instructions are not out yet.
EARLY = "the coordinator is starting. Nothing is lost; try again."


@dataclass
class Live:
    """What changes while a run goes on, and need not outlive the process.

    Attributes:
        ended: Why the run is over, once it is: finished, stopped or drained.
        told: Clients that have been told.
        uploads: Uploads that are being written.
        downloads: Downloads that are under way.
        latest: The state after the last round.
        files: Held while the files that operators may fetch are looked up, or replaced by others.
        lock: Held while a number changes.
    """

    ended: str = ""
    told: set[str] = field(default_factory=set)
    uploads: int = 0
    downloads: int = 0
    latest: ServerState | None = None
    files: threading.Lock = field(default_factory=threading.Lock)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def counted(self, what: Literal["uploads", "downloads"]) -> Iterator[None]:
        """Count one more while it is under way."""
        with self.lock:
            setattr(self, what, getattr(self, what) + 1)
        try:
            yield
        finally:
            with self.lock:
                setattr(self, what, getattr(self, what) - 1)


@dataclass(frozen=True)
class Run:
    """What the handlers of a run share.

    Attributes:
        config: The run's.
        campaign: Run id, schema, strategy.
        store: What is durable.
        roster: Who takes part.
        mailbox: To the round loop.
        access: Who may call.
        clock: For times.
        sign: The coordinator's signature over a statement.
        certificate: The coordinator's, PEM; empty without.
        consortium: Of the certificates.
        spec: The schema file.
        sums: To the round loop, for secure sums.
        live: What changes while it runs.
    """

    config: Config
    campaign: Campaign
    store: DeploymentStore
    roster: Roster
    mailbox: Mailbox
    access: Access
    clock: Clock
    sign: st.Sign
    certificate: bytes
    consortium: str
    spec: Blob
    sums: PortSums
    live: Live = field(default_factory=Live)


def count(run: Run, caller: Caller, reason: str, message: str) -> None:
    """Count a refusal in the report of the round.

    Args:
        run: The run.
        caller: Whose message it was.
        reason: A short code.
        message: The sentence.
    """
    rejection = Rejection(caller.name, reason, message, final=False)
    run.store.reject(run.store.counting_round(), rejection)


def verifier(caller: Caller) -> Callable[[str, bytes, bytes], bool]:
    """Checks statements against a caller's key; all hold where there are no certificates.

    Args:
        caller: Who signs.

    Returns:
        Domain, bytes and signature to whether it holds.
    """
    key = caller.signing_key
    return lambda domain, statement, signature: key is None or verify(key, domain, statement, signature)
