"""A site's ledger as a file: every order of a kill, every damage, and what may still be spent."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina.client import doctor_files
from lamina.client.policy import Policy, PrivacyFloor
from lamina.client.private import account as accounts
from lamina.client.private import ledger as ledgers
from lamina.client.private.account import Account, allowed, check_paid, limits_of, paid
from lamina.client.private.ledger import FILE_NAME, Charge, Ledger, charged, opened
from lamina.protos.errors import BudgetSpent
from lamina.protos.files import sha256
from lamina.protos.privacy.accounting import epsilon
from lamina.protos.privacy.events import Event
from lamina.protos.record import Head

NOW = datetime(2026, 5, 1, tzinfo=UTC)
ONE = Event("north", 1, 1.1, 0.05, 10, 1.0)
DELTA = 1e-5


def charge(number: int, run: str = "run") -> Charge:
    return Charge(run, replace(ONE, round=number), f"{number:064x}")


def filled(folder: Path, count: int, run: str = "run") -> Ledger:
    ledger = opened(folder)
    for number in range(1, count + 1):
        ledger = charged(ledger, charge(number, run), NOW)
    return ledger


def account(ledger: Ledger, run_epsilon: float = 8.0, policy: Policy | None = None, run: str = "run") -> Account:
    task = {"privacy.mode": "example-dp", "privacy.epsilon": run_epsilon, "privacy.delta": DELTA}
    return Account(ledger, run, "north", limits_of(policy or Policy(), task))


def test_what_was_charged_is_read_again(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 3)
    assert opened(tmp_path) == ledger
    assert [one.event.round for one in ledger.charges] == [1, 2, 3]
    assert ledger.pays_for("run", f"{2:064x}")
    assert not ledger.pays_for("another", f"{2:064x}")
    assert ledger.events("run") == [replace(ONE, round=number) for number in (1, 2, 3)]
    assert ledger.events("another") == []
    ledgers.check_has(ledger, [Head(n, ledger.hashes[n]) for n in range(3)])


def test_no_file_is_no_charge(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    assert ledger.charges == ()
    assert not (tmp_path / FILE_NAME).exists()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_kill_amid_a_charge_loses_no_charge_before_it(tmp_path: Path, data: st.DataObject) -> None:
    """At every length of the last line: the ones before are there, and the next charge takes the place of the torn one."""
    path = tmp_path / FILE_NAME
    path.unlink(missing_ok=True)
    before = filled(tmp_path, 2)
    filled_once_more = charged(before, charge(3), NOW)
    whole = path.read_bytes()
    most = filled_once_more.num_bytes - 1
    cut = data.draw(st.integers(before.num_bytes, most) | st.just(most))
    path.write_bytes(whole[:cut])
    found, but_newline = opened(tmp_path), cut == filled_once_more.num_bytes - 1
    assert found.charges == (filled_once_more if but_newline else before).charges
    assert found.torn_bytes == cut - before.num_bytes
    again = charged(found, charge(4), NOW)
    assert opened(tmp_path) == again
    assert [one.event.round for one in again.charges] == ([1, 2, 3, 4] if but_newline else [1, 2, 4])


def test_a_disk_that_took_half_of_a_line_takes_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = filled(tmp_path, 1)

    def full(path: Path, text: str) -> None:
        with path.open("a") as file:
            file.write(text[:40])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ledgers, "append_durably", full)
        with pytest.raises(OSError, match="No space"):
            charged(ledger, charge(2), NOW)
    assert [one.event.round for one in charged(ledger, charge(2), NOW).charges] == [1, 2]
    assert [one.event.round for one in opened(tmp_path).charges] == [1, 2]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_flipped_bit_lowers_what_was_spent(tmp_path: Path, data: st.DataObject) -> None:
    """Any bit of any line: the ledger is refused, or, where it was the last newline, nothing is missing."""
    path = tmp_path / FILE_NAME
    path.unlink(missing_ok=True)
    before = filled(tmp_path, 3)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1) | st.just(len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(content))
    if place == len(content) - 1:
        assert opened(tmp_path).charges == before.charges
        return
    with pytest.raises(BudgetSpent, match=r"expected .* (What|got)"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [lines[0], lines[2]],
        lambda lines: [lines[1], lines[0], lines[2]],
        lambda lines: lines[1:],
        lambda lines: [*lines, b"\n"],
        lambda lines: [*lines, lines[2]],
        lambda lines: [b"garbage\n", *lines],
        lambda lines: [*lines, b"{}\n"],
        lambda lines: [*lines, b"[" * 100_000 + b"\n"],
        lambda lines: [*lines, b"x" * (1 << 21)],
        lambda lines: [lines[0], lines[1].replace(b'"steps":10', b'"steps":1'), lines[2]],
        lambda lines: [*lines[:2], lines[2][:-20], lines[2]],
    ],
)
def test_other_damage_is_refused(tmp_path: Path, damage: object) -> None:
    filled(tmp_path, 3)
    path = tmp_path / FILE_NAME
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))  # type: ignore[operator]
    with pytest.raises(BudgetSpent, match="trains nothing under example-dp"):
        opened(tmp_path)


def test_a_ledger_that_changes_under_a_site_is_refused(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 2)
    path = tmp_path / FILE_NAME
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(BudgetSpent, match="got none"):
        charged(ledger, charge(3), NOW)
    path.write_bytes(content[: len(content) // 3])
    with pytest.raises(BudgetSpent, match="whole lines"):
        charged(ledger, charge(3), NOW)
    path.write_bytes(content)
    charged(ledger, charge(3), NOW)
    with pytest.raises(BudgetSpent, match="whole lines"):  # another process has charged
        charged(ledger, charge(4), NOW)


# What may still be spent.


def test_the_last_round_within_the_budget_is_allowed_and_the_next_is_not(tmp_path: Path) -> None:
    budget = epsilon([replace(ONE, steps=30)], DELTA)
    one = account(opened(tmp_path), budget)
    for number in (1, 2, 3):
        event = replace(ONE, round=number)
        assert allowed(one, number, event) == pytest.approx(
            epsilon([replace(ONE, steps=10 * number)], DELTA), abs=1e-12
        )
        one = paid(one, number, event, f"{number:064x}", NOW)
    with pytest.raises(BudgetSpent, match="expected at most epsilon"):
        allowed(one, 4, replace(ONE, round=4))
    # Nor does a restart, which reads the same file, forget.
    with pytest.raises(BudgetSpent, match="expected at most epsilon"):
        allowed(account(opened(tmp_path), budget), 4, replace(ONE, round=4))


def update_file(folder: Path, content: bytes) -> Path:
    path = folder / "update.safetensors"
    path.write_bytes(content)
    return path


def test_a_round_that_is_trained_again_costs_again(tmp_path: Path) -> None:
    one = paid(account(opened(tmp_path)), 1, ONE, sha256(b"a"), NOW)
    again = paid(one, 1, ONE, sha256(b"b"), NOW)
    assert again.spent == pytest.approx(epsilon([replace(ONE, steps=20)], DELTA), abs=1e-12)
    check_paid(again, update_file(tmp_path, b"a"))
    check_paid(again, update_file(tmp_path, b"b"))
    with pytest.raises(BudgetSpent, match="does not leave this site"):
        check_paid(again, update_file(tmp_path, b"c"))
    with pytest.raises(BudgetSpent, match="does not leave this site"):
        check_paid(replace(again, run_id="another"), update_file(tmp_path, b"a"))


@pytest.mark.parametrize(
    "event",
    [
        replace(ONE, client_id="south"),
        replace(ONE, round=2),
        replace(ONE, unit="user"),
        replace(ONE, steps=0),
        replace(ONE, noise_multiplier=0.01),
        replace(ONE, noise_multiplier=1e-9),
        replace(ONE, sample_rate=1.0, noise_multiplier=0.5),
        replace(ONE, steps=10**9),
    ],
)
def test_an_event_of_another_or_one_too_dear_is_refused(tmp_path: Path, event: Event) -> None:
    with pytest.raises(BudgetSpent):
        allowed(account(opened(tmp_path)), 1, event)


def test_the_policy_bounds_what_the_coordinator_allows(tmp_path: Path) -> None:
    task = {"privacy.epsilon": 60.0, "privacy.delta": 1e-6, "privacy.unit": "user"}
    limits = limits_of(Policy(privacy=PrivacyFloor(max_epsilon=2.0, max_delta=1e-5)), task)
    assert (limits.run_epsilon, limits.target_delta, limits.unit) == (2.0, 1e-6, "user")
    assert limits.total_epsilon is None
    limits = limits_of(Policy(privacy=PrivacyFloor(total_epsilon=3.0, total_delta=1e-7)), task)
    assert (limits.run_epsilon, limits.total_epsilon, limits.total_delta) == (60.0, 3.0, 1e-7)
    with pytest.raises(BudgetSpent, match="expected a budget"):
        limits_of(Policy(), {"privacy.mode": "example-dp"})


def test_a_run_that_changes_its_unit_is_refused(tmp_path: Path) -> None:
    """Restarted with terms per user after rounds per record: what was charged for records bounds no user."""
    after_records = account(filled(tmp_path, 2))
    user = replace(after_records, limits=replace(after_records.limits, unit="user"))
    with pytest.raises(BudgetSpent, match=r"privacy\.unit: expected record as in the ledger .*, got user"):
        allowed(user, 3, replace(ONE, round=3, unit="user"))
    other_run = replace(user, run_id="another")  # without a total, another run may be per user
    assert allowed(other_run, 1, replace(ONE, unit="user")) > 0


def test_the_total_is_over_runs_and_of_one_unit(tmp_path: Path) -> None:
    filled(tmp_path, 2, "first")
    floor = PrivacyFloor(total_epsilon=epsilon([replace(ONE, steps=30)], DELTA), total_delta=DELTA)
    one = account(opened(tmp_path), policy=Policy(privacy=floor), run="second")
    assert allowed(one, 1, ONE) == pytest.approx(epsilon([ONE], DELTA))
    one = paid(one, 1, ONE, "a" * 64, NOW)
    with pytest.raises(BudgetSpent, match=r"privacy\.total_epsilon: expected at most"):
        allowed(one, 2, replace(ONE, round=2))
    user = replace(one, limits=replace(one.limits, unit="user"))
    with pytest.raises(BudgetSpent, match="does not add up"):
        allowed(user, 2, replace(ONE, round=2, unit="user"))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["charge", "store", "send", "kill", "lose"]), max_size=14))
def test_whatever_the_order_of_faults_nothing_is_sent_unpaid(tmp_path: Path, plays: list[str]) -> None:
    """A model of a site: trains (a fresh update each time), charges, stores, sends; killed anywhere, or its update lost.

    What is in memory goes with a kill; the ledger and what was stored stay. Each update that was sent has its own charge.
    """
    (tmp_path / FILE_NAME).unlink(missing_ok=True)
    site, made, in_memory, stored, sent = account(opened(tmp_path), 60.0), 0, "", "", list[str]()
    for play in plays:
        if play == "charge" and not stored:
            made += 1
            in_memory = f"update {made}"
            site = paid(site, 1, ONE, sha256(in_memory.encode()), NOW)
        elif play == "store" and in_memory:
            stored, in_memory = in_memory, ""
        elif play == "send" and stored:
            check_paid(site, update_file(tmp_path, stored.encode()))
            sent.append(sha256(stored.encode()))
        elif play == "lose":
            stored = ""
        elif play == "kill":
            in_memory, site = "", account(opened(tmp_path), 60.0)
    on_disk = opened(tmp_path)
    assert set(sent) <= {one.update for one in on_disk.charges}
    assert len(on_disk.charges) == made >= len(set(sent))
    assert on_disk.charges == site.ledger.charges


def test_the_doctor_tells_what_was_spent(tmp_path: Path) -> None:
    assert list(doctor_files.ledger(tmp_path, None)) == []
    filled(tmp_path, 2)
    filled(tmp_path, 1, "another")
    cost = epsilon([replace(ONE, steps=30)], DELTA)
    (line,) = doctor_files.ledger(tmp_path, None)
    assert (line.level, line.what) == ("ok", "privacy")
    assert f"3 charges of 2 runs, epsilon {cost:.4g} at delta 1e-05 in all." in line.message
    policy = tmp_path / "policy.yaml"
    policy.write_text("privacy: {total_epsilon: 8, total_delta: 1e-5}")
    (line,) = doctor_files.ledger(tmp_path, policy)
    assert f"in all of 8, {8 - cost:.4g} left" in line.message
    (tmp_path / FILE_NAME).write_bytes(b"garbage\n")
    (line,) = doctor_files.ledger(tmp_path, None)
    assert line.level == "FAIL"


def test_standing_names_what_is_left(tmp_path: Path) -> None:
    one = paid(account(opened(tmp_path)), 1, ONE, "a" * 64, NOW)
    told = accounts.standing(one)
    assert told["remaining"] == pytest.approx(8.0 - told["spent"], abs=1e-3)
    assert "total" not in told
