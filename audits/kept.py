"""The kept rounds of a run directory: updates and releases as their receivers decoded them (docs/run-directory.md)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lamina.client.model import PREFIX
from lamina.client.train import fresh_rows
from lamina.protos.adapter import Adapter, LoraFactors, folded
from lamina.protos.errors import ConfigError


@dataclass(frozen=True, eq=False)
class KeptRound:
    """One round as the run directory has it.

    Attributes:
        number: From 1.
        clients: Who sent an update, in id order.
        updates: Client id -> what it trained.
        weights: Client id -> p_k.
        releases: Client id -> what it was sent to train.
        frozen: Client id -> what rode beside it, where something did.
    """

    number: int
    clients: tuple[str, ...]
    updates: Mapping[str, Adapter]
    weights: Mapping[str, float]
    releases: Mapping[str, Adapter]
    frozen: Mapping[str, Adapter]


def read_adapter(path: Path, modules: Iterable[str], dense: Iterable[str] = ()) -> tuple[Adapter, Mapping[str, str]]:
    """The factors of some modules in a safetensors file, and its metadata.

    Args:
        path: As a run directory or peft has it.
        modules: Which; those that the file lacks are left out.
        dense: Which parameters that were trained whole, likewise.

    Returns:
        Factors at the scales of the metadata (1 without), a core folded into B, and the metadata.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            scales = json.loads(metadata.get("scales", "{}"))
            names, lora = set(file.keys()), {}
            whole = {
                name: file.get_tensor(full) for name in dense for full in (name, f"{PREFIX}{name}") if full in names
            }
            for module in modules:
                for prefix in ("", PREFIX):
                    sides = [f"{prefix}{module}.lora_{side}.weight" for side in "AB"]
                    if names.issuperset(sides):
                        rows, columns = (file.get_tensor(name) for name in sides)
                        core = (
                            file.get_tensor(between)
                            if (between := f"{prefix}{module}.lora_core.weight") in names
                            else None
                        )
                        lora[module] = folded(LoraFactors(rows, columns, float(scales.get(module, 1.0)), core))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected factors as a run leaves them, got a file that cannot be read ({error})."
        ) from None
    return Adapter(lora, whole), metadata


def round_folders(run_dir: Path) -> list[Path]:
    """Where updates were kept.

    Args:
        run_dir: The run directory.

    Returns:
        `rounds/0001` and so on, in order.
    """
    found = (one for one in run_dir.glob("rounds/[0-9]*") if one.name.isdigit() and (one / "updates").is_dir())
    return sorted(found, key=lambda one: int(one.name))


def read_rounds(run_dir: Path, modules: Sequence[str]) -> tuple[KeptRound, ...]:
    """The kept rounds of a run.

    Args:
        run_dir: The run directory.
        modules: Of which modules.

    Returns:
        In order.

    Raises:
        ConfigError: If none was kept, or a file cannot be read.
    """
    folders = round_folders(run_dir)
    if not folders:
        raise ConfigError(
            f"{run_dir}: expected rounds/NNNN/updates, got none: what a party saw cannot be rebuilt. Run with keep_updates=true."
        )
    return tuple(_read_round(folder, modules) for folder in folders)


def _read_round(folder: Path, modules: Sequence[str]) -> KeptRound:
    clients = tuple(sorted(path.stem for path in (folder / "updates").glob("*.safetensors")))
    updates, weights, releases, frozen = {}, {}, {}, {}
    for client in clients:
        updates[client], metadata = read_adapter(folder / "updates" / f"{client}.safetensors", modules)
        weights[client] = float(metadata.get("weight", "nan"))
        releases[client], _ = read_adapter(folder / "releases" / f"{client}.safetensors", modules)
        beside = folder / "releases" / f"{client}.frozen.safetensors"
        if beside.exists():
            frozen[client], _ = read_adapter(beside, modules)
    return KeptRound(int(folder.name), clients, updates, weights, releases, frozen)


def start_of(release: Adapter, trained: Adapter, client: str, round_number: int, seed: int) -> Adapter:
    """What a client trained from: its release, and slots beyond that as it drew them.

    Args:
        release: As it was sent.
        trained: What it sent back, for ranks and scales.
        client: Its name, which names its draws.
        round_number: Of the release.
        seed: Of the run.

    Returns:
        Factors of the ranks of `trained`; equal to `client.train.completed`.
    """
    lora = {}
    for module, after in trained.lora.items():
        d_out, d_in = after.shape
        got = release.lora.get(module) or LoraFactors(np.zeros((0, d_in), np.float32), np.zeros((d_out, 0), np.float32))
        missing = after.rank - got.rank
        rows = np.concatenate([got.A, fresh_rows(seed, client, round_number, module, (missing, d_in))])
        columns = np.concatenate([got.B, np.zeros((d_out, missing), np.float32)], axis=1)
        lora[module] = LoraFactors(rows, columns, after.scale)
    return Adapter(lora)
