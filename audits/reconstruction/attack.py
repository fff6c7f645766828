"""Reconstruction of training text from a run directory, for each party and what it sees."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.audits import views
from lamina.audits.decoding import text_of
from lamina.audits.estimators.roc import clopper_pearson
from lamina.audits.kept import KeptRound, read_rounds
from lamina.audits.reconstruction import malicious
from lamina.audits.reconstruction.inputs import Inputs, token_inputs
from lamina.audits.reconstruction.ordering import best_match, ordered
from lamina.audits.reconstruction.span import Recovery, Scored, recovery, token_scores, top
from lamina.audits.reconstruction.truth import tokens_of, trained_on
from lamina.audits.views import Seen, View
from lamina.client.data import Example
from lamina.client.model import Base
from lamina.protos import seeds
from lamina.protos.config import Config
from lamina.protos.errors import ConfigError

Examples = Mapping[str, Sequence[Example]]
Progress = Callable[[int, int], None]
MALICIOUS = "malicious-coordinator"


@dataclass(frozen=True)
class Settings:
    """How much is tried.

    Attributes:
        rounds: Of each view its first rounds; later ones have smaller steps and say less.
        looks: Most looks of a view.
        texts: Looks of a view whose tokens are put in order.
        starts: First tokens that are tried for a text.
        length: Most tokens of a text.
        positions: Positions at which a token's input is tried where the base adds a vector for each.
        scenario: Of the malicious base, or None to leave it out.
        seed: Of the guesses that stand for chance.
    """

    rounds: int = 2
    looks: int = 40
    texts: int = 6
    starts: int = 16
    length: int = 32
    positions: int = 32
    scenario: malicious.Scenario | None = field(default_factory=malicious.Scenario)
    seed: int = 0


QUICK = Settings(rounds=1, looks=10, texts=2, starts=8, length=24, positions=8,
                 scenario=malicious.Scenario(private=6, public=32, tuning_steps=20, client_steps=10))  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A text that was put together, beside the nearest of those that were trained on.

    Attributes:
        client: Whose, or several names.
        original: Nearest text of the client's batches.
        recovered: What the attack made.
    """

    client: str
    original: str
    recovered: str


@dataclass(frozen=True)
class Result:
    """What one party could rebuild. Figures are means over looks; NaN where nothing was tried.

    Attributes:
        applicable: Whether it sees anything that can be attacked.
        why: What it sees, or why nothing.
        recall: Share of the tokens of the batches among as many best scores, of single clients where the view has them.
        chance: That share where the same attack is given noise; at least that of blind guesses.
        auc: Of the scores.
        auc_chance: Of scores of noise: not 0.5 where frequent tokens lie in directions of their own.
        rouge_l: Of the texts with the nearest original.
        rouge_l_chance: The same of a text from another look's tokens, of other clients where there is one, else from random ones.
        tokens: Different tokens of a look.
        individuals: Whether single clients are seen.
        clients: How many different ones.
        by_client: Client id -> recall and chance for its own tokens.
        examples: Some texts.
        more: Further figures of this view, JSON values.
    """

    applicable: bool
    why: str
    recall: float = float("nan")
    recall_interval: tuple[float, float] = (float("nan"), float("nan"))
    chance: float = float("nan")
    auc: float = float("nan")
    auc_chance: float = float("nan")
    rouge_l: float = float("nan")
    rouge_l_chance: float = float("nan")
    tokens: int = 0
    individuals: bool = False
    clients: int = 0
    by_client: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    examples: tuple[Text, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


def reconstruct(
    run_dir: Path,
    config: Config,
    base: Base,
    examples: Examples,
    settings: Settings,
    progress: Progress,
    only: str = "",
) -> dict[str, Result]:
    """Attack each party's view of a finished run.

    Args:
        run_dir: A run directory that kept its updates; one under privacy.secagg has none.
        config: Of the run.
        base: The full-precision base; its slots are overwritten.
        examples: Client id -> its training set, as the run had it; read to score what was found, never to find it.
        settings: How much is tried.
        progress: Told how much is done, of how much.
        only: In a deployment, the one client whose examples are there; looks at anybody else are left out.

    Returns:
        View -> result, of `views.PARTIES` and `malicious-coordinator`.

    Raises:
        ConfigError: If no updates were kept, or a client of the run has no examples.
    """
    inputs = token_inputs(base, min(config.train.max_length, settings.positions))
    if inputs is None:
        why = "no adapted module takes in a vector that depends on a token alone"
        return {party: Result(False, why) for party in (*views.PARTIES, MALICIOUS)}
    rounds = () if config.privacy.secagg else read_rounds(run_dir, inputs.modules)
    found = _views(run_dir, rounds, config, inputs, only)
    _check(found, examples)
    steps = len(found) + 1
    results = {}
    for number, (party, view) in enumerate(found.items()):
        progress(number, steps)
        results[party] = _attacked(view, config, base, inputs, examples, settings)
    progress(len(found), steps)
    results[MALICIOUS] = _malicious(config, base, inputs, settings)
    progress(steps, steps)
    return results


def _views(run_dir: Path, rounds: Sequence[KeptRound], config: Config, inputs: Inputs, only: str) -> dict[str, View]:
    cohorts = _cohorts(run_dir)
    clients = sorted({client for cohort in cohorts.values() for client in cohort})
    masked = config.privacy.secagg
    peers = [client for client in rounds[0].clients if client != only] if rounds else []
    found = {
        "peer": views.peer(rounds, config, peers[0] if peers else ""),
        "coordinator": views.coordinator(rounds, config),
        "secagg-coordinator": views.masked_sums(run_dir, config, cohorts, inputs.modules)
        if masked
        else views.secagg_coordinator(rounds, config),
        "outsider": views.outsider(run_dir, config, clients, sorted(cohorts), inputs.modules),
    }
    return {party: _of_one(view, only) for party, view in found.items()} if only else found


def _of_one(view: View, client: str) -> View:
    """The looks at one client alone: of a sum with others, whose rows nobody here has, it is not known what is right."""
    seen = tuple(one for one in view.seen if one.clients == (client,))
    if view.seen and not seen:
        return View((), f"what it sees of {client} is mixed with other sites' training, whose rows are not known here")
    return View(seen, view.why)


def _cohorts(run_dir: Path) -> dict[int, list[str]]:
    """Round -> clients whose updates are in it."""
    path = run_dir / "rounds.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return {int(record["round"]): [str(client) for client in record["clients"]] for record in records}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: expected one object a round with its clients, got {error!r}.") from None


def _check(found: Mapping[str, View], examples: Examples) -> None:
    missing = {client for view in found.values() for seen in view.seen for client in seen.clients} - examples.keys()
    if missing:
        raise ConfigError(
            f"expected the training examples of every client of the run, {', '.join(sorted(missing))} have none."
        )


def _attacked(view: View, config: Config, base: Base, inputs: Inputs, examples: Examples, settings: Settings) -> Result:
    first = sorted({seen.rounds for seen in view.seen})[: settings.rounds]
    alone = any(seen.individual for seen in view.seen)
    looks: list[tuple[Seen, Scored]] = []
    for seen in [one for one in view.seen if one.rounds in first][: settings.looks]:
        rng = seeds.stream(settings.seed, "audit", "noise", seen.party, *seen.clients, *seen.rounds)
        scores = token_scores(seen, inputs, rng)
        if scores is not None and (seen.individual or not alone):
            looks.append((seen, scores))
    if not looks:
        return Result(False, view.why if not view.seen else "nothing changed in the modules that are attacked")
    truths = [_trained(config, examples, seen) for seen, _ in looks]
    recoveries = [recovery(scores, tokens_of(_all(truth))) for (_, scores), truth in zip(looks, truths, strict=True)]
    each: dict[str, list[tuple[float, float]]] = {}
    for (_, scores), truth in zip(looks, truths, strict=True):
        for client, some in truth.items():
            own = recovery(scores, tokens_of(some))
            each.setdefault(client, []).append((own.recall, own.chance))
    result = Result(
        applicable=True,
        why=view.why,
        recall=float(np.mean([one.recall for one in recoveries])),
        recall_interval=_interval(recoveries),
        chance=float(np.mean([one.chance for one in recoveries])),
        auc=float(np.mean([one.auc for one in recoveries])),
        auc_chance=float(np.mean([one.auc_chance for one in recoveries])),
        tokens=round(float(np.mean([one.tokens for one in recoveries]))),
        individuals=alone,
        clients=len(each),
        by_client={client: tuple(np.mean(figures, axis=0).tolist()) for client, figures in sorted(each.items())},
    )
    return _with_texts(result, base, looks, truths, settings) if config.task == "causal-lm" else result


def _interval(recoveries: Sequence[Recovery]) -> tuple[float, float]:
    """The interval of Clopper and Pearson over all looks' tokens."""
    trials = sum(one.tokens for one in recoveries)
    if not trials:
        return float("nan"), float("nan")
    low, high = clopper_pearson(sum(one.recall * one.tokens for one in recoveries), trials, 0.05)
    mean = float(np.mean([one.recall for one in recoveries]))
    return min(float(low), mean), max(float(high), mean)


def _trained(config: Config, examples: Examples, seen: Seen) -> dict[str, list[Example]]:
    """Client id -> the examples that its part of a look is of."""
    return {
        client: [one for number in seen.rounds for one in trained_on(config, examples, client, number)]
        for client in seen.clients
    }


def _all(truth: Mapping[str, list[Example]]) -> list[Example]:
    return [one for some in truth.values() for one in some]


def _with_texts(
    result: Result, base: Base, looks: Sequence[tuple[Seen, Scored]], truths: Sequence[Mapping[str, list[Example]]],
    settings: Settings,
) -> Result:  # fmt: skip
    """The result with some texts: of each a look's tokens in order, and what another look's would have given."""
    matches, chances, texts = [], [], []
    for number in range(min(settings.texts, len(looks))):
        scores = looks[number][1]
        originals = [(client, one.tokens) for client, some in truths[number].items() for one in some]
        if not originals:
            continue
        count = len(tokens_of(_all(truths[number])))
        length = min(settings.length, max(len(tokens) for _, tokens in originals))
        text = ordered(base, top(scores.scores, count), length, settings.starts)
        match, nearest = best_match(text, [tokens for _, tokens in originals])
        guess = ordered(base, _elsewhere(looks, number, count, settings.seed), length, settings.starts)
        matches.append(match)
        chances.append(best_match(guess, [tokens for _, tokens in originals])[0])
        client, original = originals[max(nearest, 0)]
        texts.append(Text(client, text_of(base, original[: 2 * length]), text_of(base, text)))
    if not matches:
        return result
    mean, by_chance = float(np.mean(matches)), float(np.mean(chances))
    return replace(result, rouge_l=mean, rouge_l_chance=by_chance, examples=tuple(texts[:3]))


def _elsewhere(looks: Sequence[tuple[Seen, Scored]], number: int, count: int, seed: int) -> NDArray[np.int64]:
    """As many tokens that have nothing to do with a look: those of another one of other clients, or random ones."""
    mine, scores = looks[number]
    for seen, others in [*looks[number + 1 :], *looks[:number]]:
        if not set(seen.clients) & set(mine.clients):
            return top(others.scores, count)
    return seeds.stream(seed, "audit", "tokens", number).permutation(len(scores.scores))[:count].astype(np.int64)


def _malicious(config: Config, base: Base, inputs: Inputs, settings: Settings) -> Result:
    """See `malicious`; on invented notes, so nothing of the run is in it."""
    if settings.scenario is None or config.task != "causal-lm" or not base.spec.modules:
        return Result(False, "tried on causal-lm bases with factors alone")
    played = malicious.attack(base, inputs, settings.scenario, lambda done, of: None)
    tuned = played.tuned
    return Result(
        applicable=True,
        why="simulated on invented notes: the coordinator tuned the base on public notes before the client trained it",
        recall=tuned.tokens.recall,
        recall_interval=_interval([tuned.tokens]),
        chance=tuned.tokens.chance,
        auc=tuned.tokens.auc,
        auc_chance=tuned.tokens.auc_chance,
        tokens=tuned.tokens.tokens,
        individuals=True,
        clients=1,
        by_client={"client": (tuned.tokens.recall, tuned.tokens.chance)},
        examples=tuple(Text("client", original, recovered) for original, recovered in played.examples),
        more={"notes": {"tuned": _figures(tuned), "honest": _figures(played.honest)}},
    )


def _figures(found: malicious.Found) -> dict[str, Any]:
    return {
        "recall": found.tokens.recall,
        "values": dict(found.values),
        "values_chance": dict(found.values_chance),
        "pairs": dict(found.pairs),
        "pairs_chance": found.pairs_chance,
        "pairs_untrained": dict(found.pairs_untrained),
    }


def document(results: Mapping[str, Result]) -> dict[str, Any]:
    """The results as `audit.json` has them.

    Args:
        results: View -> result.

    Returns:
        JSON values; null for what could not be measured. `malicious-coordinator` has `notes` besides.
    """
    return {
        party: {
            "applicable": one.applicable,
            "why": one.why,
            "recall": _number(one.recall),
            "recall_interval": [_number(end) for end in one.recall_interval],
            "chance": _number(one.chance),
            "auc": _number(one.auc),
            "auc_chance": _number(one.auc_chance),
            "rouge_l": _number(one.rouge_l),
            "rouge_l_chance": _number(one.rouge_l_chance),
            "tokens": one.tokens,
            "individuals": one.individuals,
            "clients": one.clients,
            "by_client": {
                client: {"recall": _number(recall), "chance": _number(chance)}
                for client, (recall, chance) in one.by_client.items()
            },
            "examples": [
                {"client": text.client, "original": text.original, "recovered": text.recovered} for text in one.examples
            ],
            **one.more,
        }
        for party, one in results.items()
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
