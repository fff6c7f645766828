"""The gRPC form of `Channel`: offers that sites fetch when they can, replies that they leave when they are done.

It holds names of blobs, never their content. The service's threads and the round loop meet here and nowhere else.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lamina.protos.clock import Clock
from lamina.protos.errors import LaminaError
from lamina.protos.messages import Instruction, Reply

# Seconds. A wait that takes so much longer than it should is no scheduler's doing.
_HICCUP_S = 5.0


class Stopped(LaminaError):
    """The operator or a signal has ended the wait; the open round is in the store."""

    exit_code = 0


@dataclass(frozen=True)
class Offer:
    """What a site is asked now.

    Attributes:
        number: Grows with each offer, so that a stream knows what it has sent.
        instruction: The instruction.
    """

    number: int
    instruction: Instruction


class Mailbox:
    """A `Channel` between the round loop and the service's threads.

    Args:
        clock: For time-outs.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._offers: dict[str, Offer] = {}
        self._waiting: set[str] = set()
        self._answered: set[str] = set()
        self._replies: deque[Reply] = deque()
        self._number = 0
        self._begun = False
        self._ending = ""
        self._fault: Exception | None = None

    # The round loop's side.

    def offer(self, instructions: Sequence[Instruction], beside: Sequence[Instruction] = ()) -> None:
        """Put out one instruction a client, in place of all that were out before.

        Args:
            instructions: To be answered.
            beside: Open from before; nobody waits for their answers now.
        """
        with self._changed:
            before, self._offers = self._offers, {}
            for instruction in (*beside, *instructions):
                known = before.get(instruction.client_id)
                if known is None or known.instruction != instruction:
                    self._number += 1
                    known = Offer(self._number, instruction)
                self._offers[instruction.client_id] = known
            asked = {instruction.client_id for instruction in instructions}
            # The answer of one who is asked the same as before may have come after the store was last looked at.
            same = {client for client in asked if before.get(client) == self._offers[client]}
            self._replies = deque(one for one in self._replies if one.update is not None and one.client_id in same)
            self._answered = {one.client_id for one in self._replies}
            self._waiting = asked - self._answered
            self._begun = True
            self._changed.notify_all()

    def replies(self, until_s: float | None) -> Iterable[Reply]:
        """Replies as they arrive, until everyone has answered or the time is over; `Stopped` if `end` was called."""
        return self.replies_while(until_s, lambda waiting: True)

    def replies_while(self, until_s: float | None, worth: Callable[[frozenset[str]], bool]) -> Iterable[Reply]:
        """As `replies`, and only while it is worth waiting for those who have not answered.

        Args:
            until_s: Longest wait, or None.
            worth: The clients waited for to whether to go on.

        Yields:
            Replies.

        Raises:
            Stopped: If `end` was called.
        """
        deadline = None if until_s is None else self._clock.monotonic() + until_s
        while True:
            with self._changed:
                while not self._replies:
                    self._go_on()
                    left = 1.0 if deadline is None else min(1.0, deadline - self._clock.monotonic())
                    if not self._waiting or left <= 0 or not worth(frozenset(self._waiting)):
                        return
                    began = self._clock.monotonic()
                    self._changed.wait(self._clock.real(left))
                    if deadline is not None:
                        deadline += self._asleep_s(self._clock.monotonic() - began - left)
                reply = self._replies.popleft()
            yield reply

    def wait(self, seconds: float) -> None:
        """Wait for a change, at most so long; `Stopped` if `end` was called."""
        with self._changed:
            self._go_on()
            self._changed.wait(self._clock.real(seconds))
            self._go_on()

    def _asleep_s(self, excess_s: float) -> float:
        """How long this process, or its machine, was stopped in a wait: nobody could answer, so no deadline ran."""
        return excess_s if self._clock.real(excess_s) > _HICCUP_S else 0.0

    def _go_on(self) -> None:
        if self._fault is not None:
            raise self._fault
        if self._ending:
            raise Stopped(self._ending)

    # The service's side.

    def current(self, client_id: str) -> Offer | None:
        """What a client is asked now, or None."""
        with self._changed:
            return self._offers.get(client_id)

    def unanswered(self, client_id: str) -> Offer | None:
        """What a client is asked now and has not answered, or None."""
        with self._changed:
            return self._newer(client_id, 0)

    @property
    def begun(self) -> bool:
        """Whether anyone was asked anything since this process began."""
        with self._changed:
            return self._begun

    def await_offer(self, client_id: str, after: int, seconds: float) -> Offer | None:
        """An offer newer than number `after`, or None when so long has passed."""
        with self._changed:
            if (offer := self._newer(client_id, after)) is None:
                self._changed.wait(self._clock.real(seconds))
                offer = self._newer(client_id, after)
            return offer

    def _newer(self, client_id: str, after: int) -> Offer | None:
        """One that was answered is not put out again to a client that dials anew."""
        offer = self._offers.get(client_id)
        return None if offer is None or offer.number <= after or client_id in self._answered else offer

    def deliver(self, reply: Reply, about: Instruction | None = None) -> None:
        """Hand a reply to the round loop, unless it is about something that is over.

        Args:
            reply: What came. One without an update is dropped where nobody waits for the client any more.
            about: What it answers; None for whatever the client is asked now.
        """
        client = reply.client_id
        with self._changed:
            offer = self._offers.get(client)
            if offer is None or about not in (None, offer.instruction):
                return
            if reply.update is None and client not in self._waiting:
                return
            self._replies.append(reply)
            self._waiting.discard(client)
            if not reply.trained:  # one that is started again needs the instruction for the sum that is to come
                self._answered.add(client)
            self._changed.notify_all()

    def end(self, why: str) -> None:
        """Make the round loop stop where it waits."""
        with self._changed:
            self._ending = why
            self._changed.notify_all()

    def fail(self, fault: Exception) -> None:
        """Make the round loop raise what the service cannot go on with."""
        with self._changed:
            self._fault = fault
            self._changed.notify_all()

    def poke(self) -> None:
        """Wake everyone who waits, to look again."""
        with self._changed:
            self._changed.notify_all()
