"""What an agent asks of a worker, so that the one knows no model and the other no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lamina.protos.errors import BudgetSpent
from lamina.protos.messages import Instruction, Wish
from lamina.protos.privacy.events import Event
from lamina.protos.spec import AdapterSpec

# Asks the site's ledger for leave to do what an event says; gives the epsilon of the run after it, or raises `BudgetSpent`.
Allow = Callable[[Event], float]


def nothing_private(event: Event) -> float:
    """The `Allow` of a run without example-dp, in which there is nothing to charge.

    Args:
        event: Any.

    Returns:
        Nothing: there is no account.

    Raises:
        BudgetSpent: Always.
    """
    raise BudgetSpent(f"round {event.round}: expected no private mechanism in this run, got one.")


@dataclass(frozen=True)
class Trained:
    """What a worker made.

    Attributes:
        update: The encoded update.
        state: The client's state after it, by file name.
        event: What the private mechanism did for it, under example-dp; None otherwise.
    """

    update: bytes
    state: Mapping[str, bytes]
    event: Event | None = None


@dataclass(frozen=True)
class Sized:
    """What a worker can hold of an offer.

    Attributes:
        wish: What to register for.
        kept: JSON values for the next start of the agent, so that it asks for the same again.
    """

    wish: Wish
    kept: Mapping[str, Any]


class Worker(Protocol):
    """What trains and measures. It knows no network and no disk of the agent's."""

    def size(self, terms: Mapping[str, Any], spec: AdapterSpec, kept: Mapping[str, Any] | None) -> Sized:
        """What the site can hold of what it is offered; asked where `Settings.sized`."""
        ...

    def begin(self, terms: Mapping[str, Any], spec: AdapterSpec, state: Mapping[str, bytes], version: int) -> None:
        """Load what a run needs and take up the client's state."""
        ...

    def train(self, instruction: Instruction, progress: Callable[[int], None], allow: Allow) -> Trained:
        """Train from a release; `progress` may raise. Under example-dp `allow` is asked before anything is trained."""
        ...

    def measure(self, instruction: Instruction) -> Mapping[str, float]:
        """Sums over held-out examples: `nats`, `targets`, `hits`."""
        ...
