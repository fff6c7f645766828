"""The coordinator's view of what was spent: from events and claims to the worst client, and which claims it takes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from lamina.protos.errors import ConfigError, UpdateRejected
from lamina.protos.messages import Update
from lamina.protos.privacy.accounting import epsilon
from lamina.protos.privacy.events import LEAST_RATE, NOISE, Claim, Event, to_claim, to_json
from lamina.server import spending
from lamina.server.spending import Promise, charges, check_claim, document, promise_of, spent, worst_so_far
from tests.deployment import config_of

DELTA = 1e-5
PROMISE = Promise("example-dp", "record", DELTA, 8.0, 4, 1.0)
ONE = Event("north", 3, 1.0, 0.1, 4, 1.0)


def update(event: Event = ONE, claimed: float = 1.0, **changed: float) -> Update:
    return Update(
        "run", event.round, event.client_id, "f" * 64, privacy={**to_claim(Claim(event, DELTA, claimed)), **changed}
    )


def test_a_promise_is_what_the_config_says() -> None:
    assert promise_of(config_of([])) is None
    words = ["privacy=example-dp", "privacy.epsilon=8", "train.local_steps=4", "privacy.unit=user"]
    assert promise_of(config_of(words)) == replace(PROMISE, unit="user")
    central = promise_of(config_of(["privacy=client-dp", "privacy.epsilon=8", "privacy.clip_norm=2"]))
    assert central == Promise("client-dp", "client", DELTA, 8.0, 1, 2.0)


def test_a_claim_that_keeps_the_promise_passes_and_is_kept() -> None:
    check_claim(PROMISE, update())
    check_claim(PROMISE, update(claimed=8.0))
    (kept,) = charges(PROMISE, [update(claimed=2.5)])
    assert json.loads(json.dumps(kept)) == {**to_json(ONE), "claimed_epsilon": 2.5}


def test_nothing_is_asked_of_updates_under_client_dp() -> None:
    central = replace(PROMISE, mode="client-dp", unit="client")
    check_claim(central, replace(update(), privacy=None))
    assert charges(central, [update()]) == ()
    assert charges(None, [update()]) == ()


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (replace(update(), privacy=None), "privacy"),
        (update(replace(ONE, steps=3)), "privacy"),
        (update(replace(ONE, clip=2.0)), "privacy"),
        (update(delta=1e-6), "privacy"),
        (update(claimed=8.1), "privacy"),
        (replace(update(), privacy={}), "malformed"),
        (update(steps=0.0), "malformed"),
        (update(epsilon=float("nan")), "malformed"),
        (update(epsilon=float("inf")), "malformed"),
        (update(noise_multiplier=0.0), "malformed"),
        (update(sample_rate=1.5), "malformed"),
        (update(noise_multiplier=1e-200), "malformed"),
        (update(noise_multiplier=1e200), "malformed"),
        (update(sample_rate=5e-324), "malformed"),
        (update(extra=1.0), "malformed"),
    ],
)
def test_other_claims_are_refused(found: Update, reason: str) -> None:
    with pytest.raises(UpdateRejected) as caught:
        check_claim(PROMISE, found)
    assert caught.value.reason == reason
    assert "client north, round 3" in str(caught.value)


@pytest.mark.parametrize("noise", [*NOISE, 0.01, 0.1])
@pytest.mark.parametrize("rate", [LEAST_RATE, 1e-18, 0.5, 1.0])
def test_no_claim_that_is_taken_ends_the_round(noise: float, rate: float) -> None:
    """A client's odd numbers are its own fault: an error here would stop the run, each time that it is started again."""
    found = update(replace(ONE, noise_multiplier=noise, sample_rate=rate))
    check_claim(PROMISE, found)
    kept = charges(PROMISE, [found])
    assert (worst_so_far(PROMISE, kept) or 0.0) >= 1.0
    assert spent(kept, DELTA).rdp >= 0.0


def history(**claimed: float) -> list[dict[str, Any]]:
    noise = {"north": 1.0, "south": 2.0, "west": 0.9}
    return [
        {**to_json(Event(name, number, noise[name], 0.1, 4, 1.0)), "claimed_epsilon": claimed.get(name, 0.0)}
        for number in (1, 2)
        for name in noise
    ]


def test_the_worst_client_is_found_either_way() -> None:
    found = spent(history(), DELTA)
    assert found.per_client["south"] == pytest.approx(epsilon([Event("", 0, 2.0, 0.1, 8, 1.0)], DELTA), abs=1e-12)
    assert found.worst == max(found.per_client.values()) == found.per_client["west"]
    assert worst_so_far(PROMISE, history()) == found.worst
    assert found.rdp > found.worst


def test_a_larger_claim_counts_and_a_smaller_one_does_not() -> None:
    found = spent(history(south=7.5, west=0.01), DELTA)
    assert found.worst == found.per_client["south"] == 7.5
    assert found.per_client["west"] == spent(history(), DELTA).per_client["west"]
    assert worst_so_far(PROMISE, history(south=7.5)) == 7.5


def test_the_central_mechanism_is_the_entry_without_a_client() -> None:
    entries = [to_json(Event("", number, 1.0, 0.5, 1, 1.0, "client")) for number in (1, 2, 3)]
    central = Promise("client-dp", "client", DELTA, 20.0, 1, 1.0)
    told = document(central, entries)
    assert told is not None
    assert told["per_client"] == {}
    assert told["epsilon"] == worst_so_far(central, entries)
    assert told["epsilon"] > 0
    assert (told["mode"], told["unit"], told["budget"]) == ("client-dp", "client", 20.0)


def test_of_sums_the_budget_is_all_that_is_known() -> None:
    """No claim arrives with a sum; each site keeps the budget, so it bounds what was spent."""
    words = ["privacy=example-dp", "privacy.epsilon=8", "train.local_steps=4", "privacy.secagg=true", "strategy=ffa"]
    promise = promise_of(config_of(words))
    assert promise == replace(PROMISE, summed=True)
    check_claim(promise, replace(update(), privacy=None))
    assert charges(promise, [replace(update(), privacy=None)]) == ()
    assert worst_so_far(promise, []) == 8.0
    told = document(promise, [])
    assert told is not None
    assert (told["epsilon"], told["per_client"], told["epsilon_rdp"]) == (8.0, {}, None)


def test_without_privacy_there_is_nothing_to_tell() -> None:
    assert document(None, []) is None
    assert worst_so_far(None, []) is None


def test_before_the_first_round_nothing_is_spent() -> None:
    assert spent([], DELTA).worst == worst_so_far(PROMISE, []) == 0.0


def test_a_history_that_is_damaged_is_no_zero() -> None:
    entries = history()
    del entries[0]["steps"]
    with pytest.raises(ConfigError, match="privacy_history"):
        spending.spent(entries, DELTA)
