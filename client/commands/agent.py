"""`lamina client`: a site's agent."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamina.client.hardware import num_bytes
from lamina.protos import compose
from lamina.protos.clock import SYSTEM
from lamina.protos.config import SITE_KEYS, known_keys
from lamina.protos.errors import ConfigError, IdentityError, LaminaError, nearest
from lamina.protos.identity import require_tls13

_HELP = """\
usage: lamina client [key=value …] [--config FILE.yaml] [--json]

A site's agent: dials the coordinator, trains on the site's own data, sends adapters, never data. It stays through outages of
network and coordinator, keeps its last update on disk and offers it again. What to train the coordinator says; whether it may
be trained here the site's policy file says.

examples:
  lamina client client.coordinator=coordinator.example.org:8443 client.identity=identity/north client.policy=policy.yaml \\
      model=./my-model data=notes.jsonl client.state=state
  lamina client --config site.yaml
  lamina client insecure=true client.name=0 client.coordinator=127.0.0.1:8443 data=notes.jsonl   # to try it out

Before dialling, certificate, dates, CA, role and clock are checked; `lamina doctor` does so at any time.
exit codes: 0 the run is over, 2 bad configuration or data, 3 coordinator out of reach (client.give_up_s), 5 identity or policy

keys of a site (default), of which data.source must be set:"""
_SECTIONS = ("client.", "data.", "model.", "quantisation.")
_KEYS = (*SITE_KEYS, "threads", "insecure", "partition.min_examples")


def main(command: str, words: Sequence[str]) -> int:
    """Run `lamina client`.

    Args:
        command: `client`.
        words: What follows it.

    Returns:
        Exit code 0; errors are raised.
    """
    mine = [key for key in known_keys() if key.startswith(_SECTIONS) or key in _KEYS]
    if any(word in ("-h", "--help") for word in words):
        print(compose.help_text(_HELP, mine))
        return 0
    as_json = "--json" in words
    given = [word for word in words if word != "--json"]
    for key in compose.keys_of(given):
        if key not in mine:
            raise ConfigError(
                f"{key}: the coordinator decides that for all sites, or no run has it.{nearest(key, mine)} "
                "See `lamina client --help` for what a site sets."
            )
    config = compose.from_words(given)
    if not config.client.coordinator:
        raise ConfigError(
            "client.coordinator: expected host:port of the coordinator. Set client.coordinator=HOST:PORT."
        )
    if config.client.memory:
        num_bytes(config.client.memory, "client.memory")
    if not isinstance(config.quantisation.format, str):
        raise ConfigError("quantisation.format: expected one number format at a site, got a list. Give one.")
    require_tls13()  # before gRPC is imported
    from lamina.client import policy as policies
    from lamina.client.agent import Agent, Superseded
    from lamina.client.listening import Settings
    from lamina.client.rows import glance
    from lamina.protos import identity as identities
    from lamina.protos.link import Address, check_exposed
    from lamina.protos.logs import json_log, plain_log
    from lamina.protos.preflight import NETWORK, preflight

    log = plain_log() if sys.stderr.isatty() and not as_json else json_log(SYSTEM.now)
    policy = policies.read(Path(config.client.policy) if config.client.policy else None)
    check_exposed(config.client.coordinator, config.insecure, "client.coordinator")
    identity, folder, revocations = None, Path(config.client.identity), None
    if not config.insecure:
        if not config.client.identity:
            raise IdentityError(
                "client.identity: expected the folder with this site's certificate, from `lamina pki enroll`."
            )
        revocations = identities.list_of(config.client.revocations, folder)
        _raise_for([one for one in identities.check(folder, SYSTEM.now(), "client", revocations) if not one.ok])
        identity = identities.load(folder)
    elif not config.client.name:
        raise ConfigError("client.name: expected this client's name, as there is no certificate. Set client.name=NAME.")

    glance(config.data)

    def explain() -> LaminaError | None:
        if identity is None:
            return None
        found = [one for one in preflight(folder, config.client.coordinator, SYSTEM.now()) if not one.ok]
        for one in found:
            log("preflight", what=one.what, message=one.message)
        trust = [one.message for one in found if one.what not in NETWORK]
        return IdentityError("\n".join(trust)) if trust else None

    from lamina.client.model import quiet  # with torch, which takes seconds: what is wrong above is told before
    from lamina.client.worker import SiteWorker

    quiet()
    settings = Settings(
        address=Address(config.client.coordinator, identity, config.client.name),
        policy=policy,
        folder=Path(config.client.state),
        rank=config.lora.rank,
        sized=True,
        stay=config.client.stay,
        give_up_s=config.client.give_up_s,
        revocations=revocations,
        explain=explain,
    )
    agent = Agent(settings, SiteWorker(config, policy, lambda text: log("site", message=text)), SYSTEM, log)

    def on_signal(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        agent.stop()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        return agent.run()
    except Superseded:
        log("stopped", message="the last finished update is kept and is offered again")
        return 0


def _raise_for(wrong: Sequence[Any]) -> None:
    if wrong:
        raise IdentityError("\n".join(finding.message for finding in wrong))
