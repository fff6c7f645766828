"""`lamina pki`: the CA of a consortium and the identities of its sites."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from lamina.protos.errors import ConfigError, IdentityError, nearest
from lamina.protos.files import write_atomic
from lamina.protos.identity import Peer, load, require_tls13, verified_peer
from lamina.protos.identity import authority as pki
from lamina.protos.identity.certificates import certificate, consortium_of, fingerprint, general_name, stamp
from lamina.protos.identity.folder import CA, write_secret
from lamina.protos.identity.ledger import Issued, read_ledger
from lamina.protos.identity.requests import MAX_REQUEST_BYTES, invite_bytes, read_invite
from lamina.protos.identity.revocations import CRL
from lamina.protos.identity.site import accept, accept_renewal, address_of, prepare, prepare_renewal
from lamina.protos.words import flag, parsed
from lamina.server.commands.pki_help import HELP, USAGE

PASSPHRASE = "LAMINA_CA_PASSPHRASE"


def main(command: str, words: Sequence[str]) -> int:
    """Run `lamina pki`.

    Args:
        command: `pki`.
        words: What follows it.

    Returns:
        Exit code 0; errors are raised.

    Raises:
        ConfigError: For an unknown subcommand, or a file that cannot be read or written.
    """
    asks_help = any(word in ("-h", "--help") for word in words)
    name = words[0] if words else ""
    if name not in _COMMANDS:
        if asks_help or name == "help":
            print(USAGE)
            return 0
        known = ", ".join(_COMMANDS)
        got = f"no command {name!r}.{nearest(name, _COMMANDS)}" if name else "expected a command."
        raise ConfigError(f"lamina {command}: {got} Known: {known}. See `lamina {command} --help`.")
    if asks_help:
        print(HELP[name])
        return 0
    try:
        return _COMMANDS[name](words[1:])
    except OSError as error:
        raise ConfigError(f"{error.filename or 'lamina pki'}: cannot be read or written: {error.strerror}.") from error


def _init(words: Sequence[str]) -> int:
    (folder,), settings = _parsed("init", words, 1, {"consortium": "", "days": "3650"})
    created = pki.create(Path(folder), settings["consortium"], _whole(settings, "days"), _passphrase(), _now())
    print(f"{folder}: the CA of {created.consortium}, fingerprint {fingerprint(created.ca_pem)}")
    if _passphrase() is None:
        print(f"Its key is not encrypted. Keep the folder offline, or set {PASSPHRASE} at init.")
    return 0


def _invite(words: Sequence[str]) -> int:
    defaults = {"role": "client", "host": "", "days": "7", "certificate_days": "365", "enrollment": "", "output": ""}
    (folder, name), settings = _parsed("invite", words, 2, defaults)
    output = Path(settings["output"] or f"{name}.invite.json")
    authority = pki.opened(Path(folder), _passphrase())
    if output.exists():
        raise ConfigError(f"{output}: expected a new file for the invite, got one that exists. Choose another output=.")
    enrollment = _address("enrollment", settings["enrollment"]) if settings["enrollment"] else ""
    given = pki.invite(
        authority,
        name,
        settings["role"],
        [host for host in settings["host"].split(",") if host],
        _now(),
        days=_whole(settings, "days"),
        certificate_days=_whole(settings, "certificate_days"),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_secret(output, invite_bytes(replace(given, enrollment=enrollment)))
    print(f"{output}: {given.role} {given.name} of {given.consortium}, once, until {stamp(given.expires)}")
    print(f"Hand it over privately: whoever holds it becomes {given.name}.")
    return 0


def _enroll(words: Sequence[str]) -> int:
    defaults = {"output": "", "certificate": "", "ca": "", "address": "", "online": "true"}
    (source,), settings = _parsed("enroll", words, 1, defaults)
    if not settings["output"]:
        raise ConfigError("lamina pki enroll: expected output=DIR, the folder for the identity.")
    folder = Path(settings["output"])
    invite = read_invite(Path(source).read_bytes(), source)
    if settings["certificate"]:
        return _enrolled(folder, accept(folder, Path(settings["certificate"]).read_bytes(), invite, _now()))
    request = prepare(folder, invite, _now())
    pem = _answered("enroll", request, invite.ca_pem, settings, invite.enrollment)
    if pem is None:
        print(f"{folder / 'request.json'}: send it to whoever keeps the CA; then, with the answer:")
        print(f"  lamina pki enroll {source} output={folder} certificate=FILE")
        return 0
    return _enrolled(folder, accept(folder, pem, invite, _now()))


def _renew(words: Sequence[str]) -> int:
    defaults = {"certificate": "", "ca": "", "address": "", "online": "true", "rotate_signing_key": "false"}
    (place,), settings = _parsed("renew", words, 1, defaults)
    folder = Path(place)
    if settings["certificate"]:
        return _installed(folder, accept_renewal(folder, Path(settings["certificate"]).read_bytes(), _now()))
    identity = load(folder)
    request = prepare_renewal(folder, flag(settings, "rotate_signing_key"))
    pem = _answered("renew", request, identity.ca_pem, settings, address_of(folder))
    if pem is None:
        print(f"{folder / 'request.json'}: send it to whoever keeps the CA; then, with the answer:")
        print(f"  lamina pki renew {folder} certificate=FILE")
        return 0
    return _installed(folder, accept_renewal(folder, pem, _now()))


def _answered(kind: str, request: bytes, ca_pem: bytes, settings: Mapping[str, str], address: str) -> bytes | None:
    """The certificate from the CA folder at hand or from the listener; None where the request goes by files."""
    online = flag(settings, "online")
    if settings["ca"]:
        authority = pki.opened(Path(settings["ca"]), _passphrase())
        if fingerprint(authority.ca_pem) != fingerprint(ca_pem):
            raise IdentityError(f"ca={settings['ca']}: expected the CA {fingerprint(ca_pem)}, got another.")
        return pki.fulfil(authority, request, _now(), kind=kind)
    address = settings["address"] or address
    if not address or not online:
        return None
    require_tls13()
    from lamina.server.port.enrollment import ask  # brings in gRPC, which must not come before the line above

    return ask(_address("address", address), ca_pem, kind, request)


def _enrolled(folder: Path, peer: Peer) -> int:
    _installed(folder, peer)
    print(f"CA fingerprint {fingerprint(load(folder).ca_pem)}; compare it with what `lamina pki list` shows at the CA.")
    return 0


def _installed(folder: Path, peer: Peer) -> int:
    print(f"{folder}: {peer.name}, {peer.role} of {peer.consortium}, until {stamp(peer.not_after)}")
    return 0


def _sign(words: Sequence[str]) -> int:
    (folder, source), settings = _parsed("sign", words, 2, {"output": "certificate.pem"})
    authority = pki.opened(Path(folder), _passphrase())
    with Path(source).open("rb") as file:
        request = file.read(MAX_REQUEST_BYTES + 1)
    pem = pki.fulfil(authority, request, _now())
    peer = verified_peer(pem, authority.ca_pem, _now())
    write_atomic(Path(settings["output"]), pem)
    print(f"{settings['output']}: {peer.name}, {peer.role}, serial {peer.serial:x}, until {stamp(peer.not_after)}")
    return 0


def _listen(words: Sequence[str]) -> int:
    (folder,), settings = _parsed("listen", words, 1, {"address": "127.0.0.1:8441"})
    require_tls13()
    from lamina.server.port.enrollment import Listener  # brings in gRPC, which must not come before the line above

    authority = pki.opened(Path(folder), _passphrase())
    address = _address("address", settings["address"])
    listener = Listener(authority, address, lambda line: print(f"{stamp(_now())} {line}", file=sys.stderr, flush=True))
    ended = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
    port = listener.start()
    print(f"listening on {address.rpartition(':')[0]}:{port} for {authority.consortium}; stop with Ctrl-C", flush=True)
    ended.wait()
    listener.stop()
    return 0


def _revoke(words: Sequence[str]) -> int:
    plain, settings = parsed(words, {"serial": ""})
    serial = settings["serial"].lower().lstrip("0")
    if len(plain) != (1 if serial else 2):
        raise ConfigError(
            "lamina pki revoke: expected CA_DIR NAME, or CA_DIR serial=HEX. See `lamina pki revoke --help`."
        )
    folder = Path(plain[0])
    authority = pki.opened(folder, _passphrase())
    serials = pki.revoke(authority, _now(), name="" if serial else plain[1], serial=serial)
    for one in serials:
        print(f"revoked {one}")
    print(f"{folder / CRL}: copy it to the coordinator, and to the sites (client.revocations).")
    return 0


def _list(words: Sequence[str]) -> int:
    (place,), _ = _parsed("list", [word for word in words if word != "--json"], 1, {})
    folder, now = Path(place), _now()
    ledger = read_ledger(folder)
    ca_pem = (folder / CA).read_bytes()
    ca = {"consortium": consortium_of(certificate(ca_pem, CA)), "fingerprint": fingerprint(ca_pem)}
    # A renewal leaves the one before it valid, for as long as its dates say.
    newest = {one.name: one.serial for one in ledger.certificates if one.live(now)}
    certificates = [
        {key: getattr(one, key) for key in ("name", "role", "serial", "not_after", "hosts", "revoked")}
        | {"state": _state(one, now, newest)}
        for one in ledger.certificates
    ]
    invites = [
        {key: getattr(one, key) for key in ("name", "role", "id", "expires", "attempts")}
        | {"state": "used" if one.used else "cancelled" if one.cancelled else "open" if one.open(now) else "expired"}
        for one in ledger.invites
    ]
    if "--json" in words:
        print(json.dumps({"ca": ca, "certificates": certificates, "invites": invites}, indent=1))
        return 0
    print(f"{folder}: the CA of {ca['consortium']}, fingerprint {ca['fingerprint']}")
    for one in certificates:
        print(
            f"{one['name']:<24} {one['role']:<12} {one['state']:<10} until {one['not_after']}  serial {one['serial']}"
        )
    for one in invites:
        if one["state"] != "used":
            print(f"{one['name']:<24} {one['role']:<12} invite {one['state']}, until {one['expires']}")
    if not certificates and not invites:
        print("no certificates and no invites yet")
    return 0


def _state(one: Issued, now: datetime, newest: Mapping[str, str]) -> str:
    if one.revoked:
        return "revoked"
    if not one.live(now):
        return "expired"
    return "valid" if newest[one.name] == one.serial else "superseded"


_COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "init": _init,
    "invite": _invite,
    "enroll": _enroll,
    "sign": _sign,
    "listen": _listen,
    "revoke": _revoke,
    "renew": _renew,
    "list": _list,
}


def _parsed(
    name: str, words: Sequence[str], count: int, defaults: Mapping[str, str]
) -> tuple[list[str], Mapping[str, str]]:
    plain, settings = parsed(words, defaults)
    if len(plain) != count:
        first = HELP[name].splitlines()[0].removeprefix("usage: ")
        raise ConfigError(f"lamina pki {name}: got {len(plain)} plain words. Expected: {first}")
    return plain, settings


def _whole(settings: Mapping[str, str], key: str) -> int:
    if not settings[key].isascii() or not settings[key].isdigit() or len(settings[key]) > 9:
        raise ConfigError(f"{key}={settings[key]}: expected a whole number of days.")
    return int(settings[key])


def _address(key: str, value: str) -> str:
    host, _, port = value.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    fits = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65536 and general_name(bare) is not None
    if not fits or (":" in bare and bare == host):
        raise ConfigError(f"{key}={value[:80]}: expected host:port, as in ca.example.org:8441 or [::1]:8441.")
    return value


def _passphrase() -> bytes | None:
    return os.environ[PASSPHRASE].encode() if os.environ.get(PASSPHRASE) else None


def _now() -> datetime:
    return datetime.now(UTC)
