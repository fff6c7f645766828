"""Attack: rebuild training text from what a party sees. What succeeds, and what stops it (arXiv:2405.15586, arXiv:2504.20570)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lamina.audits.reconstruction import attack, malicious, span, truth
from lamina.audits.reconstruction.attack import QUICK, Result, document, reconstruct
from lamina.audits.reconstruction.inputs import Inputs, token_inputs
from lamina.audits.reconstruction.span import Recovery, recovery, token_scores
from lamina.audits.views import Change, Seen, changes_of
from lamina.client.data import Example
from lamina.client.loading import BaseOptions, load_base
from lamina.client.losses import collate, losses
from lamina.client.model import Base, put, take, trainable_parameters
from lamina.protos.adapter import Adapter, LoraFactors
from lamina.protos.config import Config
from lamina.protos.errors import ConfigError
from lamina.simulations.prepare import Prepared, prepare
from lamina.simulations.run import simulate
from tests import models
from tests.runs import Quiet, config_of

VOCABULARY = 1024
Text = Sequence[np.ndarray]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Hidden size 128, one layer, random weights, adapters in q, k and v: the setting of the published figures here."""
    folder = models.save_wide_llama(tmp_path_factory.mktemp("wide"))
    return load_base(BaseOptions(str(folder), device="cpu", target_modules=["q_proj", "k_proj", "v_proj"]))


@pytest.fixture(scope="module")
def inputs(base: Base) -> Inputs:
    found = token_inputs(base, 64)
    assert found is not None
    return found


def rows_of(change: Change) -> np.ndarray:
    assert change.rows is not None
    return change.rows


def columns_of(change: Change) -> np.ndarray:
    assert change.columns is not None
    return change.columns


def texts(tokens: int, rows: int, seed: int = 0) -> Text:
    """Rows of different tokens."""
    return np.array_split(np.random.default_rng(seed).permutation(VOCABULARY - 2)[:tokens] + 2, rows)


def trained(
    base: Base, rows: Text, rank: int, sides: str = "AB", steps: int = 1, adam: bool = False
) -> dict[str, Change]:
    """The change of factors by some steps; with A and B away from zero, as after a first round."""
    rng = np.random.default_rng(0)
    lora = {
        module: LoraFactors(
            (rng.uniform(-1, 1, (rank, d_in)) / np.sqrt(d_in)).astype(np.float32),
            (0.1 * rng.normal(size=(d_out, rank))).astype(np.float32),
            2.0,
        )
        for module, (d_out, d_in) in base.spec.modules.items()
    }
    put(base, Adapter(lora), None, sides=sides)
    parameters = list(trainable_parameters(base).values())
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=1.0)
    if adam:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    examples = [Example(row.astype(np.int32), np.arange(len(row)) > 0) for row in rows]
    for _ in range(steps):
        total, _, count = losses(base, collate(examples, 1, base.device))
        (total / count).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return changes_of(Adapter(lora), take(base))


def found(changes: dict[str, Change], inputs: Inputs, *rows: Text) -> Recovery:
    scores = token_scores(Seen("coordinator", ("0",), (1,), changes), inputs, np.random.default_rng(0))
    assert scores is not None
    return recovery(scores, np.unique(np.concatenate([row[:-1] for some in rows for row in some])))


@pytest.mark.parametrize(
    ("tokens", "rows", "least", "most"),
    [(32, 1, 0.97, 1), (63, 1, 0.9, 1), (120, 4, 0.75, 0.95), (230, 8, 0.6, 0.85)],
)
def test_tokens_are_in_the_span_of_a_change_of_rows(
    base: Base, inputs: Inputs, tokens: int, rows: int, least: float, most: float
) -> None:
    """privacy.md 4.5, rank 16: 0.98, 0.96, 0.77, 0.60 for a plain span test; it degrades and has no cliff."""
    batch = texts(tokens, rows)
    assert least <= found(trained(base, batch, 16), inputs, batch).recall <= most


def test_a_smaller_rank_shows_less(base: Base, inputs: Inputs) -> None:
    batch = texts(230, 2)
    assert (
        found(trained(base, batch, 4), inputs, batch).recall
        < found(trained(base, batch, 16), inputs, batch).recall - 0.1
    )


def test_frozen_rows_show_little_once_there_are_more_tokens_than_ranks(base: Base, inputs: Inputs) -> None:
    """privacy.md 4.5 for a plain span test: chance from one rank on. With weights, three modules show more together."""
    few, many = texts(64, 2), texts(226, 4)
    assert found(trained(base, few, 64, "B"), inputs, few).recall > 0.9
    both, frozen = (found(trained(base, few, 16, sides), inputs, few) for sides in ("AB", "B"))
    assert frozen.recall < both.recall - 0.3
    both, frozen = (found(trained(base, many, 16, sides), inputs, many) for sides in ("AB", "B"))
    assert frozen.recall < frozen.chance + 0.15 < both.recall - 0.3


@pytest.mark.parametrize("steps", [1, 4])
def test_adamw_and_several_steps_do_not_hide_tokens(base: Base, inputs: Inputs, steps: int) -> None:
    """privacy.md 4.5: 0.55 to 0.73 with AdamW."""
    batch = texts(64, 4)
    assert found(trained(base, batch, 16, steps=steps, adam=True), inputs, batch).recall > 0.75


def test_a_sum_over_clients_shows_less_of_more(base: Base, inputs: Inputs) -> None:
    parts = [texts(32, 1, seed) for seed in range(8)]
    changes = [trained(base, part, 16) for part in parts]

    def summed(some: Sequence[dict[str, Change]]) -> dict[str, Change]:
        return {
            module: replace(
                some[0][module],
                rows=np.sum([rows_of(one[module]) for one in some], axis=0),
                columns=np.sum([columns_of(one[module]) for one in some], axis=0),
            )
            for module in some[0]
        }

    two, eight = found(summed(changes[:2]), inputs, *parts[:2]), found(summed(changes), inputs, *parts)
    assert two.recall > 0.85
    assert eight.chance + 0.2 < eight.recall < two.recall - 0.1


@pytest.mark.parametrize("rows", [1, 8])
def test_noise_of_dp_sgd_hides_tokens(base: Base, inputs: Inputs, rows: int) -> None:
    """privacy.md 8.3, item 14: with noise_multiplier 0.3 the recall is within 0.06 of chance; with 1e-4 it is not."""
    batch = texts(32 * rows, rows)
    changes = trained(base, batch, 16)
    sides = [side for one in changes.values() for side in (rows_of(one), columns_of(one))]
    norm = float(np.sqrt(sum(float(np.square(side).sum()) for side in sides)))

    def noised(multiplier: float, seed: int) -> Recovery:
        rng = np.random.default_rng(seed)
        made = {}
        for module, one in changes.items():
            # The clipped sum of `rows` examples has a norm of at most rows; the noise is of norm 1 each.
            rows_now = rows_of(one) * rows / norm + multiplier * rng.normal(size=rows_of(one).shape)
            columns_now = columns_of(one) * rows / norm + multiplier * rng.normal(size=columns_of(one).shape)
            made[module] = replace(one, rows=rows_now, columns=columns_now)
        return found(made, inputs, batch)

    private = [noised(0.3, seed) for seed in range(8)]
    assert abs(float(np.mean([one.recall - one.chance for one in private]))) < 0.06
    assert noised(1e-4, 0).recall > noised(1e-4, 0).chance + 0.15


def test_another_start_shows_nothing(base: Base, inputs: Inputs) -> None:
    """The mistake, planted: a change from the wrong start is that start, and its span holds every token alike."""
    batch = texts(32, 1)
    changes = trained(base, batch, 16)
    rng = np.random.default_rng(1)
    wrong = {
        module: replace(one, rows=rows_of(one) + rng.normal(size=rows_of(one).shape), columns=None)
        for module, one in changes.items()
    }
    assert found(wrong, inputs, batch).recall < 0.15


def test_inputs_of_a_model_with_positions(gpt2: Path, bert: Path) -> None:
    for path, task in ((gpt2, "causal-lm"), (bert, "sequence-classification")):
        labels = ("a", "b") if task != "causal-lm" else ()
        one = load_base(BaseOptions(str(path), device="cpu", task=task, labels=labels))
        got = token_inputs(one, 8)
        assert got is not None
        assert got.positions == 8
        first, third = (np.concatenate(list(got.at(position))) for position in (0, 2))
        assert first.shape[0] == one.vocab
        assert not np.allclose(first, third)


def simulated(path: Path, strategy: str, prepared: Prepared | None = None, *words: str) -> tuple[Config, Prepared]:
    config = config_of(
        f"strategy={strategy}", "keep_updates=true", "clients.count=3", "clients.ranks=[16,8,4]", "rounds=2",
        "train.local_steps=2", "train.batch_size=2", "train.max_length=32", "evaluate.max_examples=2", "data.generate=0",
        "train.device=cpu", f"output={path}", *words,
    )  # fmt: skip
    prepared = prepared or prepare(config)
    simulate(config, Quiet(), prepared)
    return config, prepared


def attacked(path: Path, config: Config, prepared: Prepared) -> dict[str, Result]:
    said: list[tuple[int, int]] = []
    settings = replace(QUICK, scenario=None)
    results = reconstruct(path, config, prepared.base, prepared.train, settings, lambda *at: said.append(at))
    assert said[-1] == (5, 5)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Result]]:
    path = tmp_path_factory.mktemp("runs")
    done: dict[str, dict[str, Result]] = {}
    known: list[Prepared] = []

    def played(strategy: str) -> dict[str, Result]:
        if strategy not in done:
            config, prepared = simulated(path / strategy, strategy, known[0] if known else None)
            known.append(prepared)
            done[strategy] = attacked(path / strategy, config, prepared)
        return done[strategy]

    return played


def above(result: Result) -> float:
    """How far the recall of single clients' tokens is above chance."""
    return float(np.mean([recall - chance for recall, chance in result.by_client.values()]))


def test_peers_under_stack_recover_single_clients_tokens_and_others_less(runs: Any) -> None:
    stacked, mixed, frozen = (runs(name)["peer"] for name in ("stack", "recompress", "ffa"))
    assert stacked.individuals
    assert not mixed.individuals
    assert not frozen.individuals
    assert above(stacked) > 0.2
    assert above(mixed) < above(stacked) - 0.08
    assert above(frozen) < above(stacked) - 0.15


def test_a_coordinator_recovers_single_clients_tokens(runs: Any) -> None:
    assert above(runs("recompress")["coordinator"]) > 0.2
    assert runs("ffa")["secagg-coordinator"].applicable
    assert not runs("stack")["secagg-coordinator"].applicable


def test_a_document_has_the_same_keys_for_all_and_no_number_that_json_lacks(runs: Any) -> None:
    made = document(runs("stack"))
    json.dumps(made, allow_nan=False)
    assert list(made) == ["peer", "coordinator", "secagg-coordinator", "outsider", "malicious-coordinator"]
    assert len({tuple(one) for one in made.values()}) == 1
    assert made["secagg-coordinator"]["recall"] is None
    example = made["peer"]["examples"][0]
    assert example["client"] in made["peer"]["by_client"]
    assert example["original"]
    assert example["recovered"]


def test_what_is_true_does_not_enter_the_scores(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other texts given as true, other figures come out of the same scores, and recall falls to chance."""
    seen: list[Any] = []
    scored = span.token_scores

    def spied(*args: Any) -> Any:
        seen.append(scored(*args))
        return seen[-1]

    monkeypatch.setattr(attack, "token_scores", spied)
    config, prepared = simulated(tmp_path / "run", "stack")
    results = attacked(tmp_path / "run", config, prepared)
    right, seen[:] = [one.scores.copy() for one in seen], []
    rng = np.random.default_rng(0)
    others = {
        client: [replace(one, tokens=rng.integers(2, VOCABULARY, len(one.tokens)).astype(np.int32)) for one in some]
        for client, some in prepared.train.items()
    }
    again = attacked(tmp_path / "run", config, replace(prepared, train=others))
    assert all(np.array_equal(one, other) for one, other in zip(right, [one.scores for one in seen], strict=True))
    assert abs(again["coordinator"].recall - again["coordinator"].chance) < 0.08
    assert results["coordinator"].recall > again["coordinator"].recall + 0.15
    with pytest.raises(ConfigError, match="training examples of every client"):
        reconstruct(tmp_path / "run", config, prepared.base, {}, QUICK, lambda *at: None)


def test_a_site_alone_scores_the_looks_at_itself_as_the_whole_run_does(tmp_path: Path) -> None:
    config, prepared = simulated(tmp_path / "run", "stack")
    everyone = attacked(tmp_path / "run", config, prepared)
    site, settings = "1", replace(QUICK, scenario=None)
    own = {site: prepared.train[site]}
    alone = reconstruct(tmp_path / "run", config, prepared.base, own, settings, lambda *at: None, site)
    for party in ("peer", "coordinator"):
        assert dict(alone[party].by_client) == {site: everyone[party].by_client[site]}
        assert {text.client for text in alone[party].examples} == {site}
    assert not alone["outsider"].applicable
    assert "mixed with other sites' training" in alone["outsider"].why


def test_under_example_dp_recall_is_at_chance(tmp_path: Path) -> None:
    config, prepared = simulated(tmp_path / "run", "stack", None, "privacy=example-dp", "privacy.noise_multiplier=1.0")
    results = attacked(tmp_path / "run", config, prepared)
    for view in ("peer", "coordinator"):
        assert abs(results[view].recall - results[view].chance) < 0.06
        assert abs(results[view].auc - results[view].auc_chance) < 0.06


def test_the_batches_are_those_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that are drawn again, held against those that training collated; with sampling by Poisson, too."""
    from lamina.client import train as plain
    from lamina.client.private import train as private

    collated: list[Example] = []
    for module in (plain, private):
        real = module.collate

        def noted(examples: Any, *rest: Any, real: Any = real, **more: Any) -> Any:
            collated.extend(examples)
            return real(examples, *rest, **more)

        monkeypatch.setattr(module, "collate", noted)
    for name, words in (("ffa", []), ("stack", ["privacy=example-dp", "privacy.noise_multiplier=1.0"])):
        collated.clear()
        config, prepared = simulated(tmp_path / name, name, None, *words)
        assert collated
        drawn = [
            one
            for number in (1, 2)
            for client in prepared.train
            for one in truth.trained_on(config, prepared.train, client, number)
        ]
        assert drawn
        assert {id(one) for one in drawn} == {
            id(one) for one in collated
        }  # the very objects, of all clients and rounds


def test_a_coordinator_that_prepared_the_base_learns_values_and_pairs() -> None:
    one = load_base(BaseOptions("tiny", device="cpu"))
    where = token_inputs(one, 128)
    assert where is not None
    scenario = malicious.Scenario(private=6, public=32, tuning_steps=30, client_steps=12)
    played = malicious.attack(one, where, scenario, lambda *at: None)
    for world in (played.tuned, played.honest):
        assert world.tokens.recall > world.tokens.chance + 0.2
        assert np.mean(list(world.values.values())) > np.mean(list(world.values_chance.values()))
    pairs = [float(np.mean(list(world.pairs.values()))) for world in (played.tuned, played.honest)]
    assert pairs[0] > played.tuned.pairs_chance + 0.15
    # Of the base alone, which saw none of these notes, pairs are guesses.
    assert float(np.mean(list(played.tuned.pairs_untrained.values()))) < pairs[0]
