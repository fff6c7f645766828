"""Probes of a model on this machine: what some steps take, measured once and kept by model, versions and machine.

The file holds figures only. It lies in the user's cache folder, and may be deleted at any time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lamina.client.hardware import Profile, Speed
from lamina.client.loading import resolved
from lamina.client.quantised.copies import MANIFEST
from lamina.client.sizing.memory import RUNTIME_BYTES, Step, peak_bytes, terms
from lamina.client.sizing.planner import Wanted, choices_of, read_bytes
from lamina.client.sizing.probe import Trial, measure, speed
from lamina.client.sizing.shape import shape_of
from lamina.protos.config import FORMATS
from lamina.protos.files import sha256, write_atomic

_VERSIONS = ("lamina-fl", "torch", "transformers", "peft", "bitsandbytes", "torchao")


def probed(machine: Profile, source: str, wanted: Wanted, say: Callable[[str], None] = lambda text: None) -> Profile:
    """A profile with what some steps of a model take; the figures are kept.

    Args:
        machine: Without.
        source: The model.
        wanted: For rank and length, and what the source is.
        say: Told which format is probed.

    Returns:
        With speed and overhead of every number format that trains here.

    Raises:
        ConfigError: If the model cannot be trained for another reason than memory.
    """
    shape = shape_of(source)
    speeds, overheads, failed = dict(machine.speeds), dict(machine.overhead_bytes), list(machine.failed)
    for number_format, compute in choices_of(machine, wanted):
        say(f"probing {number_format}")
        trial = Trial(
            source, number_format, compute, min(8, wanted.rank), 1, min(256, wanted.max_length), device=machine.kind
        )
        found = [measure(replace(trial, batch_size=batch)) for batch in (1, 3)]
        if found[0] is None or found[1] is None:
            failed.append(number_format)
            continue
        ranks = {module: min(trial.rank, *sides) for module, sides in shape.linears.items()}
        file_bytes = read_bytes(machine, wanted, number_format)
        step = Step(
            number_format, compute, ranks, found[1].tokens, formats=wanted.module_formats, file_bytes=file_bytes
        )
        speeds[number_format] = speed(found[0], found[1])
        counted = peak_bytes(shape, step, 0)
        if counted <= sum(terms(shape, step, 0).values()):  # else the peak was at loading and says nothing of a step's
            overheads[number_format] = max(RUNTIME_BYTES // 2, found[1].increment_bytes - counted)
    found_here = replace(machine, speeds=speeds, overhead_bytes=overheads, failed=tuple(failed))
    _keep(found_here, source)
    return found_here


def remembered(machine: Profile, source: str) -> Profile:
    """A profile with what an earlier probe of the model found here.

    Args:
        machine: Without.
        source: The model.

    Returns:
        The same profile where there was none, or its file cannot be read.
    """
    try:
        document = json.loads(_file(machine, source).read_text())
        speeds = {
            name: Speed(_seconds(one["fixed_s"]), _seconds(one["token_s"])) for name, one in document["speeds"].items()
        }
        overheads, failed = dict(document["overhead_bytes"]), tuple(document["failed"])
        names = {*speeds, *overheads, *failed}
        if not names <= set(FORMATS) or not all(type(one) is int and 0 <= one < 2**40 for one in overheads.values()):
            return machine
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return machine
    return replace(machine, speeds=speeds, overhead_bytes=overheads, failed=failed)


def _seconds(value: Any) -> float:
    if type(value) is not float or not 0 <= value < 1e9:
        raise ValueError("seconds that are none")
    return value


def _keep(machine: Profile, source: str) -> None:
    path = _file(machine, source)
    document = {
        "speeds": {name: asdict(one) for name, one in machine.speeds.items()},
        "overhead_bytes": dict(machine.overhead_bytes),
        "failed": list(machine.failed),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(document, indent=1))
    except OSError:
        return  # then it is probed again


def _file(machine: Profile, source: str) -> Path:
    """Named by everything that the figures depend on."""
    folder = Path(resolved(source))
    texts = [path.read_text() for path in (folder / "config.json", folder / MANIFEST) if path.is_file()]
    about: list[Any] = [
        texts or source, machine.kind, machine.name, machine.cores, machine.features, torch.get_num_threads(),
        [_version(name) for name in _VERSIONS],
    ]  # fmt: skip
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lamina" / "probes" / f"{sha256(json.dumps(about).encode())[:32]}.json"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
