"""The run directory: what a run leaves behind, and what it needs to go on. Fixed names; see docs/run-directory.md."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.protos.adapter import Adapter, Array, folded
from lamina.protos.errors import CheckpointError, ConfigError
from lamina.protos.files import append_durably, write_atomic, write_json
from lamina.protos.layout import canonical
from lamina.server.store import checkpoint
from lamina.server.store.base import Completed, Store
from lamina.server.store.checkpoint import Checkpoint


def create(path: Path, config_yaml: str) -> None:
    """Start a run directory.

    Args:
        path: Where; must not hold a run already.
        config_yaml: The resolved config.

    Raises:
        ConfigError: If something is there.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"output={path}: expected a new or empty directory, found something there. "
            f"Choose another, remove it, or continue that run with resume={path}."
        )
    try:
        write_atomic(path / "config.yaml", config_yaml)
        write_atomic(path / "rounds.jsonl", "")
        (path / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={path}: expected a place to write, got {error.strerror}.") from None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rounds so far.

    Args:
        path: The run directory.

    Returns:
        One record a round. A torn last line, as a crash leaves it, is left out.

    Raises:
        CheckpointError: If any other line is malformed.
    """
    lines = (path / "rounds.jsonl").read_text().splitlines() if (path / "rounds.jsonl").exists() else []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise CheckpointError(f"{path / 'rounds.jsonl'}, line {number}: expected one JSON object a line.") from None
    return records


@dataclass(frozen=True)
class Resumed:
    """The last durable round of an interrupted run.

    Attributes:
        checkpoint: Of that round.
        completed: The round, for the loop to go on from; its record, if it was written.
    """

    checkpoint: Checkpoint
    completed: Completed


def resume(path: Path, identity: Mapping[str, Any]) -> Resumed | None:
    """The last durable round, with `rounds.jsonl` brought to agree with it.

    Args:
        path: The run directory.
        identity: What the run is now: base hashes and fixed settings.

    Returns:
        The round, or None where none was completed.

    Raises:
        CheckpointError: If it is corrupt, or belongs to another base or other settings.
    """
    return from_checkpoint(path, identity, checkpoint.load_last(path))


def from_checkpoint(path: Path, identity: Mapping[str, Any], last: Checkpoint | None) -> Resumed | None:
    """See `resume`; from a checkpoint that is loaded already.

    Args:
        path: The run directory.
        identity: What the run is now.
        last: The checkpoint, or None to begin again.

    Returns:
        The round, or None where none was completed.

    Raises:
        CheckpointError: If it belongs to another base or other settings.
    """
    if last is None:
        write_atomic(path / "rounds.jsonl", "")
        return None
    check_same(path, identity, last.identity)
    written = {record["round"]: record for record in read_records(path) if record["round"] <= last.state.round}
    if any(number not in written for number in range(1, last.state.round)):
        raise CheckpointError(
            f"{path / 'rounds.jsonl'}: expected rounds 1 to {last.state.round - 1}, some are missing."
        )
    _write_records(path, [written[number] for number in sorted(written)])
    record, announced = written.get(last.state.round, last.record), last.state.round in written
    return Resumed(last, Completed(last.state, record, (), {}, {}, last.held, announced=announced))


def check_same(path: Path, identity: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raise unless a run is gone on with as it began.

    Args:
        path: The run directory.
        identity: What the run is now.
        before: What it was.

    Raises:
        CheckpointError: If a setting that changes the result differs.
    """
    for key, wanted in before.items():
        if identity.get(key) != wanted:
            raise CheckpointError(
                f"{path}: expected {key} {_short(wanted)} as the run began with, got {_short(identity.get(key))}. "
                "Resume with the same base, data and settings, or give another output."
            )


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    write_atomic(path / "rounds.jsonl", "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


@dataclass(frozen=True)
class RunDirectory(Store):
    """A store on disk: whole rounds are durable, an interrupted one is begun again.

    Attributes:
        path: The run directory.
        identity: See `resume`.
        keep_checkpoints: How many rounds' checkpoints stay.
        keep_updates: Whether decoded updates and releases are kept.
        extra: Further checkpoint files, asked for at each save.
        completed: Told after a round is durable.
    """

    path: Path
    identity: Mapping[str, Any]
    keep_checkpoints: int
    keep_updates: bool
    extra: Callable[[], Mapping[str, bytes]]
    completed: Callable[[Completed], None]

    def save(self, completed: Completed) -> None:
        """Keep the updates if asked, then the checkpoint."""
        if self.keep_updates:
            keep_round(self.path, completed)
        checkpoint.save(
            self.path,
            Checkpoint(completed.state, completed.record, self.identity, completed.held, self.extra()),
            self.keep_checkpoints,
        )

    def announce(self, completed: Completed) -> None:
        """Write the round's line, then tell."""
        append_durably(self.path / "rounds.jsonl", json.dumps(completed.record, allow_nan=False) + "\n")
        self.completed(completed)


_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def keep_round(path: Path, completed: Completed) -> None:
    """Write one round's updates, releases and global adapter, as their receivers decoded them.

    Args:
        path: The run directory.
        completed: The round.

    Raises:
        ConfigError: If a client's name could not be a file's; before anything is written.
    """
    folder = path / "rounds" / f"{completed.state.round:04d}"
    for update in completed.updates:
        if not _FILE_NAME.fullmatch(update.client_id):
            raise ConfigError(
                f"client {update.client_id!r}: expected a name of letters, digits, '.', '_' and '-' that can be a file's. "
                "Give the client another name."
            )
    for update in completed.updates:
        weight = {"weight": repr(completed.weights[update.client_id])}
        write_atomic(folder / "updates" / f"{update.client_id}.safetensors", plain(update.adapter, weight))
        release = completed.releases[update.client_id]
        write_atomic(folder / "releases" / f"{update.client_id}.safetensors", plain(release.trainable))
        if release.frozen is not None:
            write_atomic(folder / "releases" / f"{update.client_id}.frozen.safetensors", plain(release.frozen))
    write_atomic(folder / "global.safetensors", plain(completed.state.adapter))


def plain(adapter: Adapter, metadata: Mapping[str, str] | None = None) -> bytes:
    """An adapter as a float32 safetensors file that needs no code of ours to read.

    Args:
        adapter: The adapter.
        metadata: Further metadata.

    Returns:
        `<module>.lora_A.weight` (r, d_in), `<module>.lora_B.weight` (d_out, r) with a core folded in, dense ones by name;
        `scales` in the metadata.
    """
    tensors: dict[str, Array] = {}
    for module, factors in ((module, folded(factors)) for module, factors in adapter.lora.items()):
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = factors.A, factors.B
    tensors.update(adapter.dense)
    scales = {module: factors.scale for module, factors in adapter.lora.items()}
    contiguous = {name: value.astype("float32").copy(order="C") for name, value in tensors.items()}
    return canonical(contiguous, {"scales": json.dumps(scales), **(metadata or {})})


def write_layers(path: Path, completed_state: Any) -> None:
    """Write `layers.json`: rank, singular values and relative error of each module of the final global adapter.

    Args:
        path: The run directory.
        completed_state: The final `ServerState`.
    """
    modules = completed_state.adapter.lora
    layers = {
        name: {
            "rank": modules[name].rank,
            "relative_error": layer.relative_error,
            "singular_values": list(layer.singular_values),
        }
        for name, layer in completed_state.report.items()
        if name in modules
    }
    write_json(path / "layers.json", layers)
