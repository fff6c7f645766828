"""What may be combined with privacy, and what client-dp is in a run. Each refusal says why and names the nearest that is allowed.

Nothing here weakens a mode to make a combination work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lamina.protos.config import Config, weighting_of
from lamina.protos.errors import ConfigError
from lamina.protos.privacy import accounting
from lamina.protos.privacy.mechanism import LEAST_CLIP
from lamina.protos.privacy.noise import Stream
from lamina.protos.spec import AdapterSpec
from lamina.strategies.base import Strategy
from lamina.strategies.central import Central, nothing, private

# Noise over signal beyond which a run learns nothing that is not noise.
HOPELESS = 10.0
# What for and in which round -> a stream of its own.
Streams = Callable[[str, int], Stream]


def check(config: Config, strategy: Strategy) -> None:
    """Raise for a combination that would not be what the privacy mode says.

    Args:
        config: A checked config; what secure sums do not go with was refused when it was checked.
        strategy: Its aggregation method.

    Raises:
        ConfigError: Naming everything that is wrong.
    """
    mode = config.privacy.mode
    wrong = [*_settings(config)] if mode != "none" else []
    if mode == "client-dp":
        wrong += _central(config, strategy)
    if mode == "example-dp":
        wrong += _local(config)
    if wrong:
        raise ConfigError("\n".join(wrong))


def _settings(config: Config) -> list[str]:
    """What neither mode goes with."""
    privacy, wrong = config.privacy, []
    if privacy.epsilon is None and privacy.noise_multiplier is None:
        wrong.append(
            f"privacy.mode={privacy.mode}: expected privacy.epsilon, the budget of the campaign, or privacy.noise_multiplier. "
            "Set privacy.epsilon, such as 8."
        )
    if config.aggregation.weights == "num_examples":
        wrong.append(
            f"aggregation.weights=num_examples with privacy.mode={privacy.mode}: how many examples a client has is private, too, "
            "and a mean divided by it moves with it. Set aggregation.weights=auto."
        )
    if config.aggregation.weights == "contributors" and privacy.mode == "client-dp":
        wrong.append(
            "aggregation.weights=contributors with privacy.mode=client-dp: the denominator would depend on who answers. "
            "Set aggregation.weights=auto."
        )
    return wrong


def _local(config: Config) -> list[str]:
    """What example-dp does not go with; sites would refuse it, each for itself."""
    wrong = []
    if config.privacy.secagg and config.privacy.epsilon is None:
        wrong.append(
            "privacy.secagg=true with privacy.mode=example-dp: expected privacy.epsilon, which stands for what was spent where "
            "no single claim is seen, got none. Set it beside or instead of privacy.noise_multiplier."
        )
    if config.train.max_grad_norm < LEAST_CLIP:
        wrong.append(
            f"train.max_grad_norm={config.train.max_grad_norm:g}: expected a bound of at least {LEAST_CLIP:g} under "
            "privacy.mode=example-dp, to which each gradient is clipped. Set it, such as 1.0."
        )
    if config.privacy.epsilon is None and config.coordinator.spec:
        wrong.append(
            "privacy.epsilon: expected the budget of the campaign, which each site keeps, got none; privacy.noise_multiplier "
            "alone is enough in a simulation only. Set privacy.epsilon, such as 8."
        )
    if config.privacy.unit == "user" and not config.data.user_column and not config.coordinator.spec:
        wrong.append(
            "privacy.unit=user: expected data.user_column, the column that says whose a row is, got none. Set it, or "
            "privacy.unit=record."
        )
    return wrong


def _central(config: Config, strategy: Strategy) -> list[str]:
    """What client-dp does not go with."""
    privacy, clients, wrong = config.privacy, config.clients, []
    dense_only = config.adapter.kind != "lora"
    if not strategy.linear and not dense_only:
        sees = "shows every client every update as it was sent" if strategy.released_view == "all_raw" else ""
        why = sees or "does not keep clients in common coordinates, in which a change could be clipped and noise added"
        wrong.append(
            f"privacy.mode=client-dp: strategy={strategy.name} {why}. Set strategy=ffa, alternate or core, or "
            "privacy.mode=example-dp, which goes with any strategy."
        )
    if config.aggregation.weights == "nominal" and config.aggregation.full_weight is None:
        wrong.append(
            "aggregation.weights=nominal with privacy.mode=client-dp: expected aggregation.full_weight, the public number of "
            "examples beyond which more count no more, got none. Set it, or aggregation.weights=auto."
        )
    if privacy.unit == "user":
        wrong.append(
            "privacy.unit=user with privacy.mode=client-dp: its unit is a whole client. Set privacy.unit=record, which it "
            "covers, or privacy.mode=example-dp."
        )
    if privacy.secagg:
        wrong.append(
            "privacy.secagg=true with privacy.mode=client-dp: a coordinator that sees only the sum cannot clip each client's "
            "change. Set privacy.mode=example-dp, under which the sum is already noised, or privacy.secagg=false."
        )
    if clients.carry_rounds:
        wrong.append(
            f"clients.carry_rounds={clients.carry_rounds} with privacy.mode=client-dp: a client would be in two rounds' sums at "
            "once, which no event counts. Set clients.carry_rounds=0."
        )
    if clients.over_selection:
        wrong.append(
            f"clients.over_selection={clients.over_selection:g} with privacy.mode=client-dp: who is fast enough would decide the "
            "sampling that the cost is computed from. Set clients.over_selection=0."
        )
    if config.keep_updates:
        wrong.append(
            "keep_updates=true with privacy.mode=client-dp: the updates have no noise yet, and the run directory would hold what "
            "the mode hides. Set keep_updates=false."
        )
    if privacy.delta * clients.count >= 1:
        wrong.append(
            f"privacy.delta={privacy.delta:g}: expected less than 1 / clients.count = {1 / clients.count:.2g}; with more, "
            f"publishing one client whole would count as private. Set privacy.delta={0.1 / clients.count:.0e}."
        )
    return wrong


@dataclass(frozen=True)
class Plan:
    """What client-dp is in a run.

    Attributes:
        central: The mechanism.
        epsilon: Of the whole campaign.
        coordinates: d, the numbers that get noise in a round.
        noise_to_signal: z sqrt(d) / W: the norm of the mean's noise over the largest that its signal can have.
    """

    central: Central
    epsilon: float
    coordinates: int
    noise_to_signal: float

    def line(self) -> str:
        """One line for people."""
        return (
            f"client-dp: noise multiplier {self.central.noise_multiplier:.3g}, epsilon {self.epsilon:.3g} for all rounds; "
            f"{self.coordinates} numbers get noise, whose norm is {self.noise_to_signal:.3g} x the largest signal"
        )


def planned(config: Config, strategy: Strategy, spec: AdapterSpec) -> Plan:
    """The mechanism of client-dp, calibrated once for the campaign.

    Args:
        config: With privacy.mode=client-dp; see `check`.
        strategy: Its linear strategy.
        spec: The schema.

    Returns:
        The plan.

    Raises:
        ConfigError: If the noise drowns the signal, unless privacy.force is set, or no noise is enough.
    """
    privacy, clients = config.privacy, config.clients
    rate, noise = min(1.0, clients.fraction), privacy.noise_multiplier
    if noise is None:
        noise = accounting.noise_for(float(privacy.epsilon or 0), privacy.delta, rate, config.rounds)
    denominator = rate * clients.count
    full_weight = config.aggregation.full_weight if weighting_of(config) != "uniform" else None
    central = Central(privacy.clip_norm, noise, rate, denominator, full_weight)
    cost = accounting.epsilon([central.event(number) for number in range(config.rounds)], privacy.delta)
    if privacy.epsilon is not None and cost > privacy.epsilon:
        raise ConfigError(
            f"privacy.noise_multiplier={noise:g}: expected enough noise for privacy.epsilon={privacy.epsilon:g}, {config.rounds} "
            f"rounds cost {cost:.3g}. Leave privacy.noise_multiplier out, or raise it."
        )
    largest = coordinates(strategy, spec)
    plan = Plan(central, cost, largest, noise * math.sqrt(largest) / denominator)
    if plan.noise_to_signal > HOPELESS and not privacy.force:
        needed = math.ceil(noise * math.sqrt(largest) / (HOPELESS * rate))
        raise ConfigError(
            f"privacy.mode=client-dp: the noise on the mean would be {plan.noise_to_signal:.3g} times as large as any signal, "
            f"with {clients.count} clients and {largest} numbers. It would take about {needed} clients, or fewer numbers: "
            "lower ranks, fewer lora.target_modules, strategy=core. With few sites, privacy.mode=example-dp is the mode that "
            "works. Set it, or privacy.force=true to run all the same."
        )
    return plan


def coordinates(strategy: Strategy, spec: AdapterSpec) -> int:
    """The most numbers that a round can change.

    Args:
        strategy: Which is linear, or has only dense parameters.
        spec: The schema.

    Returns:
        How many.
    """
    adapter = strategy.init(spec).adapter
    return max(sum(value.size for value in nothing(adapter, side).values()) for side in strategy.sides)


def under(plan: Plan, strategy: Strategy, streams: Streams) -> Strategy:
    """The strategy that keeps to the plan.

    Args:
        plan: See `planned`.
        strategy: The linear one.
        streams: Where its noise comes from.

    Returns:
        A strategy.
    """
    return private(strategy, plan.central, lambda round_number: streams("noise", round_number))
