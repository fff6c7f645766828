"""Held-out figures of whatever is in the slots, and short continuations for a person to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lamina.client.data import Example
from lamina.client.losses import collate, longest, losses, pad_id, padded_length
from lamina.client.model import Base


@dataclass(frozen=True)
class Score:
    """Sums over one held-out set.

    Attributes:
        nats: Summed negative log-likelihood.
        targets: Tokens predicted, or examples classified.
        hits: Targets whose most likely value is right.
    """

    nats: float
    targets: int
    hits: int

    @property
    def loss(self) -> float:
        """Mean, in nats a target."""
        return self.nats / self.targets if self.targets else math.nan

    @property
    def accuracy(self) -> float:
        """Share of targets that are right."""
        return self.hits / self.targets if self.targets else math.nan


@torch.no_grad()
def score(base: Base, examples: Sequence[Example], batch_size: int) -> Score:
    """Score a held-out set.

    Args:
        base: With an adapter in its slots, not in training mode.
        examples: The set.
        batch_size: Examples in a forward pass.

    Returns:
        Sums.
    """
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    nats, hits, targets = 0.0, 0, 0
    for start in range(0, len(ordered), batch_size):
        some = ordered[start : start + batch_size]
        length = padded_length(base, longest(some), longest(ordered))
        summed, right, count = losses(base, collate(some, pad_id(base), base.device, length))
        nats, hits, targets = nats + float(summed), hits + int(right), targets + count
    return Score(nats, targets, hits)


@torch.no_grad()
def continuation(base: Base, prompt: Sequence[int], new_tokens: int) -> str:
    """Greedy continuation of a prompt.

    Args:
        base: A causal-lm with an adapter in its slots.
        prompt: Token ids.
        new_tokens: How many to add at most.

    Returns:
        The text of the new tokens.
    """
    ids = torch.tensor([list(prompt)], device=base.device)
    out = base.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=pad_id(base),
        use_cache=True,
    )
    return str(base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
