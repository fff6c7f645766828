"""Verbatim extraction (Carlini et al. 2023, arXiv:2202.07646): given the start of a training text, does the model write the rest?

Common text is continued word for word by any model. What an adapter gave away is what lies above both references: the public base
on the same texts, and the adapter on texts that nobody trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lamina.audits.decoding import Ids, greedy, text_of
from lamina.client.data import Example
from lamina.client.model import Base, put
from lamina.protos import seeds
from lamina.protos.adapter import EMPTY, Adapter

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prompting:
    """How texts are begun and continued.

    Attributes:
        prompts: At most this many of each group.
        prefix_tokens: Tokens of the start.
        new_tokens: Tokens that must follow word for word.
        shown: Examples for a person to read.
        batch_size: Prompts at a time.
        seed: Of the audit.
    """

    prompts: int = 64
    prefix_tokens: int = 16
    new_tokens: int = 16
    shown: int = 5
    batch_size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Continued:
    """One text that was begun.

    Attributes:
        prefix: What the model was given.
        original: What follows in the training text.
        continued: What the model wrote.
        match_tokens: Tokens until the two first differ.
    """

    prefix: str
    original: str
    continued: str
    match_tokens: int


@dataclass(frozen=True)
class Extraction:
    """How much comes back.

    Attributes:
        prompts: Training texts that were begun.
        held_out_prompts: Held-out texts that were begun; 0 leaves the figures of them None.
        prefix_tokens: Tokens given.
        new_tokens: Tokens looked at.
        verbatim: Share of training texts of which all of these are right.
        verbatim_base: The same of the public base: what says nothing of the training.
        verbatim_held_out: The same of held-out texts: chance.
        mean_match_tokens: Right tokens in a row from the first on, mean over training texts.
        mean_match_tokens_base: Of the public base.
        mean_match_tokens_held_out: Of held-out texts.
        examples: The longest matches.
    """

    prompts: int
    held_out_prompts: int
    prefix_tokens: int
    new_tokens: int
    verbatim: float
    verbatim_base: float
    verbatim_held_out: float | None
    mean_match_tokens: float
    mean_match_tokens_base: float
    mean_match_tokens_held_out: float | None
    examples: tuple[Continued, ...]


def extract(
    base: Base,
    adapter: Adapter,
    trained: Sequence[Example],
    held_out: Sequence[Example],
    settings: Prompting,
    progress: Progress = lambda done, of: None,
) -> Extraction | None:
    """Begin texts and see how they go on, greedily.

    A text is begun where its first target is, or at its start: with the `prefix_tokens` before the tokens to be found.

    Args:
        base: The public base; its slots are changed.
        adapter: What is audited.
        trained: Examples that it was trained on.
        held_out: Examples of the same kind that it was not trained on.
        settings: How many and how long.
        progress: Told after each of three groups.

    Returns:
        Shares and examples; None for a classifier, or where no training text is long enough.
    """
    if base.spec.task != "causal-lm":
        return None
    mine, chance = _begun(trained, settings, "trained"), _begun(held_out, settings, "held out")
    if not len(mine):
        return None
    cut = settings.prefix_tokens

    def matches(texts: Ids, which: Adapter, number: int) -> tuple[Ids, Ids]:
        put(base, which, None, trainable=False)
        written = greedy(base, texts[:, :cut], settings.new_tokens, settings.batch_size)
        progress(number, 3)
        return written, match_tokens(written, texts[:, cut:])

    written, right = matches(mine, adapter, 1)
    right_held_out = matches(chance, adapter, 2)[1] if len(chance) else None
    right_base = matches(mine, EMPTY, 3)[1]
    put(base, EMPTY, None, trainable=False)
    shown = np.argsort(-right, kind="stable")[: settings.shown]
    return Extraction(
        prompts=len(mine),
        held_out_prompts=len(chance),
        prefix_tokens=cut,
        new_tokens=settings.new_tokens,
        verbatim=_share(right, settings),
        verbatim_base=_share(right_base, settings),
        verbatim_held_out=None if right_held_out is None else _share(right_held_out, settings),
        mean_match_tokens=float(right.mean()),
        mean_match_tokens_base=float(right_base.mean()),
        mean_match_tokens_held_out=None if right_held_out is None else float(right_held_out.mean()),
        examples=tuple(
            Continued(
                text_of(base, mine[row, :cut]),
                text_of(base, mine[row, cut:]),
                text_of(base, written[row]),
                int(right[row]),
            )
            for row in shown
        ),
    )


def json_of(found: Extraction | None) -> dict[str, Any] | None:
    """The `extraction` of audit.json.

    Args:
        found: What `extract` gave.

    Returns:
        JSON values.
    """
    if found is None:
        return None
    return asdict(found) | {"examples": [asdict(one) for one in found.examples]}


def match_tokens(written: Ids, original: Ids) -> Ids:
    """Right tokens in a row from the first on.

    Args:
        written: (n, tokens).
        original: (n, tokens).

    Returns:
        (n,), up to `tokens`.
    """
    return np.asarray(np.cumprod(written == original, axis=1).sum(1), np.int32)


def _share(right: Ids, settings: Prompting) -> float:
    return float((right == settings.new_tokens).mean())


def _begun(examples: Sequence[Example], settings: Prompting, group: str) -> Ids:
    """Prefix and what follows, (n, prefix + new tokens), of some of the examples that are long enough."""
    found = []
    for example in examples:
        first = int(example.targets.argmax()) if example.targets.any() else len(example.tokens)
        cut = max(settings.prefix_tokens, first)
        if len(example.tokens) >= cut + settings.new_tokens:
            found.append(example.tokens[cut - settings.prefix_tokens : cut + settings.new_tokens])
    rng = seeds.stream(settings.seed, "audit", "extraction", group)
    chosen = np.sort(rng.permutation(len(found))[: settings.prompts])
    width = settings.prefix_tokens + settings.new_tokens
    return np.array([found[index] for index in chosen], np.int32).reshape(-1, width)
