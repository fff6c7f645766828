"""A coordinator from config to run directory: open or resume, listen, run the rounds, write what a reader needs.

Started again on the same directory, it goes on where it was killed. The round loop runs in the calling thread; the port's
threads meet it in the mailbox and the store.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamina.protos.clock import SYSTEM, Clock
from lamina.protos.config import Config, checked
from lamina.protos.errors import LaminaError, StorageError
from lamina.protos.files import alone, sha256
from lamina.protos.link import check_exposed
from lamina.protos.logs import Log
from lamina.protos.messages import Reply
from lamina.server import spending
from lamina.server.finish import Run as Finished
from lamina.server.finish import summarise, write_results
from lamina.server.measuring import Measuring
from lamina.server.metrics import Metrics
from lamina.server.opening import Opened, open_run
from lamina.server.port.listen import listen
from lamina.server.port.mailbox import Stopped
from lamina.server.port.run import Run
from lamina.server.rounds import Loop
from lamina.server.rounds import run as run_rounds
from lamina.server.store.base import Completed, Evaluation
from lamina.server.store.log_files import ADAPTER, ROUNDS
from lamina.strategies.base import ServerState

_LOOK_S = 1.0
_TAKEN = "expected a run that nobody works on, but another coordinator has it. Stop that one, or take another output=."
_TWINS_S = 60.0
_TWINS = "another stream of this name while one is open: two agents of one name, or one that has dialled again. Stop one of two."
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
# How long clients are given to hear that the run is over: those on the line, and after a restart those who will dial again.
_FAREWELL_S = 30.0


def _disk_told(serving: Callable[..., int]) -> Callable[..., int]:
    """Say of a disk that is full or fails what can be done, in place of a traceback."""

    @functools.wraps(serving)
    def told(config: Config, path: Path, *rest: Any, **named: Any) -> int:
        try:
            return serving(config, path, *rest, **named)
        except OSError as error:
            if error.errno not in _DISK:
                raise
            raise StorageError(
                f"{error.filename or path}: expected room and the right to write, got: {error.strerror}. What was completed "
                f"is kept in {path}: make room, and start again with the same output."
            ) from None

    return told


@_disk_told
def serve(
    config: Config, path: Path, log: Log, clock: Clock = SYSTEM, ready: Callable[[int], None] | None = None
) -> int:
    """Run a coordinator to the end of its run.

    Args:
        config: A composed config.
        path: The run directory; one that holds this run already is gone on with.
        log: Told what happens.
        clock: For time-outs.
        ready: Told the number of the port once it is open.

    Returns:
        Exit code 0: finished, stopped by an operator, or drained.

    Raises:
        LaminaError: See the tree in `protos.errors`. Whatever had been completed is in the directory.
    """
    checked(config)
    check_exposed(config.coordinator.listen, config.insecure, "coordinator.listen")
    with alone(path, "output", _TAKEN):
        return _serve(config, path, log, clock, ready)


def _serve(config: Config, path: Path, log: Log, clock: Clock, ready: Callable[[int], None] | None) -> int:
    started = time.monotonic()
    opened = open_run(config, path, log, clock)
    run = opened.run
    server, number, _ = listen(run, opened.identity, log)
    log("listening", port=number, run_id=run.campaign.run_id, insecure=config.insecure or None, output=str(path))
    if run.campaign.plan is not None:
        log("privacy", message=run.campaign.plan.line())
    first = 1 + (opened.resumed.state.round if opened.resumed else 0)
    if first <= run.campaign.rounds and run.store.db.rows("SELECT 1 FROM rounds"):
        log("continues", round=first)
    metrics = Metrics(
        live=lambda: len(run.roster.heard(3 * config.wire.heartbeat_s)), uploading=lambda: float(run.live.uploads)
    )
    closing: list[Callable[[], None]] = []
    if config.coordinator.metrics:
        endpoint, _ = metrics.serve(config.coordinator.metrics)
        closing.append(endpoint.shutdown)
    over, leave = threading.Event(), threading.Event()
    threading.Thread(target=_look_after, args=(run, log, over), daemon=True, name="look-after").start()
    try:
        with _signals(run, leave):
            if ready is not None:
                ready(number)
            return _run(opened, log, metrics, started, leave)
    finally:
        over.set()
        run.live.ended = run.live.ended or "drained"
        run.mailbox.poke()
        server.stop(config.coordinator.drain_s if run.live.ended == "drained" else 1.0).wait()
        for close in closing:
            close()
        run.store.db.close()


def _run(opened: Opened, log: Log, metrics: Metrics, started: float, leave: threading.Event) -> int:
    run, config = opened.run, opened.run.config

    def announced(completed: Completed) -> None:
        metrics.completed(completed.record)
        record = completed.record
        shown = (
            "round",
            "clients",
            "loss",
            "train_loss",
            "bytes_up",
            "bytes_down",
            "relative_error",
            "seconds",
            "epsilon",
        )
        log("round", **{key: record[key] for key in shown}, rejections=len(record["rejections"]) or None)

    store = replace(run.store, completed=announced)
    measuring = Measuring(
        campaign=run.campaign,
        store=store,
        roster=run.roster,
        mailbox=run.mailbox,
        every=config.evaluate.every if config.privacy.mode == "none" else None,
        classes=config.task == "sequence-classification",
        heartbeat_s=config.wire.heartbeat_s,
        deadline_s=config.evaluate.deadline_s,
        clock=run.clock,
        started=run.clock.monotonic(),
    )

    def evaluated(state: ServerState, held: Mapping[str, int]) -> Evaluation | None:
        run.live.latest = state
        try:
            return measuring.evaluate(state, held)
        except Stopped as stopped:
            if str(stopped) == "drained":
                raise  # a restart measures it again
            return None  # the round is whole; the loop ends before the next one

    loop = Loop(run.campaign, run.mailbox, evaluated, store, lambda number: _present(run, number), run.sums)
    start = opened.resumed.state if opened.resumed else run.campaign.strategy.init(run.campaign.spec)
    run.live.latest = start
    try:
        if start.round == 0 and measuring.known("base") is None and store.opened(1) is None:
            _present(run, 1)
            measuring.evaluate(start, {})
        state = run_rounds(loop, opened.resumed)
        why = "finished"
    except Stopped as stopped:
        if str(stopped) == "drained":
            log("drained", message="the open round is kept; start again with the same output to go on")
            return 0
        state, why = run.live.latest or start, "stopped"
    _finish(opened, state, (measuring.known("base"), measuring.known("last")), why, time.monotonic() - started)
    log(why, round=state.round, adapter=str(run.store.path / "adapter"), report=str(run.store.path / "report.html"))
    _farewell(run, why, leave)
    return 0


def _present(run: Run, round_number: int) -> Mapping[str, Any]:
    def held_back() -> bool:
        if run.store.db.fact("stopping") == "1":
            raise Stopped("stopped")
        return run.store.db.fact("paused") == "1"

    return run.roster.present(round_number, run.mailbox, held_back, run.store.missed(round_number))


def _finish(
    opened: Opened, state: ServerState, figures: tuple[Evaluation | None, Evaluation | None], why: str, seconds: float
) -> None:
    run, path = opened.run, opened.run.store.path
    budgets, head = run.roster.known(), run.store.head()
    deployment = {
        "coordinator": "" if opened.identity is None else opened.identity.peer.name,
        "consortium": run.consortium,
        "gone": run.roster.gone(run.access),
        "log": {"n": head.n, "hash": head.hash},
    }
    names = {client: client for client in budgets}
    told = spending.document(run.campaign.promise, state.privacy_history)
    finished = Finished(run.campaign.run_id, names, budgets, "release", run.campaign.spec, told, why, deployment)
    summary = summarise(run.config, finished, path, figures, {"total": seconds, "base": 0.0})
    with run.live.files:
        shutil.rmtree(path / "latest", ignore_errors=True)
        write_results(path, state, run.campaign.spec, summary, run.config)
    adapter, rounds = (sha256((path / name).read_bytes()) for name in (ADAPTER, ROUNDS))
    run.store.note("end", {"ended": why}, why=why, round=state.round, adapter=adapter, rounds=rounds)


def _farewell(run: Run, why: str, leave: threading.Event) -> None:
    """Tell the clients that the run is over, as far as they are on the line; then stay for operators, or until a signal."""
    run.live.ended = why
    run.mailbox.offer([])
    until = run.clock.monotonic() + _FAREWELL_S
    while run.clock.monotonic() < until:
        there = {**run.roster.heard(2 * run.config.wire.heartbeat_s), **run.roster.missed(_FAREWELL_S)}
        if run.live.told.issuperset(there):
            break
        run.clock.sleep(0.05)
    leave.wait(run.clock.real(run.config.coordinator.linger_s))


def _look_after(run: Run, log: Log, over: threading.Event) -> None:
    """Look again and again. While a look fails nobody is let in: someone may have been revoked. A fault of ours ends the run."""
    told = ""
    twins: dict[str, float] = {}
    while not over.wait(run.clock.real(_LOOK_S)):
        held = ""
        try:
            _look(run, log)
        except (LaminaError, OSError) as error:
            held = f"the coordinator cannot tell who was revoked: {error}"
        except Exception as error:  # noqa: BLE001  raised again by the round loop
            run.mailbox.fail(error)
            return
        run.access.held = (
            "the coordinator cannot tell who was revoked. Its operator is told; try again." if held else ""
        )
        if (held or run.access.fault) != told:
            told = held or run.access.fault
            log("revocations", message=told or "in force")
        for name in run.access.calls.doubled():
            if run.clock.monotonic() - twins.get(name, -_TWINS_S) >= _TWINS_S:
                twins[name] = run.clock.monotonic()
                log("twins", client=name, message=_TWINS)


def _look(run: Run, log: Log) -> None:
    """Read the list of revoked certificates again when it changes; no round waits for a site that is on it. Nor does one
    wait for sites whose calls the disk does not let us answer: the run ends.
    """
    run.access.reload()
    if run.access.broken is not None:
        run.mailbox.fail(run.access.broken)
    for name in run.roster.revoked(run.access):
        with run.store.lock:
            run.mailbox.deliver(Reply(name, None, "revoked"))
        if run.roster.leave(name):
            log("revoked", client=name)


@contextlib.contextmanager
def _signals(run: Run, leave: threading.Event) -> Iterator[None]:
    """End at a good moment on SIGTERM and SIGINT; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end() -> None:
        leave.set()
        run.mailbox.end("drained")

    def drain(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        run.live.ended = run.live.ended or "drained"
        # The main thread may hold the mailbox's or the event's lock just now.
        threading.Thread(target=end, daemon=True).start()

    before = {number: signal.signal(number, drain) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
