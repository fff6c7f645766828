"""Transport: ours against a bare gRPC stream and against Flower's deployment engine, side by side in one run.

    python benchmarks/transport.py [--quick]

- `up_vs_bare_grpc`, `down_vs_bare_grpc`: bytes per second of one 64 MB adapter over mutual TLS, ours over the bare stream's.
  Ours has everything on: claim signed and checked, chunks, SHA-256 by the receiver, resumable partial file, stored as a blob, a
  row in SQLite, the event log. The sender's SHA-256 of an update is taken before, when it is put on the site's own disk. The
  receivers of both write a new file and fsync it. Before each transfer of either, a file is written and removed, so that neither
  pays for pages that the other has used. Repeats alternate; medians are compared.
- `round_vs_flower`: seconds of the exchange of a round in which two clients receive and return a 64 MB adapter of 244 arrays,
  from before it is encoded to when both replies are in. Ours is over mutual TLS, durable at both ends, and checks both updates;
  Flower's is without TLS and in memory. Neither has the mean in it. `round_vs_flower_packed` sets ours against Flower's with as
  many bytes in 16 arrays, which suits it best, and `whole_round_vs_flower` our whole round, with the aggregate, the measurement
  of its error and the checkpoint, against Flower's exchange.
- `empty_round_s`: a round of two clients with an adapter of a few numbers, median.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import transport_peers as peers  # noqa: E402
from benchmarks.results import write_section  # noqa: E402

# An adapter of 64 MB as a model of some billion parameters has it: rank 16, 244 arrays.
MODULES, RANK, WIDTH = 122, 16, 4096
NAMES = ("a", "b")
BOUNDS = {"up_vs_bare_grpc": 0.7, "down_vs_bare_grpc": 0.7, "round_vs_flower": 10.0}
EMPTY_ROUND_S = 0.05


def certificates(folder: Path) -> dict[str, Path]:
    """A consortium of a coordinator and two sites."""
    from lamina.protos.identity import authority, site

    now = datetime.now(UTC)
    ca = authority.create(folder / "ca", "benchmark", 30, None, now)
    for name in ("coordinator", *NAMES):
        role = "coordinator" if name == "coordinator" else "client"
        invite = authority.invite(ca, name, role, ("127.0.0.1",) if role == "coordinator" else (), now)
        site.accept(folder / name, authority.fulfil(ca, site.prepare(folder / name, invite, now), now), invite, now)
    return {name: folder / name for name in ("coordinator", *NAMES)}


def write_spec(path: Path, modules: int, width: int) -> None:
    from lamina.protos.spec import AdapterSpec

    shapes = {f"layer{index}": (width, width) for index in range(modules)}
    path.write_text(AdapterSpec(shapes, base_model="none", hashes={"weights": "0" * 64}).to_json())


def words(folder: Path, rounds: int, clients: int, rank: int) -> list[str]:
    names = ",".join(NAMES[:clients])
    return [
        f"coordinator.spec={folder / 'spec.json'}", f"coordinator.identity={folder / 'coordinator'}",
        "coordinator.listen=127.0.0.1:0", f"clients.count={clients}", f"clients.names=[{names}]", f"clients.ranks={rank}",
        f"rounds={rounds}", "strategy=fedavg", "evaluate.every=1000000", "wire.heartbeat_s=5",
    ]  # fmt: skip


def config_of(given: list[str]) -> Any:
    from lamina.protos import compose

    return compose.composed(compose.sweeps(given, False)[0])


# The stream -------------------------------------------------------------------------------------------------------------


def serve_stream(folder: Path, repeats: int) -> None:
    """The coordinator's port and store in a process of their own, with a loop that offers and does not aggregate."""
    from lamina.protos.adapter import EMPTY
    from lamina.protos.clock import SYSTEM
    from lamina.protos.messages import Budget, Instruction, Release
    from lamina.server.opening import open_run
    from lamina.server.port.listen import listen
    from lamina.server.releases import Sent
    from lamina.server.store.base import Opened

    config = config_of(words(folder, repeats, 1, RANK))
    opened = open_run(config, folder / "run", lambda event, **fields: None, SYSTEM)
    run = opened.run
    server, port, _ = listen(run, opened.identity, lambda event, **fields: None)
    print(port, flush=True)
    for number in range(1, repeats + 1):
        release = run.store.blobs.put(os.urandom(peers.ADAPTER_BYTES))
        instruction = Instruction(run.campaign.run_id, number, NAMES[0], release, None, number - 1)
        budget = Budget({"layer0": RANK}, {"layer0": RANK}, {"layer0": 2.0})
        run.store.open(Opened(number, {NAMES[0]: Sent(instruction, budget, Release(0, EMPTY))}, 1))
        run.mailbox.offer([instruction])
        list(run.mailbox.replies(120.0))
        run.store.close(number)
        run.store.sweep(number + 1)
    server.stop(0).wait()


@contextmanager
def stream_server(folder: Path, repeats: int) -> Iterator[int]:
    command = [sys.executable, __file__, "--serve", str(folder), "--repeats", str(repeats)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def ours_and_bare(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of each direction, the two taking turns."""
    import grpc

    certificates(folder)
    write_spec(folder / "spec.json", MODULES, WIDTH)
    bare_folder = folder / "bare"
    times: dict[str, list[float]] = {"up_s": [], "down_s": []}
    payload = os.urandom(peers.ADAPTER_BYTES)
    with stream_server(folder, repeats) as port, peers.bare_server(bare_folder) as (bare_port, credentials):
        for chunk in peers.BARE_CHUNKS:
            times |= {f"bare_up_s_{chunk}": [], f"bare_down_s_{chunk}": []}
        grpc.channel_ready_future(grpc.secure_channel(f"127.0.0.1:{bare_port}", credentials)).result(timeout=30)
        for down_s, up_s in ours(folder, port, payload, repeats):
            times["down_s"].append(down_s)
            times["up_s"].append(up_s)
            for chunk in peers.BARE_CHUNKS:
                found = peers.bare_times(bare_port, credentials, payload, chunk, bare_folder / "received", 1)
                times[f"bare_up_s_{chunk}"] += found["up_s"]
                times[f"bare_down_s_{chunk}"] += found["down_s"]
    return times


def ours(folder: Path, port: int, payload: bytes, repeats: int) -> Iterator[tuple[float, float]]:
    """Seconds down and up of each round, at a real client of the port."""
    from lamina.protos import coordinator_pb2 as pb
    from lamina.protos import identity as identities
    from lamina.protos import statements as st
    from lamina.protos.blobs import Blob
    from lamina.protos.clock import SYSTEM
    from lamina.protos.files import sha256
    from lamina.protos.link import Address, Link

    me = identities.load(folder / NAMES[0])
    link = Link(Address(f"127.0.0.1:{port}", me, NAMES[0]), SYSTEM)

    def sign(domain: str, statement: bytes) -> bytes:
        return identities.sign(me, domain, statement)

    hello = {"kind": st.REGISTER, "versions": [1], "rank": None, "held": -1, "run_id": ""}
    terms = json.loads(link.call("Register", st.signed(st.REGISTER, hello, sign)).terms.statement)
    path = folder / "update"
    stream = link.stream("Instructions", pb.InstructionsRequest(run_id=terms["run_id"]))
    for _ in range(repeats):
        asked = st.instruction_of(json.loads(next(stream).statement), lambda name, size: Blob(name, size, b""))
        peers.fresh_pages(folder)
        start = time.perf_counter()
        got = link.download(asked.release, folder / "releases")
        down_s = time.perf_counter() - start
        if got.num_bytes != len(payload):
            raise OSError("download: another length")
        content = os.urandom(64) + payload[64:]
        digest = sha256(content)  # taken when a finished update is put on the site's disk
        peers.write(path, iter([content]))  # on disk before it is sent, as a site's finished update is
        peers.fresh_pages(folder)
        start = time.perf_counter()
        claim = {
            "kind": st.CLAIM, "run_id": asked.run_id, "round": asked.round, "client_id": NAMES[0],
            "parent": asked.release_hash, "sha256": digest, "num_bytes": len(content), "witness": None,
        }  # fmt: skip
        link.upload(st.signed(st.CLAIM, claim, sign), path, terms["chunk_bytes"])
        yield down_s, time.perf_counter() - start
        shutil.rmtree(folder / "releases")


# Rounds -----------------------------------------------------------------------------------------------------------------


def rounds(folder: Path, num: int, rank: int, modules: int, width: int) -> tuple[list[float], list[float]]:
    """Seconds of each round's exchange, and of all of it, but for the first: a process for the coordinator and each client."""
    certificates(folder)
    write_spec(folder / "spec.json", modules, width)
    given = [*words(folder, num, len(NAMES), rank), f"output={folder / 'run'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lamina", "coordinator", "--json", *given]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as coordinator:
        assert coordinator.stderr is not None
        first = json.loads(coordinator.stderr.readline())
        reader = threading.Thread(target=coordinator.stderr.read, daemon=True)
        reader.start()
        sites = [
            subprocess.Popen(
                [sys.executable, __file__, "--site", str(folder), name, str(first["port"])], env=environment
            )
            for name in NAMES
        ]
        if coordinator.wait(300) or any(site.wait(30) for site in sites):
            raise OSError("a round of ours did not end well")
    records = [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()]
    return [record["seconds_collect"] for record in records[1:]], [record["seconds"] for record in records[1:]]


def site(folder: Path, name: str, port: int) -> int:
    """One client whose training adds a number to its release."""
    from lamina.client.agent import Agent, Trained
    from lamina.client.listening import Settings
    from lamina.client.policy import Policy
    from lamina.protos import identity as identities
    from lamina.protos.adapter import Adapter, LoraFactors
    from lamina.protos.clock import SYSTEM
    from lamina.protos.codec import encode_update, opened
    from lamina.protos.link import Address
    from lamina.protos.messages import Update

    class Adding:
        def begin(self, terms: Any, spec: Any, state: Any, version: int) -> None:
            self.name = terms["client_id"]

        def train(self, instruction: Any, progress: Any, allow: Any) -> Trained:
            release = opened(instruction.release)
            lora = {
                module: LoraFactors(factors.A, factors.B + factors.A.dtype.type(1), factors.scale)
                for module, factors in release.lora.items()
            }
            update = Update(
                instruction.run_id,
                instruction.round,
                self.name,
                instruction.release_hash,
                Adapter(lora),
                num_examples=1,
            )
            return Trained(encode_update(update, "fp32"), {})

        def measure(self, instruction: Any) -> dict[str, float]:
            return {"nats": 1.0, "targets": 1.0, "hits": 0.0}

    address = Address(f"127.0.0.1:{port}", identities.load(folder / name), name)
    settings = Settings(address, replace(Policy(), max_rank=100_000), folder / f"state-{name}")
    return Agent(settings, Adding(), SYSTEM, lambda event, **fields: None).run()


# Report -----------------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    return f"{min(values):.3f} / {statistics.median(values):.3f} / {max(values):.3f}"


def measure(folder: Path, repeats: int, num_rounds: int) -> dict[str, Any]:
    """All figures."""
    times = ours_and_bare(folder / "stream", repeats)
    bare = {
        way: min((times[f"bare_{way}_s_{chunk}"] for chunk in peers.BARE_CHUNKS), key=statistics.median)
        for way in ("up", "down")
    }
    exchanges, whole = rounds(folder / "rounds", num_rounds + 1, RANK, MODULES, WIDTH)
    flower = peers.flower_round(peers.ADAPTER_BYTES, len(NAMES), num_rounds, arrays=2 * MODULES)
    packed = peers.flower_round(peers.ADAPTER_BYTES, len(NAMES), num_rounds)
    empty = rounds(folder / "empty", 41, 2, 1, 8)[1]
    return {
        "up_vs_bare_grpc": statistics.median(bare["up"]) / statistics.median(times["up_s"]),
        "down_vs_bare_grpc": statistics.median(bare["down"]) / statistics.median(times["down_s"]),
        "round_vs_flower": statistics.median(flower) / statistics.median(exchanges),
        "round_vs_flower_packed": statistics.median(packed) / statistics.median(exchanges),
        "whole_round_vs_flower": statistics.median(flower) / statistics.median(whole),
        "empty_round_s": statistics.median(empty),
        "seconds": {
            "ours up": times["up_s"], "bare up": bare["up"], "ours down": times["down_s"], "bare down": bare["down"],
            "our exchange": exchanges, "our whole round": whole, "Flower's exchange": flower,
            "Flower's, in 16 arrays": packed, "our empty round": empty,
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, at most three minutes")
    parser.add_argument("--repeats", type=int, default=0, help="of the stream")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "cache", help="on the disk to measure")
    parser.add_argument("--only", default="", help="stream, rounds or empty: that part alone, without a peer's round")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--site", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_stream(options.serve, options.repeats)
        return
    if options.site:
        raise SystemExit(site(Path(options.site[0]), options.site[1], int(options.site[2])))
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="transport-", dir=options.folder) as text:
        folder = Path(text)
        if options.only:
            (folder / options.only).mkdir()
            part = folder / options.only
            if options.only == "stream":
                found = ours_and_bare(part, options.repeats or 9)
            else:
                size = (RANK, MODULES, WIDTH) if options.only == "rounds" else (2, 1, 8)
                exchange, whole = rounds(part, 6 if options.only == "rounds" else 41, *size)
                found = {"exchange": exchange, "whole round": whole}
            print(json.dumps({name: spread(values) for name, values in found.items()}, indent=1))
            return
        figures = measure(folder, options.repeats or (9 if options.quick else 25), 3 if options.quick else 5)
    seconds = figures.pop("seconds")
    holds = {name: figures[name] >= bound for name, bound in BOUNDS.items()}
    holds["empty_round_s"] = figures["empty_round_s"] <= EMPTY_ROUND_S
    lines = ["| | figure | bound | holds |", "|---|---|---|---|"]
    for name, value in figures.items():
        bound = f"≥ {BOUNDS[name]:g}" if name in BOUNDS else f"≤ {EMPTY_ROUND_S}" if name == "empty_round_s" else "none"
        lines.append(f"| {name} | {value:.3g} | {bound} | {'yes' if holds.get(name, True) else 'no'} |")
    lines += ["", "| seconds, 64 MB | min / median / max | repeats |", "|---|---|---|"]
    lines += [f"| {name} | {spread(values)} | {len(values)} |" for name, values in seconds.items()]
    text = "\n".join(lines)
    if not options.quick:
        write_section("transport", "python benchmarks/transport.py", f"{__doc__.split(chr(10), 4)[4]}\n{text}")
    print(text)
    print(json.dumps({"benchmark": "transport", "quick": options.quick, **figures}))


if __name__ == "__main__":
    main()
