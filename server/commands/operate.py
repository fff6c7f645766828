"""`lamina status / watch / pause / stop / fetch`: an operator's or auditor's view of a running coordinator."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lamina.protos.errors import ConfigError
from lamina.protos.identity import require_tls13
from lamina.protos.words import flag, parsed

_COMMON = """\
  identity=DIR     folder with an operator's or auditor's certificate, from `lamina pki enroll`
  insecure=true    without certificates, for a coordinator on 127.0.0.1 that runs so
  --json           for programs

exit codes: 0 done, 2 no such thing or the run is over, 3 not reached, 5 not allowed"""
_HELP: Mapping[str, str] = {
    "status": f"""\
usage: lamina status HOST:PORT identity=DIR [--json]

Where a run stands: state, round, who is there, what they are at.

examples:
  lamina status coordinator.example.org:8443 identity=identity/operator
  lamina status 127.0.0.1:8443 insecure=true --json

{_COMMON}""",
    "watch": f"""\
usage: lamina watch HOST:PORT identity=DIR [--json]

Follows a run: a line a round, and in between what has changed, until the run ends.

examples:
  lamina watch coordinator.example.org:8443 identity=identity/auditor

{_COMMON}""",
    "pause": f"""\
usage: lamina pause HOST:PORT identity=DIR [resume=true] [--json]

Finishes the open round and opens no other, until `resume=true`. A pause outlives a restart of the coordinator.

examples:
  lamina pause coordinator.example.org:8443 identity=identity/operator
  lamina pause coordinator.example.org:8443 identity=identity/operator resume=true

{_COMMON}""",
    "stop": f"""\
usage: lamina stop HOST:PORT identity=DIR [now=true] [--json]

Ends the run after the open round, or at once, and has the coordinator write adapter, summary and report.

examples:
  lamina stop coordinator.example.org:8443 identity=identity/operator
  lamina stop coordinator.example.org:8443 identity=identity/operator now=true

{_COMMON}""",
    "fetch": f"""\
usage: lamina fetch HOST:PORT identity=DIR output=DIR [--json]

Fetches the run's files: records, event log, and the adapter; while the run goes on that of the last round, under latest/.
Auditors also get the updates that were kept (keep_updates=true). Goes on where an earlier fetch broke off.

examples:
  lamina fetch coordinator.example.org:8443 identity=identity/auditor output=audit/first

{_COMMON}""",
}


def main(command: str, words: Sequence[str]) -> int:
    """Run one of the operator's commands.

    Args:
        command: Which.
        words: What follows it.

    Returns:
        Exit code 0; errors are raised.
    """
    if any(word in ("-h", "--help") for word in words):
        print(_HELP[command])
        return 0
    as_json = "--json" in words
    more = {"pause": {"resume": "false"}, "stop": {"now": "false"}, "fetch": {"output": ""}}.get(command, {})
    known = {"identity": "", "insecure": "false", **more}
    plain, settings = parsed([word for word in words if word != "--json"], known)
    if len(plain) != 1:
        raise ConfigError(f"lamina {command}: expected HOST:PORT of a coordinator. See `lamina {command} --help`.")
    require_tls13()  # before gRPC is imported
    from lamina.server import operate

    with operate.dialled(plain[0], settings["identity"], flag(settings, "insecure"), "operator") as coordinator:
        if command == "watch":
            before = None
            for document in coordinator.watch():
                line = json.dumps(document) if as_json else operate.watched(document, before)
                before = document.get("status", before)
                if line:
                    print(line, flush=True)
            return 0
        done: Callable[[], Any] = {
            "status": coordinator.status,
            "pause": lambda: coordinator.pause(not flag(settings, "resume")),
            "stop": lambda: coordinator.stop(flag(settings, "now")),
            "fetch": lambda: coordinator.fetch(_output(settings)),
        }[command]
        found = done()
    if command in ("pause", "stop") and not as_json:
        print(operate.ordered(command, settings, found))
    print(json.dumps(found, indent=1) if as_json else operate.shown(found))
    return 0


def _output(settings: Mapping[str, str]) -> Path:
    if not settings["output"]:
        raise ConfigError("output: expected a folder for what is fetched. Set output=DIR.")
    return Path(settings["output"])
