"""Replies twice, late, in another order, of earlier rounds; stragglers that still count; sites that join and leave.

Each ends in the adapter of a run without faults, or in one that lacks exactly the stated updates, and is counted.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from lamina.protos import statements as st
from lamina.server.port.mailbox import Mailbox
from lamina.server.store.deployment import DeploymentStore
from tests import deployment
from tests.deployment import NAMES
from tests.e2e.faults.scene import Gated, Scene, at_once, fault_free, until
from tests.hostile import Hostile, encoded

Hooks = dict[tuple[Path, str, str, int], Callable[[], None]]
ROUND_OF: Mapping[str, Callable[[Any], int]] = {
    "open": lambda opened: int(opened.round),
    "unjudged": lambda number: int(number),
    "close": lambda number: int(number),
    "announce": lambda completed: int(completed.state.round),
    "receive": lambda number: int(number),
}


def by_hand(it: Scene, name: str) -> Hostile:
    """A site that the test plays itself, registered."""
    hand = Hostile(name, it.port, None, it.folder / f"{name}-by-hand")
    it.stack.callback(hand.close)
    hand.register()
    return hand


def sent(hand: Hostile, document: Mapping[str, Any], content: bytes) -> str:
    return hand.upload(hand.statement(st.CLAIM, hand.claim(document, content)), content)


def gates(*rounds: int) -> dict[int, threading.Event]:
    return {number: threading.Event() for number in rounds}


def refused(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(one["client_id"], one["reason"]) for one in record["rejections"]]


# Twice, and of earlier rounds.


def test_the_same_twice_another_one_and_one_of_an_earlier_round(tmp_path: Path) -> None:
    hold = gates(1, 2, 3)
    with Scene(tmp_path) as it:
        running = it.thread()
        it.site("south")
        it.site("west", Gated("west", gates=hold))
        north = by_hand(it, "north")
        first = north.instruction(round_number=1)
        old = encoded(north.honest(first))
        assert [sent(north, first, old), sent(north, first, old)] == ["stored", "stored"]
        assert sent(north, first, old + b" ").startswith("ALREADY_EXISTS: duplicate")
        hold[1].set()
        second = north.instruction(round_number=2)
        # Of the round before: it is here already, so that a site that was not told so is content.
        assert sent(north, first, old) == "stored"
        new = encoded(north.honest(second))
        assert sent(north, second, new) == "stored"
        assert sent(north, first, old) == "stored"
        hold[2].set()
        third = north.instruction(round_number=3)
        # Of two rounds before: nobody knows it any more.
        assert sent(north, first, old).startswith("FAILED_PRECONDITION: wrong-round")
        # The release of another round.
        claim = north.claim(third, new, parent=north.claim(second, new)["parent"])
        assert north.upload(north.statement(st.CLAIM, claim), new).startswith("INVALID_ARGUMENT: wrong-parent")
        assert sent(north, third, encoded(north.honest(third))) == "stored"
        hold[3].set()
        north.link.call("Report", north.statement(st.REPORT, {"kind": "leave"}))
        assert running.join() == 0
        it.sites_ended()
        it.same()
        records = it.records()
        assert [record["clients"] for record in records] == [sorted(NAMES)] * 3
        wanted = [[("north", "duplicate")], [], [("north", "wrong-parent"), ("north", "wrong-round")]]
        assert [refused(record) for record in records] == wanted


def test_any_order_gives_the_same_bits(tmp_path: Path) -> None:
    hold = {name: gates(1, 2, 3) for name in NAMES}
    with Scene(tmp_path, ["strategy=residual"]) as it:
        running = it.thread()
        workers = {name: Gated(name, gates=hold[name]) for name in NAMES}
        for name in NAMES:
            it.site(name, workers[name])
        orders = {1: ("west", "south", "north"), 2: ("south", "north", "west"), 3: ("west", "north", "south")}
        for number, order in orders.items():
            for name in order:
                hold[name][number].set()
                until(lambda: number in it.sites[name].rounds("sent"), f"{name} has sent")  # noqa: B023
        assert running.join() == 0
        it.sites_ended()
        it.undisturbed()


# Late.


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hooks]:
    """Calls, once, at moments of a store: (run directory, method, `before` or `after`, round) -> what to do."""
    asked: Hooks = {}

    def patched(inner: Callable[..., Any], name: str) -> Callable[..., Any]:
        def method(self: DeploymentStore, argument: Any, *more: Any) -> Any:
            key = (self.path, name)
            number = ROUND_OF[name](argument)
            asked.pop((*key, "before", number), lambda: None)()
            found = inner(self, argument, *more)
            asked.pop((*key, "after", number), lambda: None)()
            return found

        return method

    for name in ROUND_OF:
        monkeypatch.setattr(DeploymentStore, name, patched(getattr(DeploymentStore, name), name))
    yield asked
    assert not asked, f"never reached: {list(asked)}"


# When the update of round 2 is sent that round 2 does not wait for.
MOMENTS: Mapping[str, tuple[str, str, int] | None] = {
    "as the round closes": ("close", "before", 2),
    "when it is closed": ("close", "after", 2),
    "between the rounds": ("announce", "after", 2),
    "as the next opens": ("open", "before", 3),
    "when the next is open": ("unjudged", "after", 3),
    "in the next": None,
}
LATE = ["rounds=4", "clients.deadline_s=20", "evaluate.every=4", "strategy=residual", "keep_updates=true"]


def straggling(folder: Path, hooks: Hooks, moment: tuple[str, str, int] | None, carry: int) -> Scene:
    """Four rounds in which north's update of round 2 comes at a moment after the deadline."""
    given = [*LATE, f"clients.carry_rounds={carry}"]
    hold, others = gates(2), gates(3)
    with Scene(folder, given) as it:

        def late() -> None:
            hold[2].set()
            until(lambda: it.sites["north"].rounds("sent") + it.sites["north"].rounds("refused") == [1, 2], "it came")

        if moment is not None:
            hooks[(it.path, *moment)] = late
        running = it.thread()
        south = Gated("south", gates=others)
        it.site("north", Gated("north", gates=hold))
        it.site("south", south)
        it.site("west")
        until(lambda: 3 in south.begun, "round 3")
        if moment is None:
            assert [sorted(record["asked"]) for record in it.records()] == [sorted(NAMES)] * 2
            late()
        others[3].set()
        assert running.join(90) == 0
        it.sites_ended()
        return it


def counts_in_the_next(folder: Path, hooks: Hooks, moment: tuple[str, str, int] | None) -> None:
    it = straggling(folder, hooks, moment, carry=1)
    assert it.sites["north"].worker.trained == [1, 2, 4]
    records = it.records()
    assert [record["clients"] for record in records] == [sorted(NAMES), ["south", "west"], sorted(NAMES), sorted(NAMES)]
    assert [record["asked"] for record in records] == [sorted(NAMES)] * 4
    assert [record["rejections"] for record in records] == [[]] * 4
    check_arithmetic(it.path)


def counts_once(folder: Path, hooks: Hooks) -> None:
    """The update is in the store when the next round looks there, and the loop is told of it after the round was offered."""
    hold = gates(2, 3)
    with Scene(folder, [*LATE, "clients.carry_rounds=1"]) as it:
        south = Gated("south", gates={3: hold[3]})
        received = threading.Event()

        def late() -> None:
            hold[2].set()
            assert received.wait(30)

        def told() -> None:
            received.set()
            until(lambda: 3 in south.begun, "round 3 is offered")

        hooks[(it.path, "unjudged", "before", 3)] = late
        hooks[(it.path, "receive", "after", 3)] = told
        running = it.thread()
        it.site("north", Gated("north", gates={2: hold[2]}))
        it.site("south", south)
        it.site("west")
        until(lambda: 2 in it.sites["north"].rounds("sent"), "it came")
        hold[3].set()
        assert running.join(90) == 0
        it.sites_ended()
        assert [len(record["clients"]) for record in it.records()] == [3, 2, 3, 3]
        assert [record["rejections"] for record in it.records()] == [[]] * 4
        check_arithmetic(it.path)


def is_missing(folder: Path, hooks: Hooks, moment: tuple[str, str, int] | None, counted: int, reason: str) -> None:
    it = straggling(folder, hooks, moment, carry=0)
    records = it.records()
    assert [record["clients"] for record in records] == [sorted(NAMES), ["south", "west"], sorted(NAMES), sorted(NAMES)]
    wanted = [[("north", reason)] if number == counted else [] for number in range(1, 5)]
    assert [refused(record) for record in records] == wanted
    assert it.sites["north"].worker.trained in ([1, 2, 3, 4], [1, 3, 4])
    it.same(fault_free(it.given, without=[("north", 2)]))


def test_a_late_update_counts_in_the_next_round_where_it_may(tmp_path: Path, hooks: Hooks) -> None:
    at_once(
        {
            name: functools.partial(counts_in_the_next, tmp_path / str(number), hooks, moment)
            for number, (name, moment) in enumerate(MOMENTS.items())
        }
        | {"before the next is offered, told of after": functools.partial(counts_once, tmp_path / "once", hooks)},
        workers=7,
    )


def test_a_late_update_is_counted_as_such_and_spoils_no_round(tmp_path: Path, hooks: Hooks) -> None:
    at_once(
        {
            name: functools.partial(
                is_missing,
                tmp_path / str(number),
                hooks,
                MOMENTS[name],
                2 if name == "as the round closes" else 3,
                "late",
            )
            for number, name in enumerate(MOMENTS)
            if MOMENTS[name] in (("close", "before", 2), ("close", "after", 2), ("announce", "after", 2))
        }
    )


def test_a_reply_that_is_handed_over_as_its_round_closes_is_not_judged_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver, offer, close = Mailbox.deliver, Mailbox.offer, DeploymentStore.close
    closing, second, delivered = threading.Event(), threading.Event(), threading.Event()

    def closed(self: DeploymentStore, number: int) -> None:
        closing.set()
        close(self, number)

    def offered(self: Mailbox, instructions: Any, *beside: Any) -> None:
        offer(self, instructions, *beside)
        if any(one.round == 2 for one in instructions):
            second.set()

    def delivering(self: Mailbox, reply: Any, *about: Any) -> None:
        if reply.client_id == "north" and reply.update is not None and not delivered.is_set():
            assert closing.wait(60)
            second.wait(2)  # in vain: the round does not close between the store and the mailbox
            delivered.set()
        deliver(self, reply, *about)

    monkeypatch.setattr(Mailbox, "deliver", delivering)
    monkeypatch.setattr(Mailbox, "offer", offered)
    monkeypatch.setattr(DeploymentStore, "close", closed)
    hold = gates(1)
    with Scene(tmp_path, ["clients.quorum=2", "clients.deadline_s=24", "clients.start=3", "evaluate.every=3"]) as it:
        running = it.thread()
        it.site("north", Gated("north", gates=hold))
        for name in ("south", "west"):
            it.site(name)
        until(lambda: all(1 in it.sites[name].rounds("sent") for name in ("south", "west")), "both are in")
        hold[1].set()
        assert running.join() == 0
        it.sites_ended()
        assert delivered.is_set()
        assert [refused(record) for record in it.records()] == [[("north", "late")], [], []]
        assert [record["clients"] for record in it.records()] == [["south", "west"], sorted(NAMES), sorted(NAMES)]


def tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}, file.metadata()  # noqa: SIM118


def whole(path: Path) -> dict[str, np.ndarray]:
    """Module -> s B A, and dense tensors by name; nothing of a module that is not in the file."""
    values, metadata = tensors(path)
    found = {
        module: scale * values[f"{module}.lora_B.weight"] @ values[f"{module}.lora_A.weight"]
        for module, scale in json.loads(metadata["scales"]).items()
    }
    return found | {name: value for name, value in values.items() if ".lora_" not in name}


def check_arithmetic(path: Path) -> None:
    """G+ = G + sum of p_k (W_k - T_k) in round 3, from the kept files alone; north started from what round 1 gave.

    T_k is what client k was sent, and p_k are its examples' share: 15, 15 and 14 of 44.
    """
    rounds = path / "rounds"
    before, after = whole(rounds / "0002" / "global.safetensors"), whole(rounds / "0003" / "global.safetensors")
    shares = {"north": 15 / 44, "south": 15 / 44, "west": 14 / 44}
    wanted = dict(before)
    for name, share in shares.items():
        update = rounds / "0003" / "updates" / f"{name}.safetensors"
        assert float(tensors(update)[1]["weight"]) == pytest.approx(share, rel=1e-12)
        started = whole(rounds / "0003" / "releases" / f"{name}.safetensors")
        for key, value in whole(update).items():
            wanted[key] = wanted[key] + share * (value - started[key])
    for key, value in wanted.items():
        assert np.linalg.norm(after[key] - value) <= 1e-5 * np.linalg.norm(value), key
    # Its parent is the adapter after round 1, cut to its rank 4: the best of that rank, as the others' is that after round 2.
    parent, releases = whole(rounds / "0001" / "global.safetensors"), rounds / "0003" / "releases"
    north, south = whole(releases / "north.safetensors"), whole(releases / "south.safetensors")
    for module in deployment.MODULES:
        assert np.allclose(north[module], best(parent[module], 4), atol=1e-5)
        assert np.allclose(south[module], best(before[module], 3), atol=1e-5)


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix)
    found: np.ndarray = u[:, :rank] * s[:rank] @ v[:rank]
    return found


# More are asked than are waited for; joining; leaving.


def test_over_selection_waits_for_the_first(tmp_path: Path) -> None:
    """Three are asked and the round is full with two; the third gives up when it is told of something else."""
    given = ["clients.fraction=0.67", "clients.over_selection=0.5"]
    slow = {1: "west", 2: "north", 3: "south"}
    with Scene(tmp_path, given) as it:
        running = it.thread()
        for name in NAMES:
            it.site(name, Gated(name, gates=gates(*(number for number, who in slow.items() if who == name))))
        assert running.join() == 0
        it.sites_ended()
        records = it.records()
        assert [record["asked"] for record in records] == [sorted(NAMES)] * 3
        assert [record["clients"] for record in records] == [sorted({*NAMES} - {slow[number]}) for number in slow]
        assert [record["rejections"] for record in records] == [[]] * 3
        it.same(fault_free(given, without=[(name, number) for number, name in slow.items()]))
        for name in NAMES:
            assert it.sites[name].worker.trained == [number for number in slow if slow[number] != name]


def test_one_joins_after_the_first_round(tmp_path: Path) -> None:
    given = ["clients.start=2"]
    north = Gated("north", gates=gates(1))
    with Scene(tmp_path, given) as it:
        running = it.thread()
        it.site("north", north)
        it.site("south")
        until(lambda: 1 in north.begun, "round 1")
        operator = it.operator()
        operator.pause(True)
        north.gates[1].set()
        until(lambda: len(it.records()) == 1, "round 1 is over")
        it.site("west")
        until(lambda: any(event == "ready" for event, _ in it.sites["west"].events), "west is there")
        operator.pause(False)
        assert running.join() == 0
        it.sites_ended()
        records = it.records()
        assert [record["asked"] for record in records] == [["north", "south"], sorted(NAMES), sorted(NAMES)]
        assert [record["clients"] for record in records] == [["north", "south"], sorted(NAMES), sorted(NAMES)]
        it.same(fault_free(given, without=[("west", 1)]))


def test_one_leaves_and_comes_back(tmp_path: Path) -> None:
    given = ["rounds=4"]
    hold = gates(2, 3, 4)
    with Scene(tmp_path, given) as it:
        running = it.thread()
        north = Gated("north", gates=hold)
        it.site("north", north)
        it.site("south")
        west = by_hand(it, "west")
        leave = west.statement(st.REPORT, {"kind": "leave"})
        asked = west.instruction(round_number=1)
        assert sent(west, asked, encoded(west.honest(asked))) == "stored"
        # In the middle of a round, without an answer.
        west.instruction(round_number=2)
        west.link.call("Report", leave)
        hold[2].set()
        # Not asked any more, and back while the others train.
        until(lambda: 3 in north.begun, "round 3")
        west.register()
        hold[3].set()
        asked = west.instruction(round_number=4)
        assert sent(west, asked, encoded(west.honest(asked))) == "stored"
        # When it has answered: what it sent counts.
        west.link.call("Report", leave)
        hold[4].set()
        assert running.join() == 0
        it.sites_ended()
        records = it.records()
        assert [record["asked"] for record in records] == [
            sorted(NAMES),
            sorted(NAMES),
            ["north", "south"],
            sorted(NAMES),
        ]
        assert [len(record["clients"]) for record in records] == [3, 2, 2, 3]
        assert [refused(record) for record in records] == [[], [("west", "failed")], [], []]
        it.same(fault_free(given, without=[("west", 2), ("west", 3)]))
