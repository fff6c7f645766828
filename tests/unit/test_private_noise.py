"""Where noise comes from: what it is distributed as, and on what it does not depend."""

from __future__ import annotations

import math
import multiprocessing
import random

import numpy as np
import pytest
import torch
from scipy import stats

from lamina.protos.privacy.noise import GRID, noised, secret, seeded

COUNT = 400_000


@pytest.mark.parametrize("stream", [secret(), seeded(0, "noise", "3", 1)])
def test_it_is_standard_normal(stream: object) -> None:
    """Within five standard errors, so that a secret stream fails once in a million runs."""
    found = stream.normal(COUNT)  # type: ignore[attr-defined]
    assert abs(found.mean()) < 5 / math.sqrt(COUNT)
    assert abs(found.std() - 1) < 5 / math.sqrt(2 * COUNT)
    assert abs(stats.kurtosis(found, fisher=False) - 3) < 5 * math.sqrt(24 / COUNT)
    assert stats.kstest(found[::4], "norm").pvalue > 1e-6
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 2**18 - 1, 2**19 + 1])
def test_every_count_is_met(count: int) -> None:
    assert seeded(0).normal(count).shape == (count,)
    assert np.isfinite(seeded(0).normal(count)).all()


def test_uniform_numbers_are_uniform() -> None:
    found = seeded(0, "sampling").uniform(COUNT)
    assert 0 <= found.min() < 1e-4
    assert 1 - 1e-4 < found.max() < 1
    assert stats.chisquare(np.histogram(found, 100, (0, 1))[0]).pvalue > 1e-3


def test_streams_of_other_names_are_others() -> None:
    """Clients, rounds, purposes and seeds of one experiment, in pairs."""
    names = [
        ("noise", "0", 1),
        ("noise", "1", 1),
        ("noise", "0", 2),
        ("sampling", "0", 1),
        ("noise", "01"),
        ("noise0", "1"),
    ]
    found = [seeded(0, *one).normal(20_000) for one in names] + [seeded(1, "noise", "0", 1).normal(20_000)]
    correlations = np.corrcoef(found)[np.triu_indices(len(found), 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(20_000)
    assert np.array_equal(found[0], seeded(0, "noise", "0", 1).normal(20_000))


def test_no_seed_of_the_process_foretells_a_secret_stream() -> None:
    def after_seeds() -> np.ndarray:
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        return np.asarray(secret().normal(20_000))

    first, second = after_seeds(), after_seeds()
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(20_000)
    torch.manual_seed(0)
    theirs = torch.randn(20_000, dtype=torch.float64).numpy()
    assert abs(np.corrcoef(first, theirs)[0, 1]) < 5 / math.sqrt(20_000)


def _forked(stream: object, answer: object) -> None:
    try:
        stream.uniform(1)  # type: ignore[attr-defined]
    except RuntimeError as error:
        answer.put(str(error))  # type: ignore[attr-defined]
    else:
        answer.put("it went on")  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_does_not_repeat_a_stream() -> None:
    stream, context = secret(), multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=_forked, args=(stream, answer))
    child.start()
    child.join(30)
    assert "forked process" in answer.get()


def test_noise_is_added_with_its_deviation_and_lies_on_a_grid() -> None:
    total = np.linspace(-3, 3, COUNT).astype(np.float32)
    found = noised(total, 0.7, seeded(0, "noise"))
    rest = (found - total) / 0.7
    assert abs(rest.mean()) < 5 / math.sqrt(COUNT)
    assert abs(rest.std() - 1) < 5 / math.sqrt(2 * COUNT)
    steps = found / (0.7 * GRID)
    assert np.abs(steps - np.rint(steps)).max() < 1e-4


@pytest.mark.parametrize("deviation", [0.0, -1.0, math.nan, math.inf])
def test_no_noise_is_refused(deviation: float) -> None:
    with pytest.raises(ValueError, match="positive deviation"):
        noised(np.zeros(3), deviation, seeded(0))


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_sum_that_is_not_finite_is_not_released(odd: float) -> None:
    with pytest.raises(ValueError, match="finite sum"):
        noised(np.array([0.0, odd]), 1.0, seeded(0))
