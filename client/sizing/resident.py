"""Resident memory of this process: now, and at its peak since a moment that can be set."""

from __future__ import annotations

import re
from pathlib import Path

from lamina.protos.errors import ConfigError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """Let the peak begin anew; nothing where the system does not offer it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def resident_bytes() -> int:
    """What is resident now.

    Returns:
        Bytes.

    Raises:
        ConfigError: If the system does not say.
    """
    return _field("VmRSS")


def peak_bytes() -> int:
    """The most that was resident since `forget_peak`, or since the process began.

    Returns:
        Bytes.

    Raises:
        ConfigError: If the system does not say.
    """
    return _field("VmHWM")


def _field(name: str) -> int:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is None:
        raise ConfigError("memory: this system does not say what a process holds. Measuring needs Linux.")
    return int(found[1]) * 1024
