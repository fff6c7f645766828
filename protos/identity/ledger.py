"""The CA's ledger: every certificate issued and every invite given, in one JSON file behind one lock."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from lamina.protos.errors import ConfigError, IdentityError
from lamina.protos.files import write_json

LEDGER = "issued.json"


@dataclass
class Issued:
    """A certificate that the CA has issued.

    Args:
        serial: Hex.
        name: Subject.
        role: Role.
        hosts: A coordinator's.
        not_after: End of validity, ISO 8601.
        issued: When, ISO 8601.
        request: SHA-256 of the request, so that the same request gets the same answer.
        certificate: PEM.
        revoked: When, ISO 8601, or ``.
    """

    serial: str
    name: str
    role: str
    hosts: list[str]
    not_after: str
    issued: str
    request: str
    certificate: str
    revoked: str = ""

    def live(self, now: datetime) -> bool:
        """Whether it is neither revoked nor expired.

        Args:
            now: The time, aware.

        Returns:
            True if it still counts.
        """
        return not self.revoked and now <= datetime.fromisoformat(self.not_after)


@dataclass
class Invited:
    """An invite that the CA has given.

    Args:
        id: Public.
        name: Who it is for.
        role: As what.
        hosts: A coordinator's.
        expires: ISO 8601.
        certificate_days: How long the certificate will be valid.
        key: The public half of the key that the token gives, hex.
        attempts: Refused requests through the listener.
        used: Serial of the certificate that it gave, or ``.
        cancelled: When, ISO 8601, or ``.
    """

    id: str
    name: str
    role: str
    hosts: list[str]
    expires: str
    certificate_days: int
    key: str
    attempts: int = 0
    used: str = ""
    cancelled: str = ""

    def open(self, now: datetime) -> bool:
        """Whether it could still be used.

        Args:
            now: The time, aware.

        Returns:
            True if it is unused, not cancelled and not expired.
        """
        return not self.used and not self.cancelled and now <= datetime.fromisoformat(self.expires)


@dataclass
class Ledger:
    """All that the CA remembers.

    Args:
        certificates: In the order of issue.
        invites: In the order of giving.
        crl_number: Of the revocation list; grows by one each time it is written.
    """

    certificates: list[Issued] = field(default_factory=list)
    invites: list[Invited] = field(default_factory=list)
    crl_number: int = 0


def ledger_bytes(ledger: Ledger) -> bytes:
    """A ledger as its file.

    Args:
        ledger: The ledger.

    Returns:
        JSON.
    """
    return json.dumps({"schema": 1} | asdict(ledger), indent=1).encode()


def read_ledger(folder: Path) -> Ledger:
    """Read the ledger of a CA folder.

    Args:
        folder: The CA folder.

    Returns:
        The ledger.

    Raises:
        ConfigError: If there is none.
        IdentityError: If it cannot be understood; nothing is issued from half a memory.
    """
    path = folder / LEDGER
    try:
        document = json.loads(path.read_bytes())
        return Ledger(
            certificates=[Issued(**one) for one in document["certificates"]],
            invites=[Invited(**one) for one in document["invites"]],
            crl_number=int(document["crl_number"]),
        )
    except OSError as error:
        raise ConfigError(
            f"{path}: expected the ledger of a CA, found none. Make one: lamina pki init {folder}"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise IdentityError(f"{path}: expected the ledger of a CA, got one that is damaged. Restore it.") from error


@contextmanager
def changing(folder: Path) -> Iterator[Ledger]:
    """Read, change and write the ledger while no other command can; an exception leaves it as it was.

    Args:
        folder: The CA folder.

    Yields:
        The ledger, written when the block ends.

    Raises:
        ConfigError: If there is none.
        IdentityError: If it cannot be understood.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a CA folder, found none. Make one: lamina pki init {folder}")
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ledger = read_ledger(folder)
        before = asdict(ledger)
        yield ledger
        if asdict(ledger) != before:
            write_json(folder / LEDGER, {"schema": 1} | asdict(ledger))
