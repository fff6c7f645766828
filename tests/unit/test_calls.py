"""How many calls one caller may have open, which newer call ends an older one, and what the mailbox takes."""

from __future__ import annotations

import resource
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from lamina.protos.blobs import blob
from lamina.protos.clock import SYSTEM, Clock
from lamina.protos.messages import Instruction, Reply
from lamina.server.port import calls, listen
from lamina.server.port.calls import MOST, Call, Calls
from lamina.server.port.mailbox import Mailbox
from lamina.server.port.places import LEAST_PER_S, PATIENCE_S, Places
from lamina.server.port.run import Live


@dataclass
class Context:
    """Of a call that is open until it is cancelled."""

    cancelled: threading.Event = field(default_factory=threading.Event)

    def is_active(self) -> bool:
        return not self.cancelled.is_set()

    def cancel(self) -> None:
        self.cancelled.set()


def opened(stack: ExitStack, all_calls: Calls, name: str, site: bool = True, single: str = "") -> tuple[bool, Context]:
    context = Context()
    call = Call(name, 0, context, False, site, single)
    return stack.enter_context(all_calls.counted(call)), context


def test_a_newer_stream_of_a_kind_ends_the_older_one_of_the_same_site() -> None:
    with ExitStack() as stack:
        found = Calls()
        _, first = opened(stack, found, "north", single="/a/Instructions")
        _, other = opened(stack, found, "south", single="/a/Instructions")
        _, download = opened(stack, found, "north", single="/a/Download")
        assert found.doubled() == set()
        allowed, second = opened(stack, found, "north", single="/a/Instructions")
        assert allowed
        assert [one.is_active() for one in (first, other, download, second)] == [False, True, True, True]
        assert found.doubled() == {"north"}
        assert found.doubled() == set()


def test_no_set_of_sites_can_take_every_thread() -> None:
    """However many calls each opens, ended ones included whose threads go on, there is a thread for the next caller."""
    names = ("north", "south", "west")
    with ExitStack() as stack:
        found = Calls()
        taken = 0
        for name in names:
            for _ in range(100):
                taken += opened(stack, found, name, single="/a/Instructions")[0]
                taken += opened(stack, found, name)[0]
        assert taken <= 2 * MOST * len(names) < calls.threads(len(names))
        assert opened(stack, found, "op", site=False)[0]
        for number in range(300):
            taken += opened(stack, found, f"op{number % 20}", site=False)[0]
        assert taken < calls.threads(len(names))


def test_one_operator_does_not_shut_out_another() -> None:
    with ExitStack() as stack:
        found = Calls()
        assert not all(opened(stack, found, "op", site=False)[0] for _ in range(100))
        assert opened(stack, found, "aud", site=False)[0]


@pytest.mark.parametrize(
    ("limits", "wanted", "files"),
    [
        ((1024, 524_288), (65_536, 524_288), 65_536),
        ((1024, 4096), (4096, 4096), 4096),
        ((1024, resource.RLIM_INFINITY), (65_536, resource.RLIM_INFINITY), 65_536),
        ((100_000, 524_288), None, 100_000),
        ((4096, 4096), None, 4096),
    ],
)
def test_the_limit_on_open_files_is_raised_as_far_as_it_goes(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], wanted: tuple[int, int] | None, files: int
) -> None:
    done: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda what, given: done.append(given))
    assert listen._open_files() == files
    assert done == ([] if wanted is None else [wanted])


def asked(round_number: int) -> Instruction:
    return Instruction("run", round_number, "north", blob(b"release"), None, round_number)


def test_a_reply_about_what_is_over_is_dropped() -> None:
    mailbox, first, second = Mailbox(SYSTEM), asked(1), asked(2)
    update = Reply("north", blob(b"update"))
    mailbox.deliver(update, first)  # nobody was asked anything
    mailbox.offer([second])
    mailbox.deliver(update, first)
    assert list(mailbox.replies(0.0)) == []
    mailbox.deliver(update, second)
    assert list(mailbox.replies(None)) == [update]


def test_one_who_has_answered_does_not_fail_afterwards() -> None:
    mailbox, now = Mailbox(SYSTEM), asked(1)
    update = Reply("north", blob(b"update"))
    mailbox.offer([now])
    mailbox.deliver(update, now)
    mailbox.deliver(Reply("north", None, "revoked"))
    assert list(mailbox.replies(None)) == [update]


@dataclass(frozen=True)
class Hands(Clock):
    """A clock that is moved by hand."""

    at: list[float] = field(default_factory=lambda: [0.0])

    def monotonic(self) -> float:
        return self.at[0]


def test_a_place_is_kept_while_bytes_come_and_no_longer_where_others_wait() -> None:
    clock = Hands()
    places = Places(1, clock)
    with ExitStack() as stack:
        first = stack.enter_context(places.one(Context()))
        assert first is not None
        for _ in range(20):
            clock.at[0] += 4.0
            first.came(8 * LEAST_PER_S)
        gone = Context()
        gone.cancel()
        assert stack.enter_context(places.one(gone)) is None  # it waited in vain
        clock.at[0] += PATIENCE_S + 0.1  # and trickles from now on
        first.came(1)
        second = stack.enter_context(places.one(Context()))
        assert second is not None
    with places.one(Context()) as third:
        assert third is not None


def test_numbers_of_what_is_under_way_add_up() -> None:
    live, together = Live(), threading.Barrier(8)

    def work() -> None:
        together.wait()
        for _ in range(2000):
            with live.counted("downloads"), live.counted("uploads"):
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (live.downloads, live.uploads) == (0, 0)
