"""From a set of tokens to text: each next token is the one of the set that the base finds likeliest.

Several first tokens are tried and the likeliest text is kept. A token that was used before costs more each time, as a set does
not say how often a token came and the likeliest continuation of a small set is a loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.client.model import Base, put
from lamina.protos.adapter import Adapter

Ids = NDArray[np.int64]
Text = Sequence[int] | NDArray[np.int64] | NDArray[np.int32]
_AGAIN = 1.0  # nats that a token costs for each time that it is there already


@torch.no_grad()
def ordered(base: Base, tokens: Text, length: int, starts: int) -> Ids:
    """Put recovered tokens into the order that the base finds likely, greedily.

    Args:
        base: A causal-lm; its slots are emptied.
        tokens: Recovered ids, the surest first.
        length: Tokens of the text.
        starts: How many of them are tried as the first.

    Returns:
        (length,) ids; empty where there are no tokens.
    """
    put(base, Adapter(), None, trainable=False)
    allowed = torch.as_tensor(np.asarray(tokens, np.int64), device=base.device)
    if not len(allowed) or length < 1:
        return np.zeros(0, np.int64)
    texts = allowed[:starts].unsqueeze(1)
    used = (texts == allowed).float()
    total = torch.zeros(len(texts), device=base.device)
    for _ in range(length - 1):
        logits = base.model(input_ids=texts, use_cache=False).logits[:, -1].float()
        nats = torch.log_softmax(logits, dim=-1)[:, allowed]
        chosen = (nats - _AGAIN * used).argmax(dim=1)
        total += nats.gather(1, chosen.unsqueeze(1)).squeeze(1) - _AGAIN * used.gather(1, chosen.unsqueeze(1)).squeeze(
            1
        )
        used.scatter_add_(1, chosen.unsqueeze(1), torch.ones_like(total).unsqueeze(1))
        texts = torch.cat([texts, allowed[chosen].unsqueeze(1)], dim=1)
    return texts[int(total.argmax())].cpu().numpy().astype(np.int64)


def rouge_l(text: Text, original: Text) -> float:
    """ROUGE-L (Lin 2004) between two texts by tokens: the F1 of their longest common subsequence.

    Args:
        text: Ids.
        original: Ids.

    Returns:
        0 to 1; 0 where one is empty.
    """
    common = _common([int(one) for one in text], [int(one) for one in original])
    return 2 * common / (len(text) + len(original)) if common else 0.0


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common subsequence, a row of its table at a time as the bits of a number (Hyyrö 2004)."""
    places: dict[int, int] = {}
    for at, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << at
    every = (1 << len(one)) - 1
    row = every
    for token in other:
        there = row & places.get(token, 0)
        row = ((row + there) | (row - there)) & every
    return len(one) - row.bit_count()


def best_match(text: Text, originals: Iterable[Text]) -> tuple[float, int]:
    """The original that a text is closest to.

    Args:
        text: Ids.
        originals: Any number.

    Returns:
        Its ROUGE-L and its number; (0, -1) without any.
    """
    return max(((rouge_l(text, original), number) for number, original in enumerate(originals)), default=(0.0, -1))
