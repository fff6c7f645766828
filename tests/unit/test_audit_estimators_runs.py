"""Estimates from canary clients, and bounds from many runs, on mechanisms whose epsilon is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lamina.audits.estimators.gaussian import epsilon_of, mu_of
from lamina.audits.estimators.many_run import many_run
from lamina.audits.estimators.one_shot import beyond, one_shot
from lamina.protos.errors import ConfigError

DIMENSION, CANARIES, ROUNDS, DELTA = 20_000, 200, 20, 1e-5


def cosines(analytic: float, seed: int, noise: float = 1.0, norm: float = 1.0, present: bool = True) -> np.ndarray:
    """Of a client-dp run whose clients are the canaries, at clip_norm 1: T rounds of the sum with noise z N(0, 1)."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(CANARIES, DIMENSION))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    multiplier = noise * math.sqrt(ROUNDS) / mu_of(analytic, DELTA)
    change = multiplier * math.sqrt(ROUNDS) * rng.normal(size=DIMENSION)
    if present:
        change += ROUNDS * norm * directions.sum(axis=0)
    return np.asarray(directions @ change / np.linalg.norm(change))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("analytic", [4.98, 0.82])
def test_a_right_mechanism_is_estimated_within_half_of_its_epsilon(analytic: float, seed: int) -> None:
    found = one_shot(cosines(analytic, seed), DIMENSION, DELTA)
    assert 0.5 * analytic < found.epsilon < 1.5 * analytic
    assert found.interval[0] < analytic < found.interval[1]
    assert not beyond(found, analytic)
    assert found.deviation == pytest.approx(found.null_deviation, rel=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_of_the_noise_is_far_beyond_the_claim(seed: int) -> None:
    found = one_shot(cosines(4.98, seed, noise=0.1), DIMENSION, DELTA)
    assert found.epsilon > 5 * 4.98
    assert beyond(found, 4.98)


@pytest.mark.parametrize("seed", range(3))
def test_canaries_that_nobody_clipped_are_far_beyond_the_claim(seed: int) -> None:
    found = one_shot(cosines(4.98, seed, norm=5.0), DIMENSION, DELTA)
    assert found.epsilon > 4 * 4.98
    assert beyond(found, 4.98)


def test_directions_that_were_not_there_are_the_null() -> None:
    found = one_shot(cosines(4.98, 0, present=False), DIMENSION, DELTA)
    assert found.null_deviation == 1 / math.sqrt(DIMENSION)
    assert found.deviation == pytest.approx(found.null_deviation, rel=0.15)
    assert found.epsilon < 0.5


def test_cosines_below_0_are_no_evidence() -> None:
    found = one_shot([-0.5, -0.6, -0.7], 100, DELTA)
    assert (found.mu, found.epsilon, found.interval) == (0, 0, (0, 0))


@pytest.mark.parametrize("values", [[0.1], [0.1, 0.1, 0.1]])
def test_one_cosine_is_held_against_the_null(values: list[float]) -> None:
    assert one_shot(values, 400, DELTA).mu == pytest.approx(2.0)


@pytest.mark.parametrize(("values", "dimension"), [([], 9), ([math.nan], 9), ([1.5], 9), ([0.1], 1)])
def test_cosines_that_cannot_be_are_refused(values: list[float], dimension: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        one_shot(values, dimension, DELTA)


@pytest.mark.parametrize(("canaries", "most"), [(20, 15), (50, 0), (100, 0)])
def test_alarms_of_a_right_mechanism_are_rare(canaries: int, most: int) -> None:
    """Cosines as the theory has them, of 500 runs: with 20 canaries their deviation is still a guess."""
    rng, mu = np.random.default_rng(0), mu_of(4.98, DELTA)
    runs = (rng.normal(mu, 1, canaries) / math.sqrt(DIMENSION) for _ in range(500))
    assert sum(beyond(one_shot(run, DIMENSION, DELTA, resamples=200), 4.98) for run in runs) <= most


# Many runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_many_runs_of_a_laplace_mechanism_come_close_to_its_epsilon(epsilon: float) -> None:
    rng = np.random.default_rng(0)
    one, other = 1 + rng.laplace(0, 1 / epsilon, 20_000), rng.laplace(0, 1 / epsilon, 20_000)
    for pair in ((one, other), (other, one), (-one, -other)):
        found = many_run(*pair, delta=0.0)
        assert 0.7 * epsilon < found.epsilon_lower <= epsilon
    assert found.ceiling == pytest.approx(math.log(0.025 ** (1 / 10_000) / (1 - 0.025 ** (1 / 10_000))))


def test_many_runs_of_a_gaussian_mechanism_without_its_noise_refute_it() -> None:
    """Noise 1 is claimed, epsilon 1.57 at delta 0.05 for one deviation, and a tenth is there."""
    rng = np.random.default_rng(0)
    claimed = epsilon_of(1.0, 0.05)
    right = many_run(rng.normal(1, 1, 10_000), rng.normal(0, 1, 10_000), 0.05)
    wrong = many_run(rng.normal(1, 0.1, 10_000), rng.normal(0, 0.1, 10_000), 0.05)
    assert 0.5 * claimed < right.epsilon_lower <= claimed
    assert wrong.epsilon_lower > 4 * claimed
    assert wrong.epsilon_lower <= wrong.ceiling


def test_what_the_event_was_chosen_on_is_no_evidence_for_it() -> None:
    """Every other run tells the neighbours apart, and those are the runs that the event is chosen on."""
    found = many_run(np.tile([0.0, 1.0], 500), np.zeros(1000), 0.0)
    assert (found.hits, found.tested) == (0, (500, 500))
    assert found.epsilon_lower == 0


def test_equal_outputs_show_nothing() -> None:
    found = many_run(np.zeros(100), np.zeros(100), 0.0)
    assert found.epsilon_lower == 0
    assert found.ceiling > 2


@pytest.mark.parametrize("runs", [[1.0], [1.0, math.nan]])
def test_runs_that_cannot_be_compared_are_refused(runs: list[float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        many_run(runs, [1.0, 2.0], 0.0)
