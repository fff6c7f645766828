"""The loss of a batch, with the logits of a few tokens at a time, so that a large vocabulary costs no memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from lamina.client.data import Example
from lamina.client.model import Base, head_of, last_state

IGNORED = -100
_LEAST_LENGTH = 16
# Logits are formed for at most this many bytes of float32 at a time.
LOSS_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Batch:
    """Padded examples on a device.

    Attributes:
        tokens: (batch, length) int64.
        mask: (batch, length) int64, 0 on padding.
        targets: (batch, length) int64 with -100 where no loss falls, or labels (batch,).
        weights: (batch,) float32, by which the loss of each row is multiplied, or None for 1.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None = None


def collate(
    examples: Sequence[Example],
    pad: int,
    device: torch.device,
    length: int = 0,
    weights: Sequence[float] | None = None,
) -> Batch:
    """Pad examples to the longest of them, or to a length.

    Args:
        examples: At least one.
        pad: Id of the padding token.
        device: Where to.
        length: Tokens; no less than the longest has.
        weights: By which the loss of each example is multiplied; default: 1.

    Returns:
        A batch.
    """
    length = max(length, *(len(example.tokens) for example in examples))
    tokens = np.full((len(examples), length), pad, np.int64)
    mask = np.zeros((len(examples), length), np.int64)
    targets = np.full((len(examples), length), IGNORED, np.int64)
    for row, example in enumerate(examples):
        size = len(example.tokens)
        tokens[row, :size], mask[row, :size] = example.tokens, 1
        targets[row, :size] = np.where(example.targets, example.tokens, IGNORED)
    if examples[0].label >= 0:
        targets = np.array([example.label for example in examples], np.int64)
    made = Batch(*(torch.from_numpy(values).to(device) for values in (tokens, mask, targets)))
    if weights is None:
        return made
    return replace(made, weights=torch.tensor(weights, dtype=torch.float32, device=device))


def pad_id(base: Base) -> int:
    """Id of the padding token, 0 where the tokenizer has none.

    Args:
        base: The base.

    Returns:
        Token id.
    """
    return int(base.tokenizer.pad_token_id or 0)


def longest(examples: Sequence[Example]) -> int:
    """Tokens of the longest example.

    Args:
        examples: At least one.

    Returns:
        How many.
    """
    return max(len(example.tokens) for example in examples)


def padded_length(base: Base, length: int, most: int) -> int:
    """How long a batch is made.

    Args:
        base: Where it is computed.
        length: Tokens of its longest example.
        most: Tokens of the longest example of all batches.

    Returns:
        As long as its longest example; on a processor with activations of 16 bits one of a few lengths, as the library that
        multiplies there keeps buffers for every shape that it has seen, tens of megabytes each.
    """
    if base.device.type != "cpu" or base.dtype == torch.float32:
        return length
    found = most
    while found >= 2 * max(length, _LEAST_LENGTH):
        found //= 2
    return max(found, length)


def loss_chunk_tokens(vocab: int) -> int:
    """For how many tokens logits are formed at one time.

    Args:
        vocab: Size of the vocabulary.

    Returns:
        At least 16.
    """
    return max(16, LOSS_CHUNK_BYTES // (4 * vocab))


def losses(base: Base, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Summed negative log-likelihood of a batch, each row's times its weight, hits, and how many targets there are.

    Args:
        base: With an adapter in its slots.
        batch: What to score.

    Returns:
        Sum in nats (float32 scalar with gradient), number of targets whose most likely value is right, number of targets.
    """
    if batch.targets.dim() == 2 and _in_pieces(base, batch):
        return _losses_in_chunks(base, batch)
    logits = base.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
    if batch.targets.dim() == 1:
        scores, wanted, weights = logits.float(), batch.targets, batch.weights
    else:
        wanted, kept, weights = _wanted(batch)
        scores = logits[:, :-1].reshape(-1, logits.shape[-1]).float()[kept]
    total, hits = _summed(scores, wanted, weights)
    return total, hits, int(wanted.numel())


def _in_pieces(base: Base, batch: Batch) -> bool:
    """Whether logits are formed a few at a time: where they are many, and their layer is not trained, as it sees no rows then."""
    many = base.split_head and batch.tokens.numel() > loss_chunk_tokens(base.vocab)
    return many and not any(one.requires_grad for one in head_of(base).parameters())


def _wanted(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The targets of a batch, which of its tokens but the last have one, and the weight of each."""
    wanted = batch.targets[:, 1:].reshape(-1)
    kept = wanted != IGNORED
    if batch.weights is None:
        return wanted[kept], kept, None
    each = batch.weights.unsqueeze(1).expand(-1, batch.targets.shape[1] - 1)
    return wanted[kept], kept, each.reshape(-1)[kept]


def _summed(
    scores: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    hits = (scores.detach().argmax(-1) == wanted).sum()
    if weights is None:
        return torch.nn.functional.cross_entropy(scores, wanted, reduction="sum"), hits
    return (torch.nn.functional.cross_entropy(scores, wanted, reduction="none") * weights).sum(), hits


def _losses_in_chunks(base: Base, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The same with logits of a few tokens at a time, formed again for the gradient; only where there is a target."""
    states, head = last_state(base, batch.tokens, batch.mask), head_of(base)
    wanted, kept, weights = _wanted(batch)
    states = states[:, :-1].reshape(-1, states.shape[-1])[kept]

    def scored(
        some: torch.Tensor, targets: torch.Tensor, each: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _summed(head(some).float(), targets, each)

    size = loss_chunk_tokens(base.vocab)
    total = states.new_zeros((), dtype=torch.float32)
    hits = torch.zeros((), dtype=torch.int64, device=states.device)
    for start in range(0, wanted.numel(), size):
        piece = slice(start, start + size)
        some, targets, each = states[piece], wanted[piece], None if weights is None else weights[piece]
        nats, right = (
            checkpoint(scored, some, targets, each, use_reentrant=False)
            if some.requires_grad
            else scored(some, targets, each)
        )
        total, hits = total + nats, hits + right
    return total, hits, int(wanted.numel())
