"""`lamina coordinator`: the server of a deployment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lamina.protos import compose
from lamina.protos.clock import SYSTEM
from lamina.protos.errors import ConfigError
from lamina.protos.identity import require_tls13
from lamina.server.port.terms import coordinator_keys

_HELP = """\
usage: lamina coordinator [key=value …] [--config FILE.yaml] [--json]

Runs one federated fine-tuning over gRPC with mutual TLS: waits for the sites' agents, aggregates their adapters round by
round, and writes the run directory. It needs no model, only the schema file. Killed at any point and started again with the
same words, it goes on where it was.

examples:
  lamina spec ./my-model output=spec.json
  lamina coordinator coordinator.spec=spec.json coordinator.identity=identity/coordinator coordinator.listen=0.0.0.0:8443 \\
      clients.count=3 'clients.names=[north,south,west]' 'clients.ranks=[16,8,4]' rounds=20 output=runs/first
  lamina coordinator --config consortium.yaml output=runs/first
  lamina coordinator insecure=true coordinator.spec=spec.json clients.count=2      # to try it out, on 127.0.0.1 only

Logs are JSON lines on standard error, or plain lines on a terminal; --json always gives JSON.
SIGTERM: what is being uploaded is taken in, then it ends; start it again to go on.
exit codes: 0 finished, stopped or drained; 2 bad configuration; 3 quorum not met by the deadline; 5 identity

keys of a coordinator (default); where data and model lie, each site says for itself:"""


def main(command: str, words: Sequence[str]) -> int:
    """Run `lamina coordinator`.

    Args:
        command: `coordinator`.
        words: What follows it.

    Returns:
        Exit code 0; errors are raised.
    """
    if any(word in ("-h", "--help") for word in words):
        print(compose.help_text(_HELP, coordinator_keys()))
        return 0
    as_json = "--json" in words
    given = [word for word in words if word != "--json"]
    for key in compose.keys_of(given):
        if key.startswith(("data.", "model.")):
            raise ConfigError(
                f"{key}: each site sets that for itself; the coordinator has no text and no model. Take it out here, and set "
                "it at the sites (`lamina client --help`)."
            )
    config = compose.from_words(given)
    if not config.output:
        raise ConfigError(
            "output: expected a run directory, so that the coordinator can be started again. Set output=DIR."
        )
    require_tls13()  # before gRPC is imported
    from lamina.protos import logs
    from lamina.protos.allocator import give_back
    from lamina.server.coordinator import serve

    give_back(arenas=4)

    log = logs.plain_log() if sys.stderr.isatty() and not as_json else logs.json_log(SYSTEM.now)
    return serve(config, Path(config.output), log)
