"""A coordinator and three sites over gRPC with certificates, all in this process: the same bits as in memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.protos.link import Link
from lamina.server.store import run_directory
from tests import deployment
from tests.runs import same_bits


@pytest.mark.parametrize("strategy", ["recompress", "residual", "stack", "ffa", "alternate", "core"])
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


def test_each_factor_is_fetched_once_after_it_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `alternate` a release names both factors, and a site that was there a round ago fetches the newer one."""
    fetched: list[tuple[str, str]] = []
    stream = Link.stream

    def listening(self: Link, method: str, request: Any, *more: Any, **named: Any) -> Iterator[Any]:
        if method == "Download":
            fetched.append((threading.current_thread().name, request.sha256))
        return stream(self, method, request, *more, **named)

    monkeypatch.setattr(Link, "stream", listening)
    spec_file = tmp_path / "spec.json"
    spec_file.write_text(deployment.spec().to_json())
    words = deployment.words(spec_file, "strategy=alternate", "insecure=true", "rounds=5")
    with deployment.coordinator(tmp_path / "run", words) as running:
        agents = [deployment.agent(name, running.port, tmp_path / name) for name in deployment.NAMES]
        sites = [deployment.in_thread(one) for one in agents]
        assert running.join() == 0
        for thread, outcome in sites:
            thread.join(20)
            assert outcome == [0]
    assert same_bits(deployment.final(running.path), deployment.fault_free(words))
    assert max(Counter(fetched).values()) == 1
    # The schema, and one part for each of the versions 0 to 5: the last is measured, not trained from.
    assert set(Counter(thread for thread, _ in fetched).values()) == {7}
