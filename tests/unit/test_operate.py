"""What operators read of a status, of a change between two, and of what they have ordered."""

from __future__ import annotations

from typing import Any

import pytest

from lamina.server.operate import ordered, shown, watched


def site(name: str = "north", **more: Any) -> dict[str, Any]:
    known = {"client_id": name, "rank": 8, "registered": True, "silent_s": 1.2, "asked": None}
    return known | {"training_round": 0, "step": 0, "answered": False} | more


def status(*clients: dict[str, Any], **more: Any) -> dict[str, Any]:
    known = {"run_id": "ab12", "state": "collecting", "round": 2, "round_open": True, "rounds": 3, "rounds_done": 1}
    known |= {"steps": 10, "clients_to_start": 3, "loss": None, "rejections": 0, "revocations": "in force"}
    return known | {"clients": list(clients)} | more


def at(found: dict[str, Any]) -> str:
    return shown(found).splitlines()[-1].split("ago")[-1].strip()


@pytest.mark.parametrize(
    ("client", "now"),
    [
        ({"asked": "train", "training_round": 2, "step": 3}, "trains round 2, step 3 of 10"),
        ({"asked": "train", "training_round": 2}, "trains round 2"),
        ({"asked": "evaluate"}, "evaluates"),
        ({"answered": True}, "has answered"),
        ({}, "waits"),
        ({"registered": False, "asked": "train", "training_round": 2}, "has left"),
    ],
)
def test_what_a_site_is_at(client: dict[str, Any], now: str) -> None:
    assert at(status(site(**client))) == now


def test_the_run_in_a_line() -> None:
    assert shown(status(site(), loss=2.5, rejections=1)).splitlines()[0] == (
        "run ab12: collecting, round 2 of 3, held-out loss 2.5000, 1 rejection in this round"
    )
    private = {
        "mode": "example-dp",
        "unit": "record",
        "delta": 1e-5,
        "epsilon": 1.256,
        "budget": 8.0,
        "remaining": 6.744,
    }
    assert shown(status(site(), privacy=private)).splitlines()[0] == (
        "run ab12: collecting, round 2 of 3, epsilon 1.26 of 8, 6.74 left (worst client, delta 1e-05), 0 rejections in this round"
    )
    unbounded = private | {"budget": None, "remaining": None}
    assert "epsilon 1.26 (worst client, delta 1e-05)" in shown(status(site(), privacy=unbounded))
    assert shown(status(site(), state="paused", round_open=False)).splitlines()[0] == (
        "run ab12: paused, 1 of 3 rounds done"
    )
    over = status(site(), state="stopped", round=6, rounds=50, rounds_done=5, loss=2.0)
    assert shown(over).splitlines()[0] == "run ab12: stopped, 5 of 50 rounds done, held-out loss 2.0000"
    assert at(over) == "-"
    assert shown(status(state="between rounds", round_open=False)) == (
        "run ab12: between rounds, no site has registered yet; waiting for 3"
    )


def test_only_what_has_changed_is_shown_again() -> None:
    first = status(site("north", asked="train", training_round=2), site("south"))
    assert len(watched({"status": first}).splitlines()) == 4
    later = status(site("north", asked="train", training_round=2, step=1), site("south", silent_s=9.0))
    (line,) = watched({"status": later}, first).splitlines()
    assert line.split()[0] == "north"
    assert watched({"status": later}, later) == ""
    (head,) = watched({"status": later | {"rejections": 1}}, later).splitlines()
    assert head.endswith("1 rejection in this round")


def test_an_order_says_what_it_does() -> None:
    plain = {"resume": "false", "now": "false"}
    assert ordered("pause", plain, status()) == "paused; round 2 is finished first"
    assert ordered("pause", plain, status(round_open=False)) == "paused; no further round is opened"
    assert ordered("pause", plain | {"resume": "true"}, status()).startswith("resumed; ")
    assert ordered("stop", plain, status()) == "stopping; round 2 is finished first"
    assert ordered("stop", plain | {"now": "true"}, status()).startswith("stopping at once; ")
