"""Curves of a quality benchmark: each is measured once, in a process of one thread, and is a file from then on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

from lamina.server.store.base import Store

Configured = Callable[[Any], Any]
Measure = Callable[[Any, dict[str, Any]], dict[str, Any]]


class Memory(Store):
    """A store that only remembers the records."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def announce(self, completed: Any) -> None:
        self.records.append(dict(completed.record))


def work(curves: Iterable[Any], configured: Configured, measure: Measure, shown: str) -> None:
    """Measure what is not on disk yet, in this process. A curve that diverges is recorded as such.

    Args:
        curves: Each with its `file`.
        configured: A curve to its run's config.
        measure: A curve, and what was prepared by split, to its figures.
        shown: The split whose loss is printed.
    """
    import warnings

    import torch

    from lamina.client.model import quiet
    from lamina.protos.errors import TrainingError
    from lamina.simulations.prepare import prepare

    warnings.simplefilter("ignore")
    quiet()
    torch.set_num_threads(1)
    prepared: dict[str, Any] = {}
    for curve in curves:
        if curve.file.exists():
            continue
        if not prepared:
            config = configured(curve)
            prepared["test"] = prepare(config)
            config.evaluate.split = "tune"
            prepared["tune"] = prepare(config)
        try:
            result = measure(curve, prepared)
        except TrainingError as error:
            result = {"diverged": str(error), "test": None, "tune": None}
        curve.file.parent.mkdir(parents=True, exist_ok=True)
        partial = curve.file.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.rename(curve.file)
        print(f"{curve.file.stem}: {shown} {result[shown]} in {result.get('seconds', 0):.0f} s", flush=True)


def all_of(script: str, curves: Iterable[Any], workers: int) -> None:
    """Measure curves in `workers` processes of one thread each.

    Args:
        script: Which measures what follows `--work`.
        curves: Each with its `file`, and its `words` for the command line.
        workers: How many processes.
    """
    missing = [curve for curve in curves if not curve.file.exists()]
    running = [
        subprocess.Popen([sys.executable, script, "--work", *(curve.words for curve in missing[index::workers])])
        for index in range(workers)
        if missing[index::workers]
    ]
    if any(process.wait() for process in running):
        raise SystemExit("a worker failed; run again to go on from the finished curves")


def read(curve: Any) -> dict[str, Any]:
    """A finished curve's figures."""
    return dict(json.loads(curve.file.read_text()))
