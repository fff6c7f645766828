"""Opening a run directory: a new run or one that is gone on with, its database, its certificates, and where it goes on from."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.protos import compose
from lamina.protos import identity as identities
from lamina.protos import spec as specs
from lamina.protos.blobs import Blob
from lamina.protos.clock import Clock
from lamina.protos.config import Config, client_names
from lamina.protos.errors import CheckpointError, ConfigError, IdentityError
from lamina.protos.files import sha256, write_atomic
from lamina.protos.identity import Identity, Revocations, list_of
from lamina.protos.identity.revocations import CRL
from lamina.protos.logs import Log
from lamina.server import campaign as campaigns
from lamina.server.campaign import Campaign
from lamina.server.finish import clear_results
from lamina.server.port.access import Access
from lamina.server.port.mailbox import Mailbox
from lamina.server.port.roster import Roster
from lamina.server.port.run import Run
from lamina.server.port.sums import PortSums
from lamina.server.port.terms import coordinator_keys
from lamina.server.store import checkpoint, events, run_directory
from lamina.server.store.base import Completed
from lamina.server.store.blobs import BlobStore
from lamina.server.store.database import Database, set_fact
from lamina.server.store.deployment import DeploymentStore

DATABASE = "coordinator.sqlite"
# Record of the event log -> what the coordinator's own log calls it, and the fields that it tells.
_TOLD: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "register": ("registered", ("client_id", "rank")),
    "leave": ("left", ("client_id",)),
    "pause": ("paused", ("by",)),
    "unpause": ("resumed", ("by",)),
    "stop": ("stopping", ("by", "now")),
    "round": ("opened", ("round", "asked")),
    "reject": ("rejected", ("round", "client_id", "reason", "code")),
}


@dataclass(frozen=True)
class Opened:
    """A run whose directory is open.

    Attributes:
        run: For the port.
        identity: The coordinator's, or None without certificates.
        resumed: The last durable round, or None.
    """

    run: Run
    identity: Identity | None
    resumed: Completed | None


def open_run(config: Config, path: Path, log: Log, clock: Clock) -> Opened:
    """Open a run directory, new or known.

    Args:
        config: A checked config.
        path: The run directory.
        log: Told what happens.
        clock: For times in the log.

    Returns:
        The run and where it goes on from.

    Raises:
        ConfigError: If the schema file is missing, or something else is in the directory.
        CheckpointError: If the directory holds a run of other settings, or nothing whole.
        IdentityError: If the certificate cannot be used, or a list of revoked ones that the run has seen is gone.
    """
    identity, access = _identity(config, clock)
    if not config.coordinator.spec:
        raise ConfigError("coordinator.spec: expected the schema file of the base. Write one with `lamina spec MODEL`.")
    spec_path = Path(config.coordinator.spec)
    spec = specs.read(spec_path)
    if spec.task != config.task:
        raise ConfigError(f"task={config.task}: expected {spec.task}, the task of {spec_path}. Set task={spec.task}.")
    kind = config.adapter.kind
    if (kind == "lora") != bool(spec.modules):
        there = f"{len(spec.modules)} modules with factors" if spec.modules else "none with factors"
        raise ConfigError(
            f"adapter.kind={kind}: expected the kind that {spec_path} was written for, which has {there}. Set adapter.kind, or "
            f"write the file with `lamina spec MODEL kind={kind}`."
        )
    known = (path / DATABASE).exists()
    if not known:
        run_directory.create(path, compose.to_yaml(config, coordinator_keys()))
    db = Database(path / DATABASE)
    if identity is not None:
        _revocations(db, path, access, identity)
    fixed = campaigns.fixed_settings(config, spec) | {"spec": sha256(spec_path.read_bytes())}
    run_id, blob = _begin(db, path, fixed, spec_path.read_bytes(), identity, clock)
    campaign = campaigns.campaign(config, spec, campaigns.budgets(config, spec), run_id)
    store = DeploymentStore(
        path=path,
        identity=fixed | {"run id": run_id},
        keep_checkpoints=config.checkpoints,
        keep_updates=config.keep_updates,
        extra=dict,
        completed=lambda completed: None,
        db=db,
        blobs=BlobStore(path / "blobs"),
        clock=clock,
        sign=_head_signer(identity),
        carry_rounds=config.clients.carry_rounds,
        told=_mirrored(log),
    )
    with db.alone() as connection:
        events.reconcile(connection, path / events.FILE_NAME)
    mailbox, roster = Mailbox(clock), Roster(config, spec, store, clock)
    run = Run(
        config=config,
        campaign=campaign,
        store=store,
        roster=roster,
        mailbox=mailbox,
        access=access,
        clock=clock,
        sign=(lambda domain, statement: b"") if identity is None else _signer(identity),
        certificate=b"" if identity is None else identity.certificate_pem,
        consortium="" if identity is None else identity.peer.consortium,
        spec=blob,
        sums=PortSums(spec, mailbox, roster, clock, config),
    )
    resumed = _resumed(store, campaign, log) if known else None
    if known and (resumed is None or resumed.state.round < campaign.rounds):
        clear_results(path)  # of an end that was none
    return Opened(run, identity, resumed)


def _mirrored(log: Log) -> Callable[[Mapping[str, Any]], None]:
    """Repeats in the coordinator's own log what a person waits for."""

    def told(record: Mapping[str, Any]) -> None:
        event, fields = _TOLD.get(record["kind"], ("", ()))
        if event:
            log(event, **{"client" if name == "client_id" else name: record["fields"].get(name) for name in fields})

    return told


def _identity(config: Config, clock: Clock) -> tuple[Identity | None, Access]:
    if config.insecure:
        return None, Access(None, None, clock, client_names(config))
    if not config.coordinator.identity:
        raise IdentityError(
            "coordinator.identity: expected the folder with the coordinator's certificate. Make one with `lamina pki`, "
            "or set insecure=true to try things out on the loopback interface."
        )
    folder = Path(config.coordinator.identity)
    identity = identities.load(folder)
    named = config.coordinator.revocations
    revocations = list_of(named, folder)
    if revocations is not None and not revocations.is_file():
        raise IdentityError(f"coordinator.revocations={named}: expected the consortium's crl.pem, found none.")
    found = identities.check(folder, clock.now(), "coordinator", revocations)
    wrong = [finding.message for finding in found if not finding.ok]
    if wrong:
        raise IdentityError("\n".join(wrong))
    return identity, Access(identity.ca_pem, revocations or folder / CRL, clock, client_names(config))


def _revocations(db: Database, path: Path, access: Access, identity: Identity) -> None:
    """Hold the list of revoked certificates against the last that the run has seen, and keep it from now on."""

    def keep(found: Revocations) -> None:
        text = json.dumps([found.number, sorted(f"{serial:x}" for serial in found.serials)])
        with db.change() as connection:
            set_fact(connection, "revocations", text)

    with _as_written(path):
        number, serials = json.loads(db.fact("revocations") or "[null, []]")
        before = None if number is None else Revocations(int(number), frozenset(int(serial, 16) for serial in serials))
    access.remember(before, keep)
    if access.broken is not None:
        raise access.broken
    if access.is_revoked_serial(identity.peer.serial):
        raise IdentityError(
            f"{access.fault or 'The list in force revokes this coordinator.'} {identity.peer.name}'s own certificate is "
            "revoked. Ask whoever keeps the CA; a new invite gives a new certificate."
        )


def _signer(identity: Identity) -> Callable[[str, bytes], bytes]:
    return lambda domain, statement: identities.sign(identity, domain, statement)


def _head_signer(identity: Identity | None) -> Callable[[bytes], bytes]:
    if identity is None:
        return lambda digest: b""
    return lambda digest: identities.sign(identity, "log-head", digest)


def _begin(
    db: Database, path: Path, fixed: Mapping[str, Any], spec: bytes, identity: Identity | None, clock: Clock
) -> tuple[str, Blob]:
    """The run's name, new or known, and the schema file as a blob."""
    blob = BlobStore(path / "blobs").put(spec)
    run_id = db.fact("run_id")
    with db.change() as connection:
        if run_id is None:
            run_id = secrets.token_hex(6)
            set_fact(connection, "run_id", run_id)
            set_fact(connection, "spec", blob.sha256)
            set_fact(connection, "settings", json.dumps(dict(fixed)))
            set_fact(connection, "signing_key", _signing_key(identity))
            certificate = "" if identity is None else identity.certificate_pem.decode()
            fields = {
                "run_id": run_id,
                "certificate": certificate,
                "config": sha256((path / "config.yaml").read_bytes()),
                "spec": blob.sha256,
                "settings": dict(fixed),
            }
            events.append(connection, "begin", fields, clock.now(), _head_signer(identity))
        else:
            _check_key(connection, identity, path)
            with _as_written(path):
                settings = dict(json.loads(db.fact("settings") or "{}"))
            run_directory.check_same(path, fixed, settings)
            if db.fact("ended") == "stopped":
                # The operator had it stopped, and has started it again.
                set_fact(connection, "stopping", "0")
                set_fact(connection, "ended", "")
            events.append(connection, "restart", {"run_id": run_id}, clock.now(), _head_signer(identity))
    if identity is not None:
        write_atomic(path / "ca.pem", identity.ca_pem)
    return run_id, blob


@contextlib.contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """What the database keeps as text is as it was written, or the start ends in words."""
    try:
        yield
    except (ValueError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path / DATABASE}: expected what the run began with, got something else. Restore the directory from a copy, or "
            "begin again in a new one."
        ) from None


def _signing_key(identity: Identity | None) -> str:
    return "" if identity is None else identity.peer.signing_key.hex()


def _check_key(connection: Any, identity: Identity | None, path: Path) -> None:
    """The log is signed with one key from its first record to its last."""
    before = connection.execute("SELECT value FROM facts WHERE name = 'signing_key'").fetchone()[0]
    if before != _signing_key(identity):
        raise IdentityError(
            f"{path}: expected the signing key that the run began with, or its event log could not be checked. "
            "Renew the coordinator's certificate with rotate_signing_key=false, or finish the run under the old one."
        )


def _resumed(store: DeploymentStore, campaign: Campaign, log: Log) -> Completed | None:
    last, wrong = checkpoint.load_newest_whole(store.path)
    for message in wrong:
        log("damaged", message=message)
        store.note("damaged", round=(last.state.round if last else 0) + 1)
    first = 1 if last is None else last.state.round + 1
    if wrong and store.opened(first) is None:
        raise CheckpointError(
            f"{store.path}: expected a whole checkpoint, or the updates of round {first} to make it again. Neither is there; "
            "restore the directory from a copy."
        )
    resumed = run_directory.from_checkpoint(store.path, store.identity, last)
    if resumed is None:
        return None
    if resumed.completed.state.round > campaign.rounds:
        raise ConfigError(
            f"rounds={campaign.rounds}: expected at least {resumed.completed.state.round}, the rounds done."
        )
    if store.settled() < resumed.completed.state.round:
        store.settle(resumed.completed)
    return resumed.completed
