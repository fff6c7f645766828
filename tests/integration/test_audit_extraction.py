"""Verbatim extraction: what was learnt by heart comes back, what was not does not, and a match is a match token by token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lamina.audits import decoding
from lamina.audits.extraction import Prompting, extract, json_of, match_tokens
from lamina.audits.membership.shadows import Settings, put_trained
from lamina.client.data import Example
from lamina.client.evaluate import continuation
from lamina.client.loading import BaseOptions, load_base
from lamina.client.model import Base, put, take
from lamina.protos.adapter import EMPTY, Adapter
from lamina.protos.config import TrainConfig
from tests.texts import LABELS

HEART = Settings(TrainConfig(batch_size=6, learning_rate=0.01), passes=60, rank=8)
SHORT = Prompting(prompts=6, prefix_tokens=4, new_tokens=6)


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(BaseOptions("tiny", device="cpu"))


def texts(count: int, length: int, seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    made = [rng.integers(2, 1000, length).astype(np.int32) for _ in range(count)]
    return [Example(tokens, np.arange(length) > 0) for tokens in made]


@pytest.fixture(scope="module")
def trained() -> list[Example]:
    return texts(6, 12, 0)


@pytest.fixture(scope="module")
def adapter(base: Base, trained: list[Example]) -> Adapter:
    put_trained(base, trained, HEART, "target", lambda done: None)
    return take(base)


def test_what_was_learnt_by_heart_comes_back(base: Base, adapter: Adapter, trained: list[Example]) -> None:
    told: list[tuple[int, int]] = []
    found = extract(base, adapter, trained, texts(6, 12, 1), SHORT, lambda done, of: told.append((done, of)))
    assert found is not None
    assert (found.prompts, found.held_out_prompts) == (6, 6)
    assert found.verbatim > 0.8
    assert found.mean_match_tokens > 5
    assert found.verbatim_base == found.verbatim_held_out == 0
    assert found.mean_match_tokens_base < 1
    assert found.mean_match_tokens_held_out is not None
    assert found.mean_match_tokens_held_out < 1
    assert told == [(1, 3), (2, 3), (3, 3)]
    best = found.examples[0]
    assert best.match_tokens == 6
    assert best.original == best.continued
    row = next(one for one in trained if best.prefix == decoding.text_of(base, one.tokens[:4]))
    assert best.original == decoding.text_of(base, row.tokens[4:10])
    assert json.loads(json.dumps(json_of(found)))["examples"][0]["original"] == best.original


def test_the_public_base_gives_nothing_of_it(base: Base, trained: list[Example]) -> None:
    found = extract(base, EMPTY, trained, [], SHORT)
    assert found is not None
    assert found.verbatim == found.verbatim_base == 0
    assert found.mean_match_tokens == found.mean_match_tokens_base
    assert found.verbatim_held_out is found.mean_match_tokens_held_out is None
    assert found.held_out_prompts == 0


def test_greedy_is_one_by_one_generation(base: Base, adapter: Adapter) -> None:
    prompts = np.random.default_rng(2).integers(2, 1000, (5, 7)).astype(np.int32)
    put(base, adapter, None, trainable=False)
    together = decoding.greedy(base, prompts, 8, batch_size=2)
    for prompt, row in zip(prompts, together, strict=True):
        end = np.flatnonzero(row == base.tokenizer.eos_token_id)
        kept = row[: end[0]] if end.size else row
        assert decoding.text_of(base, kept) == continuation(base, prompt.tolist(), 8)


def test_a_response_is_begun_after_its_prompt(base: Base) -> None:
    """Tokens that were never a target are no secret of the training: the prefix ends where targets begin."""
    tokens = np.arange(2, 22).astype(np.int32)
    found = extract(base, EMPTY, [Example(tokens, np.arange(20) >= 9)], [], SHORT)
    assert found is not None
    assert found.examples[0].prefix == decoding.text_of(base, tokens[5:9])
    assert found.examples[0].original == decoding.text_of(base, tokens[9:15])


def test_a_match_ends_with_the_first_wrong_token() -> None:
    original = np.array([[1, 2, 3, 4]] * 4)
    written = np.array([[1, 2, 3, 4], [1, 9, 3, 4], [9, 2, 3, 4], [1, 2, 3, 9]])
    assert match_tokens(written, original).tolist() == [4, 1, 0, 3]


def test_short_texts_and_classifiers_give_none(base: Base, adapter: Adapter, bert: Path) -> None:
    assert extract(base, adapter, texts(3, 9, 0), texts(3, 12, 1), SHORT) is None
    options = BaseOptions(str(bert), task="sequence-classification", labels=LABELS, device="cpu")
    labelled = [replace(one, label=0) for one in texts(3, 12, 0)]
    assert extract(load_base(options), EMPTY, labelled, labelled, SHORT) is None
    assert json_of(None) is None


def test_prompts_are_chosen_by_the_seed(base: Base) -> None:
    many = texts(30, 12, 5)
    one, same, other = (extract(base, EMPTY, many, [], replace(SHORT, seed=seed)) for seed in (0, 0, 1))
    assert one == same
    assert one is not None
    assert other is not None
    assert {shown.prefix for shown in one.examples} != {shown.prefix for shown in other.examples}
