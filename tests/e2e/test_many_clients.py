"""Two hundred sites at once: the coordinator's memory does not grow with them, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lamina.server.store import run_directory
from tests import deployment

COUNT, RANK = 200, 32
MODULES = {f"layer{index}": (512, 512) for index in range(16)}
UPDATE_BYTES = 4 * RANK * 1024 * len(MODULES)
# What a coordinator of so many clients may take: interpreter, gRPC and numpy (about 100 MB), two threads a client, eight uploads
# of nine messages, 16 MB on their way down, and the global adapter in the copies that encoding and checkpoints make.
CONSTANT_BYTES = 340e6
# One layer's stack in float64: every client's columns and rows, or the dense sum where that is smaller, and work of its size.
STACK_BYTES = 8 * min(COUNT * RANK * 1024, 512 * 512) * 8


def peak_bytes(process: subprocess.Popen[bytes]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def test_two_hundred_clients_in_one_round(tmp_path: Path) -> None:
    if sys.platform != "linux":
        return
    spec_file, port, log = tmp_path / "spec.json", deployment.free_port(), tmp_path / "coordinator.log"
    spec_file.write_text(deployment.spec(MODULES).to_json())
    names = [f"site-{index}" for index in range(COUNT)]
    words = deployment.words(
        spec_file,
        "insecure=true",
        f"clients.count={COUNT}",
        f"clients.names=[{','.join(names)}]",
        f"clients.ranks={RANK}",
        "rounds=2",
        "wire.heartbeat_s=10",
        "clients.deadline_s=300",
    )
    process = deployment.start_coordinator(tmp_path / "run", port, words, log)
    try:
        deployment.wait_for(log, "listening")
        sites = [deployment.in_thread(deployment.agent(name, port, tmp_path / name)) for name in names]
        deployment.wait_for(log, "round", 300, count=2)
        peak = peak_bytes(process)
        for thread, outcome in sites:
            thread.join(60)
            assert outcome == [0]
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(10)
    records = run_directory.read_records(tmp_path / "run")
    assert [len(record["clients"]) for record in records] == [COUNT, COUNT]
    assert all(record["rejections"] == [] for record in records)
    # All updates of a round are 420 MB: they cannot have been in memory together.
    assert COUNT * UPDATE_BYTES > CONSTANT_BYTES + STACK_BYTES
    assert peak < CONSTANT_BYTES + STACK_BYTES, f"{peak / 1e6:.0f} MB"
