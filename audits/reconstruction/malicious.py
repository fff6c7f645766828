"""A coordinator that hands out a base which it has tuned to memorise notes, after ReCIT (2025, arXiv:2504.20570).

What is simulated: the coordinator holds public notes of the same form as a client's private ones and tunes the base on them;
the client fine-tunes that base on its notes, honestly and with this project's own training; the coordinator sees its update.
It then asks (1) which tokens the update shows, (2) which of many candidate values were in the notes, by the tokens of each and
by how much likelier the update makes it, and (3) which value belongs to which name, by the likelihood of each pair; the names,
and for (3) the values, are given. The same client on the honest base is the comparison: it shows what the tuning adds, which may
be nothing.

What is not: the paper's own choice of notes and its personal data of real form, large models, and values that are in no list of
candidates. Tuning is low-rank and rides beside the base, as a merged one would act. A site that pins the hash of its base, as
every deployment here does, refuses such a base unless it was handed out from the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.audits.reconstruction.inputs import Inputs
from lamina.audits.reconstruction.notes import KINDS, Note, invented, prompt, value, values
from lamina.audits.reconstruction.span import Recovery, Scored, Scores, recovery, standard, token_scores
from lamina.audits.reconstruction.truth import tokens_of
from lamina.audits.views import Seen, changes_of
from lamina.client.data import Example
from lamina.client.frozen import Frozen, added
from lamina.client.losses import collate, pad_id
from lamina.client.model import Base, put, take
from lamina.client.private.train import Private, train_privately
from lamina.client.train import Task, completed, train
from lamina.protos import seeds
from lamina.protos.adapter import EMPTY, Adapter
from lamina.protos.config import TrainConfig
from lamina.protos.privacy.mechanism import Mechanism
from lamina.protos.privacy.noise import seeded
from lamina.protos.ranks import uniform

_SCALE, _DELTA = 2.0, 1e-5
_CLIENT = "client"


@dataclass(frozen=True)
class Scenario:
    """Numbers of the simulation.

    Attributes:
        private: Notes of the client.
        public: Notes of the coordinator.
        tuning_steps: Of the coordinator on its notes.
        client_steps: Of the client on its own.
        rank: Of both.
        seed: Of notes and starts.
        noise_multiplier: Of the client's steps, where it trains under example-dp; None without.
        max_grad_norm: Its clipping norm there.
    """

    private: int = 8
    public: int = 64
    tuning_steps: int = 60
    client_steps: int = 20
    rank: int = 8
    seed: int = 0
    noise_multiplier: float | None = None
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Found:
    """What the coordinator learnt on one base.

    Attributes:
        tokens: Of the client's notes, from the span of its update.
        values: Kind -> share of the client's values among as many best candidates.
        values_chance: Kind -> that share for guesses.
        pairs: Kind -> share of names that were given their own value.
        pairs_chance: That share for guesses.
        pairs_untrained: Kind -> that share from the base alone, which never saw the notes.
    """

    tokens: Recovery
    values: dict[str, float]
    values_chance: dict[str, float]
    pairs: dict[str, float]
    pairs_chance: float
    pairs_untrained: dict[str, float]


@dataclass(frozen=True)
class Malicious:
    """The attack on the coordinator's base, and on the honest one.

    Attributes:
        tuned: On the base that was tuned to memorise.
        honest: On the base as it was.
        examples: Of some names, the notes as they were and the pairs that the coordinator put together.
    """

    tuned: Found
    honest: Found
    examples: tuple[tuple[str, str], ...]


def attack(base: Base, inputs: Inputs, scenario: Scenario, progress: Callable[[int, int], None]) -> Malicious:
    """Play both worlds.

    Args:
        base: A causal-lm; its slots are emptied.
        inputs: Where the inputs of tokens are.
        scenario: How much of everything.
        progress: Told steps done, of how many.

    Returns:
        What was learnt.
    """
    rng = seeds.stream(scenario.seed, "audit", "notes")
    private, public, decoys = invented(scenario.private, scenario.public, rng)
    total = scenario.tuning_steps + 2 * scenario.client_steps

    def said(before: int) -> Callable[[int, float], None]:
        return lambda step, loss: progress(before + step, total)

    tuned = added(None, _tuned(base, public, None, "coordinator", (scenario.tuning_steps, scenario), said(0))[1])
    worlds: list[Found] = []
    examples: list[tuple[str, str]] = []
    for number, frozen in enumerate((tuned, None)):
        before = scenario.tuning_steps + number * scenario.client_steps
        steps = (scenario.client_steps, scenario)
        start, after = _tuned(base, private, frozen, _CLIENT, steps, said(before))
        scored = token_scores(Seen("coordinator", ("client",), (1,), changes_of(start, after)), inputs, rng)
        found, texts = _learnt(base, frozen, after, (private, decoys), scored)
        worlds.append(found)
        examples = examples or texts
    return Malicious(worlds[0], worlds[1], tuple(examples))


def _tuned(
    base: Base, notes: Sequence[Note], frozen: Frozen | None, who: str, steps: tuple[int, Scenario],
    progress: Callable[[int, float], None],
) -> tuple[Adapter, Adapter]:  # fmt: skip
    """Start and end of a training on notes, as a client trains."""
    count, scenario = steps
    config = TrainConfig(local_steps=count, batch_size=min(8, len(notes)), schedule="constant", max_length=128)
    examples = [_example(base, note.text) for note in notes]
    task = Task(who, 1, 1, scenario.seed, config)
    ranks = uniform(base.spec, scenario.rank)
    start = completed(EMPTY, ranks, dict.fromkeys(ranks, _SCALE), task, base)
    put(base, start, frozen)
    if who == _CLIENT and scenario.noise_multiplier is not None:
        private = _private(scenario, scenario.noise_multiplier, config, len(notes))
        numbered = [replace(example, row=number) for number, example in enumerate(examples)]
        train_privately(base, numbered, task, private, start, progress=progress)
    else:
        train(base, examples, task, start, progress=progress)
    return start, take(base)


def _private(scenario: Scenario, noise: float, config: TrainConfig, count: int) -> Private:
    """The client's mechanism: noise and clipping of the run, at the rate of these few notes; its epsilon is nobody's claim."""
    mechanism = Mechanism(
        unit="record",
        sample_rate=config.batch_size / count,
        expected_units=float(config.batch_size),
        noise_multiplier=noise,
        max_grad_norm=scenario.max_grad_norm,
        steps=config.local_steps,
        rounds=1,
        epsilon=math.inf,
        target_delta=_DELTA,
    )
    return Private(mechanism, count, partial(seeded, scenario.seed))


def _ids(base: Base, text: str) -> NDArray[np.int32]:
    return np.asarray(base.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def _example(base: Base, text: str) -> Example:
    ids = _ids(base, text)
    return Example(ids, np.arange(len(ids)) > 0)


def _learnt(
    base: Base,
    frozen: Frozen | None,
    after: Adapter,
    notes: tuple[Sequence[Note], Sequence[Note]],
    scored: Scored | None,
) -> tuple[Found, list[tuple[str, str]]]:
    """What tokens and likelihoods say of a client's notes; some of the pairs, and the notes."""
    private, decoys = notes
    if scored is None:
        raise RuntimeError("expected the client's factors to have moved")
    recalled, chances, pairs, untrained = {}, {}, {}, {}
    guesses: dict[str, list[int]] = {}
    for kind in KINDS:
        pool = values(private, kind) + values(decoys, kind)
        gains = _matrix(base, frozen, after, private, pool, kind) - _matrix(base, frozen, EMPTY, private, pool, kind)
        seen = np.array([scored.scores[_ids(base, one)].mean() for one in pool])
        best = np.argsort(-(standard(seen) + standard(gains.max(axis=0))), kind="stable")[: len(private)]
        recalled[kind], chances[kind] = float((best < len(private)).mean()), len(private) / len(pool)
        own = gains[:, : len(private)]
        guesses[kind] = [int(index) for index in (own - own.mean(axis=0)).argmax(axis=1)]
        alone = _matrix(base, frozen, EMPTY, private, values(private, kind), kind)
        pairs[kind] = float(np.mean(np.array(guesses[kind]) == np.arange(len(private))))
        untrained[kind] = float(np.mean((alone - alone.mean(axis=0)).argmax(axis=1) == np.arange(len(private))))
    truth = tokens_of([_example(base, note.text) for note in private])
    found = Found(recovery(scored, truth), recalled, chances, pairs, 1 / len(private), untrained)
    return found, [(note.text, _pieced(note, private, guesses, number)) for number, note in enumerate(private[:3])]


def _pieced(note: Note, private: Sequence[Note], guesses: dict[str, list[int]], number: int) -> str:
    return " ".join(prompt(kind, note.name) + value(private[guesses[kind][number]], kind) + "." for kind in KINDS)


@torch.no_grad()
def _matrix(
    base: Base, frozen: Frozen | None, adapter: Adapter, notes: Sequence[Note], pool: Sequence[str], kind: str
) -> Scores:
    """Mean log-likelihood of each value after each name, in nats a token; (names, values)."""
    put(base, adapter, frozen, trainable=False)
    rows = []
    for note in notes:
        before = len(_ids(base, prompt(kind, note.name)))
        examples = [_example(base, prompt(kind, note.name) + one) for one in pool]
        examples = [replace(one, targets=np.arange(len(one.tokens)) >= before) for one in examples]
        batch = collate(examples, pad_id(base), base.device)
        logits = base.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits[:, :-1].float()
        wanted, there = batch.tokens[:, 1:], batch.targets[:, 1:] >= 0
        nats = torch.log_softmax(logits, dim=-1).gather(2, wanted.unsqueeze(2)).squeeze(2) * there
        rows.append((nats.sum(dim=1) / there.sum(dim=1)).double().cpu().numpy())
    return np.stack(rows)
