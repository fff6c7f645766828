"""A real limit on what a process takes beyond what it holds when the limit is set; whoever exceeds it is ended.

A process sets it on itself after its imports, and its parent clears up with `release` when it has ended. Two things hold at once:
a bound of the system's on what is allocated, and a thread that looks at what is resident, mapped files included. The first is a
control group where one can be made, version 1 or 2, below the process's own; only what is touched from now on is charged to it.
Elsewhere it is RLIMIT_DATA, under which an allocation fails.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from lamina.client.hardware import groups, status_bytes, upward
from lamina.protos.errors import ConfigError

CONTROL_GROUP, DATA_LIMIT = "control group", "RLIMIT_DATA"
_MOUNT, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_LOOK_S = 0.01
_LEAVE_S = 5.0


def limit_increment(num_bytes: int) -> str:
    """Let this process take so much more than it holds now, and end it (SIGKILL) when it takes more.

    Args:
        num_bytes: At least 1.

    Returns:
        What holds beside the thread that looks at resident memory: `control group` or `RLIMIT_DATA`.

    Raises:
        ConfigError: If the number is none, or the system is not Linux.
    """
    if num_bytes < 1:
        raise ConfigError(f"memory limit: expected at least 1 byte, got {num_bytes}.")
    before = status_bytes("VmRSS")
    if before is None:
        raise ConfigError("memory limit: this system does not say what a process holds. A limit needs Linux.")
    watch = threading.Thread(target=_watch, args=(before + num_bytes, num_bytes), name="memory-limit", daemon=True)
    watch.start()  # first, as its stack counts as data
    if _joined(os.getpid(), num_bytes):
        return CONTROL_GROUP
    import resource

    data = status_bytes("VmData") or 0
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = data + num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))
    return DATA_LIMIT


def release(pid: int) -> None:
    """Remove what `limit_increment` left of a process that has ended; nothing where it made no control group.

    Args:
        pid: Of a child of this process.
    """
    for _, folder in _folders(pid):
        end = time.monotonic() + _LEAVE_S
        while folder.is_dir():
            try:
                folder.rmdir()
            except OSError:  # still emptied by the system
                if time.monotonic() > end:
                    break
                time.sleep(0.02)


def _watch(most: int, num_bytes: int) -> None:
    while True:
        if (status_bytes("VmRSS") or 0) > most:
            os.write(2, f"memory limit: more than {num_bytes} bytes beyond the imports\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(_LOOK_S)


def _sweep(parent: Path) -> None:
    """Remove the groups of processes that have ended and whose parents could not, as they were ended too."""
    for folder in parent.glob("lamina-*"):
        number = folder.name.removeprefix("lamina-")
        if number.isdecimal() and not Path("/proc", number).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _folders(pid: int) -> list[tuple[int, Path]]:
    """Version and folder of the groups that may be made for a process, below that of whoever asks."""
    found = []
    for version, path in sorted(groups(_MEMBERSHIP, "memory")):
        mount = _MOUNT if version == 2 else _MOUNT / "memory"
        if version == 1 or (mount / "cgroup.controllers").is_file():
            found.append((version, upward(mount, path)[0] / f"lamina-{pid}"))
    return found


def _joined(pid: int, num_bytes: int) -> bool:
    """Whether a process is in a control group of its own with the limit; nothing is left if not."""
    for version, folder in _folders(pid):
        _sweep(folder.parent)
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if version == 1:
                (folder / "memory.limit_in_bytes").write_text(str(num_bytes))
                swap = folder / "memory.memsw.limit_in_bytes"
            else:
                (folder / "memory.max").write_text(str(num_bytes))
                swap = folder / "memory.swap.max"
            with contextlib.suppress(OSError):  # not every system counts swap
                if swap.exists():
                    swap.write_text(str(num_bytes if version == 1 else 0))
            (folder / "cgroup.procs").write_text(str(pid))
            return True
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
    return False
