"""A coordinator and three sites over gRPC with certificates, all in this process: the same bits as in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina.server.store import run_directory
from tests import deployment
from tests.runs import same_bits


@pytest.mark.parametrize("strategy", ["recompress", "residual", "stack"])
@pytest.mark.parametrize("secure", [True, False])
def test_the_adapter_is_that_of_a_run_in_memory(tmp_path: Path, strategy: str, secure: bool) -> None:
    spec_file = tmp_path / "spec.json"
    spec_file.write_text(deployment.spec().to_json())
    who = deployment.certificates(tmp_path / "pki") if secure else {}
    trust = f"coordinator.identity={who['coordinator']}" if secure else "insecure=true"
    words = deployment.words(spec_file, f"strategy={strategy}", trust, "keep_updates=true")
    with deployment.coordinator(tmp_path / "run", words) as running:
        sites = [
            deployment.in_thread(deployment.agent(name, running.port, tmp_path / name, who.get(name)))
            for name in deployment.NAMES
        ]
        assert running.join() == 0
        for thread, outcome in sites:
            thread.join(20)
            assert outcome == [0]
    assert same_bits(deployment.final(running.path), deployment.fault_free(words))
    records = run_directory.read_records(running.path)
    assert [record["clients"] for record in records] == [sorted(deployment.NAMES)] * 3
    assert all(record["rejections"] == [] for record in records)
    # 20 / (1 + round) nats over 10 targets.
    assert [record["loss"] for record in records] == pytest.approx([1.0, 2 / 3, 0.5])
