"""Likelihood ratios against shadows: formulas written out one example at a time, and laws that hold for any numbers."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.audits.membership.ratios import lira, rmia
from lamina.audits.membership.shadows import halves
from lamina.protos.errors import ConfigError
from tests.scores import auc


def draws(shadows: int, count: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.gamma(2.0, size=count), rng.gamma(2.0, size=(shadows, count)), halves(count, shadows, seed)


@pytest.mark.parametrize("shadows", [2, 4, 8])
def test_rmia_is_the_share_that_an_example_beats(shadows: int) -> None:
    loss, shadow_loss, included = draws(shadows)
    ratios = []
    for i in range(len(loss)):
        seen = [math.exp(-shadow_loss[k, i]) for k in range(shadows) if included[k, i]]
        unseen = [math.exp(-shadow_loss[k, i]) for k in range(shadows) if not included[k, i]]
        ratios.append(math.exp(-loss[i]) / (0.5 * sum(seen) / len(seen) + 0.5 * sum(unseen) / len(unseen)))
    wanted = [sum(mine >= other for other in ratios) / len(ratios) for mine in ratios]
    np.testing.assert_allclose(rmia(loss, shadow_loss, included), wanted, rtol=1e-12)


def test_rmia_of_losses_that_no_float_holds_the_likelihood_of() -> None:
    loss, shadow_loss, included = draws(4)
    np.testing.assert_allclose(
        rmia(loss + 2000, shadow_loss + 2000, included), rmia(loss, shadow_loss, included), rtol=1e-12
    )


def test_lira_is_the_ratio_of_two_gaussians() -> None:
    confidence, values, included = draws(6)
    seen = np.stack([values[included[:, i], i] for i in range(12)], axis=1)  # (3, 12)
    unseen = np.stack([values[~included[:, i], i] for i in range(12)], axis=1)
    # One spread for all: squares about each example's own mean, over two degrees of freedom each.
    spreads = [math.sqrt(np.mean([np.var(some[:, i], ddof=1) for i in range(12)])) for some in (seen, unseen)]
    wanted = [
        math.log(NormalDist(seen[:, i].mean(), spreads[0]).pdf(confidence[i]))
        - math.log(NormalDist(unseen[:, i].mean(), spreads[1]).pdf(confidence[i]))
        for i in range(12)
    ]
    np.testing.assert_allclose(lira(confidence, values, included), wanted, rtol=1e-10)


def test_lira_of_two_shadows_has_the_order_of_its_offline_form() -> None:
    confidence, values, included = draws(2)
    unseen = np.array([values[~included[:, i], i].item() for i in range(12)])
    wanted = [NormalDist(mean, 3.0).cdf(one) for one, mean in zip(confidence, unseen, strict=True)]
    assert np.array_equal(np.argsort(lira(confidence, values, included)), np.argsort(wanted))


@given(st.integers(2, 40), st.sampled_from([2, 4, 6]), st.integers(0, 2**32 - 1))
def test_every_example_is_in_half_of_the_shadows(count: int, shadows: int, seed: int) -> None:
    included = halves(count, shadows, seed)
    assert (included.sum(0) == shadows // 2).all()
    assert (included[::2] == ~included[1::2]).all()
    assert set(included.sum(1)) <= {count // 2, count - count // 2}


def test_halves_differ_from_pair_to_pair_and_seed_to_seed() -> None:
    one = halves(64, 4, 0)
    assert not np.array_equal(one[0], one[2])
    assert not np.array_equal(one, halves(64, 4, 1))


@pytest.mark.parametrize(("shadows", "count"), [(1, 8), (3, 8), (0, 8), (2, 1)])
def test_what_cannot_be_halved_is_refused(shadows: int, count: int) -> None:
    with pytest.raises(ConfigError, match="even number"):
        halves(count, shadows, 0)


def test_an_example_in_every_shadow_is_refused() -> None:
    loss, shadow_loss, included = draws(4)
    included[:, 3] = True
    for one in (rmia, lira):
        with pytest.raises(ConfigError, match="out of another's"):
            one(loss, shadow_loss, included)
        with pytest.raises(ConfigError, match="shape"):
            one(loss[1:], shadow_loss, included)


@pytest.mark.parametrize("shadows", [2, 4, 8])
@pytest.mark.parametrize("attack", [rmia, lira])
def test_both_find_members_where_difficulty_hides_them(attack: type, shadows: int) -> None:
    """Examples differ by 5 nats in difficulty and by 1 through training: shadows see through that, the loss does not."""
    rng = np.random.default_rng(3)
    difficulty, member = rng.normal(0, 5, 600), np.arange(600) < 300
    included = halves(600, shadows, 0)
    shadow_loss = difficulty - 1.0 * included + 20 + 0.2 * rng.normal(size=included.shape)
    loss = difficulty - 1.0 * member + 20 + 0.2 * rng.normal(size=600)
    # Far from 0 the logit of exp(-loss) is -loss.
    scores = rmia(loss, shadow_loss, included) if attack is rmia else lira(-loss, -shadow_loss, included)
    assert auc(scores[member], scores[~member]) > 0.99
    assert auc(-loss[member], -loss[~member]) < 0.65
