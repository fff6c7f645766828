"""Gaussian curves, ROC figures, exposure."""

from __future__ import annotations

import json
import math

import dp_accounting
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from lamina.audits.estimators import gaussian, roc
from lamina.audits.estimators.exposure import exposure
from lamina.audits.estimators.exposure import json_of as exposure_json
from lamina.protos.errors import ConfigError

# Gaussian curves ---------------------------------------------------------------------------------------------------


def test_epsilon_of_one_deviation() -> None:
    """The analytic value that accountants are held to: sensitivity over noise 1, delta 1e-5."""
    assert gaussian.epsilon_of(1.0, 1e-5) == pytest.approx(4.377178, abs=1e-6)


@given(mu=st.floats(0.05, 30), log_delta=st.floats(-12, -1))
def test_epsilon_is_that_of_the_gaussian_mechanism(mu: float, log_delta: float) -> None:
    delta = 10**log_delta
    assert gaussian.epsilon_of(mu, delta) == pytest.approx(
        max(0.0, dp_accounting.get_epsilon_gaussian(1 / mu, delta, tol=1e-9)), rel=1e-5, abs=1e-7
    )


@given(epsilon=st.floats(0.01, 300), log_delta=st.floats(-12, -1))
def test_mu_and_epsilon_are_inverses(epsilon: float, log_delta: float) -> None:
    mu = gaussian.mu_of(epsilon, 10**log_delta)
    assert gaussian.epsilon_of(mu, 10**log_delta) == pytest.approx(epsilon, rel=1e-6, abs=1e-6)


def test_ends_of_the_curve() -> None:
    assert gaussian.epsilon_of(0.0, 1e-5) == gaussian.epsilon_of(1e-9, 1e-5) == 0
    assert gaussian.epsilon_of(math.inf, 1e-5) == math.inf
    assert gaussian.epsilon_of(gaussian.mu_of(0.0, 1e-5), 1e-5) == pytest.approx(0, abs=1e-6)
    for mu, delta in ((math.nan, 1e-5), (-1.0, 1e-5), (1.0, 0.0)):
        with pytest.raises(ConfigError, match="expected"):
            gaussian.epsilon_of(mu, delta)
    for epsilon in (math.inf, math.nan, -1.0):
        with pytest.raises(ConfigError, match="expected"):
            gaussian.mu_of(epsilon, 1e-5)


@given(mu=st.floats(0, 6))
def test_the_largest_area_is_that_under_the_largest_rates(mu: float) -> None:
    area, _ = quad(lambda fpr: gaussian.largest_tpr(mu, fpr), 0, 1, limit=200)
    assert gaussian.largest_auc(mu) == pytest.approx(area, abs=1e-5)


# ROC ---------------------------------------------------------------------------------------------------------------

SCORES = st.lists(st.integers(-3, 3).map(float) | st.just(math.inf) | st.just(-math.inf), min_size=1, max_size=30)


@given(members=SCORES, others=SCORES)
def test_the_area_is_the_share_of_pairs_in_order(members: list[float], others: list[float]) -> None:
    found = roc.roc(members, others, resamples=5)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in members for b in others]
    assert found.auc == pytest.approx(sum(pairs) / len(pairs))
    # And it is what is under the curve where nothing is thinned out.
    fpr, tpr = np.array(_all_corners(members, others)).T
    assert found.auc == pytest.approx(np.trapezoid(tpr, fpr))
    assert found.auc_interval[0] <= found.auc <= found.auc_interval[1]


def _all_corners(members: list[float], others: list[float]) -> list[tuple[float, float]]:
    levels = [math.nan, *sorted({*members, *others}, reverse=True)]
    return [(float(np.mean(np.array(others) >= t)), float(np.mean(np.array(members) >= t))) for t in levels]


@given(members=SCORES, others=SCORES)
def test_the_curve_has_corners_alone_and_rises(members: list[float], others: list[float]) -> None:
    points = roc.roc(members, others, resamples=2).curve
    assert points[-1] == (1.0, 1.0)
    assert points[0][0] == 0
    assert list(points) == sorted(points)
    assert len({fpr for fpr, _ in points}) == len(points)
    assert set(points) <= set(_all_corners(members, others))


def test_rates_where_false_alarms_are_rare() -> None:
    """1000 others at 0..999: one may be above the threshold at 0.1 %, ten at 1 %."""
    others = np.arange(1000.0)
    found = roc.roc([998.5, 990.5, 989.5, 988.5, 998.0], others, resamples=5)
    assert found.tpr_at_fpr[0.001].value == 0.2  # above 998 alone, which 999 is too; 998.0 ties with another
    assert found.tpr_at_fpr[0.01].value == 0.8  # above 989: 998.5, 990.5, 998.0 and 989.5
    assert found.tpr_at_fpr[0.001].measurable
    assert not roc.roc([1.0], others[:999], resamples=2).tpr_at_fpr[0.001].measurable
    assert roc.roc([1.0], others[:100], resamples=2).tpr_at_fpr[0.01].measurable


def test_constant_scores_tell_nothing() -> None:
    found = roc.roc(np.zeros(50), np.zeros(60), resamples=50)
    assert found.auc == 0.5
    assert [one.value for one in found.tpr_at_fpr.values()] == [0, 0]
    assert found.curve == ((0.0, 0.0), (1.0, 1.0))


def test_scores_that_are_apart_have_an_interval_all_the_same() -> None:
    """Clopper and Pearson of n out of n: the lower end is 0.025^(1/n)."""
    found = roc.roc(np.ones(20), np.zeros(30), resamples=50)
    assert found.auc_interval == pytest.approx((0.025 ** (1 / 20), 1.0))
    assert found.tpr_at_fpr[0.01].interval == pytest.approx((0.025 ** (1 / 20), 1.0))


def test_intervals_cover_the_truth() -> None:
    """N(1, 1) against N(0, 1), whose area is Phi(1 / sqrt 2): 95 % of intervals, up to chance and the bootstrap's bias."""
    rng, truth = np.random.default_rng(0), gaussian.largest_auc(1.0)
    covered = 0
    for number in range(200):
        low, high = roc.roc(rng.normal(1, 1, 60), rng.normal(0, 1, 60), number, 200).auc_interval
        covered += low <= truth <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_curve_is_thinned_where_it_costs_nothing() -> None:
    rng = np.random.default_rng(0)
    found = roc.roc(rng.normal(1, 1, 3000), rng.normal(0, 1, 20_000), resamples=2)
    fpr = np.array([point[0] for point in found.curve])
    assert len(fpr) <= 200
    assert fpr[1] == 1 / 20_000
    rare = fpr[(fpr > 0) & (fpr <= 0.01)]
    assert len(rare) > 60
    assert np.diff(np.log10(rare)).max() < 0.5
    text = json.dumps(roc.json_of(found, "black box"), allow_nan=False)
    assert json.loads(text)["tpr_at_fpr"].keys() == {"0.01", "0.001"}


@pytest.mark.parametrize(("members", "others"), [([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([[1.0]], [1.0])])
def test_scores_that_cannot_be_ranked_are_refused(members: list[float], others: list[float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        roc.roc(members, others)


def test_an_attack_as_good_as_the_curve_is_not_beyond_it() -> None:
    """Alarms at 1 % in 1000 audits of the Gaussian mechanism itself, 40 canaries either way."""
    rng, mu = np.random.default_rng(0), gaussian.mu_of(8, 1e-5)
    alarms = sum(roc.beyond(roc.roc(rng.normal(mu, 1, 40), rng.normal(0, 1, 40), resamples=1), mu) for _ in range(1000))
    assert alarms <= 10


def test_a_run_with_a_twentieth_of_its_noise_is_beyond_its_claim() -> None:
    """The area measured for that bug was 0.976, of 200 canaries in and 200 out, for a claim of epsilon 8."""
    rng = np.random.default_rng(0)
    shift = math.sqrt(2) * 1.978  # an area of 0.976
    found = roc.roc(rng.normal(shift, 1, 200), rng.normal(0, 1, 200), resamples=1)
    assert roc.beyond(found, gaussian.mu_of(8, 1e-5))
    assert not roc.beyond(found, gaussian.mu_of(30, 1e-5))


def test_five_canaries_are_too_few_for_an_alarm() -> None:
    assert not roc.beyond(roc.roc(np.ones(5), np.zeros(5), resamples=1), gaussian.mu_of(1, 1e-5))


# Exposure ----------------------------------------------------------------------------------------------------------


def test_exposure_is_exact() -> None:
    """Of R = 8 candidates: rank 1 gives 3 bits, rank 2 gives 2, rank 8 gives 0."""
    found = exposure([9.0, 6.5, 0.0], np.arange(1.0, 8.0))
    assert found.values.tolist() == [3.0, 2.0, 0.0]
    assert (found.ceiling, found.extracted) == (3.0, 1)


def test_candidates_that_are_not_told_apart_are_not_exposed() -> None:
    assert exposure([0.0, 0.0], np.zeros(1023)).values.tolist() == [0.0, 0.0]
    assert exposure([1.0, 1.0], [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).values.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("candidates", [2, 100, 4096])
def test_chance_is_the_mean_over_all_ranks(candidates: int) -> None:
    found = exposure([0.0], np.ones(candidates - 1))
    assert found.chance == pytest.approx(math.log2(candidates) - np.log2(np.arange(1, candidates + 1)).mean())


def test_no_canary_has_no_mean() -> None:
    figures = exposure_json(exposure([], [1.0]))
    assert (figures["mean"], figures["max"], figures["count"], figures["extracted"]) == (None, None, 0, 0)


@pytest.mark.parametrize("others", [[], [[1.0]], [math.nan], [[[1.0]]]])
def test_candidates_that_do_not_fit_are_refused(others: list[float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        exposure([1.0, 2.0], others)
