"""The coordinator's state on disk: one folder a round, safetensors and JSON, checksummed, complete or absent."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lamina.protos.adapter import Adapter
from lamina.protos.codec import decode, encode
from lamina.protos.errors import CheckpointError, UpdateRejected
from lamina.protos.files import sha256, write_folder
from lamina.strategies.base import LayerReport, ServerState

SCHEMA = 1


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had not stopped.

    Attributes:
        state: The coordinator's state after the round.
        record: The line of `rounds.jsonl` of that round.
        identity: What must not differ on resume: run id, base hashes, what the config fixes.
        held: Client id -> version of the release that it holds.
        extra: Further files by name, such as the clients' own state in a simulation.
    """

    state: ServerState
    record: Mapping[str, Any]
    identity: Mapping[str, Any]
    held: Mapping[str, int]
    extra: Mapping[str, bytes] = field(default_factory=dict)


def folder(run_dir: Path, round_number: int) -> Path:
    """Where the checkpoint of a round lies.

    Args:
        run_dir: The run directory.
        round_number: From 1.

    Returns:
        `checkpoints/round-0001` and so on.
    """
    return run_dir / "checkpoints" / f"round-{round_number:04d}"


def save(run_dir: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write a checkpoint and drop all but the newest `keep`.

    Args:
        run_dir: The run directory.
        checkpoint: What to keep.
        keep: How many rounds stay, >= 1.
    """
    state = checkpoint.state
    adapters = {"global": state.adapter} | {f"optimizer-{name}": adapter for name, adapter in state.optimizer.items()}
    files = {f"{name}.safetensors": encode(adapter, "fp32") for name, adapter in adapters.items()} | dict(
        checkpoint.extra
    )
    document = {
        "schema": SCHEMA,
        "round": state.round,
        "identity": dict(checkpoint.identity),
        "record": dict(checkpoint.record),
        "held": dict(checkpoint.held),
        "privacy_history": [dict(event) for event in state.privacy_history],
        "report": {name: asdict(layer) for name, layer in state.report.items()},
        "sha256": {name: sha256(content) for name, content in files.items()},
    }
    text = json.dumps(document, indent=1)
    files["state.json"] = (text + f"\n{sha256(text.encode())}\n").encode()
    write_folder(folder(run_dir, state.round), files)
    for old in _rounds(run_dir)[:-keep]:
        shutil.rmtree(folder(run_dir, old), ignore_errors=True)


def _rounds(run_dir: Path) -> list[int]:
    found = (re.fullmatch(r"round-(\d{4,})", path.name) for path in (run_dir / "checkpoints").glob("round-*"))
    return sorted(int(match[1]) for match in found if match)


def load_last(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint, every file checked against its hash.

    Args:
        run_dir: The run directory.

    Returns:
        The checkpoint, or None where there is none yet.

    Raises:
        CheckpointError: If it is corrupt or truncated. Nothing is changed; older ones are named.
    """
    rounds = _rounds(run_dir)
    if not rounds:
        return None
    path = folder(run_dir, rounds[-1])
    try:
        return _load(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UpdateRejected) as error:
        older = f"To go on from round {rounds[-2]}, remove {path}." if len(rounds) > 1 else "There is no older one."
        raise CheckpointError(f"{path}: expected a complete checkpoint, got {error}. {older}") from None


def load_newest_whole(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole; those after it that are not are set aside under other names.

    Args:
        run_dir: The run directory.

    Returns:
        The checkpoint, or None where none is whole, and what was wrong with those set aside.
    """
    wrong: list[str] = []
    while True:
        try:
            return load_last(run_dir), wrong
        except CheckpointError as error:
            wrong.append(str(error))
            damaged = folder(run_dir, _rounds(run_dir)[-1])
            aside = damaged.with_name(f"damaged-{damaged.name}")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)


def _load(path: Path) -> Checkpoint:
    text, checksum, *_ = [*(path / "state.json").read_text().rsplit("\n", 2), "", ""]
    if sha256(text.encode()) != checksum:
        raise ValueError("state.json with a wrong checksum")
    document = json.loads(text)
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']} where this version reads {SCHEMA}")
    files = {}
    for name, wanted in document["sha256"].items():
        files[name] = (path / name).read_bytes()
        if sha256(files[name]) != wanted:
            raise ValueError(f"{name} with a wrong checksum")
    adapters: dict[str, Adapter] = {
        name.removesuffix(".safetensors"): decode(files.pop(name))
        for name in list(files)
        if name == "global.safetensors" or name.startswith("optimizer-")
    }
    report = {
        name: LayerReport(**(layer | {"singular_values": tuple(layer["singular_values"])}))
        for name, layer in document["report"].items()
    }
    state = ServerState(
        round=document["round"],
        adapter=adapters.pop("global"),
        optimizer={name.removeprefix("optimizer-"): adapter for name, adapter in adapters.items()},
        privacy_history=tuple(document["privacy_history"]),
        report=report,
    )
    return Checkpoint(state, document["record"], document["identity"], document["held"], files)
