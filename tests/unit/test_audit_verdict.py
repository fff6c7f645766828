"""The word for an audit: from claim, checks and bounds alone."""

from __future__ import annotations

from typing import Any

import pytest

from lamina.audits.accounting import Steps, epsilon, steps_of, understated
from lamina.audits.mechanism import Check, cost
from lamina.audits.verdict import verdict
from lamina.protos.privacy.accounting import epsilon as accounted
from lamina.protos.privacy.accounting import noise_for
from lamina.protos.privacy.events import Event

CLAIM = {"epsilon": 8.0, "delta": 1e-5}


def check(holds: bool | None, name: str = "noise") -> Check:
    return Check(name, holds, "this", "that", "why")


def bounds(lower: float, lower_fdp: float | None, ceiling: float, ceiling_fdp: float | None) -> dict[str, Any]:
    return {
        "epsilon_lower": lower, "epsilon_lower_fdp": lower_fdp, "ceiling": ceiling, "ceiling_fdp": ceiling_fdp,
        "guesses": 100, "significance": 0.05,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("claim", "holds", "one_run", "word"),
    [
        (None, [False], bounds(9, 9, 9, 9), "no-claim"),
        (CLAIM, [True], bounds(1, 2, 4, 9), "consistent"),
        (CLAIM, [True], bounds(1, 2, 4, 7.9), "under-powered"),
        (CLAIM, [True], bounds(1, None, 4, None), "under-powered"),
        (CLAIM, [True, None], bounds(1, 2, 4, 9), "consistent"),
        (CLAIM, [True, False], bounds(1, 2, 4, 9), "violated"),
        (CLAIM, [False], None, "violated"),
        (CLAIM, [True], None, "under-powered"),
        (CLAIM, [], bounds(8.01, 2, 9, 9), "violated"),
        (CLAIM, [], bounds(1, 8.01, 4, 9), "violated"),
        (CLAIM, [], bounds(8.0, 8.0, 9, 9), "consistent"),
    ],
)
def test_the_word(claim: Any, holds: list[bool | None], one_run: Any, word: str) -> None:
    found, reasons = verdict(claim, [check(one) for one in holds], one_run)
    assert found == word
    assert reasons
    assert all(reason.endswith(".") for reason in reasons)


def test_a_cost_that_nobody_can_compute_is_no_consistency() -> None:
    assert verdict(CLAIM, [check(None, "accounting"), check(True)], bounds(1, 2, 4, 9))[0] == "under-powered"


def test_of_a_claim_about_clients_canary_clients_speak() -> None:
    assert verdict(CLAIM, [check(True, "client canaries")], None)[0] == "consistent"
    assert verdict(CLAIM, [check(False, "client canaries")], None)[0] == "violated"


def test_every_failed_check_is_a_reason() -> None:
    _, reasons = verdict(CLAIM, [check(False, "noise"), check(True, "sampling"), check(False, "accounting")], None)
    assert [reason.split(":")[0] for reason in reasons] == ["noise", "accounting"]


def test_cost_by_other_code_than_the_runs() -> None:
    """Rows of the table of reference values that dp-accounting gives for add-or-remove-one."""
    assert epsilon([Steps(1.5, 0.04, 2250)], 1e-5) == pytest.approx(6.7688, rel=2e-3)
    assert epsilon([Steps(1.0, 1.0, 1)], 1e-5) == pytest.approx(4.3772, rel=2e-3)
    # A hundred steps with ten times the noise are one step with the noise; in whatever pieces.
    assert epsilon([Steps(10.0, 1.0, 30), Steps(10.0, 1.0, 70)], 1e-5) == pytest.approx(4.3772, rel=2e-3)
    assert epsilon([], 1e-5) == 0
    assert epsilon([Steps(0.1, 1.0, 100)], 1e-5) > 1000


def test_a_claim_is_understated_beyond_what_accountants_differ_by() -> None:
    assert not understated(8.0, 8.0)
    assert not understated(8.0, 8.1)
    assert understated(8.0, 8.3)
    assert understated(0.0, 0.1)
    assert understated(float("nan"), 8.0)


@pytest.mark.parametrize("budget", [40.0, 64.0])
def test_a_large_claim_is_not_refuted_by_a_looser_bound(budget: float) -> None:
    """RDP says 71 where the run's accountant, by loss distributions, says 64."""
    noise = noise_for(budget, 1e-5, 0.2, 6)
    claimed = accounted([Event("a", 1, noise, 0.2, 6, 1.0, "record")], 1e-5)
    assert not understated(claimed, epsilon([Steps(noise, 0.2, 6)], 1e-5))


def test_cost_holds_every_client_to_the_runs_own_claim_and_misses_nobody() -> None:
    happened = {"a": [Steps(1.0, 1.0, 1)], "b": [Steps(2.0, 1.0, 1)]}  # epsilon 4.38 and 2.0 or so
    right = {"a": 4.3772, "b": 4.0}
    assert cost(right, 4.3772, None, happened, 1e-5)[0].holds
    assert cost(right, 2.0, None, happened, 1e-5)[0].holds is False  # that of b, shown for all
    assert cost({"b": 4.0}, 2.0, None, happened, 1e-5)[0].holds is False
    assert cost(right, 4.3772, 4.0, happened, 1e-5)[0].holds is False
    dropped = cost(right, 4.3772, None, {**happened, "c": []}, 1e-5)[0]
    assert dropped.holds is False
    assert "client c" in dropped.measured
    assert cost({}, 4.0, None, {}, 1e-5)[0].holds is None


def test_steps_by_client() -> None:
    event = {"client_id": "a", "noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 3}
    found = steps_of([event, {**event, "client_id": "b"}, {**event, "steps": 4}])
    assert found == {"a": [Steps(1.0, 0.1, 3), Steps(1.0, 0.1, 4)], "b": [Steps(1.0, 0.1, 3)]}
