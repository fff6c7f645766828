"""What events cost: published and measured values, identities of Gaussians, laws of composition, and noise for a budget.

The table was computed with dp-accounting 0.6.0 and opacus 1.6.0; its rows are settings of Abadi et al. 2016 (arXiv:1607.00133),
of tutorials of DP-SGD and of opacus' own tests. The analytic epsilon of a Gaussian is that of Balle and Wang 2018
(arXiv:1805.06530).
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from lamina.protos.errors import ConfigError
from lamina.protos.privacy import accounting
from lamina.protos.privacy.accounting import bound, composed, epsilon, epsilon_rdp, noise_for
from lamina.protos.privacy.events import Event

DELTA = 1e-5
MNIST = 256 / 60000
# Sample rate, noise multiplier, steps, delta -> epsilon by RDP, by PLD, and opacus' by PRV.
TABLE = [
    (MNIST, 1.1, 14062, 1e-5, 2.5966, 2.3817, 2.3917),
    (MNIST, 1.3, 3515, 1e-5, 0.9544, 0.8645, 0.8745),
    (MNIST, 0.7, 10546, 1e-5, 6.3195, 5.6394, 5.6498),
    (0.04, 1.5, 2250, 1e-5, 7.3293, 6.7688, 6.7791),
    (0.01, 4.0, 10000, 1e-5, 1.0355, 0.9470, 0.9569),
    (0.1, 1.0, 100, 1e-5, 7.904, 7.0466, 7.0571),
    (0.5, 2.0, 50, 1e-5, 10.288, 9.4736, 9.4841),
    (1.0, 10.0, 100, 1e-5, 4.7285, 4.3772, 4.3874),
    (1.0, 1.0, 1, 1e-5, 4.7285, 4.3772, 4.3874),
    (0.005, 1.0, 1000, 1e-6, 1.4661, 1.0277, 1.0378),
]


def event(rate: float, noise: float, steps: int, number: int = 1) -> Event:
    return Event("site", number, noise, rate, steps, 1.0)


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "rdp", "pld", "prv"), TABLE)
def test_the_reference_table(
    rate: float, noise: float, steps: int, delta: float, rdp: float, pld: float, prv: float
) -> None:
    one = [event(rate, noise, steps)]
    assert epsilon(one, delta) == pytest.approx(pld, abs=1e-3)
    assert epsilon_rdp(one, delta) == pytest.approx(rdp, abs=1e-3)
    # PRV adds its own error bound of 0.01 to what PLD gives.
    assert epsilon(one, delta) == pytest.approx(prv - 0.01, abs=2e-3)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "wanted"),
    [(1.5, 0.05, 1000, 6.20997), (2.0, 0.05, 1000, 4.17280), (3.0, 0.05, 20000, 13.96111)],
)
def test_published_values_of_prv(noise: float, rate: float, steps: int, wanted: float) -> None:
    """Of Gopi et al. 2021 (arXiv:2106.02848), as kept in opacus' tests; they include an error bound of 0.01."""
    assert epsilon([event(rate, noise, steps)], 1e-6) == pytest.approx(wanted - 0.01, abs=2e-3)


def test_opacus_agrees() -> None:
    accountants = pytest.importorskip("opacus.accountants")
    prv = accountants.PRVAccountant()
    prv.history = [(1.0, 0.1, 100)]
    assert prv.get_epsilon(DELTA) - 0.011 <= epsilon([event(0.1, 1.0, 100)], DELTA) <= prv.get_epsilon(DELTA)
    rdp = accountants.RDPAccountant()
    rdp.history = [(1.0, 0.1, 100)]
    assert epsilon_rdp([event(0.1, 1.0, 100)], DELTA) == pytest.approx(rdp.get_epsilon(DELTA), rel=1e-2)


def analytic(noise: float, delta: float) -> float:
    """The epsilon of one Gaussian: delta = Phi(1/2s - es) - e^e Phi(-1/2s - es)."""

    def excess(found: float) -> float:
        left, right = 0.5 / noise - found * noise, -0.5 / noise - found * noise
        return float(norm.cdf(left) - math.exp(found) * norm.cdf(right)) - delta

    return float(brentq(excess, 0.0, 60.0))


@pytest.mark.parametrize("noise", [0.8, 1.0, 4.0])
def test_one_gaussian_is_the_analytic_one(noise: float) -> None:
    assert epsilon([event(1.0, noise, 1)], DELTA) == pytest.approx(analytic(noise, DELTA), abs=1e-3)


@pytest.mark.parametrize("steps", [4, 25, 100])
def test_many_gaussians_are_one_with_less_noise(steps: int) -> None:
    """T releases with noise s are one with s / sqrt(T)."""
    many = [event(1.0, 2.0 * math.sqrt(steps), steps)]
    assert epsilon(many, DELTA) == pytest.approx(analytic(2.0, DELTA), abs=1e-3)
    assert epsilon_rdp(many, DELTA) == pytest.approx(epsilon_rdp([event(1.0, 2.0, 1)], DELTA), abs=1e-9)


MECHANISMS = st.tuples(
    st.sampled_from([0.001, 0.01, 0.05, 0.2, 1.0]),
    st.sampled_from([0.7, 1.0, 1.7, 4.0]),
    st.sampled_from([1, 7, 40, 150]),
)


@settings(max_examples=4, deadline=None)
@given(MECHANISMS)
def test_more_costs_more(mechanism: tuple[float, float, int]) -> None:
    rate, noise, steps = mechanism
    cost = epsilon([event(rate, noise, steps)], DELTA)
    slack = 1e-3 * (1 + cost)  # two grids may round apart
    assert epsilon([event(rate, noise, 2 * steps)], DELTA) >= cost - slack
    assert epsilon([event(min(1.0, 2 * rate), noise, steps)], DELTA) >= cost - slack
    assert epsilon([event(rate, 1.5 * noise, steps)], DELTA) <= cost + slack
    assert epsilon([event(rate, noise, steps)], 10 * DELTA) <= cost + slack


@settings(max_examples=4, deadline=None)
@given(MECHANISMS)
def test_the_quick_bound_is_one(mechanism: tuple[float, float, int]) -> None:
    cost = epsilon([event(*mechanism)], DELTA)
    assert cost - 1e-3 <= bound([event(*mechanism)], DELTA) <= 1.02 * cost + 0.02


@settings(max_examples=4, deadline=None)
@given(MECHANISMS)
def test_rdp_is_the_looser_bound(mechanism: tuple[float, float, int]) -> None:
    parts = (mechanism,)
    assert accounting._by_rdp(parts, DELTA) >= accounting._by_pld(parts, DELTA, 1e-4) - 1e-3


@settings(max_examples=4, deadline=None)
@given(st.lists(MECHANISMS, min_size=1, max_size=4), st.randoms())
def test_composition_knows_no_order_and_no_cuts(mechanisms: list[tuple[float, float, int]], random: object) -> None:
    """The same bits for any order, and for rounds that are cut elsewhere: so a ledger that is read again says the same."""
    events = [event(rate, noise, steps, n) for n, (rate, noise, steps) in enumerate(mechanisms)]
    cut = [
        replace(one, steps=part, round=n)
        for n, one in enumerate(events)
        for part in (one.steps // 2, one.steps - one.steps // 2)
    ]
    random.shuffle(cut)  # type: ignore[attr-defined]
    assert composed(cut) == composed(events)
    assert epsilon(cut, DELTA) == epsilon(events, DELTA)


def test_nothing_costs_nothing() -> None:
    assert epsilon([], DELTA) == epsilon_rdp([], DELTA) == 0.0
    assert epsilon([event(0.1, 1.0, 0)], DELTA) == 0.0


# Noise for a budget: N = 2000, batch 64, 20 rounds of 30 steps.
RATE, STEPS = 64 / 2000, 20 * 30


@pytest.mark.parametrize(("budget", "wanted"), [(8.0, 0.81), (4.0, 1.133), (1.0, 3.125)])
def test_noise_for_a_campaign(budget: float, wanted: float) -> None:
    """The reference values come from PRV, which adds 0.01 to epsilon: at 1 that is a hundredth of the budget."""
    found = noise_for(budget, DELTA, RATE, STEPS)
    assert wanted * (0.98 if budget == 1 else 0.995) <= found <= wanted * 1.001
    cost = epsilon([event(RATE, found, STEPS)], DELTA)
    assert 0.99 * budget <= cost <= budget


def test_noise_for_the_settings_of_opacus() -> None:
    """opacus' own tests find 1.2915 by PRV for epsilon 8 at q = 0.04 and 2000 steps, and 1.3562 by RDP."""
    assert noise_for(8.0, DELTA, 0.04, 2000) == pytest.approx(1.2915, rel=2e-3)
    assert noise_for(8.0, DELTA, 0.02, 500) == pytest.approx(0.6555, rel=2e-3)


@settings(max_examples=4, deadline=None)
@given(st.sampled_from([0.5, 2.0, 8.0]), st.sampled_from([1e-3, 0.02, 0.3, 1.0]), st.sampled_from([1, 20, 300]))
def test_noise_for_is_never_above_the_budget(budget: float, rate: float, steps: int) -> None:
    found = noise_for(budget, DELTA, rate, steps)
    cost = epsilon([event(rate, found, steps)], DELTA)
    assert cost <= budget
    assert cost >= 0.98 * budget or found < 0.1001 or found == pytest.approx(0.3, rel=0.02)


def test_an_accountant_that_is_reset_each_round_is_caught() -> None:
    """Noise that keeps one round within 8, or all 20 as their sum would have it, costs 25 over the campaign."""
    one_round = [event(RATE, 0.525, 30)]
    assert epsilon(one_round, DELTA) < 8
    campaign = [event(RATE, 0.525, 30, number) for number in range(1, 21)]
    assert epsilon(campaign, DELTA) == pytest.approx(25.0, abs=0.1)
    assert epsilon(campaign, DELTA) < 20 * epsilon(one_round, DELTA)
    assert epsilon([event(RATE, noise_for(8.0, DELTA, RATE, STEPS), 30, n) for n in range(1, 21)], DELTA) <= 8.0


# What a hostile coordinator, or a typing error, may ask for.


@pytest.mark.parametrize(
    ("rate", "noise", "steps"),
    [
        (1.0, 1e-3, 10**6),
        (0.01, 1e-9, 1),
        (1e-6, 1.0, 10**9),
        (0.5, 1.0, 10**6),
        (1.0, 1e5, 1),
        (1e-300, 1.0, 10),
        (0.3, 0.3, 100),
        (1.0, 0.5, 2**53),
    ],
)
def test_any_mechanism_has_a_bound_soon(rate: float, noise: float, steps: int) -> None:
    """Gigabytes of loss distribution are never formed: RDP's bound stands in, and both grow."""
    cost = epsilon([event(rate, noise, steps)], DELTA)
    assert 0 <= cost <= epsilon_rdp([event(rate, noise, steps)], DELTA)
    assert cost < 64 or noise < 1.1


@pytest.mark.parametrize(
    ("rate", "noise"),
    [(0.0, 1.0), (1.1, 1.0), (0.1, 0.0), (0.1, -1.0), (0.1, math.nan), (math.nan, 1.0), (0.1, math.inf)],
)
def test_an_impossible_event_has_no_epsilon(rate: float, noise: float) -> None:
    with pytest.raises(ConfigError, match="they have no epsilon"):
        epsilon([event(rate, noise, 1)], DELTA)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_an_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.delta"):
        epsilon([event(0.1, 1.0, 1)], delta)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf, 1e-9])
def test_a_budget_that_no_noise_can_meet_is_refused(budget: float) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.epsilon"):
        noise_for(budget, 1e-9, 0.5, 10**5)


def test_nothing_is_said_on_the_way(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        accounting._by_rdp.cache_clear()
        epsilon_rdp([event(0.1, 1.0, 100)], DELTA)
    assert caplog.records == []
