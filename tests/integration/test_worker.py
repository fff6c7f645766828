"""A site's worker: the base that it trains is the one that the run is about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lamina.client.evaluate import score
from lamina.client.loading import BaseOptions, load_base
from lamina.client.model import put
from lamina.client.policy import Policy
from lamina.client.work import nothing_private
from lamina.client.worker import SiteWorker
from lamina.protos.blobs import blob
from lamina.protos.codec import decode_update
from lamina.protos.errors import AdapterMismatch, BudgetSpent
from lamina.protos.privacy.events import Claim, Event, from_claim
from lamina.server import campaign as campaigns
from lamina.server.port.terms import terms as terms_of
from lamina.server.releases import released, started, trained
from tests.deployment import config_of
from tests.models import TINY


def test_a_worker_asks_before_it_trains_and_claims_what_the_ledger_says(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "def number_{n}(): return {n} + {n * n}"}}\n' for n in range(80)))
    spec = load_base(BaseOptions(source=str(TINY), target_modules=["q_proj"], device="cpu")).spec
    words = "privacy=example-dp privacy.epsilon=8 clients.count=1 clients.ranks=3 rounds=3 lora.target_modules=[q_proj]"
    config = config_of([*words.split(), "train.local_steps=2", "train.batch_size=4", "train.max_length=32"])
    budget = campaigns.budget(config, spec, 3)
    campaign = campaigns.campaign(config, spec, campaigns.budgets(config, spec), "run")
    said = [f"model.source={TINY}", f"data.source={rows}", "train.device=cpu", "privacy.nominal_examples=60"]
    worker = SiteWorker(config_of(said), Policy(), lambda text: None)
    worker.begin(terms_of(config, campaign, blob(b"{}"), "0", 3, budget, ""), spec, {}, -1)
    sent = released(campaign, blob, campaign.strategy.init(spec), {"0": budget})["0"].instruction
    asked, steps = list[Event](), list[int]()

    def allow(event: Event) -> float:
        assert steps == []
        asked.append(event)
        return 2.5

    found = worker.train(sent, steps.append, allow)
    (event,) = asked
    assert found.event == event
    assert (event.client_id, event.round, event.steps, event.sample_rate, event.unit) == ("0", 1, 2, 4 / 60, "record")
    update = decode_update(found.update)
    assert from_claim(update.privacy or {}, "0", 1, "record") == Claim(event, 1e-5, 2.5)

    def refuse(event: Event) -> float:
        raise BudgetSpent("no")

    steps.clear()
    with pytest.raises(BudgetSpent):
        worker.train(sent, steps.append, refuse)
    assert steps == []


def test_a_schema_that_does_not_name_the_sites_weights_is_refused() -> None:
    spec = load_base(BaseOptions(source=str(TINY), target_modules=["q_proj"], device="cpu")).spec
    worker = SiteWorker(config_of([f"model.source={TINY}"]), Policy(), lambda text: None)
    terms = {"task": {"task": "causal-lm", "lora.target_modules": ["q_proj"]}}
    for hashes in ({}, {"config": spec.hashes["config"]}, {**spec.hashes, "weights": "ab" * 32}):
        with pytest.raises(AdapterMismatch, match="expected the weights with SHA-256"):
            worker.begin(terms, replace(spec, hashes=hashes), {}, -1)


@pytest.mark.parametrize("strategy", ["ffa", "alternate", "core"])
def test_a_worker_trains_and_measures_one_factor_a_round(tmp_path: Path, strategy: str) -> None:
    """From the terms alone: the rows that neither side sends are those of the run's seed."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "def number_{n}(): return {n} + {n * n}"}}\n' for n in range(80)))
    spec = load_base(BaseOptions(source=str(TINY), target_modules=["q_proj"], device="cpu")).spec
    words = (
        f"strategy={strategy} clients.count=1 clients.ranks=3 lora.lora_alpha=9 seed=5 rounds=3 lora.target_modules=[q_proj] "
        "train.local_steps=2 train.batch_size=4 train.max_length=32"
    )
    config = config_of(words.split())
    budget = campaigns.budget(config, spec, 3)
    campaign = campaigns.campaign(config, spec, campaigns.budgets(config, spec), "run")
    said = [f"model.source={TINY}", f"data.source={rows}", "train.device=cpu"]
    worker = SiteWorker(config_of(said), Policy(), lambda text: None)
    worker.begin(terms_of(config, campaign, blob(b"{}"), "0", 3, budget, ""), spec, {}, -1)
    state = campaign.strategy.init(spec)
    for _ in range(3):
        sent = released(campaign, blob, state, {"0": budget})["0"]
        found = worker.train(sent.instruction, lambda step: None, nothing_private)
        release = started(campaign, sent)
        update = trained(decode_update(found.update), release)
        state = campaign.strategy.step(state, [update], {"0": release}, np.random.default_rng(0))
        assert state.relative_error < 1e-6
        measured = worker.measure(released(campaign, blob, state, {"0": budget}, "evaluate")["0"].instruction)
        run, base = worker._begun()
        put(base, state.adapter, None, trainable=False)
        wanted = score(base, run.held_out, run.config.evaluate.batch_size)
        assert measured["nats"] == pytest.approx(wanted.nats, rel=1e-6)
