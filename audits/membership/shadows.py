"""Shadow adapters: the same base, trained on random halves of the audited pool.

Nothing here knows which examples of the pool the audited model was trained on. Halves come in pairs, a half and the rest, so
that every example is in exactly half of the shadows. What a shadow says of the pool is kept, the shadow itself is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.audits.membership.statistics import measured
from lamina.client.data import Example
from lamina.client.model import Base, put
from lamina.client.train import Task, completed, train
from lamina.protos import seeds
from lamina.protos.adapter import Adapter
from lamina.protos.config import TrainConfig
from lamina.protos.errors import ConfigError
from lamina.protos.files import sha256, write_json

Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How shadows are trained and examples are scored.

    Attributes:
        train: Local training of the audited run; its `local_steps` give way to `passes`.
        seed: Of the audit.
        shadows: How many, an even number; 0 leaves out the attacks that need them.
        passes: Times that a shadow sees each example of its half.
        rank: Of a shadow's factors.
        scale: Of a shadow's products.
        batch_size: Examples in a forward pass without training.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    shadows: int = 4
    passes: float = 4.0
    rank: int = 8
    scale: float = 2.0
    batch_size: int = 32

    def steps(self, count: int) -> int:
        """Optimizer steps of a shadow on so many examples."""
        return max(1, math.ceil(self.passes * count / (self.train.batch_size * self.train.accumulation)))


@dataclass(frozen=True, eq=False)
class Shadows:
    """What K shadows say of n examples.

    Attributes:
        included: (K, n) whether a shadow was trained on an example.
        loss: (K, n) nats.
        confidence: (K, n) log p - log(1 - p).
    """

    included: NDArray[np.bool_]
    loss: Floats
    confidence: Floats


def halves(count: int, shadows: int, seed: int) -> NDArray[np.bool_]:
    """Which examples each shadow is trained on.

    Args:
        count: Examples of the pool, at least 2.
        shadows: An even number.
        seed: Of the audit.

    Returns:
        (shadows, count); rows 2i and 2i + 1 are each other's complement.

    Raises:
        ConfigError: If the number of shadows is odd, or the pool cannot be halved.
    """
    if shadows < 2 or shadows % 2 or count < 2:
        raise ConfigError(
            f"audit shadows: expected an even number and at least 2 examples, got {shadows} shadows and {count} examples. "
            "Every example must be in exactly half of the shadows."
        )
    found = np.zeros((shadows, count), bool)
    for pair in range(0, shadows, 2):
        order = seeds.stream(seed, "audit", "shadow halves", pair).permutation(count)
        found[pair, order[: count // 2]] = True
        found[pair + 1] = ~found[pair]
    return found


def shadows_of(
    base: Base, pool: Sequence[Example], settings: Settings, progress: Progress, folder: Path | None
) -> Shadows:
    """Train shadows one by one and score the whole pool with each.

    Args:
        base: The public base; its slots are changed.
        pool: Members and others in an order that says nothing of which is which.
        settings: How.
        progress: Told of optimizer steps, of all shadows together.
        folder: Where each shadow's figures are kept, so that a second call goes on from there; None keeps nothing.

    Returns:
        Figures.

    Raises:
        ConfigError: See `halves`.
        TrainingError: If a shadow's training diverges.
    """
    included = halves(len(pool), settings.shadows, settings.seed)
    steps = settings.steps(len(pool) // 2)
    digest = _digest(base, pool, settings)
    rows = []
    for number, half in enumerate(included):
        path = None if folder is None else folder / f"shadow-{number:03d}.json"
        row = None if path is None else _kept(path, digest)
        if row is None:
            mine = [example for example, seen in zip(pool, half, strict=True) if seen]
            put_trained(
                base, mine, settings, f"shadow-{number}", _shifted(progress, number * steps, len(included) * steps)
            )
            figures = measured(base, pool, settings.batch_size)
            row = figures.loss, figures.confidence
            if path is not None:
                write_json(path, {"of": digest, "loss": row[0].tolist(), "confidence": row[1].tolist()})
        progress((number + 1) * steps, len(included) * steps)
        rows.append(row)
    loss, confidence = np.stack(rows, axis=1)
    return Shadows(included, loss, confidence)


def put_trained(
    base: Base, examples: Sequence[Example], settings: Settings, name: str, progress: Callable[[int], None]
) -> None:
    """Train an adapter from nothing on some examples; it stays in the slots.

    Args:
        base: The public base; its slots are changed.
        examples: At least one.
        settings: How.
        name: Of its streams of randomness.
        progress: Told of the steps done.

    Raises:
        TrainingError: If a loss is not finite.
    """
    config = replace(settings.train, local_steps=settings.steps(len(examples)), proximal=0.0)
    task = Task(name, 1, 1, seeds.integer(settings.seed, "audit", "shadow"), config)
    ranks = {module: base.spec.clamped(settings.rank, module) for module in base.spec.modules}
    first = Adapter({}, dict(base.spec.dense))
    start = completed(first, ranks, dict.fromkeys(ranks, settings.scale), task, base)
    put(base, start, None)
    train(base, examples, task, start, progress=lambda step, _: progress(step))


def _shifted(progress: Progress, before: int, of: int) -> Callable[[int], None]:
    return lambda done: progress(before + done, of)


def content_of(example: Example) -> bytes:
    """What an example is, without whose it is and where it stood.

    Args:
        example: Any.

    Returns:
        The same bytes for the same tokens, targets and label.
    """
    return example.tokens.tobytes() + example.targets.tobytes() + str(example.label).encode()


def _digest(base: Base, pool: Sequence[Example], settings: Settings) -> str:
    """All that a shadow's figures depend on."""
    parts = {
        "settings": asdict(settings),
        "base": dict(base.spec.hashes) | {"format": base.format, "labels": base.spec.labels},
        "modules": dict(base.spec.modules),
        "dense": {name: sha256(value.tobytes()) for name, value in base.spec.dense.items()},
        "pool": [sha256(content_of(example)) for example in pool],
    }
    return sha256(json.dumps(parts, sort_keys=True).encode())


def _kept(path: Path, digest: str) -> tuple[Floats, Floats] | None:
    """A shadow's figures of an earlier call, None where they are of another pool or setting, or cannot be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["of"] != digest:
            return None
        return np.array(found["loss"], np.float64), np.array(found["confidence"], np.float64)
    except (OSError, ValueError, KeyError, TypeError):
        return None
