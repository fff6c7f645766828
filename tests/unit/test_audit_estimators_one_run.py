"""One-run bounds: published values, ceilings, and what may not be counted as evidence."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from lamina.audits.estimators import one_run as estimator
from lamina.audits.estimators.gaussian import epsilon_of
from lamina.audits.estimators.one_run import epsilon_lower, epsilon_lower_fdp, json_of, mu_lower, one_run, refuted
from lamina.protos.errors import ConfigError

# All r guesses of m = r canaries right, delta 1e-5, 95 %: the figures of both papers' methods to one decimal.
CEILINGS = {
    20: (1.8, 4.7), 50: (2.8, 6.8), 100: (3.5, 8.2), 200: (4.2, 9.5), 500: (5.1, 11.1), 1000: (5.8, 12.3),
    2000: (6.5, 13.5), 5000: (7.3, 15.0),
}  # fmt: skip


@pytest.mark.parametrize(("guesses", "expected"), CEILINGS.items())
def test_ceilings(guesses: int, expected: tuple[float, float]) -> None:
    assert abs(epsilon_lower(guesses, guesses, guesses, 1e-5, 0.05) - expected[0]) <= 0.051
    assert abs(epsilon_lower_fdp(guesses, guesses, guesses, 1e-5, 0.05) - expected[1]) <= 0.051


def test_bounds_of_a_small_campaign() -> None:
    """80 guesses of 400 canaries: 80 right, 53 right (a right mechanism at epsilon 8), 39 right (at epsilon 1)."""
    found = [
        (round(epsilon_lower(400, 80, right, 1e-5, 0.05), 2), round(epsilon_lower_fdp(400, 80, right, 1e-5, 0.05), 2))
        for right in (80, 53, 39)
    ]
    assert found == [(3.25, 5.75), (0.26, 0.39), (0.0, 0.0)]


def test_at_delta_0_the_bound_is_that_of_a_binomial() -> None:
    """All of r right: q^r = 0.05, with q = e^epsilon / (1 + e^epsilon)."""
    accuracy = 0.05 ** (1 / 30)
    assert epsilon_lower(30, 30, 30, 0.0, 0.05) == pytest.approx(math.log(accuracy / (1 - accuracy)), abs=1e-7)


def _corners(points: list[list[int]]) -> np.ndarray:
    """Corners of the upper hull of points in rising order."""
    kept: list[list[int]] = []
    for x, y in points:
        while len(kept) > 1:
            (x0, y0), (x1, y1) = kept[-2:]
            if (y1 - y0) * (x - x1) > (y - y1) * (x1 - x0):
                break
            kept.pop()
        kept.append([x, y])
    return np.array(kept)


@pytest.mark.parametrize(
    ("shift", "expected", "expected_fdp"),
    [(0, 0.0, 0.0), (1, 1.13346, 2.164749), (2, 2.311945, 4.721808), (4, 4.395568, 9.133752)],
)
def test_published_values(shift: float, expected: float, expected_fdp: float) -> None:
    """Those of jax_privacy's tests: 10 000 scores at the quantiles of N(shift, 1) in, of N(0, 1) out, guesses "in" alone above
    a threshold, the best of the corners of the ROC curve with the significance divided by their number, delta 1e-6.

    As the corners depend on who is in, that choice is for comparison only.
    """
    out = norm.ppf((np.arange(10_000) + 0.5) / 10_000)
    thresholds = np.append(np.union1d(out + shift, out), np.inf)
    missed = np.stack([np.searchsorted(out + shift, thresholds), np.searchsorted(out, thresholds)], axis=1)
    corners = _corners(missed.tolist())
    right, wrong = (10_000 - corners).T
    best, best_mu, significance = 0.0, 0.0, 0.05 / len(corners)
    most_precise_first = np.argsort(-right / np.maximum(1, right + wrong))
    for v, r in zip(right[most_precise_first].tolist(), (right + wrong)[most_precise_first].tolist(), strict=True):
        if r and estimator.p_value(20_000, r, v, best, 1e-6) < significance:
            best = epsilon_lower(20_000, r, v, 1e-6, significance)
        if r and refuted(20_000, r, v, best_mu, significance):
            best_mu = mu_lower(20_000, r, v, significance)
    assert best == pytest.approx(expected, abs=2e-6)
    assert epsilon_of(best_mu, 1e-6) == pytest.approx(expected_fdp, abs=2e-6)


def test_the_p_value_is_that_of_its_definition() -> None:
    """Against sums of the mass function, term by term."""
    for m, r, v, epsilon, delta in [(50, 20, 15, 0.7, 1e-3), (9, 9, 9, 0.0, 0.01), (400, 80, 1, 2.0, 1e-5)]:
        mass = binom.pmf(np.arange(r + 1), r, 1 / (1 + math.exp(-epsilon)))
        slope = max(mass[v - i : v].sum() / i for i in range(1, v + 1))
        assert estimator.p_value(m, r, v, epsilon, delta) == pytest.approx(
            min(1.0, mass[v:].sum() + 2 * m * delta * slope), rel=1e-10
        )


# Attacks on the estimator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_equal_scores_are_no_evidence_however_canaries_are_listed(first: bool) -> None:
    included = np.arange(200) < 100 if first else np.arange(200) >= 100
    found = one_run(included, np.zeros(200), 1e-5)
    assert (found.epsilon_lower, found.epsilon_lower_fdp) == (0.0, 0.0)
    assert 70 < found.right < 130
    assert found.ceiling > 4


def test_scores_that_are_the_coins_reach_the_ceiling() -> None:
    included = np.random.default_rng(0).random(200) < 0.5
    found = one_run(included, included.astype(float), 1e-5, guesses=80)
    assert found.right == found.guesses == 80
    assert found.epsilon_lower == found.ceiling == pytest.approx(epsilon_lower(200, 80, 80, 1e-5, 0.05))
    assert found.epsilon_lower_fdp == found.ceiling_fdp
    assert one_run(included, -included.astype(float), 1e-5, guesses=80).right == 0


def test_an_infinite_score_is_a_score() -> None:
    included = np.arange(100) % 2 == 0
    scores = np.where(included, np.inf, -np.inf)
    assert one_run(included, scores, 1e-5, guesses=50).right == 50


def test_all_in_is_guessed_right_by_half_of_the_guesses() -> None:
    found = one_run(np.ones(100, bool), np.random.default_rng(0).normal(size=100), 1e-5)
    assert found.right == 50
    assert found.epsilon_lower == 0


def test_one_canary_shows_nothing() -> None:
    found = one_run(np.array([True]), np.array([1.0]), 1e-5)
    assert (found.guesses, found.right) == (1, 1)
    assert found.epsilon_lower == found.ceiling == found.epsilon_lower_fdp == found.ceiling_fdp == 0


def test_several_choices_share_the_significance() -> None:
    included = np.arange(100) % 2 == 0
    scores = included + np.random.default_rng(0).normal(size=100)
    found = one_run(included, scores, 1e-5, guesses=(20, 40, 100, 40))
    assert found.choices == 3
    assert found.epsilon_lower == epsilon_lower(100, found.guesses, found.right, 1e-5, 0.05 / 3)
    assert found.epsilon_lower_fdp == epsilon_lower_fdp(100, found.guesses, found.right, 1e-5, 0.05 / 3)
    assert found.ceiling == epsilon_lower(100, 100, 100, 1e-5, 0.05 / 3)
    assert found.significance == 0.05


def test_an_odd_number_of_guesses_guesses_in_once_more() -> None:
    included = np.array([True, True, False, False, False])
    assert one_run(included, np.array([5.0, 4, 3, 2, 1]), 0.0, guesses=3).right == 3
    assert one_run(included, np.array([5.0, 4, 3, 2, 1]), 0.0, guesses=5).right == 4


def test_delta_0_has_no_gaussian_bound() -> None:
    included = np.arange(40) % 2 == 0
    found = one_run(included, included.astype(float), 0.0)
    assert found.epsilon_lower_fdp is found.ceiling_fdp is None
    assert found.epsilon_lower > 2
    assert json_of(found)["epsilon_lower_fdp"] is None
    with pytest.raises(ConfigError, match="delta=0"):
        epsilon_lower_fdp(40, 40, 40, 0.0, 0.05)


@pytest.mark.parametrize(
    ("included", "scores", "more"),
    [
        (np.zeros(0, bool), np.zeros(0), {}),
        (np.ones(3, bool), np.array([1.0, np.nan, 2.0]), {}),
        (np.ones(3, bool), np.zeros(4), {}),
        (np.ones(3), np.zeros(3), {}),
        (np.ones(3, bool), np.zeros(3), {"guesses": 4}),
        (np.ones(3, bool), np.zeros(3), {"guesses": 0}),
        (np.ones(3, bool), np.zeros(3), {"significance": 0.0}),
        (np.ones(3, bool), np.zeros(3), {"delta": 1.0}),
        (np.ones(3, bool), np.zeros(3), {"delta": float("nan")}),
    ],
)
def test_what_cannot_be_is_refused(included: np.ndarray, scores: np.ndarray, more: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"expected"):
        one_run(included, scores, **{"delta": 1e-5, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("counts", [(10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_counts_that_cannot_be_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="right <= guesses <= canaries"):
        epsilon_lower(*counts, 1e-5, 0.05)
    with pytest.raises(ConfigError, match="right <= guesses <= canaries"):
        epsilon_lower_fdp(*counts, 1e-5, 0.05)


def test_no_guess_shows_nothing() -> None:
    assert epsilon_lower(10, 0, 0, 1e-5, 0.05) == 0
    assert epsilon_lower_fdp(10, 0, 0, 1e-5, 0.05) == 0
