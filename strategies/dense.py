"""Dense parameters (heads, norms, biases): a linear mean in the same change form as the factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lamina.protos.adapter import Array
from lamina.protos.messages import Release, Update
from lamina.strategies.base import LayerReport, Weighting, layer_weights, released


def averaged(
    current: Mapping[str, Array],
    updates: Sequence[Update],
    releases: Mapping[str, Release],
    weights: Mapping[str, float],
    weighting: Weighting,
    learning_rate: float = 1.0,
) -> tuple[dict[str, Array], dict[str, LayerReport]]:
    """G + eta * sum p_k (W_k - T_k) for each dense parameter.

    Args:
        current: Name -> float32 value before the round.
        updates: Accepted updates in client-id order.
        releases: Client id -> decoded release it started from.
        weights: Client id -> p_k.
        weighting: See `base.layer_weights`.
        learning_rate: The server's eta.

    Returns:
        New values in float32, and a report each.
    """
    values: dict[str, Array] = {}
    reports: dict[str, LayerReport] = {}
    for name, value in current.items():
        by_client = layer_weights(weights, updates, name, weighting)
        exact = value.astype(np.float64)
        for update in updates:
            if update.client_id not in by_client:
                continue
            start = released(releases, update.client_id).dense.get(name, value).astype(np.float64)
            exact += (
                learning_rate * by_client[update.client_id] * (update.adapter.dense[name].astype(np.float64) - start)
            )
        values[name] = exact.astype(np.float32)
        norm = float(np.linalg.norm(exact))
        error = float(np.linalg.norm(values[name] - exact))
        reports[name] = LayerReport(error / norm if norm > 0 else 0.0, 0.0, norm)
    return values, reports
