"""The one seam between the coordinator and its clients, and its in-memory form.

The round loop sees only `Channel`; what is above it is tested in memory and runs unchanged over a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from lamina.protos.messages import Instruction, Reply


class Channel(Protocol):
    """Offers instructions and hands replies back as they arrive."""

    def offer(self, instructions: Sequence[Instruction]) -> None:
        """Make the round's instructions available, one a client."""
        ...

    def replies(self, until_s: float | None) -> Iterable[Reply]:
        """Replies in the order of arrival, until all came or `until_s` seconds have passed (None: no deadline)."""
        ...


Respond = Callable[[Instruction], Reply | None]


class MemoryChannel:
    """Clients in this process, asked one after the other; one that answers None has dropped out.

    Args:
        clients: Client id -> what answers its instructions.
    """

    def __init__(self, clients: Mapping[str, Respond]) -> None:
        self._clients = clients
        self._offered: list[Instruction] = []

    def offer(self, instructions: Sequence[Instruction]) -> None:
        """Keep the instructions for `replies`."""
        self._offered = list(instructions)

    def replies(self, until_s: float | None) -> Iterable[Reply]:
        """Ask each client when its reply is drawn; `until_s` has no meaning here."""
        while self._offered:
            instruction = self._offered.pop(0)
            reply = self._clients[instruction.client_id](instruction)
            if reply is not None:
                yield reply
