"""What a site makes of the privacy that a run's terms name: its own mechanism, from its own public number."""

from __future__ import annotations

from dataclasses import replace

from lamina.client.private.train import Private
from lamina.protos.config import Config, per_client
from lamina.protos.privacy.mechanism import example_dp
from lamina.protos.privacy.noise import Stream, secret


def private(config: Config, rounds: int) -> Private | None:
    """What makes a site's training private; nobody is asked.

    Args:
        config: The site's own, with what the terms dictate.
        rounds: Of the campaign, as the terms say.

    Returns:
        The mechanism and its secret streams; None where privacy.mode is not example-dp.

    Raises:
        ConfigError: If the site declares no public number, or no mechanism is private for it.
    """
    if config.privacy.mode != "example-dp":
        return None
    declared = config.privacy.nominal_examples
    nominal = None if declared is None else per_client(declared, 1, "privacy.nominal_examples")[0]
    return Private(example_dp(replace(config, rounds=rounds), nominal), nominal or 0, _secret)


def _secret(purpose: str, client_id: str, round_number: int) -> Stream:
    """A stream that depends on none of these, and on nothing else that could be known."""
    return secret()
