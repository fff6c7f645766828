"""Who is in a step: each unit with one probability, a record whatever its number of examples, a user with some of its rows."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lamina.client.data import Example
from lamina.client.private.sampling import Share, drawn, pieces, units_of
from lamina.client.split import split
from lamina.protos.errors import DataError
from lamina.protos.privacy.noise import seeded


def example(row: int, user: str = "", targets: int = 3, label: int = -1) -> Example:
    tokens = np.arange(targets + 1, dtype=np.int32)
    return Example(tokens, tokens > 0, label, row, user)


def records(count: int) -> list[Example]:
    return [example(row) for row in range(count)]


def sizes(count: int, rate: float, steps: int) -> Counter[int]:
    units, stream = units_of(records(count), "record"), seeded(1, "sampling")
    return Counter(len(drawn(units, rate, 1, stream)) for _ in range(steps))


@pytest.mark.parametrize(("count", "rate"), [(40, 0.1), (200, 0.02), (10, 0.5)])
def test_batch_sizes_are_binomial(count: int, rate: float) -> None:
    """Chi-square on sizes with at least five expected, the rest together; p > 0.001 for this seed."""
    steps = 4000
    found, law = sizes(count, rate, steps), stats.binom(count, rate)
    common = [size for size in range(count + 1) if steps * law.pmf(size) >= 5]
    observed = [found[size] for size in common]
    expected = [steps * law.pmf(size) for size in common]
    observed.append(steps - sum(observed))
    expected.append(steps - sum(expected))
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_units_are_drawn_one_by_one() -> None:
    """Each as often as the rate says, and pairs as often as its square."""
    units, stream, steps = units_of(records(12), "record"), seeded(2, "sampling"), 6000
    there = np.zeros((steps, 12))
    for step in range(steps):
        for share in drawn(units, 0.25, 1, stream):
            there[step, share.examples[0].row] = 1
    assert np.abs(there.mean(0) - 0.25).max() < 4.5 * math.sqrt(0.25 * 0.75 / steps)
    pairs = there.T @ there / steps
    off = pairs[~np.eye(12, dtype=bool)]
    assert np.abs(off - 0.0625).max() < 4.5 * math.sqrt(0.0625 * 0.9375 / steps)


def test_planted_a_shuffled_epoch_is_no_poisson_sampling() -> None:
    """Batches of one size, as a shuffling loader gives them, fail the same test."""
    rng, steps = np.random.default_rng(0), 4000
    found = Counter(len(rng.permutation(40)[:4]) for _ in range(steps))
    law = stats.binom(40, 0.1)
    assert stats.chisquare([found[4], steps - found[4]], [steps * law.pmf(4), steps * (1 - law.pmf(4))]).pvalue < 1e-9


def test_a_record_of_many_windows_is_one_unit_that_gives_one_of_them() -> None:
    windows = [example(0, targets=targets) for targets in (1, 2, 3, 4)]
    units = units_of([*windows, example(1)], "record")
    assert [len(unit) for unit in units] == [1, 1]
    seen: Counter[int] = Counter()
    stream = seeded(3, "sampling")
    for _ in range(2000):
        first, second = drawn(units, 1.0, 1, stream)
        assert len(first.examples) == len(second.examples) == 1
        targets = int(first.examples[0].targets.sum())
        assert first.weights == [1 / targets]
        seen[targets] += 1
    assert stats.chisquare([seen[number] for number in (1, 2, 3, 4)]).pvalue > 1e-3


def test_a_user_is_one_unit_with_some_of_its_rows() -> None:
    rows = [example(row, "anna") for row in range(5)] + [example(5, "ben", targets=1), example(6, "ben", targets=2)]
    units = units_of(rows, "user")
    assert [len(unit) for unit in units] == [5, 2]
    stream, seen = seeded(4, "sampling"), Counter[int]()
    for _ in range(1500):
        anna, ben = drawn(units, 1.0, 3, stream)
        numbers = [one.row for one in anna.examples]
        assert len(set(numbers)) == 3
        assert anna.weights == [1 / 9] * 3
        assert sorted(ben.weights) == [1 / 4, 1 / 2]
        seen.update(numbers)
    assert max(abs(seen[row] - 900) for row in range(5)) < 4.5 * math.sqrt(1500 * 0.6 * 0.4)


def test_labels_weigh_one() -> None:
    unit = units_of([example(0, label=2)], "record")
    assert drawn(unit, 1.0, 1, seeded(0))[0].weights == [1.0]


def test_a_row_without_a_user_is_refused() -> None:
    with pytest.raises(DataError, match="training row 3 has none"):
        units_of([example(0, "anna"), example(2)], "user")


def test_what_a_unit_gives_depends_on_no_other() -> None:
    """The draws of one unit are its own: with everybody drawn, its windows are as they are alone, in distribution."""
    windows = [example(0, targets=targets) for targets in (1, 2)]
    alone, crowd = units_of(windows, "record"), units_of([*windows, *(example(row) for row in range(1, 9))], "record")

    def firsts(units: Sequence[tuple[tuple[Example, ...], ...]], seed: int) -> int:
        stream = seeded(seed, "sampling")
        return sum(int(drawn(units, 1.0, 1, stream)[0].examples[0].targets.sum()) == 1 for _ in range(2000))

    assert abs(firsts(alone, 5) - firsts(crowd, 6)) < 4.5 * math.sqrt(2000 * 0.5)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 5), max_size=8), st.integers(1, 9))
def test_pieces_hold_everything_once_and_say_where_a_unit_goes_on(counts: list[int], size: int) -> None:
    rows = iter(range(100))
    shares = [Share([example(next(rows)) for _ in range(count)], [0.5] * count) for count in counts]
    found = list(pieces(shares, size))
    flat = [(one.row, unit) for piece in found for one, unit in zip(piece.examples, piece.units, strict=True)]
    assert flat == [(one.row, number) for number, share in enumerate(shares) for one in share.examples]
    assert all(len(piece.examples) == size for piece in found[:-1])
    for piece, after in itertools.zip_longest(found, found[1:]):
        assert piece.goes_on == (after is not None and after.units[0] == piece.units[-1])


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=5), max_size=30), st.text(max_size=5), st.sampled_from([0.1, 0.3]))
def test_one_row_more_moves_no_other_between_parts(texts: list[str], more: str, share: float) -> None:
    """Which exact shares do: one more row can push others into the training rows."""
    before = split([{"text": text} for text in texts], share, ["text"], each_alone=True)
    after = split([{"text": text} for text in [*texts, more]], share, ["text"], each_alone=True)
    grown = [len(new) - len(old) for old, new in zip(before, after, strict=True)]
    assert sorted(grown) == [0, 0, 1]
    for old, new in zip(before, after, strict=True):
        assert new[: len(old)] == old
    assert sum(map(len, after)) == len(texts) + 1
