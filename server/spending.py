"""What a run has cost its clients' privacy, as far as the coordinator can tell: events in, epsilon out.

Under example-dp each accepted update says what its client's mechanism did. The coordinator keeps these events in
`ServerState.privacy_history`, so that they outlive it, and computes each client's epsilon from all of them. Of rounds that a
client trained and that do not count (late, refused, lost) it knows by the client's own claim alone, which its ledger makes: the
larger of both is shown. Under client-dp the history holds the events of the central mechanism, with an empty client id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.protos.config import Config
from lamina.protos.errors import ConfigError, UpdateRejected
from lamina.protos.messages import Update
from lamina.protos.privacy.accounting import ACCOUNTANT, bound, epsilon, epsilon_rdp
from lamina.protos.privacy.events import Claim, Event, Unit, from_claim, from_json, to_json

EXAMPLE_DP, CLIENT_DP = "example-dp", "client-dp"
# Of a claim, beside its event; it is no part of the event.
_CLAIMED = "claimed_epsilon"
_SLACK = 1e-6  # the same epsilon by another version of the accountant
History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Promise:
    """What a run promises of privacy.

    Attributes:
        mode: `example-dp` or `client-dp`.
        unit: What one unit is.
        target_delta: The delta of every epsilon.
        budget: Largest epsilon of any client, or None.
        steps: That a client takes in a round.
        clip: Largest L2 norm of what one unit gives to a step.
        summed: Whether only sums of updates arrive, which carry no claims. Then the budget, which each site keeps, is all that
            the coordinator knows.
    """

    mode: str
    unit: Unit
    target_delta: float
    budget: float | None
    steps: int
    clip: float
    summed: bool = False


def promise_of(config: Config) -> Promise | None:
    """What a config promises.

    Args:
        config: A checked config.

    Returns:
        The promise, or None without privacy.
    """
    privacy, train = config.privacy, config.train
    if privacy.mode == "none":
        return None
    central = privacy.mode == CLIENT_DP
    unit: Unit = "client" if central else "user" if privacy.unit == "user" else "record"
    steps, clip = (1, privacy.clip_norm) if central else (train.local_steps, train.max_grad_norm)
    return Promise(privacy.mode, unit, privacy.delta, privacy.epsilon, steps, clip, privacy.secagg)


def check_claim(promise: Promise, update: Update) -> None:
    """Refuse an update that does not say what its noise was, or says what is not the run's.

    Args:
        promise: Of the run.
        update: From a client; nothing of it is believed.

    Raises:
        UpdateRejected: `privacy` where the claim is absent, or not what the run promises; `malformed` where it is none.
    """
    if promise.mode != EXAMPLE_DP or promise.summed:
        return
    where = f"client {update.client_id}, round {update.round}"
    if update.privacy is None:
        raise UpdateRejected(
            "privacy", f"{where}: expected an update with what its mechanism did, got one without noise."
        )
    claim = _claim(promise, update)
    found = {"steps": claim.event.steps, "clip": claim.event.clip, "delta": claim.target_delta}
    for name, wanted in {"steps": promise.steps, "clip": promise.clip, "delta": promise.target_delta}.items():
        if found[name] != wanted:
            raise UpdateRejected(
                "privacy", f"{where}: expected {name} {wanted:g} as in the terms, got {found[name]:g}."
            )
    if promise.budget is not None and claim.epsilon > promise.budget * (1 + _SLACK):
        raise UpdateRejected(
            "privacy",
            f"{where}: expected an epsilon of at most {promise.budget:g}, got {claim.epsilon:.4g}: it has spent more.",
        )


def _claim(promise: Promise, update: Update) -> Claim:
    try:
        return from_claim(update.privacy or {}, update.client_id, update.round, promise.unit)
    except ConfigError as error:
        raise UpdateRejected("malformed", str(error)) from None


def charges(promise: Promise | None, updates: Iterable[Update]) -> tuple[Mapping[str, Any], ...]:
    """What a round's accepted updates add to the history.

    Args:
        promise: Of the run, or None without privacy.
        updates: That `check_claim` has let pass.

    Returns:
        An entry each; none under client-dp, whose events its strategy adds, and none of a sum.
    """
    if promise is None or promise.mode != EXAMPLE_DP or promise.summed:
        return ()
    claims = (_claim(promise, update) for update in updates)
    return tuple({**to_json(claim.event), _CLAIMED: claim.epsilon} for claim in claims)


@dataclass(frozen=True)
class Spent:
    """What was spent so far.

    Attributes:
        worst: The largest epsilon of any client; under client-dp of the central mechanism.
        per_client: Client id -> epsilon; empty under client-dp.
        rdp: The largest by RDP, a looser bound that is computed in another way.
    """

    worst: float
    per_client: Mapping[str, float]
    rdp: float


def spent(history: History, target_delta: float) -> Spent:
    """The epsilon of everything in a history, from its events, and never less than what a client claims.

    Args:
        history: `ServerState.privacy_history`.
        target_delta: The delta of it.

    Returns:
        Per client, and the worst.

    Raises:
        ConfigError: If an entry is no event.
    """
    events, claimed = _by_client(history)
    found = {client: max(epsilon(of, target_delta), claimed[client]) for client, of in events.items()}
    rdp = max((epsilon_rdp(of, target_delta) for of in events.values()), default=0.0)
    worst = max(found.values(), default=0.0)
    return Spent(worst, {client: value for client, value in found.items() if client}, rdp)


def worst_so_far(promise: Promise | None, history: History) -> float | None:
    """The `epsilon` of a round's record.

    Args:
        promise: Of the run.
        history: After the round.

    Returns:
        That of `spent`, without what it takes for all clients; of sums the budget; None without privacy.
    """
    if promise is None or promise.summed:
        return None if promise is None else promise.budget
    events, claimed = _by_client(history)
    bounds = {client: bound(of, promise.target_delta) for client, of in events.items()}
    worst = max(claimed.values(), default=0.0)
    for client in sorted(bounds, key=lambda one: -bounds[one]):
        if bounds[client] <= worst:
            break
        worst = max(worst, epsilon(events[client], promise.target_delta))
    return worst


def _by_client(history: History) -> tuple[dict[str, list[Event]], dict[str, float]]:
    """Events and the largest claim of each client, by id."""
    events: dict[str, list[Event]] = {}
    claimed: dict[str, float] = {}
    for entry in history:
        event = from_json({key: value for key, value in entry.items() if key != _CLAIMED}, "privacy_history")
        events.setdefault(event.client_id, []).append(event)
        claimed[event.client_id] = max(claimed.get(event.client_id, 0.0), float(entry.get(_CLAIMED, 0.0)))
    return dict(sorted(events.items())), claimed


def document(promise: Promise | None, history: History) -> dict[str, Any] | None:
    """What `summary.json` says of privacy.

    Args:
        promise: Of the run.
        history: At its end.

    Returns:
        `mode unit epsilon delta accountant per_client epsilon_rdp budget`; None without privacy.
    """
    if promise is None:
        return None
    found = spent(history, promise.target_delta)
    return {
        "mode": promise.mode,
        "unit": promise.unit,
        "epsilon": promise.budget if promise.summed else found.worst,
        "delta": promise.target_delta,
        "accountant": ACCOUNTANT,
        "per_client": dict(found.per_client),
        "epsilon_rdp": None if promise.summed else found.rdp,
        "budget": promise.budget,
    }
