"""The report pages of deployments, of runs that were stopped, and the figures at their head."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lamina.server.report import load_run, render
from tests.unit.test_report import a_round, a_summary, page_of, write_run


def test_a_deployments_page_does_not_name_settings_that_the_sites_decide(tmp_path: Path) -> None:
    settings = a_summary()
    settings["eval"]["view"] = "release"
    run = write_run(tmp_path / "run", settings, config="data:\n  source: stdlib\n")
    before = render([load_run(run)]).partition("Resolved configuration")[0]
    assert "own data" in before
    assert "stdlib" not in before


def deployed(tmp_path: Path, name: str = "run", **changed: Any) -> Path:
    summary = a_summary(**changed)
    summary["eval"]["view"] = "release"
    rejections = [
        {"client_id": "c", "reason": "failed", "code": "revoked"},
        {"client_id": "b", "reason": "failed", "code": "out-of-memory"},
        {"client_id": "b", "reason": "norm"},
    ]
    rounds = [a_round(1, clients=["a", "c"]), a_round(2, clients=["a"], rejections=rejections)]
    return write_run(tmp_path / name, summary, rounds, "rounds: 50\nseed: 0\n")


def test_a_stopped_run_says_so_and_who_was_not_there(tmp_path: Path) -> None:
    ranks = {"a": 8, "b": 16, "c": 4}
    gone = {"c": "revoked", "d": "left", "e": "absent"}
    text = page_of(deployed(tmp_path, ended="stopped", gone=gone, client_ranks=ranks)).text
    for shown in (
        "recompress, 2 of 50 rounds",
        "An operator stopped the run after 2 of 50 rounds.",
        "Site c had its certificate revoked; its updates count in 1 round.",
        "Site d left the run; its updates count in 0 rounds.",
        "Site e never came.",
        "No update of b counts in any round.",
    ):
        assert shown in text
    plain = page_of(write_run(tmp_path / "plain", a_summary(ended="finished"))).text
    assert "stopped" not in plain
    assert "never came" not in plain


def test_an_update_that_did_not_count_has_its_own_reason(tmp_path: Path) -> None:
    text = page_of(deployed(tmp_path)).text
    for shown in ("certificate revoked", "failed at the client: out-of-memory", "refused: norm"):
        assert shown in text
    assert "1 revoked, 1 failed, 1 refused" in text
    assert "no update refused" in page_of(write_run(tmp_path / "plain")).text


def test_provenance_names_time_version_base_coordinator_and_log(tmp_path: Path) -> None:
    facts: dict[str, Any] = {
        "ended_at": "2026-11-25T14:33:12+00:00",
        "versions": {"lamina": "0.1.0"},
        "base": {"model": "tiny", "weights": "1f" * 32},
        "coordinator": "hub",
        "consortium": "hospitals",
        "log": {"n": 37, "hash": "ab" * 32},
    }
    text = page_of(deployed(tmp_path, **facts)).text
    for shown in ("2026-11-25 14:33:12 UTC", "0.1.0", "1f" * 32, "hub", "hospitals", f"record 37, {'ab' * 32}"):
        assert shown in text
    assert "what each site received, cut to its rank" in text
    assert "the whole adapter" in page_of(write_run(tmp_path / "plain")).text


def test_numbers_of_a_tile_have_as_many_places_and_times_say_whose(tmp_path: Path) -> None:
    seconds = {"total": 177.0, "train": 233.0, "aggregate": 0.0924, "evaluate": 1.0}
    summary = a_summary(seconds=seconds)
    summary["eval"] |= {"base_loss": 5.1, "final_loss": 4.1235}
    text = page_of(write_run(tmp_path / "run", summary)).text
    assert "train 3 min 53 s over all clients, aggregate 0.1 s, evaluate 1.0 s" in text
    assert f"perplexity {math.exp(5.1):.1f} → {math.exp(4.1235):.1f}" in text


def test_tiles_fill_their_rows(tmp_path: Path) -> None:
    page = render([load_run(write_run(tmp_path / "run"))])
    tiles = page[page.index('<dl class="figures') : page.index("</dl>")]
    assert tiles.startswith('<dl class="figures">')
    assert tiles.count("<dt>") == 8
    summary = a_summary()
    summary["eval"] |= {"base_accuracy": 0.5, "final_accuracy": 0.75}
    page = render([load_run(write_run(tmp_path / "accurate", summary))])
    tiles = page[page.index('<dl class="figures') : page.index("</dl>")]
    assert tiles.startswith('<dl class="figures by3">')
    assert tiles.count("<dt>") == 9


def test_a_comparison_says_which_losses_are_of_what_and_leaves_out_what_sites_decide(tmp_path: Path) -> None:
    site = deployed(tmp_path, "first")
    rehearsal = write_run(tmp_path / "rehearsal", config="rounds: 3\nseed: 0\ndata: {source: all.jsonl}\n")
    text = page_of(site, rehearsal).text
    assert "those of first are of what each site received, cut to its rank, the others of the whole adapter" in text
    differing = text[text.index("The settings in which the runs differ") :]
    assert "rounds" in differing
    assert "data.source" not in differing
    assert "measured alike" not in page_of(rehearsal, write_run(tmp_path / "other")).text
