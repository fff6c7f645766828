"""What this machine is to training: its device, the memory that is free on it, its cores, and what its processor can multiply.

Nothing of a profile leaves the site; the plan that is made from it shows only its ranks and its number format.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lamina.protos.errors import ConfigError, shown

if TYPE_CHECKING:
    import torch

KINDS = ("cuda", "rocm", "xpu", "mps", "cpu")
# Of a processor: names as in /proc/cpuinfo. They decide which number formats it multiplies fast.
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
_UNITS = {"": 1, "B": 1, "K": 2**10, "KB": 10**3, "KIB": 2**10, "M": 2**20, "MB": 10**6, "MIB": 2**20}
_UNITS |= {"G": 2**30, "GB": 10**9, "GIB": 2**30, "T": 2**40, "TB": 10**12, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?(?:i?B)?)\s*", re.IGNORECASE)
_WHAT_IF = re.compile(r"(cuda|rocm|xpu|mps|cpu)(\d+\.\d+)?:([^:,]+)(?:,cores=(\d+))?", re.IGNORECASE)


@dataclass(frozen=True)
class Speed:
    """How fast a training step is, measured.

    Attributes:
        fixed_s: Seconds of a step without a token.
        token_s: Seconds of a token.
    """

    fixed_s: float
    token_s: float


@dataclass(frozen=True)
class Profile:
    """A device and what it can hold.

    Attributes:
        kind: `cuda`, `rocm`, `xpu`, `mps` or `cpu`.
        name: For a person.
        total_bytes: Memory of the device, within the limits that this process is under.
        free_bytes: Of it, what training may take: what this process holds already is not in it.
        cores: That this process may use.
        capability: Of a CUDA device, such as (8, 0); None for others.
        features: Of a processor, of `FEATURES`.
        speeds: Measured, by number format.
        overhead_bytes: Measured beyond what the memory model counts, by number format.
        failed: Number formats that failed their self-test here.
    """

    kind: str
    name: str
    total_bytes: int
    free_bytes: int
    cores: int = 1
    capability: tuple[int, int] | None = None
    features: tuple[str, ...] = ()
    speeds: Mapping[str, Speed] = field(default_factory=dict)
    overhead_bytes: Mapping[str, int] = field(default_factory=dict)
    failed: tuple[str, ...] = ()


def num_bytes(text: str, where: str) -> int:
    """A size as people write it.

    Args:
        text: Such as `24GiB`, `300MB` or `1073741824`.
        where: For the message.

    Returns:
        Bytes.

    Raises:
        ConfigError: If it is no size.
    """
    found = _SIZE.fullmatch(text)
    number = float(found[1]) * _UNITS[found[2].upper()] if found is not None and len(text) < 40 else 0.0
    if number < 1:
        raise ConfigError(f"{where}={shown(text)}: expected a size such as 24GiB, 300MB or a number of bytes.")
    return int(number)


def size(num_bytes: float) -> str:
    """Bytes for a person.

    Args:
        num_bytes: How many.

    Returns:
        Such as `1.4 GB`.
    """
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def what_if(text: str) -> Profile:
    """The profile of a machine that is not here.

    Args:
        text: `KIND:FREE_MEMORY`, such as `cuda:24GiB`, `cuda7.5:16GiB`, `cpu:4GiB,cores=8`. A CUDA device without a capability
            is taken for 8.0, a CPU for one with AVX2 alone.

    Returns:
        A profile with nothing measured.

    Raises:
        ConfigError: If it is not that.
    """
    found = _WHAT_IF.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"--what-if={text}: expected KIND:MEMORY with one of {', '.join(KINDS)}, such as cuda:24GiB, cuda7.5:16GiB or "
            "cpu:4GiB,cores=8."
        )
    kind, free = found[1].lower(), num_bytes(found[3], "--what-if")
    if found[2] and kind != "cuda":
        raise ConfigError(f"--what-if={text}: expected a capability for cuda alone, such as cuda8.0:24GiB.")
    capability = None
    if kind == "cuda":
        major, minor = (found[2] or "8.0").split(".")
        capability = (int(major), int(minor))
    if found[4] and int(found[4]) < 1:
        raise ConfigError(f"--what-if={text}: expected at least one core.")
    features = ("avx2",) if kind == "cpu" else ()
    return Profile(kind, text.strip(), free, free, int(found[4] or 1), capability, features)


def pick_device(name: str) -> torch.device:
    """The device to train on.

    Args:
        name: `auto` takes cuda, xpu, mps or cpu, the first there is.

    Returns:
        A torch device.

    Raises:
        ConfigError: If the device asked for is not there.
    """
    import torch

    present = {
        "cuda": torch.cuda.is_available(),
        "xpu": torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return torch.device(next((kind for kind, there in present.items() if there), "cpu"))
    if not present.get(name, name == "cpu"):
        raise ConfigError(
            f"train.device={name}: expected a device that is here, got none. Set train.device=cpu or auto."
        )
    return torch.device(name)


def profile(device: str = "auto") -> Profile:
    """Profile this machine.

    Args:
        device: `auto` takes the first accelerator there is; else `cuda`, `xpu`, `mps` or `cpu`.

    Returns:
        Its profile, with nothing measured.

    Raises:
        ConfigError: If the device asked for is not here.
    """
    import torch

    kind = pick_device(device).type
    cores = usable_cores()
    if kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        if torch.version.hip:
            return Profile("rocm", name, total, free, cores)
        return Profile("cuda", name, total, free, cores, capability)
    if kind == "xpu":
        free, total = torch.xpu.mem_get_info()
        return Profile("xpu", torch.xpu.get_device_name(), total, free, cores)
    if kind == "mps":
        total = int(torch.mps.recommended_max_memory())
        return Profile("mps", "Apple GPU", total, total - int(torch.mps.driver_allocated_memory()), cores)
    total, free = host_memory()
    return Profile("cpu", processor(), total, free, cores, features=processor_features())


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and a control group's quota.

    Returns:
        At least 1.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cores(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return max(1, allowed if quota is None else min(allowed, round(quota)))


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Memory of this machine as this process may use it.

    Args:
        root: Of the file system; another one in tests.

    Returns:
        Total and free bytes: the machine's, or those of the control group or of the process's own limits where they are less.

    Raises:
        ConfigError: If the machine does not say.
    """
    machine = _machine_memory(root / "proc/meminfo")
    if machine is None:
        raise ConfigError(
            "memory: this machine does not say how much is free. Give it: `lamina plan --what-if cpu:8GiB`, or "
            "client.memory=8GiB."
        )
    total, free = machine
    limited = cgroup_memory(root / "sys/fs/cgroup", root / "proc/self/cgroup")
    for limit, used in limited + process_limits(root / "proc/self"):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def process_limits(folder: Path) -> list[tuple[int, int]]:
    """The limits on what this process may allocate: RLIMIT_DATA and RLIMIT_AS.

    Args:
        folder: Of the process in /proc.

    Returns:
        (limit, used) of each that there is. What is allocated counts, touched or not.
    """
    found = []
    for name, used in (("Max data size", "VmData"), ("Max address space", "VmSize")):
        limit = re.search(rf"^{name}\s+(\d+)\s", _text(folder / "limits"), re.MULTILINE)
        if limit is not None:
            found.append((int(limit[1]), status_bytes(used, folder / "status") or 0))
    return found


def status_bytes(name: str, status: Path = Path("/proc/self/status")) -> int | None:
    """What the system says of a process.

    Args:
        name: Such as `VmData`.
        status: The process's file.

    Returns:
        Bytes, or None where it does not say.
    """
    found = re.search(rf"^{name}:\s+(\d+) kB", _text(status), re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def _machine_memory(meminfo: Path) -> tuple[int, int] | None:
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if {"MemTotal", "MemAvailable"} <= lines.keys():
            total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
            return total, free
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
        return total, available * os.sysconf("SC_PAGE_SIZE") if available > 0 else total // 2
    return None


def cgroup_memory(mount: Path, membership: Path) -> list[tuple[int, int]]:
    """The memory limits of the control groups that this process is in, version 1 and 2, its own and those above it.

    Args:
        mount: Where control groups are mounted.
        membership: The process's list of them.

    Returns:
        (limit, used) of each group that has a limit. What a group's page cache holds of files is not counted as used, as it
        is given back on demand.
    """
    found = []
    for version, path in groups(membership, "memory"):
        base = mount if version == 2 else mount / "memory"
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        for folder in upward(base, path):
            limit, used = (_number(folder / name) for name in names)
            # Version 1 says "no limit" with the largest number of pages.
            if limit is not None and limit < 2**60:
                found.append((limit, max(0, (used or 0) - _reclaimable(folder / "memory.stat", version))))
    return found


def cgroup_cores(mount: Path, membership: Path) -> float | None:
    """The smallest quota of processor time of the control groups that this process is in.

    Args:
        mount: Where control groups are mounted.
        membership: The process's list of them.

    Returns:
        Cores, or None without a quota.
    """
    found = []
    for version, path in groups(membership, "cpu"):
        for folder in upward(mount if version == 2 else mount / "cpu", path):
            if version == 2:
                words = _text(folder / "cpu.max").split()
                if len(words) == 2 and words[0].isdigit() and int(words[1]):
                    found.append(int(words[0]) / int(words[1]))
            else:
                quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
                if quota is not None and quota > 0 and period:
                    found.append(quota / period)
    return min(found, default=None)


def groups(membership: Path, controller: str) -> list[tuple[int, str]]:
    """The control groups that a process is in.

    Args:
        membership: The process's list of them.
        controller: Such as `memory`.

    Returns:
        Version and path of each.
    """
    found = []
    for line in _text(membership).splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3 and parts[1] == "":
            found.append((2, parts[2]))
        elif len(parts) == 3 and controller in parts[1].split(","):
            found.append((1, parts[2]))
    return found


def upward(base: Path, path: str) -> list[Path]:
    """A group's folder and those above it.

    Args:
        base: Where groups are mounted.
        path: The group's, as the process's list names it.

    Returns:
        The folders, its own first. Within a container the path may be the host's; then the mount is the group.
    """
    folder = base / path.lstrip("/")
    if ".." in Path(path).parts or not folder.is_dir():
        return [base]
    return [folder, *(parent for parent in folder.parents if parent == base or base in parent.parents)]


def _reclaimable(stat: Path, version: int) -> int:
    name = "inactive_file" if version == 2 else "total_inactive_file"
    for line in _text(stat).splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def processor() -> str:
    """The processor's name."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def processor_features() -> tuple[str, ...]:
    """Those of `FEATURES` that the processor has."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            return tuple(name for name in FEATURES if name in flags)
    return ()
