"""What a model says of single examples: the numbers that every membership score is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.client.data import Example
from lamina.client.losses import (
    IGNORED,
    Batch,
    collate,
    longest,
    loss_chunk_tokens,
    pad_id,
    padded_length,
)
from lamina.client.model import Base, head_of, last_state
from lamina.protos.errors import DataError, TrainingError

Floats = NDArray[np.float64]
# Share of an example's tokens that Min-K%++ looks at: the value of its paper, fixed before any result is seen.
MIN_K_SHARE = 0.2
# A loss of 0 has no finite logit.
_LEAST_LOSS = 1e-12


@dataclass(frozen=True, eq=False)
class Statistics:
    """Figures of n examples under one adapter, in their order.

    Attributes:
        loss: (n,) mean loss of an example's targets, in nats; of a classifier, of its label.
        confidence: (n,) log p - log(1 - p), where p is the probability of the label, or exp(-loss) for text.
        min_k: (n,) Min-K%++ of text, NaN for a classifier.
        margin: (n,) of a classifier the logit of the label less the largest other one, NaN for text.
    """

    loss: Floats
    confidence: Floats
    min_k: Floats
    margin: Floats


@torch.no_grad()
def measured(base: Base, examples: Sequence[Example], batch_size: int) -> Statistics:
    """Figures of whatever is in the slots.

    Min-K%++ (Zhang et al. 2024, arXiv:2404.02936) standardises the log-probability of each target by the mean and deviation that
    the model's own distribution gives it there, and takes the mean of the lowest fifth.

    Args:
        base: With an adapter in its slots, or with none for the public base; not in training mode.
        examples: At least one; all with labels, or none.
        batch_size: Examples in a forward pass.

    Returns:
        Figures in float64.

    Raises:
        DataError: If there is no example.
        TrainingError: If a loss is not finite.
    """
    if not examples:
        raise DataError("membership: expected examples to score, got none. Check data.holdout and the audit's sizes.")
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    rows = np.full((len(examples), 4), np.nan)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        some = [examples[index] for index in chosen]
        length = padded_length(base, longest(some), len(examples[order[-1]].tokens))
        batch = collate(some, pad_id(base), base.device, length)
        rows[chosen] = _of_labels(base, batch) if batch.targets.dim() == 1 else _of_text(base, batch)
    of_task = [0, 1, 3] if examples[0].label >= 0 else [0, 1, 2]
    if not np.isfinite(rows[:, of_task]).all():
        raise TrainingError("membership: expected finite losses, got others. Is the adapter of this base?")
    return Statistics(*rows.T.copy())


def _of_labels(base: Base, batch: Batch) -> Floats:
    logits = base.model(input_ids=batch.tokens, attention_mask=batch.mask).logits.double()
    wanted = batch.targets.unsqueeze(1)
    label = logits.gather(1, wanted).squeeze(1)
    others = logits.scatter(1, wanted, -torch.inf)
    # Without passing through p, which is 1 to the last bit for a label that is learnt by heart.
    confidence = label - others.logsumexp(1)
    loss = torch.nn.functional.softplus(-confidence)
    margin = label - others.amax(1)
    return torch.stack([loss, confidence, torch.full_like(loss, torch.nan), margin], 1).cpu().numpy()


def _of_text(base: Base, batch: Batch) -> Floats:
    kept = batch.targets[:, 1:] != IGNORED
    nats, standard = _of_targets(base, batch, kept)
    ends = np.cumsum(kept.sum(1).cpu().numpy())[:-1]
    rows = []
    for losses, scores in zip(np.split(nats, ends), np.split(standard, ends), strict=True):
        lowest = np.sort(scores)[: max(1, int(len(scores) * MIN_K_SHARE))]
        loss = float(losses.mean())
        rows.append((loss, logit_of(loss), float(lowest.mean()), np.nan))
    return np.array(rows)


def logit_of(loss: float) -> float:
    """The logit of p = exp(-loss).

    Args:
        loss: In nats, at least 0.

    Returns:
        A finite number.
    """
    kept = max(loss, _LEAST_LOSS)
    return -kept - float(np.log(-np.expm1(-kept)))


def _of_targets(base: Base, batch: Batch, kept: torch.Tensor) -> tuple[Floats, Floats]:
    """Loss and standardised log-probability of every target, row after row, with the logits of a few at a time."""
    form: Callable[[torch.Tensor], torch.Tensor]
    if base.split_head:
        states, form = last_state(base, batch.tokens, batch.mask), head_of(base)
    else:
        states = base.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
        form = torch.nn.Identity()
    states, wanted = states[:, :-1][kept], batch.targets[:, 1:][kept]
    nats, standard = [], []
    size = loss_chunk_tokens(base.vocab)
    for start in range(0, len(wanted), size):
        logs = form(states[start : start + size]).double().log_softmax(-1)
        likely = logs.exp()
        mean = (likely * logs).sum(-1, keepdim=True)
        spread = (likely * (logs - mean).square()).sum(-1).sqrt()
        of_target = logs.gather(1, wanted[start : start + size].unsqueeze(1)).squeeze(1)
        nats.append(-of_target)
        standard.append((of_target - mean.squeeze(1)) / spread.clamp_min(1e-12))
    return torch.cat(nats).cpu().numpy(), torch.cat(standard).cpu().numpy()
