"""Resident memory of this process: now, and at its peak since a moment that can be set."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lamina.protos.errors import ConfigError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak(device: str = "cpu") -> None:
    """Let the peak begin anew; nothing where the system does not offer it.

    Args:
        device: Kind of the device whose memory is meant.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
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


def now() -> int:
    """What is resident now.

    Returns:
        Bytes, 0 where the system does not say.
    """
    try:
        return resident_bytes()
    except ConfigError:
        return 0


def peak(device: str) -> int:
    """The most that was held since `forget_peak`.

    Args:
        device: Kind of the device whose memory is meant.

    Returns:
        Bytes: of this process, or on a CUDA device what was reserved there; 0 where nothing says it.
    """
    if device == "cuda":
        return int(torch.cuda.max_memory_reserved())
    try:
        return peak_bytes() if device == "cpu" else 0
    except ConfigError:
        return 0


def _field(name: str) -> int:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is None:
        raise ConfigError("memory: this system does not say what a process holds. Measuring needs Linux.")
    return int(found[1]) * 1024
