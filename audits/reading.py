"""A run directory as an auditor reads it: documents, the final adapter, and what each client's model was at the end of a round.

Nothing of it is believed beyond what is said here: adapters are checked against the run's schema before they are used.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.audits import kept
from lamina.client import frozen
from lamina.client.frozen import Frozen
from lamina.protos import compose, spec
from lamina.protos.adapter import EMPTY, Adapter
from lamina.protos.config import Config
from lamina.protos.errors import ConfigError
from lamina.protos.files import file_digest
from lamina.protos.identity.certificates import is_name
from lamina.protos.privacy.events import from_json
from lamina.protos.spec import AdapterSpec

_CLAIMED = "claimed_epsilon"  # of an entry of the history, beside its event


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished run.

    Attributes:
        path: Its directory.
        config: `config.yaml`, with what the auditor has set besides.
        summary: `summary.json`.
        rounds: The objects of `rounds.jsonl`.
        spec: The schema.
        adapter: The final global adapter, as `adapter/` has it.
        kept: Rounds whose updates and releases were kept.
        history: What private mechanisms did, one event each, from the last checkpoint.
        repeats: Of a replay, the directory of the run that is audited.
    """

    path: Path
    config: Config
    summary: dict[str, Any]
    rounds: list[dict[str, Any]]
    spec: AdapterSpec
    adapter: Adapter
    kept: tuple[int, ...]
    history: tuple[dict[str, Any], ...]
    repeats: Path | None = None

    @property
    def deployed(self) -> bool:
        """Whether it is a deployment's, whose directory has neither model nor data."""
        return str((self.summary.get("eval") or {}).get("view")) == "release"

    def hashes(self) -> dict[str, str]:
        """What identifies the run's files, by name: SHA-256."""
        files = {
            "config": "config.yaml",
            "summary": "summary.json",
            "rounds": "rounds.jsonl",
            "adapter": "adapter/adapter_model.safetensors",
        }
        path = self.repeats or self.path
        found = {name: file_digest(path / file).hexdigest() for name, file in files.items()}
        return found | {f"base.{name}": value for name, value in self.spec.hashes.items()}


def read(path: Path, overrides: list[str]) -> Finished:
    """Read a finished run.

    Args:
        path: Its directory.
        overrides: Single-valued overrides on its config, for where model and data are.

    Returns:
        The run.

    Raises:
        ConfigError: If it is no finished run, or a file is not what a run writes.
    """
    for name in ("config.yaml", "summary.json", "rounds.jsonl", "adapter/adapter_model.safetensors"):
        if not (path / name).is_file():
            raise ConfigError(
                f"{path}: expected a finished run with {name}, found none. {_instead(path)}, or leave it out to have a campaign."
            )
    config = compose.composed(overrides, path / "config.yaml")
    try:
        summary = json.loads((path / "summary.json").read_text())
        rounds = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines() if line.strip()]
        _check_shape(summary, rounds)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected summary.json and rounds.jsonl of a run, got {error}.") from None
    schema = spec.read(path / "adapter" / "spec.json")
    return Finished(
        path=path,
        config=config,
        summary=summary,
        rounds=rounds,
        spec=schema,
        adapter=read_adapter(path / "adapter" / "adapter_model.safetensors", schema),
        kept=tuple(int(one.name) for one in kept.round_folders(path)),
        history=_history(path),
    )


def _instead(path: Path) -> str:
    """What to do where a folder is no finished run."""
    if (path / "config.yaml").is_file():
        return f"Finish it with `lamina simulate resume={path}`"
    runs = sorted(str(one.parent) for one in path.glob("*/summary.json"))
    return f"Name one of {', '.join(runs[:6])}" if runs else "Name one"


def _check_shape(summary: Any, rounds: list[Any]) -> None:
    """Raise ValueError where what an audit goes by is of another kind: a claim that is no number cannot be refuted."""
    if not isinstance(summary, dict) or not rounds:
        raise ValueError("no rounds")
    for one in rounds:
        clients = one.get("clients") if isinstance(one, dict) else None
        if not isinstance(clients, list) or not all(isinstance(name, str) and is_name(name) for name in clients):
            raise ValueError("a round without names of clients")
        if type(one.get("round")) is not int or one["round"] < 1:
            raise ValueError("a round without its number")
    if not _is_number((summary.get("seconds") or {}).get("train", 0.0)):
        raise ValueError("seconds that are no number")
    told = summary.get("privacy")
    if told is None:
        return
    if not isinstance(told, dict) or not isinstance(told.get("per_client"), dict):
        raise ValueError("privacy without per_client")
    wanted = [told.get("epsilon"), told.get("budget"), *told["per_client"].values()]
    if not all(one is None or _is_number(one) for one in wanted) or None in told["per_client"].values():
        raise ValueError("an epsilon that is no number")
    if not _is_number(told.get("delta")) or not 0 < told["delta"] < 1:
        raise ValueError("a delta that is not in (0, 1)")
    if not all(isinstance(told.get(name), str) for name in ("mode", "unit", "accountant")):
        raise ValueError("privacy without its mode, unit or accountant")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def read_adapter(file: Path, schema: AdapterSpec) -> Adapter:
    """An adapter from a file of a run: peft's, or one under `rounds/`.

    Args:
        file: safetensors.
        schema: Of the run.

    Returns:
        The adapter; scales are those of the metadata, 1 where there are none.

    Raises:
        ConfigError: If it cannot be read.
        AdapterMismatch: If it does not fit the schema.
    """
    adapter, _ = kept.read_adapter(file, schema.modules, schema.dense)
    schema.check(adapter, str(file))
    return adapter


def client_model(run: Finished, client: str, round_number: int) -> tuple[Adapter, Frozen | None]:
    """A client's model at the end of its round, as whoever has its update can build it.

    Args:
        run: With kept updates.
        client: Whose.
        round_number: Of the update.

    Returns:
        What to put into the slots, and what rides beside it.

    Raises:
        ConfigError: If the update was not kept.
    """
    folder = run.path / "rounds" / f"{round_number:04d}"
    adapter = read_adapter(folder / "updates" / f"{client}.safetensors", run.spec)
    if run.config.strategy.name == "stack":  # its releases hold increments; together they are the global adapter
        before = EMPTY
        if round_number > 1:
            before = read_adapter(run.path / "rounds" / f"{round_number - 1:04d}" / "global.safetensors", run.spec)
        return adapter, frozen.added(None, before)
    beside = folder / "releases" / f"{client}.frozen.safetensors"
    # Of one factor alone, the update is whole already: what was not sent stands in it as the client had it.
    if run.config.strategy.name == "residual" and beside.is_file():
        return adapter, frozen.added(None, read_adapter(beside, run.spec))
    return adapter, None


def _history(path: Path) -> tuple[dict[str, Any], ...]:
    """Events in the newest checkpoint; none where there is no checkpoint."""
    newest = max(path.glob("checkpoints/round-*/state.json"), default=None)
    if newest is None:
        return ()
    try:
        document = json.loads(newest.read_text().rsplit("\n", 2)[0])
        history = tuple(dict(event) for event in document["privacy_history"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{newest}: expected a checkpoint of a run, got another file.") from None
    for event in history:
        from_json({key: value for key, value in event.items() if key != _CLAIMED}, str(newest))
    return history
