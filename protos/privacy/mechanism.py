"""From a config to the fixed numbers of example-dp at one client: rate, denominator, noise and cost, all of public values."""

from __future__ import annotations

from dataclasses import dataclass

from lamina.protos.config import Config
from lamina.protos.errors import ConfigError
from lamina.protos.privacy.accounting import epsilon, noise_for
from lamina.protos.privacy.events import Event, Unit

# Norms are computed in float32, where the squares of numbers below 1e-19 or so vanish: a gradient of such numbers would pass for
# zero and not be clipped. A bound that is far above them is safe, whatever weights a coordinator sends to make gradients small.
LEAST_CLIP = 1e-6


@dataclass(frozen=True)
class Mechanism:
    """DP-SGD at one client (Abadi et al. 2016, arXiv:1607.00133), the same in every step of the campaign.

    Nothing of it depends on the data: how many records there really are decides neither the rate nor the denominator.

    Attributes:
        unit: `record`, or `user` with up to `user_rows` of its records.
        sample_rate: Probability with which each unit is in a step.
        expected_units: sample_rate x nominal number of units, by which the noised sum is divided.
        noise_multiplier: Standard deviation of the noise on the sum, in units of `max_grad_norm`.
        max_grad_norm: Largest L2 norm of what one unit gives to the sum.
        steps: In a round.
        rounds: Of the campaign.
        epsilon: What the whole campaign costs, by PLD.
        target_delta: The delta of (epsilon, delta).
        budget: What it may cost, retrained rounds included; None where only the noise was given.
        user_rows: Most rows of one user in a step.
    """

    unit: Unit
    sample_rate: float
    expected_units: float
    noise_multiplier: float
    max_grad_norm: float
    steps: int
    rounds: int
    epsilon: float
    target_delta: float
    budget: float | None = None
    user_rows: int = 1

    def event(self, client_id: str, round_number: int) -> Event:
        """What one round of it is in a ledger."""
        return Event(
            client_id, round_number, self.noise_multiplier, self.sample_rate, self.steps, self.max_grad_norm, self.unit
        )

    def line(self) -> str:
        """One line for people: unit, rate, noise and cost of the campaign."""
        return (
            f"example-dp by {self.unit}, sample rate {self.sample_rate:.3g}, noise multiplier {self.noise_multiplier:.3g}, "
            f"{self.rounds} x {self.steps} steps: epsilon {self.epsilon:.3g} at delta {self.target_delta:.1g}"
        )


def example_dp(config: Config, nominal: int | None, where: str = "privacy.nominal_examples") -> Mechanism:
    """The mechanism of one client.

    Args:
        config: With privacy.mode=example-dp.
        nominal: The public number of units that the client declares.
        where: The key that says it, for messages.

    Returns:
        The mechanism; its noise is the least that keeps the campaign within privacy.epsilon, or the one that is given.

    Raises:
        ConfigError: If a value is missing, or no such mechanism is private.
    """
    privacy, train = config.privacy, config.train
    batch = train.batch_size * train.accumulation
    if nominal is None:
        raise ConfigError(
            f"{where}: expected the public number of {privacy.unit}s that this site declares, got none. Rate, denominator, "
            "noise and weight come from it and never from the data. Set a round number, such as 1000."
        )
    if nominal < batch:
        raise ConfigError(
            f"{where}={nominal}: expected at least train.batch_size x train.accumulation = {batch}, the {privacy.unit}s expected "
            "in a step. Lower train.batch_size."
        )
    if privacy.delta * nominal >= 1:
        raise ConfigError(
            f"privacy.delta={privacy.delta:g}: expected less than {1 / nominal:.2g}, which is 1 / {nominal} ({where}); with "
            f"more, publishing one whole {privacy.unit} would count as private. Set privacy.delta={0.1 / nominal:.0e}."
        )
    if not train.max_grad_norm >= LEAST_CLIP:
        raise ConfigError(
            f"train.max_grad_norm={train.max_grad_norm:g}: expected a bound of at least {LEAST_CLIP:g} under "
            "privacy.mode=example-dp, to which each gradient is clipped; with less its norm in float32 is no norm. Set it, such "
            "as 1.0."
        )
    rate, steps = batch / nominal, config.rounds * train.local_steps
    noise = privacy.noise_multiplier
    if noise is None:
        if privacy.epsilon is None:
            raise ConfigError(
                "privacy.mode=example-dp: expected privacy.epsilon, the budget of the campaign, or privacy.noise_multiplier. "
                "Set privacy.epsilon, such as 8."
            )
        noise = noise_for(privacy.epsilon, privacy.delta, rate, steps)
    unit: Unit = "user" if privacy.unit == "user" else "record"
    one = Event("", 0, noise, rate, steps, train.max_grad_norm, unit)
    cost = epsilon([one], privacy.delta)
    if privacy.epsilon is not None and cost > privacy.epsilon:
        raise ConfigError(
            f"privacy.noise_multiplier={noise:g}: expected enough noise for privacy.epsilon={privacy.epsilon:g}, {steps} steps "
            f"cost {cost:.3g}. Leave privacy.noise_multiplier out, or raise it."
        )
    return Mechanism(
        unit=unit,
        sample_rate=rate,
        expected_units=float(batch),
        noise_multiplier=noise,
        max_grad_norm=train.max_grad_norm,
        steps=train.local_steps,
        rounds=config.rounds,
        epsilon=cost,
        target_delta=privacy.delta,
        budget=privacy.epsilon,
        user_rows=privacy.user_rows if unit == "user" else 1,
    )
