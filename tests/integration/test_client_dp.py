"""client-dp with a model: who is asked, what is charged, and that noise alone is a round, too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lamina.protos.privacy import accounting
from lamina.protos.privacy.events import from_json
from lamina.server.store import run_directory
from tests import deployment
from tests.runs import Outcome, play, small

PRIVATE = ("privacy=client-dp", "privacy.epsilon=8", "privacy.force=true", "rounds=4")

# Nobody is drawn.
ALONE = ("privacy=client-dp", "privacy.noise_multiplier=1", "privacy.force=true", "rounds=4", "clients.fraction=1e-4")


def spent(outcome: Outcome) -> float:
    events = [from_json(event, "history") for event in outcome.state.privacy_history]
    assert [event.round for event in events] == [1, 2, 3, 4]
    return accounting.epsilon(events, 1e-5)


@pytest.mark.parametrize("strategy", ["ffa", "alternate", "core"])
def test_a_campaign_costs_what_it_was_calibrated_for(llama: Path, notes: Path, strategy: str) -> None:
    outcome = play(small(llama, notes, f"strategy={strategy}", *PRIVATE))
    assert outcome.campaign.plan is not None
    assert spent(outcome) == pytest.approx(outcome.campaign.plan.epsilon)
    assert 7.9 < spent(outcome) <= 8


def test_a_round_that_nobody_was_drawn_for_is_noise_and_is_charged(llama: Path, notes: Path) -> None:
    outcome = play(small(llama, notes, "strategy=ffa", *ALONE))
    assert all(not done.updates for done in outcome.rounds)
    assert all(done.record["clients"] == [] for done in outcome.rounds)
    first, second = outcome.rounds[0].state.adapter, outcome.rounds[1].state.adapter
    assert any((first.lora[module].B != second.lora[module].B).all() for module in first.lora)
    assert 0 < spent(outcome) < 0.1


def test_two_runs_of_one_seed_have_different_noise_unless_they_are_simulated(llama: Path, notes: Path) -> None:
    """`play` makes the campaign as a coordinator does, with nothing that seeds the noise."""
    one, other = (play(small(llama, notes, "strategy=ffa", *ALONE)) for _ in range(2))
    module = next(iter(one.state.adapter.lora))
    assert (one.state.adapter.lora[module].B != other.state.adapter.lora[module].B).all()


def test_under_core_the_noise_is_in_the_core_alone(llama: Path, notes: Path) -> None:
    outcome = play(small(llama, notes, "strategy=core", *ALONE))
    first, second = outcome.rounds[0].state.adapter, outcome.rounds[1].state.adapter
    assert outcome.campaign.plan is not None
    assert outcome.campaign.plan.coordinates == sum(f.rank**2 for f in first.lora.values())
    for module, f in first.lora.items():
        after = second.lora[module]
        assert f.core is not None
        assert (f.core != after.core).all()
        assert np.array_equal(f.A, after.A)
        assert np.array_equal(f.B, after.B)


@pytest.mark.parametrize("strategy", ["recompress", "stack", "ffa", "core"])
def test_norms_are_a_sum_under_any_strategy(llama: Path, notes: Path, strategy: str) -> None:
    words = ("adapter.kind=norm", f"strategy={strategy}")
    outcome = play(small(llama, notes, *words, *PRIVATE))
    assert 7.9 < spent(outcome) <= 8
    alone = play(small(llama, notes, *words, *ALONE))
    first, second = (done.state.adapter.dense for done in alone.rounds[:2])
    assert alone.campaign.plan is not None
    assert alone.campaign.plan.coordinates == sum(value.size for value in first.values())
    assert all((value != second[name]).all() for name, value in first.items())


def test_no_figure_of_training_leaves_a_client(llama: Path, notes: Path) -> None:
    outcome = play(small(llama, notes, "strategy=ffa", *PRIVATE))
    updates = [update for done in outcome.rounds for update in done.updates]
    assert updates
    assert all(not update.metrics for update in updates)
    assert all(done.record["train_loss"] is None for done in outcome.rounds)


def test_over_grpc_nothing_of_a_client_is_written_down(tmp_path: Path) -> None:
    """Two runs of one seed, whose clients send the same updates: with noise of their own they end elsewhere."""
    ends = []
    for name in ("one", "other"):
        spec_file = tmp_path / "spec.json"
        spec_file.write_text(deployment.spec().to_json())
        words = deployment.words(spec_file, "strategy=ffa", "insecure=true", "privacy=client-dp", "privacy.epsilon=8",
                                 "privacy.force=true")  # fmt: skip
        with deployment.coordinator(tmp_path / name, words) as running:
            sites = [
                deployment.in_thread(deployment.agent(site, running.port, tmp_path / name / site))
                for site in deployment.NAMES
            ]
            assert running.join() == 0
            for thread, outcome in sites:
                thread.join(20)
                assert outcome == [0]
        ends.append(deployment.final(running.path))
        summary = json.loads((running.path / "summary.json").read_text())
        assert summary["privacy"]["mode"] == "client-dp"
        assert 7 < summary["privacy"]["epsilon"] <= 8
        assert summary["eval"]["final_loss"] is None
        records = run_directory.read_records(running.path)
        assert [round(record["epsilon"], 6) for record in records] == sorted(round(r["epsilon"], 6) for r in records)
        assert all(record["loss"] is None and record["train_loss"] is None for record in records)  # the sites told one
    module = next(iter(ends[0].lora))
    assert (ends[0].lora[module].B != ends[1].lora[module].B).all()
