"""The shape of a strategy: `init`, `release` and `step` on an explicit, frozen state.

After FedJAX's pair of pure functions (Ro et al. 2021, arXiv:2108.02117). No I/O, no clock, no torch. All that changes
over a run is in `ServerState`, so checkpoints, resume and evaluation know nothing of the strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lamina.protos.adapter import EMPTY, Adapter
from lamina.protos.errors import ConfigError
from lamina.protos.messages import Budget, Release, Trainable, Update
from lamina.protos.spec import AdapterSpec

ReleasedView = Literal["own", "aggregate", "all_raw"]
Weighting = Literal["num_examples", "uniform", "contributors"]


@dataclass(frozen=True)
class LayerReport:
    """What one aggregation did to one layer.

    Attributes:
        relative_error: Frobenius distance of what is stored from G + eta * sum p_k D_k, over the norm of the latter.
        dropped_norm: Frobenius norm of the singular values that a rank cap dropped; the exact certificate.
        target_norm: Frobenius norm of the exact aggregate.
        singular_values: Of what is stored, descending.
    """

    relative_error: float
    dropped_norm: float = 0.0
    target_norm: float = 0.0
    singular_values: tuple[float, ...] = ()


@dataclass(frozen=True)
class ServerState:
    """Everything the coordinator carries from round to round.

    Attributes:
        round: Rounds completed; also the version of the next release.
        adapter: The global adapter G. Low-rank factors are float32; dense parameters are absolute values.
        optimizer: Further adapters that a strategy keeps, by name.
        privacy_history: What private mechanisms did, one event each; a step keeps what is there.
        report: What the last step did, by layer.
    """

    round: int
    adapter: Adapter
    optimizer: Mapping[str, Adapter] = field(default_factory=dict)
    privacy_history: tuple[Mapping[str, Any], ...] = ()
    report: Mapping[str, LayerReport] = field(default_factory=dict)

    @property
    def relative_error(self) -> float:
        """The largest relative error over layers in the last step."""
        return max((layer.relative_error for layer in self.report.values()), default=0.0)


Init = Callable[[AdapterSpec], ServerState]
ReleaseTo = Callable[[ServerState, Budget], Release]
Step = Callable[[ServerState, Sequence[Update], Mapping[str, Release], np.random.Generator], ServerState]


@dataclass(frozen=True)
class Strategy:
    """Server maths of one method, as three pure functions and what holds of them.

    Attributes:
        name: The word for `strategy=`.
        init: Spec -> state before the first round.
        release: State and budget -> what a client of this budget receives now.
        step: State, accepted updates, the decoded releases they started from, and a generator -> next state.
        exact: Whether the aggregate is G + eta * sum p_k D_k up to a reported certificate.
        equal_ranks: Whether all clients must have one rank and one scale.
        linear: Whether the server needs only sums of what is sent.
        sides: The factors that are trained, round after round, and then from the start again.
        released_view: What a client sees of the others: its own, the aggregate, or every raw update.
        stable_coordinates: Whether a client finds its factors in the same coordinates next round.
    """

    name: str
    init: Init
    release: ReleaseTo
    step: Step
    exact: bool
    equal_ranks: bool = False
    linear: bool = False
    sides: tuple[Trainable, ...] = ("AB",)
    released_view: ReleasedView = "aggregate"
    stable_coordinates: bool = False


def client_weights(updates: Iterable[Update], weighting: Weighting) -> dict[str, float]:
    """The weight p_k of each client, over all accepted updates of a round.

    Args:
        updates: The accepted updates.
        weighting: `uniform`, or by `num_examples` (also the base of `contributors`).

    Returns:
        Client id -> p_k >= 0, summing to 1.

    Raises:
        ConfigError: If there is no update, a count is negative, or all are zero.
    """
    counts = {u.client_id: 1 if weighting == "uniform" else u.num_examples for u in updates}
    if not counts or min(counts.values()) < 0 or sum(counts.values()) == 0:
        raise ConfigError(
            f"expected updates with num_examples >= 0 and a positive sum, got {counts}. "
            "Use aggregation.weights=uniform, or check what the clients report."
        )
    total = sum(counts.values())
    return {client: count / total for client, count in counts.items()}


def layer_weights(
    weights: Mapping[str, float], updates: Sequence[Update], layer: str, weighting: Weighting
) -> dict[str, float]:
    """The weights of one layer: all p_k, or renormalised over the clients that train it.

    Args:
        weights: Client id -> p_k.
        updates: The accepted updates.
        layer: Module or dense parameter name.
        weighting: Only `contributors` renormalises.

    Returns:
        Client id -> weight of those that train the layer.
    """
    present = {
        u.client_id: weights[u.client_id] for u in updates if layer in u.adapter.lora or layer in u.adapter.dense
    }
    total = sum(present.values())
    if weighting != "contributors" or total == 0:
        return present
    return {client: weight / total for client, weight in present.items()}


def released(releases: Mapping[str, Release], client_id: str) -> Adapter:
    """The trainable part that a client started from.

    Args:
        releases: Client id -> decoded release.
        client_id: Whose.

    Returns:
        T_k; empty where nothing was released.
    """
    return releases[client_id].trainable if client_id in releases else EMPTY
