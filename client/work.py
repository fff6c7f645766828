"""What an agent asks of a worker, so that the one knows no model and the other no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lamina.protos.messages import Instruction, Wish
from lamina.protos.spec import AdapterSpec


@dataclass(frozen=True)
class Trained:
    """What a worker made.

    Attributes:
        update: The encoded update.
        state: The client's state after it, by file name.
    """

    update: bytes
    state: Mapping[str, bytes]


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

    def train(self, instruction: Instruction, progress: Callable[[int], None]) -> Trained:
        """Train from a release; `progress` may raise."""
        ...

    def measure(self, instruction: Instruction) -> Mapping[str, float]:
        """Sums over held-out examples: `nats`, `targets`, `hits`."""
        ...
