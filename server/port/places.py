"""Places for uploads: how many may send at one time, so that what is on its way in does not fill memory. A place is kept while
bytes come; one whose bytes come too slowly goes on without it, and takes nobody else's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lamina.protos.clock import Clock

# A place is kept for so long without a byte, and for so many bytes a second.
PATIENCE_S, LEAST_PER_S = 5.0, 256 * 1024
_LOOK_S = 0.5


class Place:
    """One upload's place.

    Args:
        clock: For its patience.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.until = clock.monotonic() + PATIENCE_S

    def came(self, num_bytes: int) -> None:
        """Keep the place for longer."""
        self.until = min(self.until + num_bytes / LEAST_PER_S, self._clock.monotonic() + PATIENCE_S)


class Places:
    """All places of a port.

    Args:
        count: How many.
        clock: For patience.
    """

    def __init__(self, count: int, clock: Clock) -> None:
        self._count, self._clock = count, clock
        self._taken: set[Place] = set()
        self._changed = threading.Condition()

    @contextmanager
    def one(self, context: Any) -> Iterator[Place | None]:
        """A place, once one is free or its holder is too slow.

        Args:
            context: Of the call that waits.

        Yields:
            The place; None where the caller has hung up meanwhile.
        """
        place = self._wait(context)
        try:
            yield place
        finally:
            with self._changed:
                if place in self._taken:
                    self._taken.remove(place)
                    self._changed.notify()

    def _wait(self, context: Any) -> Place | None:
        with self._changed:
            while context.is_active():
                now = self._clock.monotonic()
                self._taken = {place for place in self._taken if len(self._taken) < self._count or place.until > now}
                if len(self._taken) < self._count:
                    place = Place(self._clock)
                    self._taken.add(place)
                    return place
                self._changed.wait(self._clock.real(_LOOK_S))
        return None
