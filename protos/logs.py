"""Structured logs: one JSON object a line on standard error, or plain lines where a person is watching.

Fields are names, numbers and codes; never a row of data, a key, or text that a client chose.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

Log = Callable[..., None]


def json_log(now: Callable[[], datetime]) -> Log:
    """A log of JSON lines.

    Args:
        now: The clock.

    Returns:
        `log(event, **fields)`.
    """
    lock = threading.Lock()

    def log(event: str, **fields: Any) -> None:
        line = json.dumps({"time": now().isoformat(timespec="milliseconds"), "event": event, **fields}, default=str)
        with lock:
            print(line, file=sys.stderr, flush=True)

    return log


def plain_log() -> Log:
    """A log for a person at a terminal.

    Returns:
        `log(event, **fields)`.
    """
    lock = threading.Lock()

    def log(event: str, **fields: Any) -> None:
        said = "  ".join(f"{key} {_short(value)}" for key, value in fields.items() if value is not None)
        with lock:
            print(f"{event:<12} {said}", file=sys.stderr, flush=True)

    return log


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "-"
    return str(value)
