"""The clock that time-outs, deadlines and waits go by. A test may run it faster than the world's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True)
class Clock:
    """Seconds as the program counts them.

    Attributes:
        rate: Of its seconds that pass in one of the world's.
        ahead_s: How far its wall clock is ahead of the world's.
    """

    rate: float = 1.0
    ahead_s: float = 0.0

    def monotonic(self) -> float:
        """Seconds since some moment."""
        return time.monotonic() * self.rate

    def now(self) -> datetime:
        """Wall time, UTC."""
        return datetime.fromtimestamp(time.time() + self.ahead_s, UTC)

    def real(self, seconds: float) -> float:
        """The world's seconds in so many of this clock's, for a library's time-out."""
        return seconds / self.rate

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(self.real(seconds))


SYSTEM = Clock()
