"""A deployment without torch: a coordinator as process or thread, sites whose training is arithmetic, and the adapter that a
run without faults would have.

As a program (`python -m tests.deployment site …`) it is one such site in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lamina.client.agent import Agent
from lamina.client.listening import Settings
from lamina.client.policy import Policy
from lamina.client.work import Allow, Sized, Trained
from lamina.protos import compose, seeds
from lamina.protos import identity as identities
from lamina.protos.adapter import Adapter, LoraFactors
from lamina.protos.blobs import blob
from lamina.protos.clock import SYSTEM, Clock
from lamina.protos.codec import decode, encode_update
from lamina.protos.config import Config
from lamina.protos.link import Address
from lamina.protos.logs import json_log
from lamina.protos.messages import Budget, Instruction, Reply, Update, Wish
from lamina.protos.privacy.events import Claim, Event, to_claim
from lamina.protos.sides import one_side, whole
from lamina.protos.spec import AdapterSpec
from lamina.protos.statements import budget_of
from lamina.server import campaign as campaigns
from lamina.server.channel import MemoryChannel
from lamina.server.coordinator import serve
from lamina.server.rounds import Loop
from lamina.server.rounds import run as run_rounds
from lamina.server.store import checkpoint
from tests import consortium

ROOT = Path(__file__).resolve().parents[1]
MODULES: Mapping[str, tuple[int, int]] = {"block.q_proj": (24, 16), "block.up_proj": (16, 32)}
NAMES = ("north", "south", "west")
RANKS = (4, 3, 2)


def spec(modules: Mapping[str, tuple[int, int]] = MODULES) -> AdapterSpec:
    dense = {"head.weight": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)}
    return AdapterSpec(modules, dense=dense, base_model="synthetic", hashes={"weights": "ab" * 32, "config": "cd" * 32})


def words(spec_file: Path, *more: str) -> list[str]:
    """The words of a run of three sites and three rounds; later words win."""
    settings = [
        f"coordinator.spec={spec_file}",
        f"clients.names=[{','.join(NAMES)}]",
        f"clients.count={len(NAMES)}",
        f"clients.ranks=[{','.join(map(str, RANKS))}]",
        "rounds=3",
        "seed=5",
        "clients.deadline_s=120",
        "wire.heartbeat_s=0.5",
    ]
    found = {word.partition("=")[0]: word for word in settings}
    found.update({word.partition("=")[0]: word for word in more})
    return list(found.values())


def config_of(given: Sequence[str]) -> Config:
    return compose.composed(compose.sweeps(list(given), False)[0])


# Sites.


def trained(name: str, seed: int, budget: Budget, schema: AdapterSpec, instruction: Instruction) -> Update:
    """What a site sends: its release, completed to its rank and moved a little; the same whenever it is asked the same."""
    rng = seeds.stream(seed, "synthetic", name, instruction.round)
    release = decode(instruction.release.read())
    if instruction.train != "AB":
        parts = [release, None if instruction.frozen is None else decode(instruction.frozen.read())]
        release = whole(parts, budget.train, budget.scale, schema.modules, seed, instruction.train)
    lora = {}
    for module, rank in budget.train.items():
        d_out, d_in = schema.modules[module]
        rows, columns = rng.normal(size=(rank, d_in)), rng.normal(size=(d_out, rank)) * 0.1
        got = release.lora.get(module)
        if got is not None:
            rows[: got.rank] = rows[: got.rank] * 0.1 + got.A
            columns[:, : got.rank] += got.B
        core = None
        if got is not None and got.core is not None:
            core = (got.core + rng.normal(size=got.core.shape)).astype(np.float32)
        lora[module] = LoraFactors(rows.astype(np.float32), columns.astype(np.float32), budget.scale[module], core)
        if instruction.train != "AB":
            lora[module] = one_side(lora[module], instruction.train)
    dense = {
        one: (release.dense.get(one, first) + rng.normal(size=first.shape) * 0.1).astype(np.float32)
        for one, first in schema.dense.items()
    }
    return Update(
        run_id=instruction.run_id,
        round=instruction.round,
        client_id=name,
        parent_release_hash=instruction.release_hash,
        adapter=Adapter(lora, dense),
        num_examples=10 + len(name),
        metrics={"train_loss": 1.0},
    )


@dataclass
class Synthetic:
    """A worker whose training is arithmetic.

    Attributes:
        name: The site's.
        step_s: Seconds that a step takes.
        steps: Steps in a round.
        change: Applied to each update before it is encoded; an attack, or nothing.
        wish: What it registers for, where its agent sizes itself.
        trained: Rounds that were trained, in order, repeats included.
        sized: What each sizing was given of an earlier one.
    """

    name: str
    step_s: float = 0.0
    steps: int = 2
    change: Callable[[Update], Update] = lambda update: update
    wish: Wish = field(default_factory=Wish)
    trained: list[int] = field(default_factory=list)
    sized: list[Mapping[str, Any] | None] = field(default_factory=list)

    def size(self, terms: Mapping[str, Any], spec: AdapterSpec, kept: Mapping[str, Any] | None) -> Sized:
        self.sized.append(kept)
        return Sized(self.wish, {"times": len(self.sized)})

    def begin(self, terms: Mapping[str, Any], spec: AdapterSpec, state: Mapping[str, bytes], version: int) -> None:
        self.spec, self.budget, self.seed = spec, budget_of(terms["budget"]), int(terms["task"]["seed"])

    def train(self, instruction: Instruction, progress: Callable[[int], None], allow: Allow) -> Trained:
        self.trained.append(instruction.round)
        for step in range(1, self.steps + 1):
            time.sleep(self.step_s)
            progress(step)
        update = trained(self.name, self.seed, self.budget, self.spec, instruction)
        return Trained(encode_update(self.change(update), "fp32"), {})

    def measure(self, instruction: Instruction) -> dict[str, float]:
        return {"nats": 20.0 / (1 + instruction.round), "targets": 10.0, "hits": 0.0}


@dataclass
class Noisy(Synthetic):
    """A worker under example-dp: fresh noise in each training, so that no two updates have the same bytes.

    Attributes:
        noise_multiplier: Of its mechanism.
        sample_rate: Of its mechanism.
        asks: Whether it asks for leave before it trains.
        made: SHA-256 of the updates that it made, in order.
    """

    noise_multiplier: float = 1.0
    sample_rate: float = 0.1
    asks: bool = True
    made: list[str] = field(default_factory=list)

    def begin(self, terms: Mapping[str, Any], spec: AdapterSpec, state: Mapping[str, bytes], version: int) -> None:
        super().begin(terms, spec, state, version)
        self.task = terms["task"]

    def event(self, round_number: int) -> Event:
        steps, clip = int(self.task["train.local_steps"]), float(self.task["train.max_grad_norm"])
        return Event(self.name, round_number, self.noise_multiplier, self.sample_rate, steps, clip)

    def train(self, instruction: Instruction, progress: Callable[[int], None], allow: Allow) -> Trained:
        event = self.event(instruction.round)
        spent = allow(event) if self.asks else 0.0
        self.trained.append(instruction.round)
        for step in range(1, self.steps + 1):
            time.sleep(self.step_s)
            progress(step)
        update = trained(self.name, self.seed, self.budget, self.spec, instruction)
        noise = np.random.default_rng(int.from_bytes(os.urandom(8), "big"))
        lora = {
            module: LoraFactors(one.A, one.B + noise.normal(size=one.B.shape).astype(np.float32) * 0.01, one.scale)
            for module, one in update.adapter.lora.items()
        }
        claim = to_claim(Claim(event, self.task["privacy.delta"], spent))
        private = replace(update, adapter=Adapter(lora, update.adapter.dense), metrics={}, privacy=claim)
        encoded = encode_update(self.change(private), "fp32")
        self.made.append(blob(encoded).sha256)
        return Trained(encoded, {}, event)


def agent(
    name: str,
    port: int,
    folder: Path,
    identity: Path | None = None,
    clock: Clock = SYSTEM,
    worker: Synthetic | None = None,
    log: Callable[..., None] = lambda event, **fields: None,
    policy: Policy | None = None,
    **more: Any,
) -> Agent:
    """An agent in this process."""
    who = None if identity is None else identities.load(identity)
    address = Address(f"127.0.0.1:{port}", who, name)
    settings = Settings(address, policy or Policy(), folder, **more)
    return Agent(settings, worker or Synthetic(name), clock, log)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def certificates(folder: Path, names: Sequence[str] = NAMES) -> dict[str, Path]:
    """Identities of a coordinator, some sites, an operator and an auditor, by name; `ca` is the CA's folder."""
    now = datetime.now(UTC)
    ca = consortium.new_ca(folder / "ca", now=now)
    found = {"ca": folder / "ca"}
    for name, role in [
        ("coordinator", "coordinator"),
        ("op", "operator"),
        ("aud", "auditor"),
        *((n, "client") for n in names),
    ]:
        found[name] = folder / name
        consortium.enrolled(ca, found[name], name, role, now)
    return found


# A coordinator in a thread.


@dataclass
class Running:
    """A coordinator in this process.

    Attributes:
        port: Its port.
        path: Its run directory.
        events: What it logged.
    """

    port: int
    path: Path
    events: list[dict[str, Any]]
    thread: threading.Thread
    outcome: list[Any]

    def join(self, seconds: float = 60.0) -> int:
        """Wait for its end; its exit code, or the error that it raised."""
        self.thread.join(seconds)
        assert not self.thread.is_alive(), f"the coordinator did not end: {self.events[-5:]}"
        (found,) = self.outcome
        if isinstance(found, BaseException):
            raise found
        return int(found)


@contextlib.contextmanager
def coordinator(path: Path, given: Sequence[str], clock: Clock = SYSTEM) -> Iterator[Running]:
    """A coordinator in a thread, to be joined or left to end with its run."""
    config = config_of(
        [*given, "coordinator.listen=127.0.0.1:0"] if not any("listen" in one for one in given) else given
    )
    said: list[dict[str, Any]] = []
    ready: list[int] = []
    opened = threading.Event()
    outcome: list[Any] = []

    def on_ready(port: int) -> None:
        ready.append(port)
        opened.set()

    def work() -> None:
        try:
            outcome.append(serve(config, path, lambda event, **f: said.append({"event": event, **f}), clock, on_ready))
        except BaseException as error:  # noqa: BLE001  handed to the test
            outcome.append(error)
            opened.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert opened.wait(30)
    running = Running(ready[0] if ready else 0, path, said, thread, outcome)
    yield running


def in_thread(one: Agent) -> tuple[threading.Thread, list[Any]]:
    """Run an agent beside the test; its exit code or error lands in the list."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(one.run())
        except BaseException as error:  # noqa: BLE001  handed to the test
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, outcome


# Processes.


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def start(*command: str, log: Path | None = None) -> subprocess.Popen[bytes]:
    """A Python process of this checkout; its standard error goes to `log`."""
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(log.open("ab")) if log else subprocess.DEVNULL
        return subprocess.Popen(
            [sys.executable, *command], env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=target
        )


def start_coordinator(path: Path, port: int, given: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """`lamina coordinator` in a process."""
    return start(
        "-m",
        "lamina",
        "coordinator",
        "--json",
        *given,
        f"coordinator.listen=127.0.0.1:{port}",
        f"output={path}",
        log=log,
    )


def start_site(
    name: str, port: int, folder: Path, log: Path, identity: Path | None = None, step_s: float = 0.0, steps: int = 2
) -> subprocess.Popen[bytes]:
    """A synthetic site in a process."""
    settings = {
        "name": name,
        "port": port,
        "folder": str(folder),
        "identity": str(identity) if identity else None,
        "step_s": step_s,
        "steps": steps,
    }
    return start("-m", "tests.deployment", "site", json.dumps(settings), log=log)


def wait_for(path: Path, event: str, seconds: float = 30.0, count: int = 1) -> list[dict[str, Any]]:
    """Events of a log as they come, until `count` of a kind are there."""
    until = time.monotonic() + seconds
    while True:
        lines = path.read_text().splitlines() if path.exists() else []
        found = [one for one in map(_event, lines) if one.get("event") == event]
        if len(found) >= count:
            return found
        assert time.monotonic() < until, f"no {event} in {path.name}: {lines[-5:]}"
        time.sleep(0.02)


def _event(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9."""
    process.send_signal(signal.SIGKILL)
    process.wait(10)


# What a run without faults gives.


def fault_free(
    given: Sequence[str],
    chosen: Mapping[str, Mapping[str, int]] | None = None,
    schema: AdapterSpec | None = None,
    without: Sequence[tuple[str, int]] = (),
) -> Adapter:
    """The global adapter of the same run in memory: no network, no disk, no fault.

    Args:
        given: The run's words.
        chosen: Ranks by module of the clients that chose them.
        schema: Its schema.
        without: (client, round) pairs that do not count.
    """
    schema, config = schema or spec(), config_of(given)
    budgets = campaigns.budgets(config, schema, chosen)
    campaign = campaigns.campaign(config, schema, budgets, "in memory")

    def respond(instruction: Instruction) -> Reply | None:
        name = instruction.client_id
        if (name, instruction.round) in without:
            return None
        update = trained(name, config.seed, budgets[name], schema, instruction)
        return Reply(name, blob(encode_update(update, "fp32")))

    state = run_rounds(Loop(campaign, MemoryChannel(dict.fromkeys(budgets, respond)), lambda state, held: None))
    return state.adapter


def final(path: Path) -> Adapter:
    """The global adapter of a run directory's newest checkpoint."""
    last = checkpoint.load_last(path)
    assert last is not None
    return last.state.adapter


def main(arguments: Sequence[str]) -> int:
    settings = json.loads(arguments[1])
    identity = Path(settings["identity"]) if settings["identity"] else None
    kind = Noisy if settings.get("private") else Synthetic
    worker = kind(settings["name"], settings["step_s"], settings["steps"])
    log = json_log(SYSTEM.now)
    one = agent(settings["name"], settings["port"], Path(settings["folder"]), identity, worker=worker, log=log)
    return one.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
