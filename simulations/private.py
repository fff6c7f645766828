"""`example-dp` in a simulation: each client's mechanism, and noise that repeats with the run's seed and so claims nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from lamina.client.data import Example
from lamina.client.private.sampling import units_of
from lamina.client.private.train import Private
from lamina.protos.config import Config, client_names, nominal_of
from lamina.protos.privacy.events import Unit
from lamina.protos.privacy.mechanism import example_dp
from lamina.protos.privacy.noise import seeded


def mechanisms(
    config: Config, train: Mapping[str, Sequence[Example]], say: Callable[[str], None]
) -> dict[str, Private]:
    """What makes each client's training private.

    Args:
        config: A checked config.
        train: Client id -> training examples.
        say: Told rate, noise and cost, and whether real numbers stand in for public ones.

    Returns:
        Client id -> mechanism and its seeded streams; empty unless privacy.mode=example-dp.

    Raises:
        ConfigError: If a client declares too little for a private mechanism.
    """
    if config.privacy.mode != "example-dp":
        return {}
    unit: Unit = "user" if config.privacy.unit == "user" else "record"
    declared = dict(zip(client_names(config), nominal_of(config), strict=True))
    if config.privacy.nominal_examples is None:
        declared = {client: len(units_of(train[client], unit)) for client in declared}
        say(
            f"privacy: privacy.nominal_examples is not set, so this simulation takes the clients' own numbers of {unit}s as "
            "public; a deployment would not start"
        )
    found = {}
    if config.privacy.noise_multiplier is None:
        say(f"privacy: calibrating the noise of {len(declared)} clients, some seconds for each that differs")
    for client, nominal in declared.items():
        mechanism = example_dp(config, nominal, f"client {client}: privacy.nominal_examples")
        found[client] = Private(mechanism, nominal or 0, partial(seeded, config.seed))
    lines = {client: one.mechanism.line() for client, one in found.items()}
    for text in dict.fromkeys(lines.values()):
        those = [client for client, other in lines.items() if other == text]
        say(f"privacy: {'every client' if len(those) == len(lines) else 'client ' + ', '.join(those)}: {text}")
    return found
