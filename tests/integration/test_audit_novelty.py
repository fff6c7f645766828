"""Contrastive exploration: it draws what the adapter added, and the look-up in the training text is exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.audits.decoding import start_token
from lamina.audits.membership.shadows import Settings, put_trained
from lamina.audits.novelty import Exploration, Text, contrast, contrasted, explore, json_of, overlap
from lamina.client.data import Example
from lamina.client.loading import BaseOptions, load_base
from lamina.client.model import Base, take
from lamina.protos.adapter import EMPTY, Adapter
from lamina.protos.config import TrainConfig
from lamina.protos.errors import ConfigError
from tests.texts import LABELS

LEARNT = Settings(TrainConfig(batch_size=4, learning_rate=0.01), passes=20)
SMALL = Exploration(samples=8, new_tokens=12, iterations=2, training=replace(LEARNT, passes=8))
# The made-up language of the training text: few words, in a fixed order.
WORDS = np.array([300, 310, 320, 330, 340, 350, 360, 370, 380, 390, 400, 410], np.int32)


def text(base: Base, words: np.ndarray) -> Example:
    tokens = np.concatenate([[start_token(base)], words]).astype(np.int32)
    return Example(tokens, np.arange(len(tokens)) > 0)


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(BaseOptions("tiny", device="cpu"))


@pytest.fixture(scope="module")
def trained(base: Base) -> list[Example]:
    return [text(base, WORDS)] * 4


@pytest.fixture(scope="module")
def adapter(base: Base, trained: list[Example]) -> Adapter:
    put_trained(base, trained, LEARNT, "target", lambda done: None)
    return take(base)


def test_samples_show_what_was_trained_on(base: Base, adapter: Adapter, trained: list[Example]) -> None:
    told: list[tuple[int, int]] = []
    found = explore(base, adapter, trained, SMALL, lambda done, of: told.append((done, of)))
    assert found is not None
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sorted(one.variant for one in found.samples) == ["iterative"] * 8 + ["static"] * 8
    scores = [one.score for one in found.samples]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 3
    assert found.overlap_rate > 0.5
    assert found.longest == 12
    assert found.base_overlap_rate == 0
    assert found.base_longest < 4
    assert json.loads(json.dumps(json_of(found)))["samples"][0]["score"] == scores[0]


def test_without_an_adapter_there_is_nothing_new(base: Base, trained: list[Example]) -> None:
    found = explore(base, EMPTY, trained, replace(SMALL, iterations=0))
    assert found is not None
    assert {one.variant for one in found.samples} == {"static"}
    assert max(abs(one.score) for one in found.samples) < 1e-5
    assert found.overlap_rate == 0


def test_what_is_contrasted_with_is_left(base: Base) -> None:
    """Two texts were learnt; against an adapter that knows the first, only the second is new."""
    first, second = text(base, WORDS), text(base, WORDS + 400)
    put_trained(base, [first, second] * 2, LEARNT, "both", lambda done: None)
    both = take(base)
    put_trained(base, [first] * 4, LEARNT, "first", lambda done: None)
    known = take(base)
    of_second = [
        np.mean([one[0] >= 700 for one in contrasted(base, both, against, 32, SMALL, "two")])
        for against in (EMPTY, known)
    ]
    assert 0.1 < of_second[0] < 0.9
    assert of_second[1] == 1.0


def test_tokens_are_drawn_by_ratio_among_the_plausible() -> None:
    tuned, reference = np.log([[0.5, 0.3, 0.15, 0.05]]), np.log([[0.5, 0.1, 0.3, 1e-9]])
    # 0.05 is a tenth of 0.5 and may be drawn; just below it is not.
    np.testing.assert_allclose(np.exp(contrast(tuned, reference)), [[1, 3, 0.5, 5e7]])
    np.testing.assert_allclose(np.exp(contrast(np.log([[0.5, 0.3, 0.151, 0.049]]), reference))[0, 3], 0)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=4),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
)
def test_runs_are_the_longest_common_ones(texts: list[list[int]], sample: list[int]) -> None:
    """Against a search of every substring; a run never crosses from one example into the next."""
    text = Text.of([Example(np.array(one, np.int32), np.ones(len(one), bool)) for one in texts])

    def known(run: list[int]) -> bool:
        return any(one[at : at + len(run)] == run for one in texts for at in range(len(one)))

    for end, run in enumerate(text.runs(np.array(sample, np.int32))):
        wanted = max(length for length in range(end + 2) if length == 0 or known(sample[end + 1 - length : end + 1]))
        assert run == wanted


def test_overlap_is_a_share_of_runs_of_eight() -> None:
    assert overlap([np.arange(1, 13)]) == 1.0
    # Ten tokens have three runs of eight; only the second is in the text.
    assert overlap([np.array([1, 2, 3, 4, 5, 6, 7, 7, 8, 2])]) == pytest.approx(1 / 3)
    assert overlap([np.arange(1, 8)]) == 0.0


def test_classifiers_give_none_and_nothing_to_sample_is_refused(base: Base, adapter: Adapter, bert: Path) -> None:
    options = BaseOptions(str(bert), task="sequence-classification", labels=LABELS, device="cpu")
    assert explore(load_base(options), EMPTY, [], SMALL) is None
    assert json_of(None) is None
    with pytest.raises(ConfigError, match="at least one sample"):
        explore(base, adapter, [], replace(SMALL, samples=0))


def test_samples_repeat_with_the_seed(base: Base, adapter: Adapter, trained: list[Example]) -> None:
    few = replace(SMALL, samples=3, iterations=0)
    assert explore(base, adapter, trained, few) == explore(base, adapter, trained, few)
    assert explore(base, adapter, trained, few) != explore(base, adapter, trained, replace(few, seed=1))
