"""What an adapter taught the base, in samples: contrastive generative exploration (Isonuma and Titov 2024, arXiv:2410.14765).

Tokens are drawn by how much more likely the adapter makes them than the base, among those that the adapter finds likely at all.
The samples are for a person to read: they show what kind of text was trained on, a language, a form, a topic. That is a fact of
the whole data and not of a row, which differential privacy does not hide, so nothing here refutes a claim of it. Only long runs
of tokens that are in the training text point at rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.audits.decoding import Floats, Ids, next_logs, sampled, start_token, text_of
from lamina.audits.membership.shadows import Settings, put_trained
from lamina.audits.membership.statistics import measured
from lamina.client.data import Example
from lamina.client.model import Base, put, take
from lamina.protos import seeds
from lamina.protos.adapter import EMPTY, Adapter
from lamina.protos.errors import ConfigError

Progress = Callable[[int, int], None]
# Least probability of a token that may be drawn, as a share of the most likely one's; the value of the paper.
PLAUSIBLE = 0.1
# Tokens in a row that count as found in the training text.
RUN_TOKENS = 8


@dataclass(frozen=True)
class Exploration:
    """How much is sampled.

    Attributes:
        samples: Of each variant, and of the base.
        new_tokens: Of a sample at most.
        iterations: Times that the iterative variant moves the base towards what it has found; 0 leaves the variant out.
        training: How it moves: passes, rate, rank.
        seed: Of the audit.
    """

    samples: int = 16
    new_tokens: int = 32
    iterations: int = 4
    training: Settings = field(default_factory=lambda: Settings(passes=8))
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        text: For a person.
        variant: `static` or `iterative`.
        score: Nats a token by which the adapter makes it more likely than the public base does.
        overlap: Share of its runs of `RUN_TOKENS` tokens that are in the training text.
        longest: Tokens of the longest run that is in the training text.
    """

    text: str
    variant: str
    score: float
    overlap: float
    longest: int


@dataclass(frozen=True)
class Novelty:
    """What exploration found.

    Attributes:
        samples: The highest scores first.
        overlap_rate: Of all samples' runs of `RUN_TOKENS` tokens, the share that is in the training text.
        base_overlap_rate: The same of samples of the public base, which has not seen the training text.
        longest: Tokens of the longest common run of any sample.
        base_longest: The same of samples of the public base.
    """

    samples: tuple[Sample, ...]
    overlap_rate: float
    base_overlap_rate: float
    longest: int
    base_longest: int


def explore(
    base: Base,
    adapter: Adapter,
    trained: Sequence[Example],
    settings: Exploration,
    progress: Progress = lambda done, of: None,
) -> Novelty | None:
    """Sample what the adapter added, and look it up in the training text.

    The iterative variant draws a share of its samples, trains an adapter on all samples found so far, and contrasts with that
    instead of the base from then on, so that it does not find the same again.

    Args:
        base: The public base; its slots are changed.
        adapter: What is audited.
        trained: What it was trained on, for the overlap alone: sampling knows nothing of it.
        settings: How much.
        progress: Told after each batch of samples.

    Returns:
        Samples and rates; None for a classifier.

    Raises:
        ConfigError: If nothing is to be sampled.
    """
    if base.spec.task != "causal-lm":
        return None
    if settings.samples < 1 or settings.new_tokens < 1:
        raise ConfigError(
            f"audit novelty: expected at least one sample of one token, got {settings.samples} of {settings.new_tokens}."
        )
    of = 2 + settings.iterations
    static = contrasted(base, adapter, EMPTY, settings.samples, settings, "static")
    progress(1, of)
    reference = plain(base, settings)
    progress(2, of)
    iterative: list[Ids] = []
    against = EMPTY
    for number in range(settings.iterations):
        share = settings.samples * (number + 1) // settings.iterations - len(iterative)
        iterative += contrasted(base, adapter, against, share, settings, f"iterative {number}")
        if number + 1 < settings.iterations and iterative:
            put_trained(
                base, [_example(base, one) for one in iterative], settings.training, "novelty", lambda done: None
            )
            against = take(base)
        progress(3 + number, of)
    text = Text.of(trained)
    found = [*static, *iterative]
    runs = [text.runs(one) for one in found]
    base_runs = [text.runs(one) for one in reference]
    variants = ["static"] * len(static) + ["iterative"] * len(iterative)
    scores = _scores(base, adapter, found)
    put(base, EMPTY, None, trainable=False)
    samples = [
        Sample(text_of(base, tokens), variant, float(score), overlap([run]), int(run.max()))
        for tokens, variant, score, run in zip(found, variants, scores, runs, strict=True)
    ]
    return Novelty(
        tuple(sorted(samples, key=lambda sample: -sample.score)),
        overlap(runs),
        overlap(base_runs),
        max(int(run.max()) for run in runs),
        max(int(run.max()) for run in base_runs),
    )


def json_of(found: Novelty | None) -> dict[str, Any] | None:
    """The `novelty` of audit.json.

    Args:
        found: What `explore` gave.

    Returns:
        JSON values.
    """
    return None if found is None else asdict(found) | {"samples": [asdict(sample) for sample in found.samples]}


def contrast(tuned: Floats, reference: Floats) -> Floats:
    """What tokens are drawn by: the log-ratio where the adapter finds a token plausible, -inf elsewhere.

    Args:
        tuned: (n, vocabulary) log-probabilities with the adapter.
        reference: (n, vocabulary) of what it is contrasted with.

    Returns:
        (n, vocabulary) unnormalised log-probabilities.
    """
    plausible = tuned >= tuned.max(-1, keepdims=True) + np.log(PLAUSIBLE)
    return np.where(plausible, tuned - reference, -np.inf)


def contrasted(
    base: Base, adapter: Adapter, against: Adapter, count: int, settings: Exploration, name: str
) -> list[Ids]:
    """Samples by contrast; the two adapters take turns in the slots, once a token for all samples.

    Args:
        base: The public base; its slots are changed.
        adapter: What is audited.
        against: What it is contrasted with, `EMPTY` for the base.
        count: Samples.
        settings: Length and seed.
        name: Of the stream of randomness.

    Returns:
        Sequences of at least one token.
    """
    caches: list[Any] = [None, None]

    def step(tokens: Ids) -> Floats:
        logs = []
        for place, one in enumerate((adapter, against)):
            put(base, one, None, trainable=False)
            found, caches[place] = next_logs(base, tokens, caches[place])
            logs.append(found)
        return contrast(logs[0], logs[1])

    rng = seeds.stream(settings.seed, "audit", "novelty", name)
    return sampled(base, count, settings.new_tokens, step, rng) if count else []


def plain(base: Base, settings: Exploration) -> list[Ids]:
    """Samples of the public base among the tokens that it finds plausible, as a reference.

    Args:
        base: The public base; its slots are emptied.
        settings: Number, length and seed.

    Returns:
        Sequences of at least one token.
    """
    put(base, EMPTY, None, trainable=False)
    cache: Any = None

    def step(tokens: Ids) -> Floats:
        nonlocal cache
        logs, cache = next_logs(base, tokens, cache)
        return contrast(logs, np.zeros(1))

    rng = seeds.stream(settings.seed, "audit", "novelty", "base")
    return sampled(base, settings.samples, settings.new_tokens, step, rng)


def _example(base: Base, tokens: Ids) -> Example:
    whole = np.concatenate([[start_token(base)], tokens]).astype(np.int32)
    return Example(whole, np.arange(len(whole)) > 0)


def _scores(base: Base, adapter: Adapter, found: Sequence[Ids]) -> Floats:
    examples = [_example(base, one) for one in found]
    losses = []
    for one in (EMPTY, adapter):
        put(base, one, None, trainable=False)
        losses.append(measured(base, examples, len(examples)).loss)
    return np.asarray(losses[0] - losses[1], np.float64)


@dataclass(frozen=True, eq=False)
class Text:
    """Training text in which runs of tokens are looked up.

    Attributes:
        tokens: (n,) all examples' tokens, each example's followed by -1.
        order: (n,) positions by token.
        ordered: (n,) tokens in that order.
    """

    tokens: Ids
    order: NDArray[np.int64]
    ordered: Ids

    @staticmethod
    def of(examples: Sequence[Example]) -> Text:
        """The text of some examples."""
        parts = [part for example in examples for part in (example.tokens, [-1])]
        tokens = np.concatenate([*parts, np.zeros(0)]).astype(np.int32)
        order = np.argsort(tokens, kind="stable")
        return Text(tokens, order, tokens[order])

    def runs(self, sample: Ids) -> NDArray[np.int64]:
        """For each token of a sample, how many tokens, it being the last, are in the text in a row."""
        before = np.zeros(len(self.tokens) + 1, np.int64)  # at p: the run that ends at p - 1
        found, touched = [], np.zeros(0, np.int64)
        for token in sample:
            first, last = np.searchsorted(self.ordered, token, "left"), np.searchsorted(self.ordered, token, "right")
            at = self.order[first:last]
            lengths = before[at] + 1
            before[touched] = 0
            before[at + 1], touched = lengths, at + 1
            found.append(int(lengths.max(initial=0)))
        return np.array(found)


def overlap(runs: Sequence[NDArray[np.int64]]) -> float:
    """Share of the runs of `RUN_TOKENS` tokens that are in the training text.

    Args:
        runs: What `Text.runs` gave for each sample.

    Returns:
        In [0, 1]; 0 where no sample is that long.
    """
    ends = np.concatenate([one[RUN_TOKENS - 1 :] for one in runs])
    return float((ends >= RUN_TOKENS).mean()) if len(ends) else 0.0
