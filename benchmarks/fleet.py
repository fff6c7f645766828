"""A federated run of four sites that can hold less and less, each within its limit, against all in full precision.

    python benchmarks/fleet.py [--quick]

One base of 12 million parameters (the shipped one, grown) and four packages of the standard library. The sites are processes
that talk to a coordinator over gRPC; each may take so much beyond its imports: 100 MB, 300 MB, 1 GB, and any. The limit is the
system's (a control group, or RLIMIT_DATA where none can be made), with a thread beside it that ends the process as soon as more
is resident. Each site plans for itself. Three runs of the same rounds, steps and data:

- `sized`: each as its limit admits; number formats and ranks are mixed in one round.
- `full`: the same sites without limits, all in full precision, each with the rank that it is offered.
- `lowest`: all with the settings of the smallest, which are what a federation of one setting for all would take.

The held-out loss is that of the aggregate on the full-precision base, over 128 windows of each package that no site has.

- `excess_over_full`: (loss of `sized` - loss of `full`) / loss of `full`.
- `lowest_over_sized`: (loss of `lowest` - loss of `sized`) / loss of `sized`; above 0 the lowest settings are worse.
- `largest_share_of_limit`: over the limited sites, the most that was taken as a share of the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CACHE = ROOT / "benchmarks" / "cache" / "fleet"
SILOS = {"asyncio": 100 * 10**6, "email": 300 * 10**6, "http": 10**9, "unittest": 0}
OFFERED, LENGTH, BATCH, RATE = 32, 64, 8, 2e-3
HELD_OUT = 128  # windows of a package
BOUNDS = {"excess_over_full": 0.02, "largest_share_of_limit": 1.0}


@dataclass(frozen=True)
class Scale:
    """How long a run is."""

    rounds: int
    steps: int
    width: int
    depth: int


FULL, QUICK = Scale(6, 16, 4, 1), Scale(2, 4, 4, 1)


# A site's process.


def site(limit: int, record: Path, words: list[str]) -> None:
    """Be a site: import, be limited, and run `lamina client`."""
    from lamina.protos.allocator import give_back

    give_back(1)
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import grpc  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lamina.client.agent
    import lamina.client.worker  # noqa: F401
    from lamina.__main__ import main
    from lamina.client.resident import resident_bytes
    from lamina.client.sizing.limit import limit_increment

    torch.set_num_threads(1)
    before = resident_bytes()
    document = {"imports_bytes": before, "limit_bytes": limit, "mechanism": limit_increment(limit) if limit else "none"}
    record.write_text(json.dumps(document))
    try:
        code = main(["client", *words])
    finally:
        document["took_bytes"] = highest() - before
        record.write_text(json.dumps(document))
    sys.exit(code)


class _Highest:
    """The most that this process has held, also where something has set the system's own mark back."""

    def __init__(self) -> None:
        import threading

        self.value = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        from lamina.client.resident import peak_bytes

        while True:
            self.value = max(self.value, peak_bytes())
            time.sleep(0.002)


def highest() -> int:
    """See `_Highest`."""
    assert _HIGHEST is not None
    return _HIGHEST.value


_HIGHEST: _Highest | None = None


# What a run is made of.


def texts(scale: Scale) -> dict[str, tuple[list[str], list[str]]]:
    """Silo -> its text, and what is held out of it: every eighth piece."""
    from lamina.simulations.corpora import SILO_COLUMN, stdlib_rows

    found: dict[str, tuple[list[str], list[str]]] = {}
    for silo in SILOS:
        rows = [str(row["text"]) for row in stdlib_rows() if row[SILO_COLUMN] == silo]
        found[silo] = ([t for i, t in enumerate(rows) if i % 8], [t for i, t in enumerate(rows) if i % 8 == 0])
    return found


def base_at(scale: Scale) -> tuple[Path, Path]:
    """The base, and its copy in 4 bits, which a site that cannot hold the base gets from one that can."""
    from benchmarks.models import grown
    from lamina.client.making import Wanted, make

    full = grown(CACHE, scale.width, scale.depth, noise=0.3)
    copy = full.with_name(full.name + "-nf4")
    if not (copy / "config.json").is_file():
        make(Wanted(str(full), copy, "nf4", "fp32"), lambda text: None)
    return full, copy


def federated(name: str, scale: Scale, limits: dict[str, int], settings: dict[str, list[str]]) -> dict[str, Any]:
    """One run, with a process for the coordinator and each site."""
    from lamina.client.sizing.limit import release

    folder = CACHE / f"run-{name}-{scale.rounds}x{scale.steps}"
    done = folder / "result.json"
    if done.is_file():
        return dict(json.loads(done.read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    full, _ = base_at(scale)
    for silo, (train, _) in texts(scale).items():
        (folder / f"{silo}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in train))
    port, silos = _free_port(), list(SILOS)
    words = [
        f"coordinator.listen=127.0.0.1:{port}", "insecure=true", f"coordinator.spec={folder / 'spec.json'}",
        f"clients.names=[{','.join(silos)}]", f"clients.count={len(silos)}", f"clients.ranks={OFFERED}",
        f"rounds={scale.rounds}", f"train.local_steps={scale.steps}", f"train.batch_size={BATCH}", f"train.max_length={LENGTH}",
        f"train.learning_rate={RATE}", "evaluate.max_examples=16", f"output={folder / 'run'}", "wire.heartbeat_s=2", "seed=0",
    ]  # fmt: skip
    _lamina("spec", str(full), f"output={folder / 'spec.json'}").wait()
    coordinator = _lamina("coordinator", "--json", *words, log=folder / "coordinator.log")
    sites = {}
    for silo in silos:
        own = [
            f"client.coordinator=127.0.0.1:{port}", "insecure=true", f"client.name={silo}", f"client.state={folder / silo}",
            f"data.source={folder / f'{silo}.jsonl'}", "threads=1", "client.give_up_s=60", *settings[silo],
        ]  # fmt: skip
        command = [sys.executable, __file__, "--site", str(limits[silo]), str(folder / f"{silo}.json"), *own]
        sites[silo] = _start(command, folder / f"{silo}.log")
    codes = _ended({"coordinator": coordinator, **sites})
    for process in sites.values():
        release(process.pid)
    if any(codes.values()):
        raise SystemExit(f"{name}: expected every process to end well, got exit codes {codes}. See {folder}/*.log")
    found = {
        "sites": {silo: json.loads((folder / f"{silo}.json").read_text()) | _plan(folder, silo) for silo in silos},
        "loss": _loss(full, folder / "run", scale),
        "rejections": sum(len(json.loads(line)["rejections"]) for line in (folder / "run/rounds.jsonl").open()),
    }
    done.write_text(json.dumps(found, indent=1))
    return found


def _ended(processes: dict[str, subprocess.Popen[bytes]]) -> dict[str, int | None]:
    """Exit codes; where one fails, the others are ended."""
    while any(process.poll() is None for process in processes.values()):
        if any(process.poll() for process in processes.values()):
            time.sleep(2)
            for process in processes.values():
                process.kill()
        time.sleep(0.2)
    return {name: process.wait() for name, process in processes.items()}


def _plan(folder: Path, silo: str) -> dict[str, Any]:
    (path,) = folder.glob(f"{silo}/*/plan.json")
    kept = json.loads(path.read_text())
    one = kept["plan"]
    keys = ("format", "rank", "modules", "micro_batch", "accumulation", "max_length", "checkpointing", "optimizer")
    return {key: one[key] for key in keys} | {"planned_bytes": sum(one["terms"].values())}


def _loss(full: Path, run: Path, scale: Scale) -> float:
    from lamina.client.data import Encoder
    from lamina.client.evaluate import score
    from lamina.client.loading import BaseOptions, load_base
    from lamina.client.model import put
    from lamina.protos.config import DataConfig
    from lamina.server.store.checkpoint import load_last

    base, last = load_base(BaseOptions(str(full), device="cpu")), load_last(run)
    assert last is not None
    encoder = Encoder(base.tokenizer, DataConfig(), "causal-lm", (), LENGTH)
    held = []
    for _, out in texts(scale).values():
        examples = encoder.examples([{"text": text} for text in out])
        held += examples[:: max(1, len(examples) // HELD_OUT)][:HELD_OUT]
    put(base, last.state.adapter, None, trainable=False)
    return score(base, held, 32).loss


def _lamina(*words: str, log: Path | None = None) -> subprocess.Popen[bytes]:
    return _start([sys.executable, "-m", "lamina", *words], log)


def _start(command: list[str], log: Path | None) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    target = log.open("ab") if log else subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=target, stderr=target)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The runs.


def measure(scale: Scale) -> dict[str, Any]:
    """All three."""
    full, copy = base_at(scale)
    tight = min((limit, silo) for silo, limit in SILOS.items() if limit)[1]
    own = {silo: [f"model.source={copy if silo == tight else full}"] for silo in SILOS}
    runs = {"sized": federated("sized", scale, dict(SILOS), own)}
    precise = {silo: [f"model.source={full}", "quantisation=fp32"] for silo in SILOS}
    runs["full"] = federated("full", scale, dict.fromkeys(SILOS, 0), precise)
    runs["lowest"] = federated("lowest", scale, dict.fromkeys(SILOS, SILOS[tight]), dict.fromkeys(SILOS, own[tight]))
    return runs


def figures(runs: dict[str, Any]) -> dict[str, float]:
    """The headline figures."""
    sized, full, lowest = (runs[name]["loss"] for name in ("sized", "full", "lowest"))
    shares = [one["took_bytes"] / one["limit_bytes"] for one in runs["sized"]["sites"].values() if one["limit_bytes"]]
    return {
        "excess_over_full": (sized - full) / full,
        "lowest_over_sized": (lowest - sized) / sized,
        "largest_share_of_limit": max(shares),
    }


def _report(runs: dict[str, Any], found: dict[str, float], command: str) -> None:
    from benchmarks.results import write_section

    lines = [(__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    lines += ["| run | site, limit | plan | predicted MB, without the data | taken MB |", "|---|---|---|---|---|"]
    for name, run in runs.items():
        for silo, one in run["sites"].items():
            limit = f"{one['limit_bytes'] / 1e6:.0f} MB, {one['mechanism']}" if one["limit_bytes"] else "none"
            again = ", activations again" if one["checkpointing"] else ""
            plan = (
                f"{one['format']}, rank {one['rank']} on {one['modules']} layers, {one['micro_batch']} x {one['accumulation']} x "
                f"{one['max_length']} tokens{again}"
            )
            lines.append(
                f"| {name} | {silo}, {limit} | {plan} | {one['planned_bytes'] / 1e6:.0f} | {one['took_bytes'] / 1e6:.0f} |"
            )
    lines += ["", "| run | held-out loss (nats/token) | rejections |", "|---|---|---|"]
    lines += [f"| {name} | {run['loss']:.4f} | {run['rejections']} |" for name, run in runs.items()]
    lines += ["", "| number | value | bound | holds |", "|---|---|---|---|"]
    for key, value in found.items():
        bound = BOUNDS.get(key)
        holds = value > 0 if bound is None else value <= bound
        told = "> 0" if bound is None else f"<= {bound:g}"
        lines.append(f"| {key} | {value:.4f} | {told} | {'yes' if holds else 'no'} |")
    write_section("fleet", command, "\n".join(lines))


def main() -> int:
    """Run it."""
    if sys.argv[1:2] == ["--site"]:
        global _HIGHEST
        _HIGHEST = _Highest()
        site(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps; RESULTS.md is left alone")
    quick = parser.parse_args().quick
    CACHE.mkdir(parents=True, exist_ok=True)
    runs = measure(QUICK if quick else FULL)
    found = figures(runs)
    for name, run in runs.items():
        print(name, f"{run['loss']:.4f}", {silo: (one["format"], one["rank"]) for silo, one in run["sites"].items()})
    for key, value in found.items():
        print(f"{key} {value:.4f}")
    if not quick:
        _report(runs, found, "python benchmarks/fleet.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
