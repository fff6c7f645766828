"""kill -9 of the coordinator at every step of a round: started again with the same words, it ends in the same bits.

The sites live on through it, and train nothing twice.
"""

from __future__ import annotations

import functools
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from tests import deployment
from tests.deployment import NAMES, Synthetic
from tests.e2e.faults.killable import Point
from tests.e2e.faults.scene import BIG_MODULES, BIG_WORDS, Gated, Scene, at_once, fault_free, until

STORE = "lamina.server.store.deployment:DeploymentStore"
STRATEGIES = ("recompress", "residual", "stack")
# Each is reached in round 2 unless it says otherwise: 3 sites, so the 4th update to arrive is the first of round 2, and the
# offers are those of the base's figures, round 1, its figures, round 2.
POINTS = {
    "the run has a name": Point("lamina.server.opening:_begin", "after"),
    "the base's figures came": Point("lamina.server.measuring:Measuring._remember", "before"),
    "round 1 has releases": Point(f"{STORE}.open", "before"),
    "round 1 is open": Point(f"{STORE}.open", "after"),
    "round 1 got an update": Point(f"{STORE}.receive", "after", 2),
    "round 1 is closed": Point(f"{STORE}.close", "after"),
    "the round has releases": Point(f"{STORE}.open", "before", 2),
    "the round is open": Point(f"{STORE}.open", "after", 2),
    "the round is offered": Point("lamina.server.port.mailbox:Mailbox.offer", "after", 4),
    "an update is on disk": Point(f"{STORE}.receive", "before", 4),
    "an update is received": Point(f"{STORE}.receive", "after", 4),
    "two updates are received": Point(f"{STORE}.receive", "after", 5),
    "an update is admitted": Point(f"{STORE}.admit", "after", 4),
    "all updates are admitted": Point(f"{STORE}.close", "before", 2),
    "the round is closed": Point(f"{STORE}.close", "after", 2),
    "the checkpoint is half written": Point("lamina.protos.files:write_atomic", "before", 2, ".round-0002.partial"),
    "the checkpoint is written": Point("lamina.server.store.checkpoint:save", "after", 2),
    "the round is saved": Point(f"{STORE}.save", "after", 2),
    "the round's figures came": Point("lamina.server.measuring:Measuring._remember", "before", 3),
    "half of its record is written": Point("lamina.server.store.run_directory:append_durably", "torn", 2),
    "the record is written": Point(f"{STORE}.announce", "after", 2),
    "the last record is written": Point(f"{STORE}.announce", "after", 3),
    "the adapter is written": Point("lamina.server.export:write_adapter", "after"),
    "the summary is written": Point("lamina.server.finish:write_report", "before"),
    "the end is noted": Point("lamina.server.coordinator:_farewell", "before"),
}
# Where the state of a client matters: what it holds, and what it is sent of a growing frozen part.
HELD = (
    "an update is received", "all updates are admitted", "the round is closed", "the checkpoint is written",
    "the round is saved", "the record is written",
)  # fmt: skip
# The port is open for some seconds before anyone is asked: who goes on where he was comes too early, and tries again.
SLOW_TO_ASK = Point("lamina.server.port.mailbox:Mailbox.offer", "slow")
KILLED: dict[str, tuple[str, ...]] = {"recompress": tuple(POINTS), "residual": HELD, "stack": HELD, "alternate": HELD}


def killed_once(folder: Path, strategy: str, point: Point) -> None:
    with Scene(folder, [f"strategy={strategy}"]) as it:
        first = it.coordinator(point)
        it.all_sites()
        it.ended(first, -signal.SIGKILL)
        it.ended(it.coordinator(), 0)
        it.sites_ended()
        it.undisturbed()


@pytest.mark.parametrize("strategy", list(KILLED))
def test_killed_once(tmp_path: Path, strategy: str) -> None:
    at_once(
        {
            name: functools.partial(killed_once, tmp_path / str(number), strategy, POINTS[name])
            for number, name in enumerate(KILLED[strategy])
        }
    )


def test_one_who_is_slow_to_dial_again_is_asked_all_the_same(tmp_path: Path) -> None:
    """A coordinator that was killed between two rounds asks in the next whom it would have asked."""
    with Scene(tmp_path) as it:
        link = it.proxy()
        first = it.coordinator(POINTS["the record is written"])
        it.site("north")
        it.site("south")
        it.site("west", port=link.port)
        it.ended(first, -signal.SIGKILL)
        link.cut()
        second = it.coordinator()
        until(lambda: it.logged_rounds("round") == [1, 2, 3], "round 3 is open")
        link.heal()
        it.ended(second, 0)
        it.sites_ended()
        it.undisturbed()


def test_a_round_that_was_closed_stays_closed(tmp_path: Path) -> None:
    """An update that comes after the deadline and the kill does not count in the round that was closed without it."""
    given = ["clients.deadline_s=6", "clients.quorum=2"]
    gate = threading.Event()
    with Scene(tmp_path, given) as it:
        first = it.coordinator(POINTS["the round is closed"])
        it.site("north", Gated("north", gates={2: gate}))
        it.site("south")
        it.site("west")
        it.ended(first, -signal.SIGKILL)
        gate.set()
        it.ended(it.coordinator(None, "clients.deadline_s=120"), 0)
        it.sites_ended()
        everyone = sorted(NAMES)
        assert [record["clients"] for record in it.records()] == [everyone, ["south", "west"], everyone]
        it.same(fault_free(given, without=[("north", 2)]))


def killed_in_an_upload(folder: Path, strategy: str) -> None:
    """The restarted coordinator goes on at the byte: what it has is not sent again."""
    with Scene(folder, [f"strategy={strategy}", *BIG_WORDS], BIG_MODULES) as it:
        link = it.proxy()
        link.stall_after(350_000)
        first = it.coordinator()
        north = it.site("north", port=link.port)
        it.site("south")
        it.site("west")
        until(lambda: it.partial_bytes("north") > 200_000, "half of an update on disk")
        until(lambda: it.settled_bytes(link), "the link stands still")
        deployment.kill(first)
        there, sent = it.partial_bytes("north"), link.bytes_up
        link.heal()
        second = it.coordinator(SLOW_TO_ASK)
        until(lambda: north.rounds("sent"), "the update is sent")
        size = next(fields["bytes_up"] for name, fields in north.events if name == "sent")
        # What else goes up, signs of life and the registration, is far less than what was there already.
        assert link.bytes_up - sent < size - there + 100_000
        it.ended(second, 0)
        it.sites_ended()
        it.undisturbed()


def killed_in_a_download(folder: Path) -> None:
    """Likewise the site."""
    with Scene(folder, ["strategy=residual", "evaluate.every=3", *BIG_WORDS], BIG_MODULES) as it:
        link = it.proxy()
        first = it.coordinator()
        gate = threading.Event()
        north = it.site("north", port=link.port)
        it.site("south", Gated("south", gates={1: gate}))
        it.site("west")
        until(lambda: north.rounds("sent"), "round 1")
        link.slow(150_000)
        gate.set()

        def there() -> int:
            return sum(path.stat().st_size for path in (folder / "north").glob("*/releases/*.part"))

        until(lambda: there() > 100_000, "half of a release is there")
        deployment.kill(first)
        had, came = there(), link.bytes_down
        link.heal()
        second = it.coordinator(SLOW_TO_ASK)
        until(lambda: 2 in north.rounds("training"), "round 2")
        size = next(
            fields["bytes_down"] for name, fields in north.events if name == "training" and fields["round"] == 2
        )
        assert link.bytes_down - came < size - had + 100_000
        it.ended(second, 0)
        it.sites_ended()
        it.undisturbed()
        assert north.rounds("refused") + north.rounds("failed") == []


def test_killed_while_something_is_half_written(tmp_path: Path) -> None:
    uploads = {f"upload, {s}": functools.partial(killed_in_an_upload, tmp_path / s, s) for s in ("residual", "stack")}
    at_once({**uploads, "download": functools.partial(killed_in_a_download, tmp_path / "download")})


def killed_again_and_again(folder: Path, strategy: str, seed: int, seconds: float, rounds: int) -> None:
    rng = random.Random(seed)
    with Scene(folder, [f"strategy={strategy}", f"rounds={rounds}"]) as it:
        for name in NAMES:
            it.site(name, Synthetic(name, step_s=0.05, steps=4))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            process = it.coordinator()
            time.sleep(rng.uniform(0.1, 2.0))
            if process.poll() is not None:
                it.ended(process, 0)
                break
            deployment.kill(process)
        else:
            it.ended(it.coordinator(), 0, 120)
        it.sites_ended()
        it.undisturbed(rounds)


def test_killed_again_and_again_at_random_moments(tmp_path: Path) -> None:
    cases = {s: functools.partial(killed_again_and_again, tmp_path / s, s, 7, 8.0, 6) for s in STRATEGIES}
    at_once(cases)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again_for_minutes(tmp_path: Path, seed: int) -> None:
    cases = {s: functools.partial(killed_again_and_again, tmp_path / s, s, seed, 180.0, 40) for s in STRATEGIES}
    at_once(cases)
