"""The open calls of each caller: how many one may have, one stream of a kind at a time, and an end to those that stand still.

No caller can take the port away from the others: neither with many calls, nor with uploads that never come, nor with calls that
were opened before its certificate was revoked. There is a thread for every call that all sites may have open together, and
apart from these for everyone else's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lamina.protos.clock import SYSTEM, Clock

# A site has three open at most: instructions, a sign of life, and an adapter down or up or a step of a secure sum; and each of
# these dialled again.
MOST = 6
# One operator, auditor or whoever else is no site; all of these together; and calls that are just being refused.
_ONE_OTHER, _OTHERS, _REFUSED = 16, 48, 32
STALL_S = 240.0
_REVOKED_S = 2.0


@dataclass(eq=False)
class Call:
    """One open call.

    Attributes:
        name: The caller's.
        serial: Of its certificate.
        context: Of the call.
        sends: Whether the caller sends a stream.
        site: Whether the caller is a client of the run.
        single: The method, where a newer call of it ends this one; otherwise empty.
        waits_since: When the handler began to wait for the caller's next message, or None while it does not.
    """

    name: str
    serial: int
    context: Any
    sends: bool
    site: bool = True
    single: str = ""
    waits_since: float | None = None


def threads(sites: int) -> int:
    """Enough for every call that may be open at one time.

    Args:
        sites: Clients of the run.

    Returns:
        How many.
    """
    return 2 * MOST * sites + _OTHERS + _REFUSED


class Calls:
    """All open calls of a port.

    Args:
        clock: For calls that stand still.
        most: Calls that one site may have open, beside as many that are over and whose threads have yet to notice.
        stall_s: Longest wait for the next message of a stream.
    """

    def __init__(self, clock: Clock = SYSTEM, most: int = MOST, stall_s: float = STALL_S) -> None:
        self._clock, self._most, self._stall_s = clock, most, stall_s
        self._open: dict[str, set[Call]] = {}
        self._doubled: set[str] = set()
        self._lock = threading.Lock()

    @contextmanager
    def counted(self, call: Call) -> Iterator[bool]:
        """A call while it is open. A site's earlier stream of the kind ends: it has come back on another connection.

        Args:
            call: Which.

        Yields:
            Whether its caller may have one more.
        """
        with self._lock:
            others = self._open.setdefault(call.name, set())
            alive = [one for one in others if one.context.is_active()]
            before = [one for one in alive if one.single and one.single == call.single]
            if call.site:
                allowed = len(alive) - len(before) < self._most and len(others) < 2 * self._most
            else:
                beside = sum(not one.site for calls in self._open.values() for one in calls)
                allowed = len(others) < _ONE_OTHER and beside < _OTHERS
            if allowed:
                others.add(call)
                self._doubled.update(one.name for one in before if one.single.endswith("/Instructions"))
        try:
            if allowed:
                for one in before:
                    one.context.cancel()
            yield allowed
        finally:
            with self._lock:
                others.discard(call)
                if not others:
                    self._open.pop(call.name, None)

    def doubled(self) -> set[str]:
        """Sites that have opened another stream of instructions beside a live one, since this was last asked."""
        with self._lock:
            found, self._doubled = self._doubled, set()
        return found

    def watched(self, call: Call, messages: Iterator[Any]) -> Iterator[Any]:
        """The messages of a caller's stream, with note of when the next one is waited for.

        Args:
            call: Whose.
            messages: As they come.

        Yields:
            The same.
        """
        while True:
            call.waits_since = self._clock.monotonic()
            try:
                message = next(messages, None)
            finally:
                call.waits_since = None
            if message is None:
                return
            yield message

    def sweep(self, is_revoked: Callable[[int], bool]) -> None:
        """End the calls whose next message does not come, and those of callers that are revoked.

        Args:
            is_revoked: Serial number of a certificate to whether it is revoked.
        """
        now = self._clock.monotonic()
        with self._lock:
            calls = [call for others in self._open.values() for call in others]
        for call in calls:
            since = call.waits_since
            # Those whose messages come are told by their handlers why they end.
            patience = _REVOKED_S if is_revoked(call.serial) else self._stall_s
            if since is not None and now - since > patience:
                call.context.cancel()
