"""The pure parts of reconstruction: figures, order, and which tokens of an example a gradient knows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.audits.reconstruction.notes import KINDS, invented, prompt, value, values
from lamina.audits.reconstruction.ordering import best_match, rouge_l
from lamina.audits.reconstruction.span import Evidence, Scored, evidence, recovery, scores_of, top
from lamina.audits.reconstruction.truth import sources, tokens_of
from lamina.audits.views import Change
from lamina.client.data import Example

SCORES = st.lists(st.integers(0, 5), min_size=2, max_size=12)


@given(SCORES, st.data())
def test_auc_is_the_share_of_pairs_in_the_right_order(values: list[int], data: st.DataObject) -> None:
    scores = np.array(values, float)
    truth = np.array(sorted(data.draw(st.sets(st.integers(0, len(values) - 1), min_size=1, max_size=len(values) - 1))))
    others = [token for token in range(len(values)) if token not in truth]
    wanted = np.mean([(scores[t] > scores[o]) + 0.5 * (scores[t] == scores[o]) for t in truth for o in others])
    found = recovery(Scored(scores, ()), truth)
    assert found.auc == pytest.approx(wanted)
    assert found.recall == np.isin(top(scores, len(truth)), truth).mean()
    assert found.chance == len(truth) / len(scores)


def test_chance_is_what_noise_finds_where_that_is_more() -> None:
    scores = np.arange(10.0)
    assert recovery(Scored(scores, (scores, -scores)), np.array([8, 9])).chance == 0.5
    assert recovery(Scored(scores, (-scores,)), np.array([8, 9])).chance == 0.2
    assert recovery(Scored(scores, ()), np.zeros(0, np.int64)).tokens == 0


def subsequences(text: list[int]) -> Iterator[tuple[int, ...]]:
    for length in range(len(text) + 1):
        yield from combinations(text, length)


@given(st.lists(st.integers(0, 3), max_size=7), st.lists(st.integers(0, 3), max_size=7))
def test_rouge_is_by_the_longest_common_subsequence(one: list[int], other: list[int]) -> None:
    longest = max(len(some) for some in set(subsequences(one)) & set(subsequences(other)))
    total = len(one) + len(other)
    assert rouge_l(one, other) == pytest.approx(2 * longest / total if total else 0.0)
    assert rouge_l(one, other) == rouge_l(other, one)
    assert rouge_l(one, one) == (1.0 if one else 0.0)


def test_the_best_match_is_named() -> None:
    match, number = best_match([1, 2, 3], [[9], [1, 2, 4], [2]])
    assert (match, number) == (2 / 3, 1)
    assert best_match([1], []) == (0.0, -1)


def test_tokens_after_the_last_prediction_are_in_no_gradient() -> None:
    tokens = np.array([7, 8, 9, 7, 6], np.int32)
    text = Example(tokens, np.array([False, True, True, True, True]))
    prompt_only = Example(tokens, np.array([False, False, True, False, False]))
    labelled = Example(tokens, np.zeros(5, bool), label=1)
    assert sources(text).tolist() == [7, 8, 9, 7]
    assert sources(prompt_only).tolist() == [7, 8]
    assert sources(labelled).tolist() == [7, 8, 9, 7, 6]
    assert tokens_of([text, prompt_only]).tolist() == [7, 8, 9]
    assert tokens_of([]).size == 0


def vocabulary(rng: np.random.Generator, tokens: int = 200, width: int = 32) -> np.ndarray:
    """Inputs with a mean and unequal directions, as those of a trained base."""
    return rng.normal(size=(tokens, width)) * np.linspace(0.2, 2.0, width) + rng.normal(size=width)


@given(st.integers(0, 2**32 - 1), st.integers(1, 10), st.booleans())
def test_tokens_whose_inputs_were_mixed_come_first(seed: int, count: int, mapped: bool) -> None:
    """Fewer tokens than dimensions and exact mixtures: the span holds them and, almost surely, no other."""
    rng = np.random.default_rng(seed)
    inputs = vocabulary(rng)
    through = rng.normal(size=(16, 32)) if mapped else None
    there = inputs if through is None else inputs @ through.T
    truth = rng.permutation(len(inputs))[:count]
    orthogonal = np.linalg.qr(rng.normal(size=(24, count)))[0].T  # each counts alike
    rows = orthogonal.T @ (there[truth] / np.linalg.norm(there[truth], axis=1, keepdims=True))
    scores = scores_of([[Evidence(rows, through)]], lambda _: iter([inputs[:50], inputs[50:]]))
    assert recovery(Scored(scores, ()), truth).auc > 0.9


def test_the_likeliest_position_of_a_token_counts() -> None:
    rng = np.random.default_rng(0)
    pages = [vocabulary(rng), vocabulary(rng)]
    rows = rng.normal(size=(24, 3)) @ pages[1][[5, 6, 7]]
    scores = scores_of([[Evidence(rows)]], lambda position: iter([pages[position]]), positions=2)
    assert set(top(scores, 3)) == {5, 6, 7}
    assert not {5, 6, 7} <= set(top(scores_of([[Evidence(rows)]], lambda _: iter([pages[0]])), 3))


def test_what_is_known_is_taken_off_and_what_did_not_move_is_no_evidence() -> None:
    rng = np.random.default_rng(0)
    known, hidden = rng.normal(size=(4, 12)), rng.normal(size=(2, 12))
    left = rng.normal(size=(9, 6))
    change = Change(product=(left, np.concatenate([known, hidden])), known=known)
    ((one,),) = evidence({"m": change}, ["m"])
    assert one.through is not None
    np.testing.assert_allclose(one.through @ known.T, 0.0, atol=1e-12)
    # What is left is the two hidden rows, off the known ones.
    assert np.linalg.matrix_rank(one.rows, tol=1e-9) == 2
    still = Change(rows=np.zeros((2, 12)))
    assert evidence({"m": still}, ["m", "absent"]) == []


def test_notes_of_the_client_are_nobody_elses() -> None:
    private, public, decoys = invented(6, 20, np.random.default_rng(0))
    assert (len(private), len(public), len(decoys)) == (6, 20, 18)
    for kind in KINDS:
        mine = values(private, kind)
        assert len(set(mine)) == 6
        assert not set(mine) & set(values(public, kind) + values(decoys, kind))
    assert not {note.name for note in private} & {note.name for note in public}
    note = private[0]
    assert all(prompt(kind, note.name) + value(note, kind) in note.text for kind in KINDS)
