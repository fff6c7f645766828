"""What goes with a privacy mode, what is refused and why, and what client-dp is in a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lamina.protos import compose
from lamina.protos.config import Config, checked, weighting_of
from lamina.protos.errors import ConfigError
from lamina.protos.privacy import accounting
from lamina.protos.privacy.mechanism import example_dp
from lamina.protos.privacy.noise import seeded
from lamina.protos.spec import AdapterSpec
from lamina.server import campaign as campaigns
from lamina.server import selection
from lamina.server.campaign import Campaign
from tests.federation import spec

SMALL = ("clients.count=1000", "clients.ranks=2", "privacy=client-dp", "privacy.epsilon=8", "privacy.delta=1e-5")


def configured(*overrides: str) -> Config:
    return checked(compose.from_words(overrides))


def made(*overrides: str, schema: AdapterSpec | None = None) -> Campaign:
    config, schema = configured(*overrides), schema or spec()
    return campaigns.campaign(config, schema, campaigns.budgets(config, schema), "run")


def numbers(count: int) -> AdapterSpec:
    """A schema of this many dense numbers and nothing else."""
    return AdapterSpec({}, dense={"head.weight": np.zeros(count, np.float32)})


# Noise-to-signal of ten silos and of a thousand clients: privacy.md gives z sqrt(d) / cohort at epsilon 8, delta 1e-5, 50 rounds.
@pytest.mark.parametrize(
    ("clients", "fraction", "count", "ratio"),
    [
        (10, 1.0, 20_000, 60),
        (10, 1.0, 300_000, 232),
        (100, 1.0, 20_000, 6.0),
        (1000, 0.1, 20_000, 1.1),
        (1000, 0.1, 300_000, 4.4),
    ],
)
def test_noise_over_signal_is_that_of_the_published_formula(
    clients: int, fraction: float, count: int, ratio: float
) -> None:
    one = made(
        "strategy=ffa", "rounds=50", "privacy=client-dp", "privacy.epsilon=8", f"clients.count={clients}",
        f"clients.fraction={fraction}", "privacy.force=true", schema=numbers(count),
    )  # fmt: skip
    assert one.plan is not None
    assert one.plan.coordinates == count
    assert one.plan.noise_to_signal == pytest.approx(ratio, rel=0.05)
    assert one.plan.epsilon == pytest.approx(8, rel=0.01)
    assert one.plan.epsilon <= 8


def test_ten_silos_are_refused_and_told_what_would_work() -> None:
    with pytest.raises(ConfigError, match=r"60\.\d times as large.*about 61 clients.*example-dp.*privacy\.force=true"):
        made("strategy=ffa", "rounds=50", "privacy=client-dp", "privacy.epsilon=8", schema=numbers(20_000))


@pytest.mark.parametrize(
    ("overrides", "reason", "instead"),
    [
        (["strategy=recompress"], "common coordinates", "strategy=ffa"),
        (["strategy=residual"], "common coordinates", "privacy.mode=example-dp"),
        (["strategy=stack"], "every update as it was sent", "strategy=ffa"),
        (["strategy=zeropad"], "common coordinates", "strategy=ffa"),
        (["strategy=ffa", "aggregation.weights=num_examples"], "private, too", "aggregation.weights=auto"),
        (["strategy=ffa", "aggregation.weights=contributors"], "who answers", "aggregation.weights=auto"),
        (["strategy=ffa", "aggregation.weights=nominal"], "full_weight", "aggregation.weights=auto"),
        (["strategy=ffa", "clients.carry_rounds=1"], "two rounds", "clients.carry_rounds=0"),
        (["strategy=ffa", "clients.over_selection=0.5", "clients.fraction=0.5"], "fast enough", "over_selection=0"),
        (["strategy=ffa", "keep_updates=true"], "no noise yet", "keep_updates=false"),
        (["strategy=ffa", "privacy.unit=user"], "a whole client", "privacy.unit=record"),
        (["strategy=ffa", "privacy.delta=0.01"], "less than 1 / clients.count", "privacy.delta=1e-04"),
        (["strategy=ffa", "privacy.noise_multiplier=0.1"], "rounds cost", "privacy.noise_multiplier"),
    ],
)
def test_what_client_dp_does_not_go_with(overrides: list[str], reason: str, instead: str) -> None:
    with pytest.raises(ConfigError) as found:
        made(*SMALL, *overrides)
    assert reason in str(found.value)
    assert instead in str(found.value)


@pytest.mark.parametrize("mode", ["client-dp", "example-dp"])
def test_a_mode_needs_a_budget_or_a_noise(mode: str) -> None:
    with pytest.raises(ConfigError, match=r"expected privacy\.epsilon"):
        made("strategy=ffa", f"privacy={mode}")


def test_what_every_site_would_refuse_is_refused_at_the_coordinator() -> None:
    private = ("privacy=example-dp", "strategy=ffa")
    for bound in ("0", "1e-09"):
        with pytest.raises(ConfigError, match=rf"train\.max_grad_norm={bound}.*: expected a bound of at least 1e-06"):
            made(*private, "privacy.epsilon=8", f"train.max_grad_norm={bound}")
    assert made(*private, "privacy.noise_multiplier=2").plan is None
    with pytest.raises(ConfigError, match="the budget of the campaign, which each site keeps, got none"):
        made(*private, "privacy.noise_multiplier=2", "coordinator.spec=spec.json")


def test_a_site_calibrates_its_noise_for_all_rounds_together() -> None:
    """At rate 64/2000, 600 steps in 20 rounds need 0.81 for epsilon 8; the noise for one round alone would cost 25."""
    words = ["privacy=example-dp", "privacy.epsilon=8", "rounds=20", "train.local_steps=30", "train.batch_size=64"]
    found = example_dp(configured(*words), 2000)
    assert found.noise_multiplier == pytest.approx(0.81, rel=0.01)
    campaign = [found.event("0", number) for number in range(1, 21)]
    cost = accounting.epsilon(campaign, 1e-5)
    assert 7.9 < cost <= 8.0
    assert cost == pytest.approx(found.epsilon)


def test_example_dp_goes_with_any_strategy_and_not_with_weights_by_private_counts() -> None:
    for name in ("recompress", "residual", "stack", "ffa", "alternate"):
        assert made("privacy=example-dp", "privacy.epsilon=8", f"strategy={name}").plan is None
    with pytest.raises(ConfigError, match=r"aggregation\.weights=auto"):
        made("privacy=example-dp", "privacy.epsilon=8", "aggregation.weights=num_examples")


@pytest.mark.parametrize(
    ("overrides", "weighting"),
    [
        ([], "num_examples"),
        (["privacy=example-dp"], "num_examples"),  # which is then the public number
        (["privacy=client-dp"], "uniform"),
        (["aggregation.weights=contributors"], "contributors"),
    ],
)
def test_auto_weights_follow_the_mode(overrides: list[str], weighting: str) -> None:
    assert weighting_of(configured(*overrides)) == weighting


def test_several_refusals_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as found:
        made(*SMALL, "strategy=stack", "keep_updates=true", "clients.carry_rounds=2")
    assert len(str(found.value).splitlines()) == 3


def test_sampling_is_a_coin_for_each_client() -> None:
    """The size of the cohort is binomial: 400 draws of 50 coins at 0.3, within 5 standard errors in mean and variance."""
    clients = [str(number) for number in range(50)]
    sizes = [len(selection.sampled(seeded(0, number), clients, 0.3)) for number in range(400)]
    assert np.mean(sizes) == pytest.approx(15, abs=5 * (10.5 / 400) ** 0.5)
    assert np.var(sizes) == pytest.approx(10.5, rel=5 * (2 / 400) ** 0.5)
    assert min(len(selection.sampled(seeded(1, number), ["a"], 0.5)) for number in range(20)) == 0


def test_the_denominator_counts_whom_the_run_expects_not_who_comes() -> None:
    one: Any = made(*SMALL, "strategy=ffa", "clients.fraction=0.2", "privacy.force=true").plan
    assert one.central.denominator == 200
    assert one.central.sample_rate == 0.2
