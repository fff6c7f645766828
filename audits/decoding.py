"""Token by token: greedy continuations and samples of many sequences at once.

Not `generate` of the model's library: its settings travel with a model and may penalise repetition, which is what is looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.client.model import Base

Floats = NDArray[np.float64]
Ids = NDArray[np.int32]


def start_token(base: Base) -> int:
    """What a text of the base begins with where nothing is known of it.

    Args:
        base: A causal-lm.

    Returns:
        The token of a beginning, or that of an end, after which another text begins; 0 without either.
    """
    first = base.tokenizer.bos_token_id
    return int((base.tokenizer.eos_token_id if first is None else first) or 0)


@torch.no_grad()
def next_logs(base: Base, tokens: Ids, cache: Any) -> tuple[Floats, Any]:
    """Log-probabilities of the token after some.

    Args:
        base: A causal-lm with an adapter in its slots.
        tokens: (n, length) that follow what is in the cache.
        cache: Of an earlier call with the same adapter, or None.

    Returns:
        (n, vocabulary), and the cache for the next call.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64, device=base.device)
    out = base.model(input_ids=ids, past_key_values=cache, use_cache=True)
    return out.logits[:, -1].double().log_softmax(-1).cpu().numpy(), out.past_key_values


def greedy(base: Base, prompts: Ids, new_tokens: int, batch_size: int) -> Ids:
    """The most likely token, again and again.

    Args:
        base: A causal-lm with an adapter in its slots.
        prompts: (n, length), all of one length.
        new_tokens: How many to add; an end of text is a token like another.
        batch_size: Prompts at a time.

    Returns:
        (n, new_tokens).
    """
    found = []
    for start in range(0, len(prompts), batch_size):
        tokens, cache, added = prompts[start : start + batch_size], None, []
        for _ in range(new_tokens):
            logs, cache = next_logs(base, tokens, cache)
            tokens = logs.argmax(-1).astype(np.int32)[:, None]
            added.append(tokens)
        found.append(np.concatenate(added, axis=1))
    return np.concatenate(found)


def sampled(
    base: Base, count: int, new_tokens: int, step: Callable[[Ids], Floats], rng: np.random.Generator
) -> list[Ids]:
    """Sequences from a start token on, drawn token by token.

    Args:
        base: For its tokens of start and end.
        count: Sequences.
        new_tokens: Of each at most; an end of text ends it, and is its last token.
        step: (count, 1) latest tokens to (count, vocabulary) unnormalised log-probabilities, -inf for never.
        rng: Of the draws.

    Returns:
        Sequences of at least one token, without the start token.
    """
    tokens = np.full((count, 1), start_token(base), np.int32)
    added = []
    for _ in range(new_tokens):
        scores = step(tokens)
        # A draw from the softmax is the largest score after Gumbel noise.
        tokens = (scores + rng.gumbel(size=scores.shape)).argmax(-1).astype(np.int32)[:, None]
        added.append(tokens)
    whole = np.concatenate(added, axis=1)
    return [_to_its_end(row, base.tokenizer.eos_token_id) for row in whole]


def _to_its_end(row: Ids, end: int | None) -> Ids:
    ends = np.flatnonzero(row == (-1 if end is None else end))
    return row[: ends[0] + 1] if ends.size else row


def text_of(base: Base, tokens: NDArray[np.integer[Any]] | Sequence[int]) -> str:
    """Tokens as text, without special ones.

    Args:
        base: For its tokenizer.
        tokens: Ids.

    Returns:
        Text.
    """
    return str(base.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True))
