"""Canaries: examples that no one would write, of which a fair coin has put each into the training data or left it out.

`rare` canaries are sequences of tokens drawn uniformly (Carlini et al. 2019, arXiv:1802.08232), for classification with a label
drawn uniformly. `new-token` canaries end in a token that the training data hardly have, and only that token carries loss (as in
arXiv:2503.06808, with a token of the vocabulary in place of a new one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lamina.client.data import Example
from lamina.client.model import Base
from lamina.protos import seeds

_LENGTH, _LEAST_LENGTH = 16, 4
NEW_TOKEN_SHARE = 5  # of five rare canaries one new-token one
REFERENCE = 1000


@dataclass(frozen=True, eq=False)
class Canaries:
    """Canaries of one kind, dealt to clients.

    Attributes:
        kind: `rare` or `new-token`.
        examples: (m,), in and out.
        included: (m,) bool, a fair coin each.
        clients: (m,), into whose data each is put, or would have been.
    """

    kind: str
    examples: tuple[Example, ...]
    included: NDArray[np.bool_]
    clients: tuple[str, ...]


def rare(base: Base, count: int, clients: Sequence[str], max_length: int, seed: int) -> Canaries:
    """Sequences of uniform tokens.

    Args:
        base: For its vocabulary, special tokens and labels.
        count: m.
        clients: Dealt to in turn.
        max_length: Most tokens of an example.
        seed: Of everything here.

    Returns:
        The canaries.
    """
    rng = seeds.stream(seed, "audit", "rare")
    length = max(_LEAST_LENGTH, min(_LENGTH, max_length))
    examples = tuple(_random(base, length, rng) for _ in range(count))
    return _dealt("rare", examples, clients, seed)


def references(base: Base, count: int, max_length: int, seed: int) -> list[Example]:
    """Candidates of the form of `rare`, none of which is ever trained on; exposure ranks canaries among them.

    Args:
        base: As in `rare`.
        count: R.
        max_length: As in `rare`.
        seed: Of the tokens.

    Returns:
        (R,) examples.
    """
    rng = seeds.stream(seed, "audit", "reference")
    length = max(_LEAST_LENGTH, min(_LENGTH, max_length))
    return [_random(base, length, rng) for _ in range(count)]


def new_token(base: Base, train: Mapping[str, Sequence[Example]], count: int, max_length: int, seed: int) -> Canaries:
    """Uniform tokens, then one that the training data hardly have, which alone carries loss.

    Args:
        base: A causal-lm.
        train: Client id -> training examples, for the frequencies.
        count: m; each has a last token of its own, so no more than the vocabulary.
        max_length: Most tokens of an example.
        seed: Of everything here.

    Returns:
        The canaries, none for a classifier.
    """
    if base.spec.task != "causal-lm":
        return Canaries("new-token", (), np.zeros(0, bool), ())
    rng = seeds.stream(seed, "audit", "new-token")
    usable = _usable(base)
    counts = np.zeros(base.vocab, np.int64)
    for examples in train.values():
        for example in examples:
            counts += np.bincount(example.tokens, minlength=base.vocab)[: base.vocab]
    order = usable[np.argsort(counts[usable] + rng.random(len(usable)), kind="stable")]
    length = max(_LEAST_LENGTH, min(_LENGTH, max_length))
    examples = []
    for last in order[:count]:
        tokens = np.append(rng.choice(usable, length - 1), last).astype(np.int32)
        targets = np.zeros(length, bool)
        targets[-1] = True
        examples.append(Example(tokens, targets))
    return _dealt("new-token", tuple(examples), list(train), seed)


def _usable(base: Base) -> NDArray[np.int64]:
    """Ids of tokens that are no special ones."""
    special = set(base.tokenizer.all_special_ids)
    return np.array([token for token in range(min(base.vocab, len(base.tokenizer))) if token not in special])


def _random(base: Base, length: int, rng: np.random.Generator) -> Example:
    tokens = rng.choice(_usable(base), length)
    if base.spec.task != "causal-lm":
        ends = [one for one in (base.tokenizer.cls_token_id, base.tokenizer.sep_token_id) if one is not None]
        tokens = np.concatenate([ends[:1], tokens[: length - len(ends)], ends[1:]])
        return Example(tokens.astype(np.int32), np.zeros(len(tokens), bool), int(rng.integers(len(base.spec.labels))))
    return Example(tokens.astype(np.int32), np.arange(length) > 0)


def _dealt(kind: str, examples: tuple[Example, ...], clients: Sequence[str], seed: int) -> Canaries:
    included = seeds.stream(seed, "audit", "coins", kind).random(len(examples)) < 0.5
    return Canaries(kind, examples, included, tuple(clients[number % len(clients)] for number in range(len(examples))))


def inserted(train: Mapping[str, Sequence[Example]], canaries: Sequence[Canaries]) -> dict[str, list[Example]]:
    """Training examples with the canaries whose coin says so, each a row and a user of its own.

    Args:
        train: Client id -> examples.
        canaries: Of every kind.

    Returns:
        Client id -> examples.
    """
    found = {client: list(examples) for client, examples in train.items()}
    number = 1 + max((example.row for examples in train.values() for example in examples), default=0)
    for some in canaries:
        for example, included, client in zip(some.examples, some.included, some.clients, strict=True):
            if included:
                found[client].append(replace(example, row=number, user=f"canary-{number}"))
            number += 1
    return found


def dealt_to(client: str, canaries: Sequence[Canaries]) -> int:
    """How many canaries a client was dealt, in and out: a number that says nothing of the coins.

    Args:
        client: Its id.
        canaries: Of every kind.

    Returns:
        The number.
    """
    return sum(some.clients.count(client) for some in canaries)
