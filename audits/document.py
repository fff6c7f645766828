"""Parts of `audit.json` that say what was audited, what it claims, and what an audit cannot say."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from lamina.audits import accounting
from lamina.audits.scene import Scene
from lamina.audits.settings import Settings
from lamina.protos.privacy.events import RELATION, to_json

Json = dict[str, Any]


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def settings(given: Settings) -> Json:
    """The settings that decide the figures.

    Args:
        given: All of them.

    Returns:
        JSON values, without paths.
    """
    names = ("parts", "canaries", "rows", "guesses", "examples", "shadows", "significance", "client", "show_text")
    return {name: list(value) if isinstance(value := getattr(given, name), tuple) else value for name in names}


def subject(scene: Scene) -> Json:
    """What was audited.

    Args:
        scene: Any.

    Returns:
        `subject` of audit.json.
    """
    run, config = scene.run, scene.config
    return {
        "kind": "campaign" if scene.origin == "campaign" else "run",
        "origin": scene.origin,
        "run_id": run.summary.get("run_id"),
        "strategy": run.summary.get("strategy"),
        "rounds": run.summary.get("rounds"),
        "clients": run.summary.get("clients"),
        "task": config.task,
        "model": config.model.source,
        "data": config.data.source,
        "secagg": config.privacy.secagg,
        "base_loss": (run.summary.get("eval") or {}).get("base_loss"),
        "final_loss": (run.summary.get("eval") or {}).get("final_loss"),
        "hashes": run.hashes(),
    }


def claim(scene: Scene) -> Json | None:
    """What the run claims.

    Args:
        scene: Any.

    Returns:
        `claim` of audit.json; None without a privacy mode.
    """
    told = scene.run.summary.get("privacy")
    if not told or told.get("epsilon") is None:
        return None
    return {
        "epsilon": told["epsilon"],
        "delta": told["delta"],
        "unit": told["unit"],
        "relation": RELATION,
        "mode": told["mode"],
        "per_client": dict(told.get("per_client") or {}),
    }


def history(scene: Scene) -> Sequence[Mapping[str, Any]]:
    """What private mechanisms did: the run's events, or, where only sums were seen, those of the mechanisms that were run here.

    Args:
        scene: Any.

    Returns:
        Events as JSON values.
    """
    if scene.run.history or not scene.private:
        return scene.run.history
    return [
        to_json(one.mechanism.event(client, record["round"]))
        for record in scene.run.rounds
        for client, one in scene.private.items()
        if client in record["clients"]
    ]


def mechanism(scene: Scene, events: Sequence[Mapping[str, Any]], again: float) -> Json:
    """The mechanism's numbers and its cost round by round.

    Args:
        scene: With a claim.
        events: See `history`.
        again: Epsilon computed anew from everything that happened.

    Returns:
        `mechanism` of audit.json.
    """
    told, last = scene.run.summary["privacy"], events[-1] if events else {}
    worst = max(told["per_client"], key=lambda one: told["per_client"][one], default="")
    own = [event for event in events if event["client_id"] == worst] or list(events)
    spent = []
    for number in range(1, len(scene.run.rounds) + 1):
        steps = accounting.steps_of([{**event, "client_id": ""} for event in own if event["round"] <= number])
        spent.append(accounting.epsilon(steps.get("", []), told["delta"]))
    return {
        "noise_multiplier": last.get("noise_multiplier"),
        "max_grad_norm": last.get("clip"),
        "sample_rate": last.get("sample_rate"),
        "steps": sum(int(event["steps"]) for event in own),
        "accountant": told["accountant"],
        "epsilon_recomputed": again,
        "epsilon_by_round": spent,
        "epsilon_reported_by_round": [record.get("epsilon") for record in scene.run.rounds],
        "budget": told.get("budget"),
    }


def limits(scene: Scene, given: Settings, membership: Mapping[str, Any] | None) -> list[str]:
    """What this audit does not say, in plain words.

    Args:
        scene: What was audited.
        given: Sizes.
        membership: Of the document.

    Returns:
        Sentences.
    """
    found = [
        "An audit shows leaks that its attacks find. That it finds none does not prove that there are none; only the analysis "
        "of the mechanism does, and only if the mechanism is run as it was analysed.",
        "A lower bound on epsilon is below the truth, often by a factor of two to four even with perfect canaries.",
        "Facts about the data as a whole, such as their language or subject, are not hidden by differential privacy: what "
        "the novelty samples show of these is no violation.",
    ]
    if scene.origin == "campaign":
        found.append(
            "The figures are of a campaign of the audit's own, with canaries among the rows and fewer rows than a real site has. "
            "Fewer rows are remembered better; they say how the settings leak, not what a particular run leaked. Reconstruction "
            "is tried on two rounds of two steps, over a row each, at every client, where most can be read off an update."
        )
    if scene.origin == "not kept":
        found.append(
            "The run kept no updates, so what the coordinator and other clients saw of single clients could not be rebuilt; what "
            "is said of them is missing. keep_updates=true keeps them."
        )
    if scene.origin == "deployment":
        found.append(
            f"Rows are taken for those that {scene.own_client} trained on, as they were given now: the run directory shows how "
            "large their held-out part was, where the site measured on it, and no more. What the other sites' rows are is not "
            "known here."
        )
    if scene.config.privacy.mode != "none" and scene.origin in ("campaign", "replayed"):
        found.append(
            "A simulation draws its noise from the run's seed, so that it repeats. Whoever knows the seed can take it away; a "
            "deployment draws it from the system, and its noise was not looked at."
        )
    if membership is not None and membership["of"] == "rows":
        found.append(
            "Rows stand for canaries: which went to training was decided by their hash, which the bounds take for coins. Rows "
            "that resemble each other count as one each, and are remembered together."
        )
    if given.quick:
        found.append(
            "This was a quick audit: fewer canaries, rows and shadow models, so wider intervals and lower ceilings."
        )
    return found


def without_text(document: Mapping[str, Any]) -> Json:
    """A document without any text of the audited data.

    Args:
        document: Of an audit.

    Returns:
        The same figures; examples and samples are empty.
    """
    found = dict(document)
    for part in ("reconstruction", "close_up"):
        found[part] = found[part] and {view: {**one, "examples": []} for view, one in found[part].items()}
    for part, key in (("extraction", "examples"), ("novelty", "samples")):
        if found[part] is not None:
            found[part] = {**found[part], key: []}
    return found
