"""What a run's models remember of canaries and of rows, as scores and figures of audit.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.audits import canaries as making
from lamina.audits import reading
from lamina.audits.canaries import Canaries
from lamina.audits.estimators import exposure as exposures
from lamina.audits.estimators import gaussian, one_run, roc
from lamina.audits.mechanism import Check
from lamina.audits.membership.attacks import PRIMARY, Scores, attack, strangers, without_shadows
from lamina.audits.membership.shadows import Progress
from lamina.audits.membership.shadows import Settings as ShadowSettings
from lamina.audits.membership.statistics import Statistics, measured
from lamina.audits.scene import Scene, one_a_row
from lamina.audits.settings import Settings
from lamina.client.data import Example
from lamina.client.frozen import Frozen
from lamina.client.losses import collate, pad_id
from lamina.client.model import Base, put
from lamina.protos import seeds
from lamina.protos.adapter import EMPTY, Adapter

Floats = NDArray[np.float64]
_BATCH, _DELTA = 64, 1e-5
# Chance of a false alarm by `beyond`.
_ALARM = 1e-3


def of_canaries(scene: Scene, settings: Settings) -> dict[str, Any]:
    """Membership, one-run bound and exposure of a campaign's canaries.

    Args:
        scene: A campaign.
        settings: Guesses, significance, size.

    Returns:
        `membership` (without rows), `one_run` and `exposure`.
    """
    rare = scene.canaries[0]
    public = _under(scene.prepared.base, rare.examples)
    views = {name: _gathered(scene, rare, name) for name in _views(scene)}
    attacks: dict[str, Any] = {}
    classes = rare.examples[0].label >= 0
    for view, tuned in views.items():
        for name, (scores, needs) in without_shadows(public, tuned, classes).items():
            key = name if view == _views(scene)[0] else f"{name}, {view}"
            found = roc.roc(scores[rare.included], scores[~rare.included], scene.config.seed)
            attacks[key] = roc.json_of(found, f"{needs}; the adapter is {_WHOSE[view]}")
    scores = public.loss - views[_views(scene)[0]].loss
    bound = one_run.one_run(rare.included, scores, _delta(scene), settings.significance, settings.guesses)
    return {
        "membership": _summary(attacks, "canaries", int(rare.included.sum()), int((~rare.included).sum())),
        "one_run": one_run.json_of(bound),
        "exposure": _exposure(scene, settings, public.loss - views["final adapter"].loss),
    }


_WHOSE = {
    "own update": "each client's last update, which a coordinator sees",
    "final adapter": "the final one, which everyone sees",
}


def _views(scene: Scene) -> tuple[str, ...]:
    """Through whose eyes, the strongest first."""
    return ("own update", "final adapter") if scene.run.kept else ("final adapter",)


def _gathered(scene: Scene, canaries: Canaries, view: str) -> Statistics:
    """Figures of canaries, each under the adapter of the view."""
    if view == "final adapter":
        return _under(scene.prepared.base, canaries.examples, scene.run.adapter)
    columns = np.zeros((4, len(canaries.examples)))
    for client in dict.fromkeys(canaries.clients):
        places = [place for place, one in enumerate(canaries.clients) if one == client]
        found = _of_client(scene, client, [canaries.examples[place] for place in places])
        columns[:, places] = (found.loss, found.confidence, found.min_k, found.margin)
    return Statistics(*columns)


def _of_client(scene: Scene, client: str, examples: Sequence[Example]) -> Statistics:
    last = max(record["round"] for record in scene.run.rounds if client in record["clients"])
    return _under(scene.prepared.base, examples, *reading.client_model(scene.run, client, last))


def _under(
    base: Base, examples: Sequence[Example], adapter: Adapter = EMPTY, beside: Frozen | None = None
) -> Statistics:
    """Figures under an adapter, by default under none: of the public base alone."""
    put(base, adapter, beside, trainable=False)
    found = measured(base, examples, _BATCH)
    put(base, EMPTY, None, trainable=False)
    return found


def _summary(attacks: Mapping[str, Any], of: str, members: int, others: int) -> dict[str, Any]:
    """The head of `membership`: the figures of the attack that was fixed beforehand."""
    first = attacks[PRIMARY]
    return {
        "attack": PRIMARY,
        "of": of,
        "auc": first["auc"],
        "auc_interval": first["auc_interval"],
        "tpr_at_fpr": {rate: one["value"] for rate, one in first["tpr_at_fpr"].items()},
        "members": members,
        "others": others,
        "attacks": dict(attacks),
        "rows": None,
    }


def _delta(scene: Scene) -> float:
    return float((scene.run.summary.get("privacy") or {}).get("delta") or _DELTA)


def _exposure(scene: Scene, settings: Settings, scores: Floats) -> dict[str, Any]:
    """Exposure under the final adapter: of rare canaries among sequences like them, of new tokens among all tokens."""
    rare, new = scene.canaries
    base, count = scene.prepared.base, making.REFERENCE // (2 if settings.quick else 1)
    others = making.references(base, count, scene.config.train.max_length, scene.config.seed)
    known = _under(base, others).loss - _under(base, others, scene.run.adapter).loss
    found = exposures.exposure(scores[rare.included], known)
    kinds = {"rare": _of_kind(found, int(rare.included.sum()))}
    if new.included.any():
        inside = [example for example, included in zip(new.examples, new.included, strict=True) if included]
        own, table = _by_token(scene, inside)
        kinds["new-token"] = _of_kind(exposures.exposure(own, table), len(inside))
    return {"candidates": found.candidates, "ceiling": math.log2(found.candidates), "canaries": kinds}


def _of_kind(found: exposures.Exposure, count: int) -> dict[str, Any]:
    return {**exposures.json_of(found), "count": count, "candidates": found.candidates, "ceiling": found.ceiling}


@torch.no_grad()
def _by_token(scene: Scene, examples: Sequence[Example]) -> tuple[Floats, Floats]:
    """How much more likely the last token became than under the base, and so for every other token in its place."""
    base, tables = scene.prepared.base, []
    for adapter in (EMPTY, scene.run.adapter):
        put(base, adapter, None, trainable=False)
        batch = collate(examples, pad_id(base), base.device)
        logits = base.model(input_ids=batch.tokens, attention_mask=batch.mask).logits[:, -2]
        tables.append(torch.log_softmax(logits.double(), -1).cpu().numpy())
    put(base, EMPTY, None, trainable=False)
    gained = tables[1] - tables[0]
    last = np.array([int(example.tokens[-1]) for example in examples])
    kept = np.ones(gained.shape, bool)
    kept[np.arange(len(last)), last] = False
    return gained[np.arange(len(last)), last], gained[kept].reshape(len(last), -1)


def of_rows(scene: Scene, settings: Settings, folder: Path, progress: Progress) -> dict[str, Any]:
    """Membership of real rows: some that were trained on against some that were held out.

    Args:
        scene: Any.
        settings: Sizes, shadows.
        folder: Where shadows are kept between calls.
        progress: Told of the shadows' steps.

    Returns:
        `rows`: attacks by name; `head`: as `membership`; `one_run` for rows.
    """
    members, others = drawn(scene, settings)
    train = scene.config.train
    rank = min(8, max((f.rank for f in scene.run.adapter.lora.values()), default=8))
    how = ShadowSettings(train=train, seed=scene.config.seed, shadows=settings.shadows, rank=rank)
    found = attack(scene.prepared.base, scene.run.adapter, members, others, how, progress, folder)
    attacks = {name: _json(scores, scene.config.seed) for name, scores in found.items()}
    return {
        "rows": attacks,
        "head": _summary(attacks, "rows", len(members), len(others)),
        "one_run": _of_split(found[PRIMARY], settings, _delta(scene), scene.config.seed),
    }


def _json(scores: Scores, seed: int) -> dict[str, Any]:
    return roc.json_of(roc.roc(scores.members, scores.others, seed), scores.needs)


def drawn(scene: Scene, settings: Settings) -> tuple[list[Example], list[Example]]:
    """Rows to score: trained on and held out, as many of each as there are up to `settings.examples`.

    Args:
        scene: Any.
        settings: For the number.

    Returns:
        Members and others. Of a row only one example.
    """
    train = [one for some in scene.real().values() for one in one_a_row(some)]
    held = [one for some in scene.prepared.held_out.values() for one in one_a_row(some)]
    everything = [one for some in scene.prepared.train.values() for one in some]
    others = _cut(strangers(everything, held), settings.examples, scene.config.seed, "others")
    members = _cut(train, settings.examples, scene.config.seed, "members")
    return members, others


def _cut(examples: Sequence[Example], most: int, seed: int, name: str) -> list[Example]:
    order = seeds.stream(seed, "audit", name).permutation(len(examples))[:most]
    return [examples[int(place)] for place in sorted(order)]


def _of_split(scores: Scores, settings: Settings, delta: float, seed: int) -> dict[str, Any] | None:
    """The one-run bound with the run's own split as coins.

    Rows went to training or were held out by their hash, most to training. Each of the more numerous kind is kept with such a
    chance that a row that is kept is as likely of one kind as of the other.
    """
    rng = seeds.stream(seed, "audit", "split")
    least = min(len(scores.members), len(scores.others))
    kept = [some[rng.random(len(some)) < least / max(1, len(some))] for some in (scores.members, scores.others)]
    included = np.repeat([True, False], [len(some) for some in kept])
    if len(included) < 4:
        return None
    guesses = max(2, min(settings.guesses, len(included) // 2))
    return one_run.json_of(one_run.one_run(included, np.concatenate(kept), delta, settings.significance, guesses))


def beyond_claim(claim: Mapping[str, Any], membership: Mapping[str, Any]) -> Check:
    """Whether the attack that was fixed beforehand does better than any attack on a Gaussian mechanism of the claim could.

    Args:
        claim: epsilon, delta.
        membership: Of audit.json.

    Returns:
        The check.
    """
    mu = gaussian.mu_of(float(claim["epsilon"]), float(claim["delta"]))
    most, auc = gaussian.largest_auc(mu), float(membership["auc"])
    slack = roc.luck(mu, membership["members"], membership["others"], _ALARM)
    return Check(
        "memory",
        auc <= most + slack,
        f"an AUC of at most {most:.3f}, all that the claim's Gaussian curve allows, and {slack:.3f} for the luck of the sample",
        f"{auc:.3f} over {membership['members']} {membership['of']} in and {membership['others']} out",
        "Whoever tells members from others better than the claim allows has seen more than was claimed.",
    )


def beyond_ledger(clients: Mapping[str, Any]) -> Check:
    """Whether canary clients show more than the ledger says.

    Args:
        clients: `client_canaries` of audit.json.

    Returns:
        The check.
    """
    estimate, analytic = clients["epsilon"], clients["analytic"]
    told = "more than can be counted" if estimate is None else f"about {estimate:.3g}"
    return Check(
        "client canaries",
        not clients["beyond"],
        f"an estimate near the ledger's {analytic:.3g}",
        f"{told} from {clients['canaries']} canary clients",
        "Clients that send along a known direction: what is left of it shows clipping and noise. An estimate, no bound; it is "
        "far off where noise is too small by half or more, or clipping is missing.",
    )


def with_rows(membership: Mapping[str, Any] | None, rows: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The whole `membership`: of canaries with the rows beside it, or of the rows alone.

    Args:
        membership: Of canaries, or None.
        rows: What `of_rows` gave, or None.

    Returns:
        `membership` of audit.json.
    """
    if rows is None:
        return None if membership is None else dict(membership)
    if membership is None:
        return dict(rows["head"])
    return {**membership, "rows": rows["rows"]}
