"""Membership by likelihood ratios against shadow models: arrays in, scores out. Higher is more likely a member."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from lamina.protos.errors import ConfigError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
# RMIA asks how many others an example beats by this factor. With 1 the answer is a rank.
GAMMA = 1.0
# Shadows from which on both of LiRA's Gaussians have a spread that can be estimated.
ONLINE_SHADOWS = 4
_LEAST_SPREAD = 1e-6


def _check(target: Floats, shadows: Floats, included: Bools) -> None:
    wanted = (len(included), len(target))
    if shadows.shape != wanted or included.shape != wanted:
        raise ConfigError(
            f"membership: expected figures and halves of shape {wanted}, got {shadows.shape} and {included.shape}."
        )
    if not (included.any(0).all() and (~included).any(0).all()):
        raise ConfigError("membership: expected every example in some shadow's half and out of another's.")


def rmia(loss: Floats, shadow_loss: Floats, included: Bools) -> Floats:
    """RMIA with reference models that saw an example and others that did not (Zarifzadeh et al. 2024, arXiv:2312.03262).

    The likelihood of an example under the audited model is divided by its likelihood in general: the mean of its mean over the
    shadows that saw it and over those that did not. The score is the share of the pool whose ratio is smaller by `GAMMA`; the
    pool takes the place of a population sample. As GAMMA is the same for all, which examples the pool holds decides how fine
    the score is and not the order of two examples. The likelihood of text is that of its mean token, exp(-loss).

    Args:
        loss: (n,) nats under the audited model.
        shadow_loss: (K, n) nats under each shadow.
        included: (K, n) whether each shadow was trained on each example.

    Returns:
        (n,) in [0, 1].

    Raises:
        ConfigError: If shapes differ, or an example is in every shadow or in none.
    """
    _check(loss, shadow_loss, included)

    def mean_log(of: Bools) -> Floats:
        return np.asarray(logsumexp(-shadow_loss, axis=0, b=of) - np.log(of.sum(0)), np.float64)

    general = np.logaddexp(mean_log(included), mean_log(~included)) - np.log(2)
    ratio = -loss - general
    beaten = np.searchsorted(np.sort(ratio), ratio - np.log(GAMMA), side="right")
    return np.asarray(beaten / len(ratio), np.float64)


def lira(confidence: Floats, shadow_confidence: Floats, included: Bools) -> Floats:
    """LiRA (Carlini et al. 2022, arXiv:2112.03570) on logit-scaled confidence.

    From four shadows on: the log-ratio of two Gaussians, one of the shadows that saw an example and one of those that did not,
    with means of its own and, as its paper has it for few shadows, spreads of the whole pool. Below: its offline form, against
    the shadows that did not see the example, where with one spread for all the order is that of the difference of means.

    Args:
        confidence: (n,) log p - log(1 - p) under the audited model.
        shadow_confidence: (K, n) the same under each shadow.
        included: (K, n) whether each shadow was trained on each example.

    Returns:
        (n,).

    Raises:
        ConfigError: If shapes differ, or an example is in every shadow or in none.
    """
    _check(confidence, shadow_confidence, included)
    without, without_spread = _gaussians(shadow_confidence, ~included)
    if len(included) < ONLINE_SHADOWS:
        return np.asarray(confidence - without, np.float64)
    seen, seen_spread = _gaussians(shadow_confidence, included)
    far, near = (confidence - without) / without_spread, (confidence - seen) / seen_spread
    return np.asarray(0.5 * far**2 + np.log(without_spread) - 0.5 * near**2 - np.log(seen_spread), np.float64)


def _gaussians(values: Floats, of: Bools) -> tuple[Floats, float]:
    """Mean of each example over some of the shadows, and the spread about these means of all."""
    counts = of.sum(0)
    means = np.where(of, values, 0).sum(0) / counts
    freedom = int((counts - 1).sum())
    square = float((np.where(of, values - means, 0) ** 2).sum()) / max(1, freedom)
    return means, max(float(np.sqrt(square)), _LEAST_SPREAD)
