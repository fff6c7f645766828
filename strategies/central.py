"""client-dp: a trusted coordinator clips each client's change, adds noise to their sum, and releases nothing else.

The release is G + eta (sum_k w_k clip(D_k, C) + N(0, z^2 C^2 I)) / W: DP-FedAvg (McMahan et al. 2018, arXiv:1710.06963) with
weights 0 <= w_k <= 1 and a denominator W that is fixed before the run, so that one client more or less moves the sum by at most C
whatever the others send, how many answer, and how much data anybody has. D_k is in the coordinates that noise is added in:
the change of the trained factor in the slots of the global one, zero elsewhere, at the global scale, and of the dense parameters.

Only for strategies that need no more than this sum: where factors are formed anew from the updates (`recompress`, `residual`,
`stack`) there are no common coordinates to bound a client in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lamina.protos.adapter import Adapter, Array
from lamina.protos.errors import ConfigError
from lamina.protos.messages import Budget, Release, Trainable, Update
from lamina.protos.privacy.events import Event, to_json
from lamina.protos.privacy.noise import Stream, noised
from lamina.protos.sides import change_of, numbers_of, with_numbers
from lamina.protos.spec import AdapterSpec
from lamina.strategies.base import ServerState, Strategy
from lamina.strategies.exact import in_order

Changes = dict[str, Array]
_NOBODY = Budget({}, {}, {})


@dataclass(frozen=True)
class Central:
    """The mechanism of one round.

    Attributes:
        clip_norm: C, the largest L2 norm of a client's change.
        noise_multiplier: z, in units of C.
        sample_rate: Probability with which a client is asked; 1 where all are.
        denominator: W.
        full_weight: Examples at which a client has weight 1, and less below; None gives all weight 1.
    """

    clip_norm: float
    noise_multiplier: float
    sample_rate: float
    denominator: float
    full_weight: int | None = None

    def event(self, round_number: int) -> Event:
        """What the round is in a ledger."""
        return Event("", round_number, self.noise_multiplier, self.sample_rate, 1, self.clip_norm, "client")


def private(inner: Strategy, central: Central, streams: Callable[[int], Stream]) -> Strategy:
    """A linear strategy under client-dp.

    The guarantee is for adding or removing one client with all that it sends in all rounds: the steps' events compose. It
    holds against whoever sees releases and final adapter, not against the coordinator.

    Args:
        inner: Which is linear, or has only dense parameters to average.
        central: Clipping, noise and denominator.
        streams: Round -> where its noise comes from.

    Returns:
        The strategy. A step adds its event to `privacy_history`; one without updates is a step of noise alone.

    Raises:
        ConfigError: At `init`, if factors are trained and the strategy is not linear.
    """

    def init(spec: AdapterSpec) -> ServerState:
        if spec.modules and not inner.linear:
            raise ConfigError(
                f"privacy.mode=client-dp: expected a strategy that needs only sums, got {inner.name}. Set strategy=ffa."
            )
        return inner.init(spec)

    def step(
        state: ServerState, updates: Sequence[Update], releases: Mapping[str, Release], rng: np.random.Generator
    ) -> ServerState:
        side = inner.release(state, _NOBODY).train
        total = nothing(state.adapter, side)
        for update in in_order(updates):
            one = change(state.adapter, update.adapter, releases[update.client_id].trainable, side)
            share = _weight(central, update) * clipping(one, central.clip_norm)
            if share > 0:
                for name, value in one.items():
                    total[name][tuple(slice(size) for size in value.shape)] += share * value
        stream = streams(state.round + 1)
        mean = {
            name: noised(value, central.noise_multiplier * central.clip_norm, stream) / central.denominator
            for name, value in sorted(total.items())  # so that a restart gives every number its noise again
        }
        everybody = Update("", state.round + 1, "", "", _moved(state.adapter, mean, side), 1)
        after = inner.step(state, [everybody], {"": Release(state.round, state.adapter, train=side)}, rng)
        event = to_json(central.event(state.round + 1))
        return replace(after, privacy_history=(*state.privacy_history, event))

    return replace(inner, init=init, step=step)


def nothing(current: Adapter, side: Trainable) -> Changes:
    """Zero in every coordinate that a round can change.

    Args:
        current: The global adapter.
        side: Which factor the round trains.

    Returns:
        Module or dense name -> zeros, float64.
    """
    lora = {module: np.zeros_like(numbers_of(f, side), np.float64) for module, f in current.lora.items()}
    return lora | {name: np.zeros_like(value, np.float64) for name, value in current.dense.items()}


def change(current: Adapter, trained: Adapter, start: Adapter, side: Trainable) -> Changes:
    """One client's change in the global coordinates.

    Args:
        current: The global adapter, for its scales.
        trained: What the client ended with.
        start: What it started from.
        side: Which factor it trained.

    Returns:
        Module or dense name -> (r_k, d_in), (d_out, r_k), (r_k, r_k) or the dense shape, float64; slots beyond r_k are zero.
    """
    found: Changes = {}
    for module, factors in trained.lora.items():
        found[module] = change_of(factors, start.lora[module], side, current.lora[module].scale)
    for name, value in trained.dense.items():
        found[name] = value.astype(np.float64) - start.dense.get(name, current.dense[name])
    return found


def clipping(one: Changes, clip_norm: float) -> float:
    """What a change is multiplied by, so that its norm over all coordinates is at most `clip_norm`.

    Args:
        one: See `change`.
        clip_norm: C.

    Returns:
        In [0, 1]; 0 for a change that is not finite, which then counts as none.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norm = math.sqrt(sum(float(np.square(value).sum()) for value in one.values()))
    if not math.isfinite(norm):
        return 0.0
    return 1.0 if norm <= clip_norm else clip_norm / norm


def _weight(central: Central, update: Update) -> float:
    if central.full_weight is None:
        return 1.0
    return min(1.0, max(0, update.num_examples) / central.full_weight)


def _moved(current: Adapter, mean: Changes, side: Trainable) -> Adapter:
    """The global adapter with a change added, float64."""
    lora = {
        module: with_numbers(f, side, numbers_of(f, side).astype(np.float64) + mean[module])
        for module, f in current.lora.items()
    }
    return Adapter(lora, {name: value.astype(np.float64) + mean[name] for name, value in current.dense.items()})
