"""One simulation from config to run directory: prepare, run or resume, measure, write everything that a reader needs."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lamina.protos import compose
from lamina.protos.adapter import Adapter
from lamina.protos.config import Config, checked
from lamina.protos.errors import ConfigError
from lamina.protos.files import write_json
from lamina.protos.privacy.noise import seeded
from lamina.server import campaign as campaigns
from lamina.server import spending
from lamina.server.finish import Run, summarise, write_results
from lamina.server.rounds import Loop
from lamina.server.rounds import run as run_rounds
from lamina.server.store import run_directory
from lamina.server.store.base import Completed, Evaluation
from lamina.simulations import engine
from lamina.simulations.baselines import measure as measure_baselines
from lamina.simulations.engine import Watcher
from lamina.simulations.generations import generations
from lamina.simulations.prepare import Prepared, prepare
from lamina.strategies.base import ServerState


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        path: Its directory.
        summary: `summary.json`.
    """

    path: Path
    summary: Mapping[str, Any]


def default_output() -> Path:
    """`outputs/<date>/<time>`, in local time.

    Returns:
        A path that need not exist.
    """
    now = datetime.datetime.now()
    return Path("outputs") / now.strftime("%Y-%m-%d") / now.strftime("%H-%M-%S")


def simulate(
    config: Config,
    watcher: Watcher,
    prepared: Prepared | None = None,
    instead: Mapping[str, engine.Answer] | None = None,
) -> Finished:
    """Run a simulation to its end, from the start or from where it was interrupted.

    Args:
        config: A composed config; with `resume`, that of the run directory.
        watcher: Shown progress.
        prepared: Base and data, where another run has prepared the same.
        instead: Client id -> what answers in its place, for clients that do not train.

    Returns:
        The directory and its summary.

    Raises:
        LaminaError: See the tree in `protos.errors`; completed rounds are kept.
    """
    started = time.monotonic()
    checked(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    path = Path(config.resume or config.output or default_output())
    prepared = prepared or prepare(config, watcher.say)
    config = _pinned(config, prepared)
    chosen = engine.chosen_ranks(config, prepared, watcher)
    fixed = engine.identity(config, prepared, chosen)
    found = campaigns.budgets(config, prepared.base.spec, chosen)
    campaign = campaigns.campaign(
        config,
        prepared.base.spec,
        found,
        campaigns.run_id(fixed),
        functools.partial(seeded, config.seed, "coordinator"),
    )
    if campaign.plan is not None:
        watcher.say(campaign.plan.line())
    cohort = engine.cohort(config, prepared, found, watcher, instead)
    resumed = _start(config, path, fixed, cohort)
    watcher.begin(config.rounds, prepared.names, resumed.state.round if resumed else 0)
    base_started = time.monotonic()
    base_figures = engine.evaluate(prepared, Adapter({}, dict(prepared.base.spec.dense)), config, "base model")
    watcher.say(f"base model: held-out loss {base_figures.loss:.4f}")
    base_seconds = time.monotonic() - base_started
    store = run_directory.RunDirectory(
        path, fixed, config.checkpoints, config.keep_updates, cohort.files, watcher.completed
    )

    latest: dict[int, Evaluation] = {}

    def evaluated(state: ServerState, held: Mapping[str, int]) -> Evaluation | None:
        if state.round % config.evaluate.every and state.round != config.rounds:
            return None
        latest[state.round] = engine.evaluate(prepared, state.adapter, config, f"round {state.round}")
        return latest[state.round]

    state = run_rounds(Loop(campaign, cohort.channel(), evaluated, store, sums=cohort.sums()), resumed)
    final = latest.get(state.round) or engine.evaluate(prepared, state.adapter, config, f"round {state.round}")
    baselines = measure_baselines(config, prepared, found, base_figures, watcher.say)
    clock = {"total": time.monotonic() - started, "base": base_seconds}
    private = spending.document(campaign.promise, state.privacy_history)
    run = Run(campaign.run_id, prepared.names, found, "exported", prepared.base.spec, private)
    summary = summarise(config, run, path, (base_figures, final), clock)
    summary |= {"baselines": baselines, "corpus": dict(prepared.corpus)}
    if chosen is not None:
        summary["ranks"] = chosen
    _write(path, state, prepared, summary, config)
    return Finished(path, summary)


def _pinned(config: Config, prepared: Prepared) -> Config:
    """The config with what loading found out: the ordered labels, the commit of a hub model, and a bound for secure sums."""
    data, aggregation = replace(config.data, labels=list(prepared.labels)), config.aggregation
    if config.privacy.secagg and aggregation.full_weight is None:
        aggregation = replace(aggregation, full_weight=max(len(examples) for examples in prepared.train.values()))
    return replace(
        config, data=data, aggregation=aggregation, model=replace(config.model, revision=prepared.base.revision)
    )


def _start(config: Config, path: Path, fixed: Mapping[str, Any], cohort: engine.Cohort) -> Completed | None:
    if not config.resume:
        run_directory.create(path, compose.to_yaml(config))
        return None
    resumed = run_directory.resume(path, fixed)
    if resumed is None:
        return None
    if resumed.checkpoint.state.round > config.rounds:
        raise ConfigError(
            f"rounds={config.rounds}: expected at least {resumed.checkpoint.state.round}, the rounds done. Resume with more."
        )
    cohort.restore(resumed.checkpoint.extra)
    return resumed.completed


def _write(path: Path, state: ServerState, prepared: Prepared, summary: Mapping[str, Any], config: Config) -> None:
    if config.task == "causal-lm" and config.data.generate:
        write_json(path / "generations.json", generations(prepared, state.adapter, config))
    write_results(path, state, prepared.base.spec, summary, config)
