"""What the federation is worth: the base alone, every client alone, and all data in one place, in the same run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lamina.client.data import Example
from lamina.client.evaluate import Score, score
from lamina.client.model import put, take
from lamina.client.train import Task, completed, train
from lamina.protos.adapter import Adapter
from lamina.protos.config import Config
from lamina.protos.messages import Budget
from lamina.server.store.base import Evaluation
from lamina.simulations.prepare import Prepared


def measure(
    config: Config, prepared: Prepared, budgets: Mapping[str, Budget], base: Evaluation, say: Callable[[str], None]
) -> dict[str, Any]:
    """Held-out figures of the baselines that the config asks for.

    `local` trains each client alone with its own rank for as many steps as the campaign; `central` trains one adapter of the
    largest rank on all training data with as many steps, each over as many examples as a cohort's.

    Args:
        config: The config.
        prepared: Base and data.
        budgets: Client id -> ranks and scales.
        base: Figures of the base.
        say: Told what is going on.

    Returns:
        Name -> `loss`, `accuracy`.
    """
    found: dict[str, Any] = {}
    if "base" in config.baselines:
        found["base"] = {"loss": base.loss, "accuracy": base.accuracy}
    if "local" in config.baselines:
        say("baseline local: every client alone")
        scores = []
        for client, budget in budgets.items():
            _train(config, prepared, prepared.train[client], budget, f"local-{client}")
            scores.append(score(prepared.base, prepared.held_out[client], config.evaluate.batch_size))
        found["local"] = _figures(scores, config)
    if "central" in config.baselines:
        say("baseline central: all data in one place")
        cohort = max(1, round(config.clients.fraction * config.clients.count))
        widest = max(budgets.values(), key=lambda budget: sum(budget.train.values()))
        pooled = [example for examples in prepared.train.values() for example in examples]
        wider = replace(config.train, accumulation=config.train.accumulation * cohort)
        _train(replace(config, train=wider), prepared, pooled, widest, "central")
        held = prepared.held_out.values()
        found["central"] = _figures([score(prepared.base, one, config.evaluate.batch_size) for one in held], config)
    return found


def _train(config: Config, prepared: Prepared, examples: Sequence[Example], budget: Budget, name: str) -> None:
    """Train one adapter for the whole campaign and leave it in the slots."""
    task = Task(name, 1, 1, config.seed, replace(config.train, local_steps=config.rounds * config.train.local_steps))
    first = Adapter({}, dict(prepared.base.spec.dense))
    start = completed(first, budget.train, budget.scale, task, prepared.base)
    put(prepared.base, start, None)
    train(prepared.base, examples, task, start)
    put(prepared.base, take(prepared.base), None, trainable=False)


def _figures(scores: Sequence[Score], config: Config) -> dict[str, Any]:
    targets = sum(one.targets for one in scores)
    loss = sum(one.nats for one in scores) / targets
    accuracy = sum(one.hits for one in scores) / targets if config.task == "sequence-classification" else None
    return {"loss": loss if math.isfinite(loss) else None, "accuracy": accuracy}
