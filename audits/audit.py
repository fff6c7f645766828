"""One audit from settings to `audit.json`: the scene, each part in turn, the verdict.

Every finished part is kept in the audit's folder until the audit is complete, so that one that was broken off goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lamina import __version__
from lamina.audits import client_canaries, defences, document, extraction, mechanism, novelty, probes, remembered, scene
from lamina.audits import verdict as verdicts
from lamina.audits.estimators.one_shot import beyond
from lamina.audits.mechanism import Check
from lamina.audits.membership.shadows import content_of
from lamina.audits.rebuilding import rebuilt
from lamina.audits.scene import Scene
from lamina.audits.settings import PARTS, Settings
from lamina.audits.telling import Telling
from lamina.client.data import Example
from lamina.client.private.train import Private
from lamina.client.train import Task
from lamina.protos.config import Config
from lamina.protos.errors import LaminaError
from lamina.protos.files import write_atomic
from lamina.simulations.engine import Watcher

Json = dict[str, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Work:
    """What the parts of an audit share.

    Attributes:
        scene: What is audited.
        settings: How.
        folder: Of the audit.
        telling: Shown progress.
    """

    scene: Scene
    settings: Settings
    folder: Path
    telling: Telling


def audit(
    settings: Settings, config: Config | None, overrides: list[str], folder: Path, shown: tuple[Telling, Watcher]
) -> Json:
    """Audit a finished run, or a campaign of the audit's own.

    Args:
        settings: What to do.
        config: Of the campaign; None for a finished run.
        overrides: On a finished run's config, for where model and data are.
        folder: Of the audit; what was finished before in it is taken up.
        shown: Progress of the audit, and of a simulation in it.

    Returns:
        `audit.json`, unsigned.

    Raises:
        LaminaError: See the tree in `protos.errors`; finished parts are kept.
    """
    started, (telling, watcher) = time.monotonic(), shown
    if config is not None:
        telling.begin("campaign", f"a run of {config.clients.count} clients with {settings.canaries} canaries")
        found = scene.campaign(settings, config, folder, watcher)
    else:
        telling.begin("run", f"{settings.run_dir} with its base and data")
        found = scene.of_run(settings, overrides, folder, watcher)
    work = Work(found, settings, folder, telling)
    key = _fingerprint(work)
    results = {name: _kept(work, name, key) for name in PARTS if name in settings.parts}
    checks = [Check(**one) for one in (results.get("mechanism") or {}).get("checks", [])]
    claim = document.claim(found)
    canaries = results.get("canaries") or {}
    rows = results.get("membership")
    membership = remembered.with_rows(canaries.get("membership"), rows)
    one_run = canaries.get("one_run") or (rows or {}).get("one_run")
    # A row more or less is not a client or a user more or less; each canary is a user of its own, but no client.
    scored = one_run if claim is None or claim["unit"] == "record" or (claim["unit"] == "user" and canaries) else None
    if claim is not None and membership is not None and claim["unit"] != "client":
        checks.append(remembered.beyond_claim(claim, membership))
    if (clients := canaries.get("client_canaries")) is not None:
        checks.append(remembered.beyond_ledger(clients))
    word, reasons = verdicts.verdict(claim, checks, scored)
    made = {
        "schema": 1,
        "lamina": __version__,
        "made_at": document.now(),
        "seconds": round(time.monotonic() - started, 1),
        "quick": settings.quick,
        "seed": found.config.seed,
        "settings": document.settings(settings),
        "subject": document.subject(found),
        "claim": claim,
        "mechanism": (results.get("mechanism") or {}).get("mechanism"),
        "checks": [asdict(check) for check in checks],
        "membership": membership,
        "exposure": canaries.get("exposure"),
        "one_run": one_run,
        "client_canaries": canaries.get("client_canaries"),
        "reconstruction": (results.get("reconstruction") or {}).get("parties") or {},
        "close_up": (results.get("reconstruction") or {}).get("close_up"),
        "extraction": results.get("extraction"),
        "novelty": results.get("novelty"),
        "defences": (results.get("defences") or {}).get("rows"),
        "verdict": word,
        "reasons": reasons,
        "limits": document.limits(found, settings, membership),
        "signature": None,
    }
    return made if settings.show_text else document.without_text(made)


def finish(folder: Path) -> None:
    """Remove what is only kept so that an audit can go on.

    Args:
        folder: Of a complete audit.
    """
    shutil.rmtree(folder / "parts", ignore_errors=True)


def _kept(work: Work, name: str, key: str) -> Json | None:
    """A part's result, from an earlier call that was broken off or made now."""
    path = work.folder / "parts" / f"{name}.json"
    what, make = _MAKING[name]
    if path.is_file():
        before = json.loads(path.read_text())
        if before.get("key") == key:
            work.telling.begin(name, "taken from an earlier call")
            return before["result"]  # type: ignore[no-any-return]
    progress = work.telling.begin(name, what)
    result, line = make(work, progress)
    write_atomic(path, json.dumps({"key": key, "result": result}, allow_nan=False))
    work.telling.done(line)
    return result


def _fingerprint(work: Work) -> str:
    how = replace(work.settings, run_dir=None, output=None, fail_on="", identity="", parts=(), show_text=True)
    text = json.dumps([str(how), work.scene.run.hashes(), __version__, work.scene.origin], sort_keys=True)
    found = hashlib.sha256(text.encode())
    # Of a deployment, nothing else knows the rows.
    for some in (work.scene.prepared.train, work.scene.prepared.held_out):
        for client, examples in some.items():
            found.update(client.encode())
            for example in examples:
                found.update(content_of(example))
    return found.hexdigest()


def _mechanism(work: Work, progress: Progress) -> tuple[Json | None, str]:
    found, config = work.scene, work.scene.config
    claimed = document.claim(found)
    if claimed is None:
        return None, "no private mechanism"
    history = document.history(found)
    promised = found.run.summary["privacy"]
    seen = list(found.seen or ())
    rounds = dict(Counter(client for one in found.run.rounds for client in one["clients"]))
    rounds[""] = len(found.run.rounds)
    happened = mechanism.happened_in(history, seen, config.train.local_steps, rounds)
    told = dict(promised["per_client"]) if claimed["unit"] != "client" else {"": promised["epsilon"]}
    budget = promised.get("budget") if promised.get("budget") is not None else config.privacy.epsilon
    # Of the delta that the run was set up with, not of the one that its summary speaks of.
    cost, again = mechanism.cost(told, promised["epsilon"], budget, happened, config.privacy.delta)
    checks = [cost]
    if found.private:
        by_client: dict[str, list[Mapping[str, Any]]] = {}
        for event in history:
            by_client.setdefault(str(event["client_id"]), []).append(event)
        deviations = mechanism.deviations(by_client, float(config.train.batch_size * config.train.accumulation))
        checks += [mechanism.noise(seen, deviations), mechanism.independence(seen, deviations)]
        checks += [mechanism.update(seen, config.wire.format), mechanism.figures(found.run.rounds)]
        client, private = next(iter(found.private.items()))
        rates = [float(event["sample_rate"]) for event in by_client.get(client, ())]
        checks += _probed(found, client, private, rates)
    held = sum(check.holds is True for check in checks)
    document_of = document.mechanism(found, history, again)
    return {
        "checks": [asdict(check) for check in checks],
        "mechanism": document_of,
    }, f"{held} of {len(checks)} checks hold"


def _probed(found: Scene, client: str, private: Private, rates: Sequence[float]) -> list[Check]:
    """What a client's own training code does, tried out here."""
    config, base = found.config, found.prepared.bases[client]
    odd = [example for some in found.canaries for example in some.examples[:3]]
    rows: Sequence[Example] = [*odd, *found.prepared.train[client]]
    task = Task(client, 1, config.rounds, config.seed, config.train)
    ways: dict[str, Callable[[], Check]] = {
        "noise alone": lambda: probes.noise_alone(base, found.run.adapter, rows[:1], private, task),
        "sensitivity": lambda: probes.sensitivity(base, found.run.adapter, rows, private, task),
        "sampling": lambda: probes.sampling(base, found.run.adapter, private, task, rates),
    }
    checks = []
    for name, probe in ways.items():
        try:
            checks.append(probe())
        except LaminaError as error:
            checks.append(mechanism.failed(name, error))
    return checks


def _canaries(work: Work, progress: Progress) -> tuple[Json | None, str]:
    found = work.scene
    if not found.canaries:
        return None, "none in this run: a campaign of the audit's own has them"
    result = remembered.of_canaries(found, work.settings)
    if found.config.privacy.mode == "client-dp":
        count = 50 if work.settings.quick else 100
        done = client_canaries.client_canaries(found.config, work.folder, count, progress, found.prepared)
        result["client_canaries"] = {**client_canaries.json_of(done), "beyond": beyond(done.found, done.analytic)}
        return result, f"canary clients: epsilon about {done.found.epsilon:.3g}, by the ledger {done.analytic:.3g}"
    bound = result["one_run"]
    return result, (
        f"AUC {result['membership']['auc']:.3f}; {bound['right']} of {bound['guesses']} guesses right: "
        f"epsilon at least {bound['epsilon_lower']:.3g} (ceiling {bound['ceiling']:.3g})"
    )


def _membership(work: Work, progress: Progress) -> tuple[Json | None, str]:
    result = remembered.of_rows(work.scene, work.settings, work.folder / "parts", progress)
    head = result["head"]
    return result, f"AUC {head['auc']:.3f} over {head['members']} rows in and {head['others']} out, by {head['attack']}"


def _reconstruction(work: Work, progress: Progress) -> tuple[Json | None, str]:
    found = work.scene
    if found.origin == "deployment":
        parties, near = rebuilt(found, work.settings, progress), None
    elif found.origin == "campaign":
        parties, near = rebuilt(scene.close_up(found, work.folder), work.settings, progress), None
    else:
        parties = rebuilt(found, work.settings, progress)
        near = rebuilt(scene.close_up(found, work.folder), work.settings, progress, invented=False)
    line = ", ".join(
        f"{view} {one['recall']:.2f} (chance {one['chance']:.2f})"
        for view, one in (near or parties).items()
        if one["recall"] is not None
    )
    where = "in rounds of few steps, " if near else ""
    return {
        "parties": parties,
        "close_up": near,
    }, f"{where}recall of tokens: {line}" if line else "nothing to reconstruct from"


def _extraction(work: Work, progress: Progress) -> tuple[Json | None, str]:
    config, found = work.scene.config, work.scene
    half = min(16, config.train.max_length // 2)
    members, others = remembered.drawn(found, work.settings)
    prompts = 32 if work.settings.quick else 64
    how = extraction.Prompting(prompts, half, half, seed=config.seed)
    result = extraction.extract(found.prepared.base, found.run.adapter, members, others, how, progress)
    if result is None:
        return None, "a classifier continues nothing" if config.task != "causal-lm" else "no text is long enough"
    return extraction.json_of(result), f"verbatim {result.verbatim:.3f}, by the base {result.verbatim_base:.3f}"


def _novelty(work: Work, progress: Progress) -> tuple[Json | None, str]:
    config, found = work.scene.config, work.scene
    train = [example for some in found.prepared.train.values() for example in some]
    how = novelty.Exploration(seed=config.seed)
    if work.settings.quick:
        how = novelty.Exploration(samples=8, new_tokens=24, iterations=2, seed=config.seed)
    result = novelty.explore(found.prepared.base, found.run.adapter, train, how, progress)
    if result is None:
        return None, "a classifier writes nothing"
    return novelty.json_of(result), (
        f"share of the samples' runs of 8 tokens in the training text {result.overlap_rate:.3f}, "
        f"of the base's {result.base_overlap_rate:.3f}"
    )


def _defences(work: Work, progress: Progress) -> tuple[Json | None, str]:
    rows = defences.compared(work.scene.config, work.settings, work.folder / "defences", progress)
    return {"rows": rows}, f"{len(rows)} defences side by side"


_MAKING: dict[str, tuple[str, Callable[[Work, Progress], tuple[Json | None, str]]]] = {
    "mechanism": ("noise, sensitivity, independence, sampling and cost", _mechanism),
    "canaries": ("what the models remember of canaries", _canaries),
    "membership": ("telling training rows from held-out rows", _membership),
    "reconstruction": ("tokens and text from what each party sees", _reconstruction),
    "extraction": ("continuing training text from its beginning", _extraction),
    "novelty": ("what the model says that its base does not", _novelty),
    "defences": ("the same attacks under each defence", _defences),
}
