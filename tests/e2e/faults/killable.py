"""A coordinator or a site that kills itself, as by `kill -9`, at a chosen call of a chosen function.

`python -m tests.e2e.faults.killable POINT coordinator …` or `… POINT site SETTINGS`; POINT is a `Point` as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lamina import __main__ as lamina
from tests import deployment

SLOW_S = 3.0


@dataclass(frozen=True)
class Point:
    """When to die.

    Attributes:
        target: `module:function` or `module:Class.method`, patched where it is looked up.
        when: `before` the call, `after` it, or `torn`: half of its last argument, a text, is appended to the file first.
            With `slow` nobody dies: the call comes `SLOW_S` later.
        count: Which call, from 1.
        holding: Only calls count whose arguments, written out, contain this.
    """

    target: str
    when: str
    count: int = 1
    holding: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """What starts a process that dies here."""
        return ("-m", "tests.e2e.faults.killable", json.dumps(asdict(self)))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: Point) -> None:
    """Patch the function."""
    module, _, path = point.target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    inner: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def patched(*given: Any, **named: Any) -> Any:
        nonlocal calls
        counts = not point.holding or point.holding in " ".join(map(str, given))
        calls += counts
        now = counts and calls == point.count
        if now and point.when == "before":
            die()
        if now and point.when == "slow":
            time.sleep(SLOW_S)
        if now and point.when == "torn":
            file, text = given
            with open(file, "a") as half:
                half.write(text[: len(text) // 2])
            die()
        found = inner(*given, **named)
        if now and point.when == "after":
            die()
        return found

    setattr(owner, name, patched)


def main(arguments: Sequence[str]) -> int:
    point, what, *rest = arguments
    if point:
        arm(Point(**json.loads(point)))
    return deployment.main([what, *rest]) if what == "site" else lamina.main([what, *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
