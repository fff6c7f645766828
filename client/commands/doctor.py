"""`lamina doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lamina.client import doctor, doctor_files
from lamina.client.doctor import Line
from lamina.protos.clock import SYSTEM
from lamina.protos.config import ClientConfig, DataConfig
from lamina.protos.errors import ConfigError
from lamina.protos.identity import list_of
from lamina.protos.preflight import address
from lamina.protos.words import flag, parsed

_HELP = """\
usage: lamina doctor [identity=DIR] [coordinator=HOST:PORT] [policy=FILE] [state=DIR] [listen=HOST:PORT] [model=DIR]
                     [data=FILE] [spec=FILE] [revocations=FILE] [config=FILE.yaml] [insecure=true] [--json]

Looks at Python, packages, devices and the state folder, and at whatever is named: certificates and keys, the consortium's list
of revoked certificates (default: crl.pem in identity if it is there), the way to a coordinator with its certificate and clock,
the site's policy, a port to listen on, a base model, a site's text, a coordinator's schema. Of a privacy ledger in the state
folder it says what was spent. config= is the settings file of a site or a coordinator, and looks at all that it names. Each line
is ok, warn or FAIL and says what to do. Nothing is changed, nothing is sent but handshakes and a sign of life.

examples:
  lamina doctor
  lamina doctor identity=site coordinator=hub.example.org:8443 policy=policy.yaml
  lamina doctor listen=0.0.0.0:8443 identity=hub spec=spec.json
  lamina doctor config=site.yaml

exit code: 0 without a FAIL, 5 if one is of identity or trust, else 2"""
_KEYS = (
    "identity", "coordinator", "policy", "state", "listen", "model", "data", "spec", "revocations", "config", "insecure",
)  # fmt: skip


def main(command: str, words: Sequence[str]) -> int:
    """Run `lamina doctor`.

    Args:
        command: `doctor`.
        words: What follows it.

    Returns:
        0, 2 or 5, by the findings.

    Raises:
        ConfigError: If a setting is unknown or cannot be meant.
    """
    if any(word in ("-h", "--help") for word in words):
        print(_HELP)
        return 0
    as_json = "--json" in words
    plain, settings = parsed([word for word in words if word != "--json"], dict.fromkeys(_KEYS, ""))
    if plain:
        raise ConfigError(f"lamina {command}: expected key=value, got {plain[0]!r}. See `lamina {command} --help`.")
    lines = []
    for line in looked_at(settings):
        lines.append(line)
        if not as_json:
            print(f"{line.level:<4}  {line.what:<13}  {line.message}", flush=True)
    code = doctor.exit_code(lines)
    if as_json:
        found = [{"level": line.level, "what": line.what, "message": line.message} for line in lines]
        print(json.dumps({"exit_code": code, "findings": found}, indent=1))
    return code


def looked_at(settings: Mapping[str, str]) -> Iterator[Line]:
    """All findings, as they come.

    Args:
        settings: Every key of the command, empty where it is not named; what is named goes before what config= names.

    Yields:
        Findings.

    Raises:
        ConfigError: If settings do not go together, or an address is none.
    """
    data = DataConfig()
    if settings["config"]:
        try:
            config, named = doctor_files.settings_of(Path(settings["config"]))
        except ConfigError as error:
            yield Line("FAIL", "settings", str(error))
        else:
            yield Line("ok", "settings", f"{settings['config']} can be read.")
            data = config.data
            settings = {key: value or named.get(key, "") for key, value in settings.items()}
    settings = dict(settings) | {"insecure": settings["insecure"] or "false"}
    insecure = flag(settings, "insecure")
    if settings["coordinator"] and insecure == bool(settings["identity"]):
        raise ConfigError("coordinator=: expected one of identity=DIR and insecure=true beside it. Name one of them.")
    for key in ("coordinator", "listen"):
        if settings[key]:
            address(key, settings[key])
    yield from doctor.python()
    yield from doctor.packages()
    yield from doctor.devices()
    state = Path(settings["state"] or ClientConfig().state)
    yield from doctor.state(state)
    yield from doctor_files.ledger(state, Path(settings["policy"]) if settings["policy"] else None)
    if settings["policy"]:
        yield from doctor_files.policy(Path(settings["policy"]))
    if settings["data"]:
        yield from doctor_files.text(replace(data, source=settings["data"]))
    if settings["spec"]:
        yield from doctor_files.schema(Path(settings["spec"]))
    if settings["model"] == "tiny":
        yield Line("ok", "model", "tiny comes with the package.")
    elif settings["model"]:
        yield from doctor_files.base(Path(settings["model"]))
    if settings["listen"]:
        yield from doctor.listening(settings["listen"])
    folder, now = Path(settings["identity"]), SYSTEM.now()
    revocations = list_of(settings["revocations"], folder) if settings["identity"] else None
    if settings["coordinator"]:
        yield from doctor.coordinator(
            None if insecure else folder, settings["coordinator"], now, revocations=revocations
        )
    elif settings["identity"]:
        yield from doctor.identity(folder, now, revocations)
