"""Many rounds of a tiny adapter: memory of coordinator and client stays flat, and the store does not grow."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import deployment
from tests.runs import same_bits

NAMES = ("north", "south")


def resident_bytes(process: subprocess.Popen[bytes]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def stored_bytes(run: Path) -> int:
    """All of the run directory but the two files that gain lines by design."""
    growing = ("rounds.jsonl", "events.jsonl")
    sizes = 0
    for folder, _, files in os.walk(run):  # unlike rglob, it does not mind what is replaced while it looks
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                sizes += os.stat(os.path.join(folder, name)).st_size if name not in growing else 0
    return sizes


def soak(tmp_path: Path, rounds: int) -> None:
    spec_file, port, log = tmp_path / "spec.json", deployment.free_port(), tmp_path / "coordinator.log"
    spec_file.write_text(deployment.spec().to_json())
    who = deployment.certificates(tmp_path / "pki", NAMES)
    words = deployment.words(
        spec_file,
        f"coordinator.identity={who['coordinator']}",
        f"clients.names=[{','.join(NAMES)}]",
        f"clients.count={len(NAMES)}",
        "clients.ranks=[3,2]",
        f"rounds={rounds}",
        "strategy=stack",
    )
    coordinator = deployment.start_coordinator(tmp_path / "run", port, words, log)
    processes = {"coordinator": coordinator}
    try:
        deployment.wait_for(log, "listening")
        for name in NAMES:
            site_log = tmp_path / f"{name}.log"
            processes[name] = deployment.start_site(name, port, tmp_path / name, site_log, who[name])
        resident: dict[str, list[int]] = {name: [] for name in processes}
        stored: list[int] = []
        seen = 0
        while seen < rounds and coordinator.poll() is None:
            done = log.read_text().count('"event": "round"')
            if done > seen:
                seen = done
                stored.append(stored_bytes(tmp_path / "run"))
                for name, process in processes.items():
                    if process.poll() is None:
                        resident[name].append(resident_bytes(process))
            time.sleep(0.01)
        assert coordinator.wait(60) == 0
        assert [processes[name].wait(60) for name in NAMES] == [0, 0]
    finally:
        for process in processes.values():
            process.kill()
            process.wait(10)
    assert same_bits(deployment.final(tmp_path / "run"), deployment.fault_free(words))
    for name, values in resident.items():
        first, last = _thirds(values)
        # Python and gRPC settle over the first rounds; what remains of the noise is well below this.
        assert last - first < 1.5e6, f"{name}: {first / 1e6:.1f} to {last / 1e6:.1f} MB over {len(values)} samples"
    first, last = _thirds(stored)
    assert last < first + 250_000, f"store: {first} to {last} bytes"
    # Of the two rounds that a restart may need: an update and a release of two parts for each client; and the spec.
    blobs = [path for path in (tmp_path / "run" / "blobs").rglob("*") if path.is_file()]
    assert len(blobs) <= 2 * 3 * len(NAMES) + 1
    lines = (tmp_path / "run" / "events.jsonl").stat().st_size + (tmp_path / "run" / "rounds.jsonl").stat().st_size
    assert lines / rounds < 16_000, "bytes of records and events a round"


def _thirds(values: list[int]) -> tuple[float, float]:
    """Medians of the second and the last third."""
    third = len(values) // 3
    return statistics.median(values[third : 2 * third]), statistics.median(values[-third:])


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_sixty_rounds(tmp_path: Path) -> None:
    soak(tmp_path, 60)


@pytest.mark.long
def test_two_hundred_rounds(tmp_path: Path) -> None:
    soak(tmp_path, 200)
