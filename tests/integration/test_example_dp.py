"""example-dp from config to update: what trains, what leaves, where the noise comes from, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lamina.client.data import Example
from lamina.client.loading import BaseOptions, load_base, load_tokenizer
from lamina.client.model import Base, put, take, trainable_parameters
from lamina.client.own import own_examples
from lamina.client.policy import Policy
from lamina.client.private import train as module
from lamina.client.private.deployed import private as private_of
from lamina.client.private.train import Private, train_privately
from lamina.client.train import Task
from lamina.client.worker import SiteWorker
from lamina.protos.blobs import blob
from lamina.protos.codec import decode_update
from lamina.protos.config import PrivacyConfig, TrainConfig
from lamina.protos.errors import ConfigError, DataError, PolicyRefused, TrainingError
from lamina.protos.messages import Update
from lamina.protos.privacy.accounting import epsilon
from lamina.protos.privacy.events import Event
from lamina.protos.privacy.mechanism import Mechanism
from lamina.protos.privacy.noise import secret, seeded
from lamina.server import campaign as campaigns
from lamina.server.port.terms import terms as terms_of
from lamina.server.releases import released
from lamina.simulations.prepare import prepare
from lamina.simulations.private import mechanisms
from tests import texts
from tests.deployment import config_of
from tests.models import TINY
from tests.private import adapter, rows
from tests.runs import Outcome, classification, play, same_bits, small

pytestmark = pytest.mark.filterwarnings("ignore")
ON = ("privacy=example-dp", "privacy.noise_multiplier=1", "privacy.delta=1e-3")


@pytest.fixture(scope="module")
def base(llama: Path) -> Base:
    return load_base(BaseOptions(str(llama), device="cpu"))


def updates(outcome: Outcome) -> list[Update]:
    return [decode_update(reply.update.read()) for _, reply in outcome.channel.replied if reply.update is not None]


@pytest.mark.parametrize(
    "words",
    [
        *([f"strategy={name}"] for name in ("recompress", "residual", "stack", "ffa", "alternate", "core")),
        ["strategy=ffa", "adapter.kind=norm"],
    ],
)
def test_a_run_under_every_strategy(llama: Path, notes: Path, words: list[str]) -> None:
    """Noise has full rank, so recompress keeps all of it only where its cap does."""
    outcome = play(small(llama, notes, *words, *ON, "aggregation.rank_cap=16"))
    assert all(done.record["relative_error"] < 1e-6 for done in outcome.rounds)
    assert all(len(done.updates) == 3 for done in outcome.rounds)
    assert not same_bits(outcome.adapters[0], outcome.adapters[1])


@pytest.mark.parametrize("words", [[], ["train.checkpointing=true", "train.micro_batch=2"], ["train.precision=bf16"]])
def test_a_classifier_with_its_head(bert: Path, questions: Path, words: list[str]) -> None:
    outcome = play(classification(bert, questions, *ON, "strategy=ffa", *words))
    assert all(done.record["relative_error"] < 1e-6 for done in outcome.rounds)
    assert any(
        np.abs(value - outcome.campaign.spec.dense[name]).max() > 0
        for name, value in outcome.state.adapter.dense.items()
    )


def test_what_leaves_depends_on_no_data(llama: Path, notes: Path) -> None:
    """Silos of 10 to 19 records that all declare 40 say the same of themselves, and nothing of their training."""
    outcome = play(small(llama, notes, *ON, "privacy.nominal_examples=40"))
    assert len({len(examples) for examples in outcome.prepared.train.values()}) > 1
    for done in outcome.rounds:
        assert done.record["train_loss"] is None
        assert set(done.weights.values()) == {1 / 3}
    for update in updates(outcome):
        assert update.num_examples == 40
        assert update.metrics == {}
        event = Event("", 0, 1.0, 0.1, 2, 1.0)  # of its round alone: who has no ledger tells no more
        assert update.privacy == {
            "noise_multiplier": 1.0,
            "sample_rate": 0.1,
            "steps": 2.0,
            "clip": 1.0,
            "delta": 1e-3,
            "epsilon": epsilon([event], 1e-3),
        }


def test_a_simulation_says_what_it_takes_as_public(llama: Path, notes: Path) -> None:
    prepared, said = prepare(small(llama, notes, *ON)), []  # type: tuple[Any, list[str]]
    found = mechanisms(small(llama, notes, *ON), prepared.train, said.append)
    assert {one: private.nominal for one, private in found.items()} == {
        client: len({example.row for example in examples}) for client, examples in prepared.train.items()
    }
    assert "takes the clients' own numbers of records as public" in said[0]
    said.clear()
    mechanisms(small(llama, notes, *ON, "privacy.nominal_examples=30"), prepared.train, said.append)
    assert len(said) == 1
    assert said[0].startswith(
        "privacy: every client: example-dp by record, sample rate 0.133, noise multiplier 1, 2 x 2 steps"
    )
    assert mechanisms(small(llama, notes), prepared.train, said.append) == {}


def test_a_simulation_has_a_stream_for_each_purpose_client_and_round(llama: Path, notes: Path) -> None:
    config = small(llama, notes, *ON, "privacy.nominal_examples=30")
    stream = mechanisms(config, {}, lambda text: None)["0"].stream
    names = [("noise", "0", 1), ("noise", "1", 1), ("noise", "0", 2), ("sampling", "0", 1)]
    found = np.corrcoef([stream(*one).normal(5000) for one in names])[np.triu_indices(4, 1)]
    assert np.abs(found).max() < 5 / math.sqrt(5000)
    assert np.array_equal(stream("noise", "0", 1).normal(9), seeded(0, "noise", "0", 1).normal(9))


def test_a_simulation_repeats_whatever_the_process_was_seeded_with(llama: Path, notes: Path) -> None:
    config = small(llama, notes, *ON)
    torch.manual_seed(1)
    first = play(config)
    torch.manual_seed(2), np.random.seed(2)
    assert same_bits(first.state.adapter, play(config).state.adapter)
    assert not same_bits(first.state.adapter, play(small(llama, notes, *ON, "seed=1")).state.adapter)


def mechanism(**more: Any) -> Mechanism:
    values = {
        "unit": "record",
        "sample_rate": 0.5,
        "expected_units": 4.0,
        "noise_multiplier": 0.8,
        "max_grad_norm": 0.5,
    }
    values |= {"steps": 1, "rounds": 1, "epsilon": 1.0, "target_delta": 1e-5}
    return Mechanism(**{**values, **more})


def trained(
    base: Base, examples: Sequence[Example], private: Private, client: str = "0", round_number: int = 1, **more: Any
) -> Mapping[str, torch.Tensor]:
    """The change that one round makes, with steps that are the gradient itself."""
    config = TrainConfig(**{"local_steps": 1, "schedule": "constant", "learning_rate": 1.0, "max_length": 24, **more})
    put(base, adapter(base), None)
    before = {name: one.detach().clone() for name, one in trainable_parameters(base).items()}
    train_privately(base, examples, Task(client, round_number, 9, 0, config), private, take(base))
    return {name: one.detach() - before[name] for name, one in trainable_parameters(base).items()}


@pytest.fixture
def plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "optimizer_of", lambda config, parameters: torch.optim.SGD(parameters, lr=1.0))


def flat(change: Mapping[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([one.flatten().numpy() for one in change.values()]).astype(np.float64)


def private(stream: Any = secret, **more: Any) -> Private:
    return Private(mechanism(**more), 8, lambda *names: stream() if stream is secret else stream(0, *names))


def test_a_step_without_units_is_noise_once_over_the_fixed_denominator(base: Base, plain_descent: None) -> None:
    """A rate so small that nobody is drawn: standard deviation sigma C / expected units."""
    found = flat(trained(base, rows(base, [9, 4]), private(sample_rate=1e-12)))
    wanted, count = 0.8 * 0.5 / 4.0, len(found)
    assert abs(found.std() / wanted - 1) < 5 / math.sqrt(2 * count)
    assert abs(found.mean()) < 5 * wanted / math.sqrt(count)


@pytest.mark.parametrize("micro", [1, 3, 64])
def test_noise_is_added_once_a_step_whatever_the_micro_batches(base: Base, plain_descent: None, micro: int) -> None:
    """Of eight rows that all come: the change minus the clipped sum is that same noise."""
    examples, one = rows(base, [9, 4, 2, 7, 3, 5, 8, 6]), private(seeded, sample_rate=1.0)
    with_data = flat(trained(base, examples, one, micro_batch=micro))
    alone = flat(trained(base, examples, replace(one, mechanism=mechanism(sample_rate=1e-12))))
    assert np.linalg.norm(with_data - alone) <= 8 * 0.5 / 4.0 * (1 + 1e-4)
    assert np.linalg.norm(with_data - flat(trained(base, examples, one, micro_batch=64))) < 1e-5


def test_noise_differs_between_clients_rounds_and_restarts(base: Base, plain_descent: None) -> None:
    examples = rows(base, [9, 4])
    silent = {"sample_rate": 1e-12}
    simulated = [
        flat(trained(base, examples, private(seeded, **silent), client, number))
        for client, number in (("0", 1), ("1", 1), ("0", 2))
    ]
    torch.manual_seed(0)
    first = flat(trained(base, examples, private(secret, **silent)))
    torch.manual_seed(0)
    again = flat(trained(base, examples, private(secret, **silent)))
    found = np.corrcoef([*simulated, first, again])[np.triu_indices(5, 1)]
    assert np.abs(found).max() < 5 / math.sqrt(len(first))


def test_planted_clients_that_share_a_stream_are_seen(base: Base, plain_descent: None) -> None:
    """The correlation of 1 that seeding by the experiment alone gives."""
    shared = Private(mechanism(sample_rate=1e-12), 8, lambda *names: seeded(0))
    found = [flat(trained(base, rows(base, [9]), shared, client)) for client in ("0", "1")]
    assert np.corrcoef(found)[0, 1] > 0.99


@pytest.mark.parametrize(
    "odd",
    [
        {"noise_multiplier": 0.0}, {"noise_multiplier": math.inf}, {"noise_multiplier": math.nan}, {"max_grad_norm": 0.0},
        {"sample_rate": 0.0}, {"sample_rate": 1.5}, {"expected_units": 0.0},
    ],
)  # fmt: skip
def test_a_mechanism_that_is_none_trains_nothing(base: Base, odd: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.mode=example-dp: expected a"):
        trained(base, rows(base, [9]), private(**odd))


def test_parameters_that_are_not_finite_stop_the_round(base: Base, plain_descent: None) -> None:
    with pytest.raises(TrainingError, match="round 1, step 1: expected finite numbers in"):
        trained(base, rows(base, [9]), private(noise_multiplier=1e38, expected_units=1e-3))


def test_the_proximal_term_needs_no_noise_of_its_own(base: Base, plain_descent: None) -> None:
    """From the release it has no gradient in the first step, and in the second one that pulls back."""
    examples, one = rows(base, [9]), private(seeded, sample_rate=1e-12, noise_multiplier=1e-3, steps=2)
    first = flat(trained(base, examples, private(seeded, sample_rate=1e-12, noise_multiplier=1e-3), proximal=0.01))
    other = flat(trained(base, examples, private(seeded, sample_rate=1e-12, noise_multiplier=1e-3)))
    assert np.allclose(first, other, atol=1e-6)
    free = flat(trained(base, examples, one))
    assert np.linalg.norm(flat(trained(base, examples, one, proximal=0.01))) < np.linalg.norm(free)


def test_what_was_trained_is_left_as_it_was_found(base: Base) -> None:
    trained(base, rows(base, [9, 4]), private())
    assert not any("forward" in one.__dict__ and "lora" in name for name, one in base.model.named_modules())
    assert not base.model.training
    assert all(one.grad is None for one in base.model.parameters())


# --- users


def by_user(folder: Path) -> Path:
    """Ten users of one site, each with 1 to 10 rows."""
    made = [
        {"text": f"def number_{user}_{row}(): return {user} + {row * row}", "person": f"user {user}"}
        for user in range(10)
        for row in range(user + 1)
    ]
    return texts.write_jsonl(folder / "people.jsonl", made)


USERS = (*ON, "privacy.unit=user", "data.user_column=person", "clients.count=1", "clients.ranks=2", "partition=iid")


def test_users_are_units(llama: Path, tmp_path: Path) -> None:
    words = [word for word in USERS if not word.startswith("partition")]
    config = small(llama, by_user(tmp_path), *words, "partition=iid", "privacy.delta=1e-2")
    prepared = prepare(config)
    found = mechanisms(config, prepared.train, lambda text: None)["0"]
    assert found.nominal == len({example.user for example in prepared.train["0"]})
    assert (found.mechanism.unit, found.mechanism.user_rows) == ("user", 8)
    assert updates(play(config, prepared))[0].num_examples == found.nominal


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["data.user_column="], "privacy.unit=user: expected data.user_column"),
        (["data.user_column=nobody"], "no column 'nobody' in row 1"),
        (["train.batch_size=16"], "client 0: privacy.nominal_examples=.*: expected at least train.batch_size"),
        (["privacy.delta=0.3"], "with more, publishing one whole user would count as private"),
        (["train.max_grad_norm=0"], "train.max_grad_norm=0: expected a bound"),
        (["train.max_grad_norm=1e-30"], "train.max_grad_norm=1e-30: expected a bound of at least 1e-06"),
    ],
)
def test_users_that_cannot_be_protected_are_refused(llama: Path, tmp_path: Path, words: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        play(small(llama, by_user(tmp_path), *USERS, "privacy.delta=1e-2", *words))


# --- at a site

RUN = (
    "strategy=ffa clients.count=1 clients.ranks=3 lora.lora_alpha=9 seed=5 rounds=3 lora.target_modules=[q_proj] "
    "train.local_steps=2 train.batch_size=4 train.max_length=32 privacy.mode=example-dp privacy.epsilon=8 privacy.delta=1e-4"
)


def worker(folder: Path, *words: str, said: list[str] | None = None) -> tuple[SiteWorker, Any, Any]:
    """A worker that has begun, an instruction to train, and one to measure."""
    data = folder / "rows.jsonl"
    data.write_text("".join(f'{{"text": "def number_{n}(): return {n} + {n * n}"}}\n' for n in range(80)))
    spec = load_base(BaseOptions(source=str(TINY), target_modules=["q_proj"], device="cpu")).spec
    config = config_of(RUN.split())
    budget = campaigns.budget(config, spec, 3)
    campaign = campaigns.campaign(config, spec, campaigns.budgets(config, spec), "run")
    own = [f"model.source={TINY}", f"data.source={data}", "train.device=cpu", *words]
    made = SiteWorker(config_of(own), Policy(), ([] if said is None else said).append)
    made.begin(terms_of(config, campaign, blob(b"{}"), "0", 3, budget, ""), spec, {}, -1)
    state = campaign.strategy.init(spec)
    train, measure = (
        released(campaign, blob, state, {"0": budget}, kind)["0"].instruction for kind in ("train", "evaluate")
    )
    return made, train, measure


def test_a_site_trains_with_secret_noise_and_tells_no_figures(tmp_path: Path) -> None:
    said: list[str] = []
    site, train, measure = worker(tmp_path, "privacy.nominal_examples=60", said=said)
    assert any(text.startswith("privacy: example-dp by record, sample rate 0.0667") for text in said)
    first, again = (decode_update(site.train(train, lambda step: None, lambda event: 2.0).update) for _ in range(2))
    assert (first.num_examples, first.metrics) == (60, {})
    assert first.privacy is not None
    assert first.privacy["epsilon"] < 8
    assert not same_bits(first.adapter, again.adapter)  # a round that is trained anew has noise of its own
    with pytest.raises(PolicyRefused, match=r"expected none under privacy\.mode=example-dp"):
        site.measure(measure)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "expected the public number of records that this site declares, got none"),
        (["privacy.nominal_examples=3"], "privacy.nominal_examples=3: expected at least"),
        (["privacy.nominal_examples=many"], "privacy.nominal_examples: expected integers"),
        (["privacy.nominal_examples=[60,60]"], "privacy.nominal_examples: expected one entry"),
        (["privacy.nominal_examples=20000"], "privacy.delta=0.0001: expected less than 5e-05"),
    ],
)
def test_a_site_that_declares_too_little_does_not_begin(tmp_path: Path, words: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        worker(tmp_path, *words)


def test_no_setting_of_a_coordinator_asks_whether_any_row_has_something(tmp_path: Path) -> None:
    """Labels and length are the coordinator's. An error for one row with another label, or none long enough, would be an exact
    answer about rows that no noise covers; so such rows give nothing, each by itself, and the site trains on the rest.
    """
    data = texts.write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {n}", "label": "ab"[n % 2]} for n in range(60)])
    tokenizer, private = load_tokenizer(str(TINY)), ["privacy=example-dp", "privacy.epsilon=8", f"data.source={data}"]
    labelled = config_of([*private, "task=sequence-classification"])
    all_rows, some = (own_examples(labelled, labels, tokenizer).train for labels in (("a", "b"), ("a", "c")))
    assert len(all_rows) > len(some) > 0
    assert {one.label for one in some} == {0}
    assert own_examples(labelled, ("c", "d"), tokenizer).train == []
    with pytest.raises(DataError, match=r"is not in data\.labels"):
        own_examples(replace(labelled, privacy=PrivacyConfig()), ("a", "c"), tokenizer)


def test_the_rounds_are_those_of_the_terms() -> None:
    """Which the noise is calibrated for, whatever the site's own settings say of them."""
    config = config_of([*RUN.split(), "privacy.nominal_examples=60"])
    found = private_of(config, 30)
    assert found is not None
    assert found.mechanism.rounds == 30
    assert 0.99 * 8 < found.mechanism.epsilon <= 8
    assert private_of(config_of([]), 3) is None
