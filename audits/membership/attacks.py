"""Membership inference: what each attack thinks of examples that were trained on, and of others of the same kind.

Whether the two groups differ in anything else is the caller's to rule out: rows that were held out at random are such others,
newer rows or another site's are not, as every attack would then find the difference between the groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lamina.audits.membership.ratios import lira, rmia
from lamina.audits.membership.shadows import Progress, Settings, content_of, shadows_of
from lamina.audits.membership.statistics import Statistics, measured
from lamina.client.data import Example
from lamina.client.model import Base, put
from lamina.protos.adapter import EMPTY, Adapter
from lamina.protos.errors import DataError

Floats = NDArray[np.float64]
# The one whose figures stand for all, fixed before any result is seen.
PRIMARY = "calibrated"
_BLACK, _GREY = "losses of the adapter", "log-probabilities of the adapter"
_BASE, _SHADOWS = "the public base", "shadow adapters on rows of the same kind"


@dataclass(frozen=True, eq=False)
class Scores:
    """What one attack says; higher is more likely a member.

    Attributes:
        name: Of the attack.
        members: (n,) float64, of the examples that were trained on, in their order.
        others: (m,) float64.
        needs: What it takes to run it, in words.
    """

    name: str
    members: Floats
    others: Floats
    needs: str


def strangers(members: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """The others that are not, word for word, among the members: a text that was trained on is no other.

    Args:
        members: Examples that were trained on; all of them, not only those to score.
        others: Held-out examples.

    Returns:
        Some of `others`, in their order, each content once.
    """
    known = {content_of(example) for example in members}
    found = []
    for example in others:
        content = content_of(example)
        if content not in known:
            found.append(example)
            known.add(content)
    return found


def attack(
    base: Base,
    adapter: Adapter,
    members: Sequence[Example],
    others: Sequence[Example],
    settings: Settings,
    progress: Progress = lambda done, of: None,
    folder: Path | None = None,
) -> dict[str, Scores]:
    """Every attack that fits the task.

    The pool goes to the shadows in the order of its content, so nothing but its content can decide what becomes of an example.

    Args:
        base: The public base; its slots are changed.
        adapter: What is audited, as its receivers have it.
        members: Examples that it was trained on, at least one.
        others: Examples of the same kind that it was not trained on, at least one; see `strangers`.
        settings: Shadows and sizes.
        progress: Told of the shadows' optimizer steps.
        folder: Where shadows' figures are kept between calls.

    Returns:
        Name -> scores: `loss`, `calibrated`; of text `min-k++` and `min-k++ calibrated`; of a classifier `margin`; and with
        shadows `rmia` and `lira`. All are finite.

    Raises:
        ConfigError: If the number of shadows is odd.
        DataError: If a group is empty.
        TrainingError: If a loss is not finite.
    """
    if not members or not others:
        raise DataError(
            f"membership: expected members and others, got {len(members)} and {len(others)}. Hold rows out: data.holdout."
        )
    together = [*members, *others]
    order = sorted(range(len(together)), key=lambda index: content_of(together[index]))
    pool = [together[index] for index in order]
    put(base, EMPTY, None, trainable=False)
    public = measured(base, pool, settings.batch_size)
    put(base, adapter, None, trainable=False)
    tuned = measured(base, pool, settings.batch_size)
    found = without_shadows(public, tuned, classes=pool[0].label >= 0)
    if settings.shadows:
        shadows = shadows_of(base, pool, settings, progress, folder)
        needs = f"{_BLACK}, {_BASE}, {settings.shadows} {_SHADOWS}"
        found["rmia"] = rmia(tuned.loss, shadows.loss, shadows.included), needs
        found["lira"] = lira(tuned.confidence, shadows.confidence, shadows.included), needs
    put(base, EMPTY, None, trainable=False)
    back = np.argsort(order)
    made = {}
    for name, (scores, needs) in found.items():
        split = np.split(scores[back], [len(members)])
        made[name] = Scores(name, split[0], split[1], needs)
    return made


def without_shadows(public: Statistics, tuned: Statistics, classes: bool) -> dict[str, tuple[Floats, str]]:
    """The attacks that need the audited model and, at most, the public base.

    Args:
        public: Of the public base.
        tuned: Of the base with the audited adapter.
        classes: Whether they classify; the head of the public base is then its first, untrained one.

    Returns:
        Name -> scores in the order of the statistics, and what the attack needs.
    """
    found: Mapping[str, tuple[Floats, str]] = {
        "loss": (-tuned.loss, _BLACK),
        "calibrated": (public.loss - tuned.loss, f"{_BLACK}, {_BASE}"),
    }
    if classes:
        return {**found, "margin": (tuned.margin, "logits of the adapter")}
    return {
        **found,
        "min-k++": (tuned.min_k, _GREY),
        "min-k++ calibrated": (tuned.min_k - public.min_k, f"{_GREY}, {_BASE}"),
    }
