"""Whether the files of a run directory are those that its event log speaks of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina.protos.chain import Record, shown
from lamina.protos.errors import CheckpointError
from lamina.protos.files import file_digest
from lamina.server.store.run_directory import read_records

ADAPTER = "adapter/adapter_model.safetensors"
ROUNDS = "rounds.jsonl"
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass
class Said:
    """What a log says of files.

    Attributes:
        config: SHA-256 of config.yaml, as every hash whatever the log holds.
        spec: SHA-256 of the schema.
        end: The record of the end; None before it, and after a restart.
        clients: Round -> clients whose updates are in it.
    """

    config: Any = None
    spec: Any = None
    end: Record | None = None
    clients: dict[int, Any] = field(default_factory=dict)

    def hear(self, record: Record) -> None:
        """Take note of a good record."""
        if record.kind == "begin":
            self.config, self.spec = record.fields.get("config"), record.fields.get("spec")
        elif record.kind == "restart":
            self.end = None  # what it wrote goes, and is written again
        elif record.kind == "end":
            self.end = record
        elif record.kind == "aggregate" and type(number := record.fields.get("round")) is int:
            self.clients[number] = record.fields.get("clients")


@dataclass(frozen=True)
class Compared:
    """One file, held against the log.

    Attributes:
        name: In the run directory.
        state: `same`, `absent` where it need not be there, or `differs`.
        told: What was compared, or what was expected and what is there.
    """

    name: str
    state: str
    told: str


def compared(run_dir: Path, said: Said) -> list[Compared]:
    """Hold a run directory against its log.

    Args:
        run_dir: The run directory, or a copy of what may be fetched of it.
        said: What the log says.

    Returns:
        One for each file that the log says something of, in the order of the log.
    """
    return [*_compared(run_dir, said)]


def _compared(run_dir: Path, said: Said) -> Iterator[Compared]:
    if said.config is not None:
        yield _hashed(run_dir, "config.yaml", said.config, "begin", needed=False)
    if isinstance(said.spec, str) and _HASH.fullmatch(said.spec):
        yield _hashed(run_dir, f"blobs/{said.spec[:2]}/{said.spec}", said.spec, "begin", needed=False)
    if said.clients or said.end is not None:
        yield _rounds(run_dir, said)
    if said.end is not None:
        if "rounds" in said.end.fields:
            yield _hashed(run_dir, ROUNDS, said.end.fields["rounds"], "end", needed=True)
        yield _hashed(run_dir, ADAPTER, said.end.fields.get("adapter"), "end", needed=True)


def _hashed(run_dir: Path, name: str, wanted: Any, kind: str, needed: bool) -> Compared:
    path = run_dir / name
    if not path.is_file():
        told = f"expected a file with the SHA-256 {shown(wanted)} of the record `{kind}`, found none"
        return Compared(name, "differs" if needed else "absent", told)
    found = file_digest(path).hexdigest()
    if found != wanted:
        return Compared(name, "differs", f"expected the SHA-256 {shown(wanted)} of the record `{kind}`, got {found}")
    return Compared(name, "same", f"its SHA-256 is that of the record `{kind}`")


def _rounds(run_dir: Path, said: Said) -> Compared:
    if not (run_dir / ROUNDS).is_file():
        told = f"expected the clients of {len(said.clients)} rounds, found no file"
        return Compared(ROUNDS, "differs" if said.end is not None else "absent", told)
    try:
        lines = read_records(run_dir)
        records = {line["round"]: line["clients"] for line in lines}
        fault = _fault(said, records) if len(records) == len(lines) else "expected one line a round, got several of one"
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        fault = f"expected an object with `round` and `clients` a line, got something else ({type(error).__name__})"
    if fault:
        return Compared(ROUNDS, "differs", fault)
    both = len(said.clients.keys() & records.keys())
    ahead = len(said.clients) + len(records) - 2 * both
    more = f"; {ahead} later ones are in one of the two only, as a run that goes on leaves it" if ahead else ""
    return Compared(ROUNDS, "same", f"the clients of {both} rounds are those of the records `aggregate`{more}")


def _fault(said: Said, records: Mapping[Any, Any]) -> str:
    """The first round in which the file and the log differ. Until the run has ended, either may be ahead of the other."""
    both = said.clients.keys() & records.keys()
    last = max(both, default=0)
    for number in sorted(said.clients.keys() | records.keys()):
        if number not in both and (number < last or said.end is not None):
            where, other = ("the log", "the file") if number in said.clients else ("the file", "the log")
            return f"expected round {shown(number)} in both, got it in {where} and not in {other}"
        if number in both and records[number] != said.clients[number]:
            return (
                f"round {number}: expected the clients {shown(said.clients[number])} of the record `aggregate`, got "
                f"{shown(records[number])}"
            )
    return ""
