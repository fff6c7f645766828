"""What a run may still cost at this site: its budget and the site's own, against the ledger, before anything is trained.

Nothing here believes the coordinator. Its budget counts only where the site's policy has no smaller one, and what was spent is in
the site's ledger: a round that is asked for again, a run that is begun again and smaller noise all cost what they cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from lamina.client.policy import Policy
from lamina.client.private import ledger as ledgers
from lamina.client.private.ledger import Charge, Ledger, charged
from lamina.protos.config import PrivacyConfig
from lamina.protos.errors import BudgetSpent
from lamina.protos.files import file_digest
from lamina.protos.privacy.accounting import epsilon
from lamina.protos.privacy.events import Event
from lamina.protos.record import Head

PRIVATE = "example-dp"


@dataclass(frozen=True)
class Limits:
    """What may be spent.

    Attributes:
        run_epsilon: In this run.
        target_delta: The delta of it.
        unit: What one unit is.
        total_epsilon: In all runs of the ledger together, or None for any.
        total_delta: The delta of that.
        source: The policy, for messages.
    """

    run_epsilon: float
    target_delta: float
    unit: str
    total_epsilon: float | None
    total_delta: float
    source: str


@dataclass(frozen=True)
class Account:
    """One run of a ledger.

    Attributes:
        ledger: The site's.
        run_id: The run.
        client_id: The site.
        limits: What may be spent.
    """

    ledger: Ledger
    run_id: str
    client_id: str
    limits: Limits

    @property
    def spent(self) -> float:
        """The epsilon of what this run was charged so far."""
        return epsilon(self.ledger.events(self.run_id), self.limits.target_delta)


def opened(folder: Path, policy: Policy, terms: Mapping[str, Any], heads: Iterable[Head]) -> Account | None:
    """The account of a run in the site's ledger.

    Args:
        folder: `client.state`.
        policy: The site's.
        terms: The coordinator's, which the policy allows.
        heads: Lines of the ledger that must be there, as updates that are kept were paid by them.

    Returns:
        The account; None where nothing is private.

    Raises:
        BudgetSpent: If nobody names a budget, or the ledger cannot tell what was spent.
    """
    if terms["task"].get("privacy.mode") != PRIVATE:
        return None
    limits, ledger = limits_of(policy, terms["task"]), ledgers.opened(folder)
    ledgers.check_has(ledger, heads)
    return Account(ledger, str(terms["run_id"]), str(terms["client_id"]), limits)


def limits_of(policy: Policy, task: Mapping[str, Any]) -> Limits:
    """What a run may spend.

    Args:
        policy: The site's.
        task: The settings in a coordinator's terms, which the policy allows.

    Returns:
        The limits.

    Raises:
        BudgetSpent: If nobody names a budget.
    """
    floor = policy.privacy
    named = [one for one in (task.get("privacy.epsilon"), floor.max_epsilon) if one is not None]
    if not named:
        raise BudgetSpent("privacy.epsilon: expected a budget of the run, got none. Ask the coordinator for one.")
    delta = task.get("privacy.delta")
    target_delta = float(PrivacyConfig().delta if delta is None else delta)
    total_delta = floor.total_delta or floor.max_delta or target_delta
    unit = str(task.get("privacy.unit", PrivacyConfig().unit))
    return Limits(float(min(named)), target_delta, unit, floor.total_epsilon, total_delta, policy.source)


def allowed(account: Account, round_number: int, event: Event) -> float:
    """Whether an event may happen.

    Args:
        account: Of the run.
        round_number: That was asked for.
        event: What the site's mechanism is about to do.

    Returns:
        The epsilon of the run after it, rounds that were trained again included.

    Raises:
        BudgetSpent: If it would exceed a limit, or is no event of this site and round.
    """
    limits, ledger = account.limits, account.ledger
    about = (event.client_id, event.round, event.unit)
    if about != (account.client_id, round_number, limits.unit) or event.steps < 1:
        raise BudgetSpent(f"round {round_number}: expected an event of this site, round and unit, got another.")
    events = ledger.events(account.run_id)
    _check_unit(account, events, event, "Ask the coordinator for that unit, or for a new run.")
    after = epsilon([*events, event], limits.target_delta)
    if not after <= limits.run_epsilon:  # nor where it is not a number
        raise BudgetSpent(
            f"privacy, round {round_number}: expected at most epsilon {limits.run_epsilon:g} in run {account.run_id}, with this "
            f"round it would be {after:.4g}; {account.spent:.4g} is spent. This site trains no more of it: rounds that were "
            "trained again cost again. Ask the coordinator for fewer rounds in a new run."
        )
    if limits.total_epsilon is not None:
        _within_total(account, event, limits.total_epsilon)
    return after


def _within_total(account: Account, event: Event, most: float) -> None:
    """Raise where all runs together would cost more than the site gives in all."""
    events, limits = account.ledger.events(), account.limits
    then = f"Ask the coordinator for that unit, or leave privacy.total_epsilon out of {limits.source}."
    _check_unit(account, events, event, then)
    after = epsilon([*events, event], limits.total_delta)
    if not after <= most:
        raise BudgetSpent(
            f"{limits.source}: privacy.total_epsilon: expected at most {most:g} over all runs in {account.ledger.path}, with "
            f"this round it would be {after:.4g}. This site's data have given what they may; raise it only if that is meant."
        )


def _check_unit(account: Account, events: Sequence[Event], event: Event, then: str) -> None:
    """Raise where earlier events are of another unit: what a record's cost is says nothing of its user's."""
    units = {one.unit for one in events} - {event.unit}
    if units:
        raise BudgetSpent(
            f"privacy.unit: expected {', '.join(sorted(units))} as in the ledger {account.ledger.path}, got {event.unit}: what "
            f"protects one does not add up with what protects the other. {then}"
        )


def paid(account: Account, round_number: int, event: Event | None, update: str, now: datetime) -> Account:
    """Charge an event; it is on disk when this returns, and only then may its update be stored or sent.

    Args:
        account: Of the run.
        round_number: That was trained.
        event: What happened, as the worker says; it must be one that is allowed.
        update: SHA-256 of the encoded update.
        now: The time, with its zone.

    Returns:
        The account after it.

    Raises:
        BudgetSpent: If there is no event or it may not happen, or the ledger on disk is not as it was.
        OSError: If the disk does not take it.
    """
    if event is None:
        raise BudgetSpent(f"round {round_number}: expected an update with its event under example-dp, got none.")
    allowed(account, round_number, event)
    return replace(account, ledger=charged(account.ledger, Charge(account.run_id, event, update), now))


def check_paid(account: Account, path: Path) -> None:
    """Raise unless an update was charged for, in this run.

    Args:
        account: Of the run.
        path: Its bytes, as they would be sent or masked.

    Raises:
        BudgetSpent: If there is no charge.
        OSError: If they cannot be read.
    """
    update = file_digest(path).hexdigest()
    if not account.ledger.pays_for(account.run_id, update):
        raise BudgetSpent(
            f"{account.ledger.path}: expected a charge for the update {update[:12]}…, got none: it does not leave this site. "
            f"Remove the folders finished-* in {account.ledger.path.parent / account.run_id}; the round is trained again."
        )


def standing(account: Account) -> dict[str, Any]:
    """Where a run stands, for the site's own log.

    Args:
        account: Of the run.

    Returns:
        `spent`, `budget` and `remaining` epsilon at `delta`, and `total` over all runs where the policy bounds it.
    """
    limits, spent = account.limits, account.spent
    found: dict[str, Any] = {"spent": round(spent, 4), "budget": limits.run_epsilon, "delta": limits.target_delta}
    if account.ledger.torn_bytes and not account.ledger.unwritten:
        found["note"] = "a charge that was broken off with this site paid for nothing, and is cut off"
    found["remaining"] = round(max(0.0, limits.run_epsilon - spent), 4)
    if limits.total_epsilon is not None:
        found["total"] = round(epsilon(account.ledger.events(), limits.total_delta), 4)
    return found
