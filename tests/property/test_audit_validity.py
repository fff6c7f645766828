"""Lower bounds are bounds: on mechanisms whose epsilon is known they exceed it in no more than 5 % of audits.

Where the number of right guesses has a law that can be written down the probability is exact; elsewhere audits are repeated, and
the slack is four deviations of a binomial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, ndtr
from scipy.stats import binom

from lamina.audits.estimators.gaussian import epsilon_of
from lamina.audits.estimators.many_run import many_run
from lamina.audits.estimators.one_run import OneRun, epsilon_lower, epsilon_lower_fdp, mu_lower, one_run
from lamina.protos.privacy.accounting import epsilon as accounted
from lamina.protos.privacy.events import Event

DELTA, SIGNIFICANCE = 1e-5, 0.05
Audit = tuple[np.ndarray, np.ndarray]


def exceeds(bound: Callable[[int], float], guesses: int, accuracy: float, truth: float) -> float:
    """P[bound > truth] where right guesses are Binomial(guesses, accuracy); the bound rises with them."""
    low, high = 0, guesses + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle) > truth + 1e-8 else (middle + 1, high)
    return float(binom.sf(low - 1, guesses, accuracy))


def allowed(audits: int) -> int:
    return math.floor(audits * SIGNIFICANCE + 4 * math.sqrt(audits * SIGNIFICANCE * (1 - SIGNIFICANCE)))


# Exactly -----------------------------------------------------------------------------------------------------------


@given(
    guesses=st.integers(1, 400),
    more=st.integers(0, 200),
    epsilon=st.floats(0.0, 4.0),
    delta=st.sampled_from([0.0, 1e-5]),
)
def test_randomised_response(guesses: int, more: int, epsilon: float, delta: float) -> None:
    """Each coin is told rightly with probability e^epsilon / (1 + e^epsilon): nothing tells more."""
    found = exceeds(
        lambda v: epsilon_lower(guesses + more, guesses, v, delta, SIGNIFICANCE),
        guesses,
        float(expit(epsilon)),
        epsilon,
    )
    assert found <= SIGNIFICANCE


def test_randomised_response_leaves_little_to_spare() -> None:
    found = [exceeds(lambda v: epsilon_lower(300, 300, v, 0.0, 0.05), 300, float(expit(e)), e) for e in (0.5, 1.0, 3.0)]
    assert min(found) > 0.02


@given(guesses=st.integers(20, 400), epsilon=st.floats(0.0, 2.0), log_delta=st.floats(-3, -0.5))
def test_randomised_response_that_tells_all_with_probability_delta(
    guesses: int, epsilon: float, log_delta: float
) -> None:
    """For each coin on its own. The term of delta is what keeps the bound valid here."""
    delta = 10**log_delta
    accuracy = delta + (1 - delta) * float(expit(epsilon))
    assert exceeds(lambda v: epsilon_lower(guesses, guesses, v, delta, 0.05), guesses, accuracy, epsilon) <= 0.05


@pytest.mark.parametrize(("guesses", "delta"), [(100, 1e-3), (300, 1e-2), (300, 0.04)])
def test_a_mechanism_that_tells_all_coins_at_once_with_probability_delta(guesses: int, delta: float) -> None:
    """And is randomised response otherwise: (epsilon, delta)-DP, with P[all right] of delta at least."""
    epsilon = 0.5
    tail = exceeds(lambda v: epsilon_lower(guesses, guesses, v, delta, 0.05), guesses, float(expit(epsilon)), epsilon)
    reached = epsilon_lower(guesses, guesses, guesses, delta, 0.05) > epsilon
    assert tail * (1 - delta) + delta * reached <= 0.05


@given(guesses=st.integers(1, 300), mu=st.floats(0.01, 4.0))
def test_independent_gaussian_canaries(guesses: int, mu: float) -> None:
    """In or out moves a score by mu deviations, and each is guessed by its own middle: right with probability Phi(mu / 2)."""
    accuracy, epsilon = float(ndtr(mu / 2)), epsilon_of(mu, DELTA)
    assert exceeds(lambda v: mu_lower(guesses, guesses, v, SIGNIFICANCE), guesses, accuracy, mu) <= SIGNIFICANCE
    assert exceeds(lambda v: epsilon_lower(guesses, guesses, v, DELTA, 0.05), guesses, accuracy, epsilon) <= 0.05


@given(data=st.data(), guesses=st.integers(1, 200), more=st.integers(0, 100))
def test_bounds_rise_with_what_is_right_and_fall_with_what_is_allowed(
    data: st.DataObject, guesses: int, more: int
) -> None:
    right = data.draw(st.integers(0, guesses - 1))
    m = guesses + more
    for bound in (epsilon_lower, epsilon_lower_fdp):
        one = bound(m, guesses, right, DELTA, 0.05)
        assert one <= bound(m, guesses, right + 1, DELTA, 0.05) <= bound(m, guesses, guesses, DELTA, 0.05)
        assert bound(m, guesses, right, DELTA, 0.01) <= one
        assert bound(m, guesses, right, 1e-2, 0.05) <= one + 1e-9
        assert bound(m + 50, guesses, right, DELTA, 0.05) <= one + 1e-9


# By repetition -----------------------------------------------------------------------------------------------------


def coins(rng: np.random.Generator, audits: int, canaries: int) -> Iterator[np.ndarray]:
    yield from rng.random((audits, canaries)) < 0.5


def shared_sum(rng: np.random.Generator, audits: int, canaries: int, dimension: int, noise: float) -> Iterator[Audit]:
    """The Gaussian mechanism on one sum of unit vectors; a canary's score is its product with what is released."""
    for included in coins(rng, audits, canaries):
        vectors = rng.normal(size=(canaries, dimension))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        released = included @ vectors + noise * rng.normal(size=dimension)
        yield included, vectors @ (released - 0.5 * vectors.sum(axis=0))


def laplace(rng: np.random.Generator, audits: int, canaries: int, epsilon: float) -> Iterator[Audit]:
    for included in coins(rng, audits, canaries):
        yield included, included + rng.laplace(0, 1 / epsilon, canaries)


def sampled(rng: np.random.Generator, audits: int, canaries: int, noise: float) -> Iterator[Audit]:
    """20 steps, in each of which a canary that is in counts with probability 0.3."""
    for included in coins(rng, audits, canaries):
        times = rng.binomial(20, 0.3, canaries) * included
        yield included, times + noise * math.sqrt(20) * rng.normal(size=canaries)


def audited(runs: Iterator[Audit], delta: float, *guesses: int) -> list[OneRun]:
    return [one_run(included, scores, delta, SIGNIFICANCE, guesses) for included, scores in runs]


@pytest.mark.parametrize("dimension", [1, 5, 2000])
def test_canaries_that_share_one_sum(dimension: int) -> None:
    audits, noise = 200 if dimension > 100 else 1000, 0.7
    found = audited(shared_sum(np.random.default_rng(dimension), audits, 60, dimension, noise), DELTA, 60)
    truth = epsilon_of(1 / noise, DELTA)
    assert sum(one.epsilon_lower > truth for one in found) <= allowed(audits)
    assert sum((one.epsilon_lower_fdp or 0) > truth for one in found) <= allowed(audits)
    if dimension > 100:  # and it is not for nothing
        assert np.mean([one.epsilon_lower_fdp or 0 for one in found]) > 0.2 * truth


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_laplace_canaries(epsilon: float) -> None:
    found = audited(laplace(np.random.default_rng(1), 1000, 100, epsilon), 0.0, 50)
    assert sum(one.epsilon_lower > epsilon for one in found) <= allowed(1000)


def test_sampled_canaries() -> None:
    noise = 0.8
    truth = accounted([Event("", 0, noise, 0.3, 20, 1.0, "record")], DELTA)
    found = audited(sampled(np.random.default_rng(2), 1000, 100, noise), DELTA, 40)
    assert sum(one.epsilon_lower > truth for one in found) <= allowed(1000)
    assert sum((one.epsilon_lower_fdp or 0) > truth for one in found) <= allowed(1000)


def test_the_best_of_several_choices() -> None:
    """Randomised response, whose scores are ties but for one bit: each number of guesses is nearly an audit of its own."""
    rng, epsilon, exceeded = np.random.default_rng(3), 1.0, 0
    for included in coins(rng, 1500, 400):
        told = np.where(rng.random(400) < expit(epsilon), included, ~included)
        found = one_run(included, told.astype(float), 0.0, SIGNIFICANCE, (30, 60, 120, 240, 400))
        exceeded += found.epsilon_lower > epsilon
    assert exceeded <= allowed(1500)


@pytest.mark.parametrize("epsilon", [0.2, 1.0])
def test_many_runs_of_a_laplace_mechanism(epsilon: float) -> None:
    rng, exceeded = np.random.default_rng(4), 0
    for _ in range(400):
        one, other = 1 + rng.laplace(0, 1 / epsilon, 200), rng.laplace(0, 1 / epsilon, 200)
        exceeded += many_run(one, other, 0.0).epsilon_lower > epsilon
    assert exceeded <= allowed(400)


def test_many_runs_of_a_coin() -> None:
    """Randomised response is the tightest: its one event is known, and the bound is that of two binomials."""
    rng, epsilon, exceeded = np.random.default_rng(5), 1.0, 0
    for _ in range(600):
        one, other = rng.random(200) < expit(epsilon), rng.random(200) < expit(-epsilon)
        exceeded += many_run(one, other, 0.0).epsilon_lower > epsilon
    assert exceeded <= allowed(600)
