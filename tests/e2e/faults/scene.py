"""What the fault tests share: a coordinator process at a fixed port, sites as threads that live on, what must hold at the end."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lamina.client.agent import Agent
from lamina.client.work import Allow, Trained
from lamina.protos.adapter import Adapter
from lamina.protos.clock import Clock
from lamina.protos.link import Address, Link
from lamina.protos.messages import Instruction
from lamina.protos.spec import AdapterSpec
from lamina.server.operate import Remote
from lamina.server.store import log_check, run_directory
from tests import deployment
from tests.deployment import NAMES, Running, Synthetic
from tests.e2e.faults.killable import Point
from tests.proxy import Proxy
from tests.runs import merged, same_bits

# The update of the first site takes some 0.6 MB, in parts of 32 KiB: enough to be cut in the middle.
BIG_MODULES: Mapping[str, tuple[int, int]] = {"block.q_proj": (512, 512), "block.up_proj": (512, 768)}
BIG_WORDS = ("clients.ranks=[64,48,32]", "wire.chunk_bytes=32768")
# Sites' seconds pass faster, so that their waits before they dial again are short.
BRISK = Clock(rate=4.0)


def until(holds: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """Wait for a condition; what it gave."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)
    return found


def at_once(cases: Mapping[str, Callable[[], None]], workers: int = 6) -> None:
    """Run cases side by side, since most of each is waiting; all that failed are told."""

    def played(case: Callable[[], None]) -> str:
        try:
            case()
        except AssertionError as error:
            return str(error) or "failed"
        except Exception as error:  # noqa: BLE001  told with its case
            return repr(error)
        return ""

    with ThreadPoolExecutor(workers) as pool:
        found = dict(zip(cases, pool.map(played, cases.values()), strict=True))
    assert not any(found.values()), "\n\n".join(f"{name}: {why}" for name, why in found.items() if why)


_COMPOSING = threading.Lock()


def fault_free(
    given: Sequence[str],
    modules: Mapping[str, tuple[int, int]] = deployment.MODULES,
    without: Sequence[tuple[str, int]] = (),
) -> Adapter:
    """The adapter of a run in memory; one at a time, since Hydra is one for the process."""
    with _COMPOSING:
        return deployment.fault_free(
            deployment.words(Path("spec.json"), *given), schema=deployment.spec(modules), without=without
        )


@dataclass
class Gated(Synthetic):
    """A worker whose training waits, in the rounds that have a gate, until the gate is opened.

    Attributes:
        gates: Round -> what opens it.
        begun: Rounds whose training has begun.
    """

    gates: Mapping[int, threading.Event] = field(default_factory=dict)
    begun: list[int] = field(default_factory=list)

    def train(self, instruction: Instruction, progress: Callable[[int], None], allow: Allow) -> Trained:
        self.begun.append(instruction.round)
        gate = self.gates.get(instruction.round)
        while gate is not None and not gate.wait(0.01):
            progress(0)
        return super().train(instruction, progress, allow)


@dataclass
class Site:
    """A site in this process.

    Attributes:
        worker: What trains.
        agent: What talks.
        events: What it logged.
        thread: Its.
        outcome: Its exit code or error, once it has ended.
    """

    worker: Synthetic
    agent: Agent
    events: list[tuple[str, Mapping[str, Any]]]
    thread: threading.Thread
    outcome: list[Any]

    def rounds(self, event: str) -> list[int]:
        """Rounds of an event of its log."""
        return [fields["round"] for name, fields in self.events if name == event]


@dataclass(frozen=True)
class SiteProcess:
    """A site in a process of its own.

    Attributes:
        process: It.
        log: What it and those before it under its name have said.
    """

    process: subprocess.Popen[bytes]
    log: Path

    def rounds(self, event: str) -> list[int]:
        """Rounds of an event of the log."""
        return [one["round"] for one in deployment.wait_for(self.log, event, 0.0, 0)]

    def reach(self, event: str, round_number: int) -> None:
        """Wait for an event of a round."""
        until(lambda: round_number in self.rounds(event), f"{event} of round {round_number} in {self.log.name}")


@dataclass
class Scene(AbstractContextManager["Scene"]):
    """A coordinator's port and directory, and sites.

    Attributes:
        folder: For everything.
        given: Words of the run beside the usual ones.
        modules: Of the schema.
        clock: The sites'.
        port: The coordinator's.
        sites: By name.
        processes: All that were started.
    """

    folder: Path
    given: Sequence[str] = ()
    modules: Mapping[str, tuple[int, int]] = field(default_factory=lambda: deployment.MODULES)
    clock: Clock = BRISK
    port: int = field(default_factory=deployment.free_port)
    sites: dict[str, Site] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        spec_file = self.folder / "spec.json"
        spec_file.write_text(self.schema.to_json())
        self.words = deployment.words(spec_file, "insecure=true", *self.given)

    @property
    def schema(self) -> AdapterSpec:
        """Of the base."""
        return deployment.spec(self.modules)

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.folder / "run"

    @property
    def log(self) -> Path:
        """What all coordinator processes said."""
        return self.folder / "coordinator.log"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for site in self.sites.values():
            site.agent.stop()
        for process in self.processes:
            if process.poll() is None:
                deployment.kill(process)
        self.stack.close()

    def coordinator(self, point: Point | None = None, *more: str) -> subprocess.Popen[bytes]:
        """Start `lamina coordinator`, to die at a point; returns when its port is open, or it is dead already."""
        listen, output = f"coordinator.listen=127.0.0.1:{self.port}", f"output={self.path}"
        begin = ("-m", "lamina") if point is None else point.words
        given = merged(self.words, more)
        process = deployment.start(*begin, "coordinator", "--json", *given, listen, output, log=self.log)
        self.processes.append(process)
        until(lambda: process.poll() is not None or self.is_open(), "the port is open")
        return process

    def is_open(self) -> bool:
        """Whether a coordinator listens."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def thread(self) -> Running:
        """Start a coordinator in this process, with this scene's clock."""
        given = [*self.words, f"coordinator.listen=127.0.0.1:{self.port}"]
        with _COMPOSING, deployment.coordinator(self.path, given, self.clock) as running:
            return running

    def operator(self) -> Remote:
        """An operator on the line."""
        link = Link(Address(f"127.0.0.1:{self.port}", None, "op", "operator"), self.clock)
        self.stack.callback(link.close)
        return Remote(link)

    def site(self, name: str, worker: Synthetic | None = None, port: int | None = None, **more: Any) -> Site:
        """Start a site as threads of this process."""
        events: list[tuple[str, Mapping[str, Any]]] = []
        worker = worker or Synthetic(name)
        agent = deployment.agent(
            name,
            port or self.port,
            self.folder / name,
            clock=self.clock,
            worker=worker,
            log=lambda event, **fields: events.append((event, fields)),
            **more,
        )
        self.sites[name] = Site(worker, agent, events, *deployment.in_thread(agent))
        return self.sites[name]

    def process(self, name: str, point: Point | None = None, port: int | None = None, **more: Any) -> SiteProcess:
        """Start a site in a process of its own, to die at a point; its log goes on where it was."""
        log, settings = self.folder / f"{name}.log", {"step_s": 0.0, "steps": 2, "identity": None} | more
        settings |= {"name": name, "port": port or self.port, "folder": str(self.folder / name)}
        begin = ("-m", "tests.deployment", "site") if point is None else (*point.words, "site")
        process = deployment.start(*begin, json.dumps(settings), log=log)
        self.processes.append(process)
        return SiteProcess(process, log)

    def all_sites(self) -> None:
        """Start every site as it is by default."""
        for name in NAMES:
            self.site(name)

    def proxy(self, target: int | None = None) -> Proxy:
        """A proxy before the coordinator, for one site."""
        return self.stack.enter_context(Proxy(target or self.port))

    def records(self) -> list[dict[str, Any]]:
        """Lines of `rounds.jsonl`."""
        return run_directory.read_records(self.path)

    def partial_bytes(self, name: str) -> int:
        """Bytes of a site's update that are on the coordinator's disk and not the whole of it."""
        try:
            return sum(path.stat().st_size for path in (self.path / "blobs" / "partial").glob(f"*-{name}-*"))
        except FileNotFoundError:
            return 0

    def settled_bytes(self, link: Proxy) -> bool:
        """Whether a link carries nothing up, for a moment."""
        before = link.bytes_up
        time.sleep(0.3)
        return link.bytes_up == before

    # What must hold.

    def ended(self, process: subprocess.Popen[bytes], code: int, seconds: float = 60.0) -> None:
        """A process ends so."""
        try:
            found = process.wait(seconds)
        except subprocess.TimeoutExpired:
            found = None
        assert found == code, f"expected exit code {code}, got {found}: {self.tail()}"

    def tail(self) -> str:
        """The end of the coordinators' log."""
        return "\n".join(self.log.read_text().splitlines()[-12:]) if self.log.exists() else ""

    def sites_ended(self, seconds: float = 30.0) -> None:
        """Every site has heard of the end."""
        for name, site in self.sites.items():
            site.thread.join(seconds)
            assert site.outcome == [0], f"{name}: {site.outcome}, {site.events[-6:]}"

    def same(self, wanted: Adapter | None = None) -> None:
        """The adapter is that of a run without faults, or another that is stated."""
        wanted = wanted or fault_free(self.given, self.modules)
        assert same_bits(deployment.final(self.path), wanted), "another adapter"

    def undisturbed(self, rounds: int = 3) -> None:
        """Everyone in every round, nothing refused, nothing trained twice, and a log that tells each round once."""
        self.same()
        records = self.records()
        assert [record["round"] for record in records] == list(range(1, rounds + 1))
        assert all(record["clients"] == sorted(NAMES) for record in records)
        assert [record["rejections"] for record in records] == [[]] * rounds
        for name, site in self.sites.items():
            assert site.worker.trained == list(range(1, rounds + 1)), name
        self.logged(rounds)

    def logged(self, rounds: int) -> None:
        """The event log is whole, and has each round's aggregation once."""
        path = self.path / "events.jsonl"
        checked = log_check.check(path, None, "")
        assert checked.verified.bad is None, checked.verified.bad
        assert self.logged_rounds("aggregate") == list(range(1, rounds + 1))

    def logged_rounds(self, kind: str) -> list[int]:
        """Rounds of a kind of event; a line that is being written is left out."""
        whole = (self.path / "events.jsonl").read_text().rpartition("\n")[0]
        found = [json.loads(line) for line in whole.splitlines()]
        return [one["fields"]["round"] for one in found if one["kind"] == kind]
