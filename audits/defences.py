"""The same attacks on small campaigns, each with one defence on: what it costs in loss, and what it stops."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lamina.audits import remembered, scene
from lamina.audits.rebuilding import rebuilt
from lamina.audits.settings import QUICK_RUN, Settings, quick
from lamina.protos import compose
from lamina.protos.config import Config
from lamina.protos.files import write_atomic
from lamina.simulations.engine import Quiet

Json = dict[str, Any]
# Of each client: enough that training helps, and what a defence costs in loss can be seen.
_ROWS = 200


@dataclass(frozen=True)
class Defence:
    """One row of the table.

    Attributes:
        name: In words.
        values: Keys on top of the campaign's.
    """

    name: str
    values: tuple[tuple[str, Any], ...]

    def words(self) -> str:
        """As on a command line."""
        return " ".join(f"{key}={value}" for key, value in self.values)


def _private(epsilon: float) -> Defence:
    values = (("strategy.name", "recompress"), ("privacy.mode", "example-dp"), ("privacy.epsilon", epsilon))
    return Defence(f"example-dp, epsilon {epsilon:g}", values)


DEFENCES: Sequence[Defence] = (
    Defence("none, stack", (("strategy.name", "stack"),)),
    Defence("recompress", (("strategy.name", "recompress"),)),
    Defence("recompress, batches x 4", (("strategy.name", "recompress"), ("train.batch_size", 64))),
    Defence("ffa", (("strategy.name", "ffa"),)),
    Defence("ffa, secure aggregation", (("strategy.name", "ffa"), ("privacy.secagg", True), ("clients.quorum", 3))),
    _private(8.0),
    _private(4.0),
    _private(1.0),
)


def compared(config: Config, settings: Settings, folder: Path, progress: Callable[[int, int], None]) -> list[Json]:
    """Run every defence's campaign and attack it; finished rows are kept.

    Args:
        config: Whose model, data and task the campaigns have.
        settings: Of the audit; the campaigns have quick sizes.
        folder: For campaigns and rows.
        progress: Told of campaigns done and to do.

    Returns:
        `defences` of audit.json.
    """
    small, own_settings = _small(config), replace(quick(settings), rows=_ROWS)
    rows = []
    for number, defence in enumerate(DEFENCES):
        progress(number, len(DEFENCES))
        own = compose.with_values(small, dict(defence.values))
        path = folder / f"{number}.json"
        key = f"{compose.to_yaml(own)}|{settings.significance}"
        before = json.loads(path.read_text()) if path.is_file() else {}
        if before.get("key") != key:
            before = {"key": key, "row": _row(defence, own, own_settings, folder / str(number))}
            write_atomic(path, json.dumps(before, allow_nan=False))
        rows.append(before["row"])
    progress(len(DEFENCES), len(DEFENCES))
    return rows


def _small(config: Config) -> Config:
    """A campaign of quick size on the same model and data, without privacy, of three clients as secure sums need."""
    sizes = {**QUICK_RUN, "clients.count": 3, "clients.names": [], "clients.ranks": 8, "clients.join_round": 1}
    sizes |= {"aggregation.weights": "auto", "privacy.nominal_examples": None, "privacy.epsilon": None}
    sizes |= {
        "privacy.mode": "none",
        "privacy.secagg": False,
        "privacy.noise_multiplier": None,
        "clients.fraction": 1.0,
    }
    sizes |= {
        "quantisation.format": "auto",
        "clients.start": None,
        "keep_updates": False,
        "aggregation.full_weight": None,
    }
    sizes |= {"adapter.kind": "lora", "clients.quorum": 1, "baselines": [], "clients.dropout_rate": 0.0}
    return replace(compose.with_values(config, sizes), resume="", output="")


def _row(defence: Defence, config: Config, settings: Settings, folder: Path) -> Json:
    started = time.monotonic()
    found = scene.campaign(settings, config, folder, Quiet())
    canaries = remembered.of_canaries(found, settings)
    close = scene.close_up(found, folder)
    seen = rebuilt(close, settings, lambda done, of: None)
    evaluated, membership = found.run.summary["eval"], canaries["membership"]
    return {
        "name": defence.name,
        "words": defence.words(),
        "seconds": round(time.monotonic() - started, 1),
        "base_loss": evaluated["base_loss"],
        "loss": evaluated["final_loss"],
        "epsilon": (found.run.summary["privacy"] or {}).get("epsilon"),
        "auc": membership["auc"],
        "auc_interval": membership["auc_interval"],
        "tpr_at_fpr_0.01": membership["tpr_at_fpr"]["0.01"],
        "recall": {view: one["recall"] for view, one in seen.items()},
        "chance": {view: one["chance"] for view, one in seen.items()},
        "epsilon_lower": canaries["one_run"]["epsilon_lower"],
    }
