"""The gRPC form of `Sums`: what the round loop tells the clients of a secure sum, which they ask for, and what they answer.

Nothing here is durable: a coordinator that is started again begins a new attempt, with fresh keys.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from lamina.protos.adapter import Array
from lamina.protos.clock import Clock
from lamina.protos.config import Config
from lamina.protos.errors import UpdateRejected
from lamina.protos.secagg.context import Participant
from lamina.protos.secagg.coordinates import layout
from lamina.protos.secagg.messages import Declined, Delivered, Masked, Opening
from lamina.protos.secagg.server import Down, Up
from lamina.protos.sides import Side
from lamina.protos.spec import AdapterSpec
from lamina.server.port.access import Caller
from lamina.server.port.mailbox import Mailbox
from lamina.server.port.roster import Roster

# A client that asks is answered after so long at the latest, and asks again; one that has not asked for longer is not there.
POLL_S, _THERE_S = 2.0, 5.0
# A client that is silent for so many heartbeats is not waited for.
_MISSED_HEARTBEATS = 3
_LOOK_S = 0.2


@dataclass(frozen=True)
class Told:
    """What a client is told.

    Attributes:
        attempt: The attempt's nonce; empty while there is none for it.
        step: Of the attempt, from 0.
        message: The step's message, None for nothing new.
        certificates: With an opening: participant -> its certificate, PEM.
    """

    attempt: bytes = b""
    step: int = 0
    message: Down | None = None
    certificates: Mapping[str, str] | None = None


class PortSums:
    """Between the round loop and the service's threads.

    Args:
        spec: For the length of vectors.
        mailbox: Whose waits an operator can end.
        roster: For silences.
        clock: For time-outs.
        config: For waits.
    """

    def __init__(self, spec: AdapterSpec, mailbox: Mailbox, roster: Roster, clock: Clock, config: Config) -> None:
        self._spec, self._mailbox, self._roster, self._clock = spec, mailbox, roster, clock
        self._patience_s = _MISSED_HEARTBEATS * config.wire.heartbeat_s
        self._wait_s = config.privacy.secagg_wait_s
        self._changed = threading.Condition()
        self._asked: dict[str, tuple[int, float, Caller]] = {}
        self._attempt, self._step, self._length = b"", 0, 0
        self._told: Mapping[str, Down] = {}
        self._certificates: Mapping[str, str] = {}
        self._answered: set[str] = set()
        self._answers: deque[tuple[str, Up]] = deque()

    # The round loop's side.

    def ready(self, round_number: int, clients: Collection[str], least: int) -> tuple[Participant, ...]:
        """Those that ask what to do in a round's sum; the others are given a moment, or longer where too few are there."""
        began = self._clock.monotonic()
        while len(there := self._there(round_number, clients)) < len(clients):
            waited = self._clock.monotonic() - began
            if waited > (_THERE_S if len(there) >= least else self._wait_s):
                break
            self._mailbox.wait(_LOOK_S)
        return tuple(Participant(name, there[name].signing_key or b"") for name in sorted(there))

    def _there(self, round_number: int, clients: Collection[str]) -> dict[str, Caller]:
        since = self._clock.monotonic() - _THERE_S
        with self._changed:
            asked = {name: self._asked[name] for name in clients if name in self._asked}
        return {name: who for name, (number, at, who) in asked.items() if number == round_number and at >= since}

    def exchange(self, told: Mapping[str, Down], until_s: float | None) -> Iterable[tuple[str, Up]]:
        """Answers as they come, until everyone has answered who is not silent, or the time is over."""
        self._tell(told)
        deadline = None if until_s is None else self._clock.monotonic() + until_s
        while True:
            with self._changed:
                answer = self._answers.popleft() if self._answers else None
                waiting = self._told.keys() - self._answered
            if answer is not None:
                yield answer
                continue
            late = deadline is not None and self._clock.monotonic() > deadline
            if late or all(self._roster.silent_s(name) > self._patience_s for name in waiting):
                break
            self._mailbox.wait(_LOOK_S)
        with self._changed:
            self._told = {}
            for name in waiting:  # it is there again when it asks again
                self._asked.pop(name, None)

    def _tell(self, told: Mapping[str, Down]) -> None:
        first = next(iter(told.values()), None)
        with self._changed:
            self._step += 1
            if isinstance(first, Opening):
                context = first.context
                self._attempt, self._step = context.nonce, 0
                self._length = layout(
                    self._spec, cast(Side, context.train), first.ranks, first.scales, first.rule
                ).length
                self._certificates = {name: self._asked[name][2].certificate.decode() for name in context.names}
            self._told, self._answered = told, set()
            self._answers.clear()
            self._changed.notify_all()

    # The service's side.

    def ask(self, caller: Caller, round_number: int, attempt: bytes, step: int, message: Up | None) -> Told:
        """Take a client's answer to a step in, and wait a while for the next.

        Args:
            caller: Who.
            round_number: Whose update it has ready.
            attempt: That it takes part in, empty for none.
            step: That it answers, or has answered.
            message: Its answer; None for one that it uploads, or has none.

        Returns:
            What it is told.
        """
        name = caller.name
        until, offer = self._clock.monotonic() + POLL_S, self._mailbox.current(name)
        with self._changed:
            self._asked[name] = (round_number, self._clock.monotonic(), caller)
            if message is not None and (attempt, step) == (self._attempt, self._step):
                self._take(name, message)
            self._mailbox.poke()
            while True:
                found = self._new(name, attempt, step)
                left = until - self._clock.monotonic()
                if found is not None or left <= 0 or self._mailbox.current(name) != offer:
                    break
                self._changed.wait(self._clock.real(min(left, _LOOK_S)))
            self._asked[name] = (round_number, self._clock.monotonic(), caller)
        return found or Told(attempt, step)

    def _take(self, name: str, message: Up) -> bool:
        if name not in self._told or name in self._answered:
            return False
        self._answered.add(name)
        self._answers.append((name, message))
        return True

    def _new(self, name: str, attempt: bytes, step: int) -> Told | None:
        message = self._told.get(name)
        if message is None or name in self._answered or (attempt, step) == (self._attempt, self._step):
            return None
        if isinstance(message, Opening):
            return Told(self._attempt, 0, message, self._certificates)
        if (attempt, step) == (self._attempt, self._step - 1):
            return Told(self._attempt, self._step, message)
        self._take(name, Declined(name))  # it was started again, and has lost its keys
        return None

    def awaited_bytes(self, name: str, attempt: bytes) -> int | None:
        """Length of the vector that a client is to upload; 0 for one that has come, None where none is awaited."""
        with self._changed:
            if attempt != self._attempt or not isinstance(self._told.get(name), Delivered):
                return None
            return 0 if name in self._answered else 4 * self._length

    def vector(self, name: str, attempt: bytes, values: Array) -> None:
        """Take a client's vector in; `UpdateRejected` where its attempt is over."""
        with self._changed:
            if attempt != self._attempt or not isinstance(self._told.get(name), Delivered):
                raise UpdateRejected(
                    "late", f"client {name}: expected a vector before the attempt at a secure sum was over."
                )
            self._take(name, Masked(name, values))
        self._mailbox.poke()
