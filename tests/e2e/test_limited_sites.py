"""Sites under real limits of memory, as processes: each within its own, formats mixed, nothing refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")


@pytest.mark.long
def test_four_sites_train_within_what_they_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    from benchmarks import fleet

    monkeypatch.setattr(fleet, "CACHE", tmp_path)
    runs = fleet.measure(fleet.QUICK)
    sites = runs["sized"]["sites"]
    assert {one["format"] for one in sites.values()} >= {"fp32", "nf4"}
    for one in sites.values():
        assert not one["limit_bytes"] or one["took_bytes"] <= one["limit_bytes"]
        assert one["micro_batch"] * one["accumulation"] == fleet.BATCH
    assert [run["rejections"] for run in runs.values()] == [0, 0, 0]
    found = fleet.figures(runs)
    assert found["excess_over_full"] <= fleet.BOUNDS["excess_over_full"]
