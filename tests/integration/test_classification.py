"""Sequence classification: the label order, and parameters that the base has not, which are made once and travel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lamina.client.data import Example
from lamina.client.loading import BaseOptions, load_base
from lamina.client.model import put, take
from lamina.client.train import Task, train
from lamina.protos.adapter import EMPTY, Adapter
from lamina.protos.codec import decode
from lamina.protos.config import TrainConfig
from lamina.protos.errors import ConfigError, DataError
from lamina.simulations import engine
from lamina.simulations.prepare import prepare
from tests import texts
from tests.runs import classification, play, small
from tests.texts import LABELS

NEW = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}


def options(bert: Path, seed: int = 0) -> BaseOptions:
    return BaseOptions(str(bert), task="sequence-classification", labels=LABELS, seed=seed, device="cpu")


def test_new_parameters_are_found_and_the_same_for_all(bert: Path) -> None:
    first, again, other = (load_base(options(bert, seed)).spec for seed in (0, 0, 1))
    assert set(first.dense) == NEW
    assert first.dense["classifier.weight"].shape == (3, 16)
    assert all(first.dense[name].tobytes() == again.dense[name].tobytes() for name in NEW)
    assert any(first.dense[name].tobytes() != other.dense[name].tobytes() for name in NEW)
    # They are trained whole, so no low-rank change rides on them, and they are no part of the base's hash.
    assert not {name.rsplit(".", 1)[0] for name in NEW} & set(first.modules)
    assert first.hashes == other.hashes


def test_new_parameters_travel_in_the_first_release(bert: Path, questions: Path) -> None:
    outcome = play(classification(bert, questions, "rounds=1"))
    spec = outcome.campaign.spec
    assert len(outcome.channel.instructions) == 3
    for instruction in outcome.channel.instructions:
        dense = decode(instruction.release.read()).dense
        assert {name: value.tobytes() for name, value in dense.items()} == {
            name: value.tobytes() for name, value in spec.dense.items()
        }


@pytest.mark.parametrize("strategy", ["recompress", "residual", "stack", "zeropad"])
def test_heads_are_the_weighted_mean(bert: Path, questions: Path, strategy: str) -> None:
    outcome = play(classification(bert, questions, f"strategy={strategy}"))
    for before, done in zip([outcome.campaign.spec.dense, *(a.dense for a in outcome.adapters)], outcome.rounds):
        for name in NEW:
            wanted = before[name].astype(np.float64)
            for update in done.updates:
                start = done.releases[update.client_id].trainable.dense[name]
                change = update.adapter.dense[name].astype(np.float64) - start
                assert np.abs(change).max() > 0
                wanted = wanted + done.weights[update.client_id] * change
            assert np.abs(done.state.adapter.dense[name] - wanted).max() < 1e-6


def test_it_learns_what_the_text_says(bert: Path, questions: Path) -> None:
    config = classification(
        bert,
        questions,
        "rounds=3",
        "train.local_steps=15",
        "train.batch_size=8",
        "evaluate.max_examples=null",
        "data.holdout=0.2",
    )
    prepared = prepare(config)
    outcome = play(config, prepared)
    figures = engine.evaluate(prepared, outcome.state.adapter, config, "end")
    assert figures.accuracy is not None
    assert figures.accuracy > 0.7
    tokens = sum(one["tokens"] for one in figures.per_client.values())
    assert tokens == sum(len(held) for held in prepared.held_out.values())
    hits = sum(one["accuracy"] * one["tokens"] for one in figures.per_client.values())
    assert figures.accuracy == pytest.approx(hits / tokens)


def test_the_label_list_is_part_of_the_config_and_keeps_its_order(bert: Path, questions: Path) -> None:
    order = ("refund", "card", "login")
    prepared = prepare(classification(bert, questions, f"data.labels=[{','.join(order)}]"))
    assert prepared.labels == order == prepared.base.spec.labels
    assert prepared.base.model.config.id2label == dict(enumerate(order))
    rows = texts.questions()
    by_text = {tuple(prepared.base.tokenizer(row["text"])["input_ids"][:24]): row["category"] for row in rows}
    for examples in prepared.train.values():
        for example in examples:
            assert order[example.label] == by_text[tuple(int(token) for token in example.tokens)]
    assert prepare(classification(bert, questions)).labels == tuple(sorted(LABELS))


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (["data.labels=[refund,card]"], DataError, "not in data.labels"),
        (["data.labels=[refund,card,login,card]"], ConfigError, "each label once"),
        (["data.labels=[refund]"], ConfigError, "at least two"),
        (["data.label_column=intent"], DataError, "no column 'intent'"),
        (["train.max_length=65"], ConfigError, "at most 64"),
        (["lora.target_modules=[q_proj]"], ConfigError, "It has: dense, key, query, value"),
    ],
)
def test_wrong_labels_are_config_errors(
    bert: Path, questions: Path, words: list[str], kind: type[ConfigError], said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        prepare(classification(bert, questions, *words))
    assert texts.SECRET not in str(caught.value)


def test_a_causal_lm_that_lacks_weights_does_not_load(bert: Path, questions: Path) -> None:
    with pytest.raises(ConfigError, match="expected"):
        load_base(BaseOptions(str(bert), device="cpu"))


def test_a_test_file_is_used_for_testing_only(bert: Path, tmp_path: Path) -> None:
    rows = texts.questions(120)
    train, test = texts.write_csv(tmp_path / "train.csv", rows[:90]), texts.write_csv(tmp_path / "test.csv", rows[90:])
    prepared = prepare(classification(bert, train, f"data.holdout={test}", "evaluate.max_examples=null"))
    assert sum(len(held) for held in prepared.held_out.values()) == 30
    assert sum(len(one) for one in prepared.train.values()) < 90
    tuned = prepare(
        classification(bert, train, f"data.holdout={test}", "evaluate.split=tune", "evaluate.max_examples=null")
    )
    counted = sum(len(one) for one in tuned.train.values()) + sum(len(held) for held in tuned.held_out.values())
    assert counted == 90


def test_a_cut_evaluation_set_still_has_every_label(bert: Path, tmp_path: Path) -> None:
    rows = sorted(texts.questions(180), key=lambda row: str(row["category"]))
    train, test = texts.write_csv(tmp_path / "a.csv", rows[::2]), texts.write_csv(tmp_path / "b.csv", rows[1::2])
    prepared = prepare(classification(bert, train, f"data.holdout={test}", "evaluate.max_examples=9"))
    assert {example.label for held in prepared.held_out.values() for example in held} == {0, 1, 2}


def test_put_and_take_restore_the_first_values(bert: Path) -> None:
    base = load_base(options(bert))
    put(base, Adapter({}, {name: np.full_like(value, 7.0) for name, value in base.spec.dense.items()}), None)
    assert all((value == 7.0).all() for value in take(base).dense.values())
    put(base, Adapter(), None)
    assert all(take(base).dense[name].tobytes() == base.spec.dense[name].tobytes() for name in NEW)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora.target_modules=[query]"], "It has: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        (["clients.count=9", "clients.ranks=2"], "clients.count=5 or less"),
        (["data.text_column=body"], "no column 'body'"),
        (["partition.column=hospital"], "number, silo, text"),
        (["train.device=cuda"], "train.device"),
        (["model=/nowhere"], "No such directory"),
    ],
)
def test_what_cannot_be_prepared_says_why(llama: Path, notes: Path, words: list[str], said: str) -> None:
    import torch

    if words == ["train.device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ConfigError, match=said) as caught:
        prepare(small(llama, notes, *words))
    assert texts.SECRET not in str(caught.value)


@pytest.mark.parametrize("value", ["5", "[]", "[q_proj,3]", "''"])
def test_target_modules_that_are_no_names_are_config_errors(llama: Path, notes: Path, value: str) -> None:
    with pytest.raises(ConfigError):
        prepare(small(llama, notes, f"lora.target_modules={value}"))


@pytest.mark.parametrize(
    ("number_format", "compute"), [("nf4", "fp32"), ("int8", "bf16"), ("mixed", "fp32"), ("bf16", "bf16")]
)
def test_new_parameters_of_a_smaller_base_stay_float32_and_learn(bert: Path, number_format: str, compute: str) -> None:
    if number_format != "bf16":
        pytest.importorskip("bitsandbytes")
    exact = load_base(options(bert))
    base = load_base(replace(options(bert), format=number_format, compute=compute))
    assert base.spec.dense.keys() == exact.spec.dense.keys()
    for name, first in exact.spec.dense.items():
        assert base.parameter(name).dtype == torch.float32
        np.testing.assert_array_equal(base.spec.dense[name], first)
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(5, 900, 8).astype(np.int32) + 20 * (number % 2), np.zeros(8, bool), number % 2)
        for number in range(8)
    ]
    config = TrainConfig(local_steps=8, batch_size=8, learning_rate=1e-5, schedule="constant", max_grad_norm=0.0)
    put(base, Adapter({}, dict(base.spec.dense)), None)
    train(base, examples, Task("0", 1, 1, 0, config), EMPTY)
    for name, first in base.spec.dense.items():
        moved = np.abs(take(base).dense[name] - first).max()
        # AdamW's first steps are of about the learning rate, which 16 bits would round away.
        assert 2e-5 < moved < 1e-4, name
