"""How an audit shows what it is doing: a line for each part, and a bar where there is a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Telling:
    """Progress of an audit.

    Args:
        console: Where to.
        parts: How many parts there will be.
    """

    def __init__(self, console: Console, parts: int) -> None:
        self._console, self._parts, self._number = console, parts, 0
        self._started, self._progress = time.monotonic(), None  # type: float, Progress | None

    def say(self, text: str) -> None:
        """A line worth reading."""
        self._console.print(text, style="dim", highlight=False, markup=False)

    def begin(self, part: str, what: str) -> Callable[[int, int], None]:
        """A part begins; the one before it ends.

        Args:
            part: Its name.
            what: What it does, in words.

        Returns:
            To be called with what is done, and of how much.
        """
        self.end()
        self._number += 1
        self._started = time.monotonic()
        self._console.print(
            f"[{self._number}/{self._parts}] {part}: {what}", style="bold", highlight=False, markup=False
        )
        if not self._console.is_terminal:
            return lambda done, of: None
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
        bar = self._progress.add_task(part, total=None)
        self._progress.start()
        shown = self._progress
        return lambda done, of: shown.update(bar, completed=done, total=of)

    def done(self, text: str) -> None:
        """What the part found, in a line, with the time it took."""
        self.end()
        self.say(f"      {text} ({time.monotonic() - self._started:.0f} s)")

    def end(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
