"""What is written when a run ends, whichever way it ran: the adapter with its card, layers, `summary.json`, the report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina import __version__
from lamina.protos.clock import SYSTEM
from lamina.protos.config import Config
from lamina.protos.files import write_json
from lamina.protos.messages import Budget
from lamina.protos.spec import AdapterSpec
from lamina.server import export
from lamina.server.report import write_report
from lamina.server.store import run_directory
from lamina.server.store.base import Evaluation
from lamina.strategies.base import ServerState


@dataclass(frozen=True)
class Run:
    """What a summary says of a run beside its config and records.

    Attributes:
        run_id: Its name.
        names: Client id -> name for reading.
        budgets: Client id -> what it could hold.
        view: Of the held-out figures: `exported`, the global adapter on the full-precision base, or `release`, what each
            client itself received.
        spec: The schema, for what the base was.
        privacy: What `server.spending.document` says, or None.
        ended: `finished`, or `stopped` by an operator.
        deployment: What only a deployment has: `coordinator`, `consortium`, `gone` (site -> why it is not in the run at its
            end), `log` (`n` and `hash` of the last record).
    """

    run_id: str
    names: Mapping[str, str]
    budgets: Mapping[str, Budget]
    view: str
    spec: AdapterSpec
    privacy: Mapping[str, Any] | None = None
    ended: str = "finished"
    deployment: Mapping[str, Any] = field(default_factory=dict)


def summarise(
    config: Config,
    run: Run,
    path: Path,
    figures: tuple[Evaluation | None, Evaluation | None],
    clock: Mapping[str, float],
) -> dict[str, Any]:
    """`summary.json`, from the records of a run directory and the figures before and after.

    Args:
        config: The config.
        run: Its name, clients, and the view of its figures.
        path: The run directory, whose records are added up.
        figures: Of the base and of the end; None where nobody measured.
        clock: Seconds in `total` and for the `base` figures.

    Returns:
        The document.
    """
    records = run_directory.read_records(path)
    base, final = figures

    def added(key: str) -> float:
        return float(sum(record[key] for record in records))

    return {
        "schema": 1,
        "run_id": run.run_id,
        "ended": run.ended,
        "ended_at": SYSTEM.now().isoformat(timespec="seconds"),
        "strategy": config.strategy.name,
        "rounds": len(records),
        "clients": len(run.budgets),
        "seed": config.seed,
        "eval": {
            "view": run.view,
            "split": config.evaluate.split,
            "base_loss": base and base.loss,
            "final_loss": final and final.loss,
            "base_accuracy": base and base.accuracy,
            "final_accuracy": final and final.accuracy,
            "per_client": _per_client(run, base, final),
        },
        "communication": {"bytes_up": int(added("bytes_up")), "bytes_down": int(added("bytes_down"))},
        "aggregation": {
            "seconds": added("seconds_aggregate"),
            "relative_error": max((record["relative_error"] for record in records), default=0.0),
            "release_error": max((record["release_error"] for record in records), default=0.0),
        },
        "privacy": run.privacy,
        "rejections": sum(len(record["rejections"]) for record in records),
        "seconds": {
            "total": clock["total"],
            "train": added("seconds_train"),
            "aggregate": added("seconds_aggregate"),
            "evaluate": added("seconds_evaluate") + clock["base"],
        },
        "adapter": "adapter",
        "client_ranks": {client: max(budget.train.values(), default=0) for client, budget in run.budgets.items()},
        "base": {"model": run.spec.base_model, **run.spec.hashes},
        "versions": {"lamina": __version__},
        **run.deployment,
    }


def _per_client(run: Run, base: Evaluation | None, final: Evaluation | None) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for client, after in (final.per_client if final else {}).items():
        before = base.per_client.get(client, {}) if base else {}
        found[client] = {
            "name": run.names.get(client, client),
            "base_loss": before.get("loss"),
            "final_loss": after["loss"],
            "tokens": int(after["tokens"]),
        }
        if "accuracy" in after:
            found[client] |= {"base_accuracy": before.get("accuracy"), "final_accuracy": after["accuracy"]}
    return found


def clear_results(path: Path) -> None:
    """Remove what the end of a run wrote, as the run goes on.

    Args:
        path: The run directory.
    """
    for name in ("adapter", "latest"):
        shutil.rmtree(path / name, ignore_errors=True)
    for name in ("summary.json", "layers.json", "report.html"):
        (path / name).unlink(missing_ok=True)


def write_results(
    path: Path, state: ServerState, spec: AdapterSpec, summary: Mapping[str, Any], config: Config
) -> None:
    """Write everything that a reader needs into the run directory; the report comes last.

    Args:
        path: The run directory.
        state: After the last round.
        spec: The schema.
        summary: See `summarise`.
        config: The resolved config.
    """
    export.write_adapter(path / "adapter", state.adapter, spec)
    export.write_card(path / "adapter", summary, spec, config)
    run_directory.write_layers(path, state)
    write_json(path / "summary.json", summary)
    write_report([path], path / "report.html")
