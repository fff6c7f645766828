"""The one seam between the coordinator and its clients, and its in-memory form.

The round loop sees only `Channel`; what is above it is tested in memory and runs unchanged over a network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

from lamina.protos.messages import Instruction, Reply
from lamina.protos.secagg.context import Participant
from lamina.protos.secagg.server import Down, Up


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


class Sums(Protocol):
    """Carries the messages of secure sums."""

    def ready(self, round_number: int, clients: Collection[str], least: int) -> tuple[Participant, ...]:
        """Those of the clients that have trained in a round and can be summed now, in the order of their names.

        Args:
            round_number: The round.
            clients: Who may be.
            least: How many are worth waiting for.

        Returns:
            Names and keys.
        """
        ...

    def exchange(self, told: Mapping[str, Down], until_s: float | None) -> Iterable[tuple[str, Up]]:
        """Tell each client something; answers as they come, until all came or `until_s` seconds have passed."""
        ...


Take = Callable[[Down], Up | None]


class MemorySums:
    """Clients in this process; one that answers None has dropped out for the rest of the round.

    Args:
        clients: Client id -> what answers its messages.
    """

    def __init__(self, clients: Mapping[str, Take]) -> None:
        self._clients = clients
        self._gone: set[tuple[int, str]] = set()
        self._round = 0

    def ready(self, round_number: int, clients: Collection[str], least: int) -> tuple[Participant, ...]:
        """Whoever has not dropped out; without identities, as all are in one process."""
        self._round = round_number
        return tuple(Participant(name) for name in sorted(clients) if (round_number, name) not in self._gone)

    def exchange(self, told: Mapping[str, Down], until_s: float | None) -> Iterable[tuple[str, Up]]:
        """Ask each client when its answer is drawn; `until_s` has no meaning here."""
        for name, message in told.items():
            if (self._round, name) in self._gone:
                continue
            answer = self._clients[name](message)
            if answer is None:
                self._gone.add((self._round, name))
            else:
                yield name, answer
