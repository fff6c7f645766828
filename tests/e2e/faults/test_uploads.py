"""Slow and stalled links: an upload completes, its bytes go over the link once, and the adapter is the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from lamina.protos import coordinator_pb2 as pb
from lamina.protos import statements as st
from lamina.protos.clock import SYSTEM, Clock
from tests.deployment import NAMES, Synthetic
from tests.e2e.faults.scene import BRISK, Scene, until
from tests.hostile import Hostile, encoded

# What goes up beside updates: registrations, signs of life, acknowledgements of what came down.
BESIDE_BYTES = 150_000
# What of an upload a break may make travel again: a part that had not come whole, and what was in buffers on the way.
BUFFERED_BYTES = 250_000
CHUNK = "wire.chunk_bytes=65536"
# The first site's update takes 4 MB.
LARGE: Mapping[str, tuple[int, int]] = {"block.q_proj": (1024, 1024), "block.up_proj": (1024, 5120)}


def uploaded(it: Scene, name: str) -> list[int]:
    """Bytes of the updates that a site has sent; one that dials again may say once more what is there already."""
    found = {fields["round"]: fields["bytes_up"] for event, fields in it.sites[name].events if event == "sent"}
    return list(found.values())


def slow(folder: Path, modules: Mapping[str, tuple[int, int]], ranks: str, bytes_per_s: float) -> None:
    given = ["rounds=2", ranks, "clients.deadline_s=3600", "evaluate.every=2", "strategy=residual"]
    with Scene(folder, given, modules) as it:
        link = it.proxy()
        link.slow(bytes_per_s)
        running = it.thread()
        it.site("north", port=link.port)
        it.site("south")
        it.site("west")
        assert running.join(1800) == 0
        it.sites_ended()
        it.undisturbed(2)
        size = sum(uploaded(it, "north"))
        assert size <= link.bytes_up <= size * 1.01 + BESIDE_BYTES
        assert [record["bytes_up"] for record in it.records()] == [
            sum(uploaded(it, name)[number] for name in NAMES) for number in (0, 1)
        ]


def test_a_slow_link(tmp_path: Path) -> None:
    slow(tmp_path, LARGE, "clients.ranks=[128,2,2]", 2e6)


@pytest.mark.long
def test_hundreds_of_megabytes_at_5_MB_a_second(tmp_path: Path) -> None:
    slow(tmp_path, {"block.q_proj": (1024, 1024**2)}, "clients.ranks=[64,2,2]", 5e6)


def stalled(folder: Path, clock: Clock) -> None:
    """The link stands still for 200 s in the middle of an update."""
    given = ["rounds=1", "clients.ranks=[128,2,2]", "clients.deadline_s=100000", "wire.heartbeat_s=10", CHUNK]
    with Scene(folder, given, LARGE, clock) as it:
        link = it.proxy()
        link.stall_after(2_000_000)
        running = it.thread()
        it.site("north", port=link.port)
        it.site("south")
        it.site("west")
        until(lambda: it.partial_bytes("north") > 1_000_000, "half of the update is there")
        until(lambda: it.settled_bytes(link), "the link stands still")
        clock.sleep(200)
        link.heal()
        assert running.join(300) == 0
        it.sites_ended()
        it.undisturbed(1)
        (size,) = uploaded(it, "north")
        assert size <= link.bytes_up <= size + BUFFERED_BYTES + BESIDE_BYTES < 2 * size


def test_a_stall_of_200_seconds(tmp_path: Path) -> None:
    stalled(tmp_path, Clock(rate=60.0))


@pytest.mark.long
def test_a_stall_of_200_real_seconds(tmp_path: Path) -> None:
    stalled(tmp_path, SYSTEM)


def test_a_link_that_breaks_again_and_again(tmp_path: Path) -> None:
    """Each connection dies after 0.8 MB: the update still comes whole, from the byte where each broke off."""
    given = ["rounds=2", "clients.ranks=[128,2,2]", "strategy=stack", CHUNK]
    with Scene(tmp_path, given, LARGE, BRISK) as it:
        link = it.proxy()
        running = it.thread()
        it.site("south")
        it.site("west")
        link.drop_after(800_000)
        it.site("north", Synthetic("north"), link.port)
        breaks = 1
        while running.thread.is_alive():
            if breaks * 800_000 < link.bytes_up and breaks < 8:
                link.drop_after(800_000)
                breaks += 1
            running.thread.join(0.02)
        assert running.join() == 0
        it.sites_ended()
        it.undisturbed(2)
        assert breaks == 8
        sent = sum(uploaded(it, "north"))
        assert sent <= link.bytes_up <= sent + breaks * BUFFERED_BYTES + BESIDE_BYTES


# A sender that sends a byte now and then.


def trickling(it: Scene, over: threading.Event) -> tuple[Hostile, threading.Thread, list[str]]:
    """West by hand, its update under way byte by byte; its thread and how the upload ended."""
    west = Hostile("west", it.port, None, it.folder / "west-by-hand")
    it.stack.callback(west.close)
    west.register()
    for name in ("north", "south"):
        it.site(name)
    asked = west.instruction()
    content = encoded(west.honest(asked, it.schema))
    begun, ends = threading.Event(), []

    def parts() -> Iterator[pb.UploadPart]:
        yield pb.UploadPart(claim=west.statement(st.CLAIM, west.claim(asked, content)))
        for at in range(len(content) - 1):
            yield pb.UploadPart(data=content[at : at + 1])
            begun.set()
            if over.wait(0.02):
                return

    thread = threading.Thread(target=lambda: ends.append(west.send(parts(), 120.0)), daemon=True)
    thread.start()
    assert begun.wait(30)
    until(lambda: it.partial_bytes("west") > 0, "some of it is there")
    return west, thread, ends


def test_one_that_trickles_takes_nobody_elses_place(tmp_path: Path) -> None:
    """There is one place, and two more have an update to write."""
    over = threading.Event()
    with Scene(tmp_path, ["rounds=1", "coordinator.uploads=1", "evaluate.every=1000"]) as it:
        running = it.thread()
        west, thread, ends = trickling(it, over)
        try:
            until(lambda: all(it.sites[name].rounds("sent") == [1] for name in ("north", "south")), "both are in")
            assert thread.is_alive()
        finally:
            over.set()
        thread.join(30)
        assert ends == ["ended"]
        west.link.call("Report", west.statement(st.REPORT, {"kind": "leave"}))
        assert running.join() == 0
        assert [record["clients"] for record in it.records()] == [["north", "south"]]


def test_an_upload_ends_with_its_round(tmp_path: Path) -> None:
    """Its sender goes on; it is told, and hears of the next round."""
    over = threading.Event()
    words = ["rounds=2", "clients.quorum=2", "clients.deadline_s=8", "evaluate.every=1000"]
    with Scene(tmp_path, words) as it:
        running = it.thread()
        _, thread, ends = trickling(it, over)
        try:
            thread.join(60)
            assert not thread.is_alive()
        finally:
            over.set()
        (said,) = ends
        assert said.startswith("FAILED_PRECONDITION: late"), said
        assert running.join() == 0
        assert [record["clients"] for record in it.records()] == [["north", "south"]] * 2
