"""One layer's aggregation against a dense SVD: seconds, memory and error.

A 4096 x 4096 layer and ten clients of ranks 64 to 4. Ours is a whole `step` of the strategy, the measurement of its own error
included. The other side is the server step of FlexLoRA (arXiv:2402.11505) written as lean as it gets: the dense float32 sum by
one product of the stacked factors, its full SVD in float32, and the leading 64 singular values; with torch's SVD, which is the
fastest, and with scipy's in place, which is the leanest. Ours must beat the seconds of the one and the memory of the other.
(numpy's SVD computes in float64 whatever it is given, and takes more of both.)

Every measurement is a process of its own, with one BLAS thread. Seconds are CPU seconds, the least of several calls. Memory is
the peak of the resident set during the first call above what was resident before it, after a small layer went through the same
code, so that no library is loaded in between.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lamina.protos.adapter import LoraFactors
    from lamina.protos.messages import Release, Update
    from lamina.strategies.base import ServerState

WIDTH = 4096
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
RANK_CAP = 64
LAYER = "layers.0.q_proj"
BOUNDS = {"speed_vs_dense_svd": 100.0, "memory_vs_dense_svd": 8.0, "relative_error": 1e-6}
ROOT = Path(__file__).resolve().parent.parent
ENTRIES = 200

Array = NDArray[np.float32]
# What a worker measures: seconds, bytes, and about the result its rank, a probe of its product, and errors.
Measured = dict[str, Any]


def updates(width: int, ranks: tuple[int, ...]) -> list[Update]:
    """Ten clients' updates: random factors whose later columns count for less, at lora_alpha = 2 r."""
    from lamina.protos.adapter import Adapter, LoraFactors
    from lamina.protos.messages import Update

    made = []
    for index, rank in enumerate(ranks):
        rng = np.random.default_rng(index)
        rows = rng.standard_normal((rank, width), dtype=np.float32) / np.float32(width**0.5)
        columns = rng.standard_normal((width, rank), dtype=np.float32) * (0.9 ** np.arange(rank)).astype(np.float32)
        lora = {LAYER: LoraFactors(rows, columns, 2.0)}
        made.append(Update("benchmark", 1, f"site-{index}", "", Adapter(lora), 100 + 10 * index))
    return made


def weight(update: Update, everyone: list[Update]) -> float:
    return update.num_examples / sum(other.num_examples for other in everyone)


def dense_svd(everyone: list[Update], rank: int, library: str) -> tuple[Array, Array]:
    """FlexLoRA's server step: columns and rows of the best matrix of this rank."""
    factors = [update.adapter.lora[LAYER] for update in everyone]
    weights = [np.float32(weight(u, everyone) * f.scale) for u, f in zip(everyone, factors, strict=True)]
    left = np.concatenate([f.B * w for f, w in zip(factors, weights, strict=True)], axis=1)
    right = np.concatenate([f.A for f in factors])
    u, sigma, vt = svd_torch(left, right) if library == "torch" else svd_scipy(left, right)
    root = np.sqrt(sigma[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def svd_torch(left: Array, right: Array) -> tuple[Array, Array, Array]:
    import torch

    u, sigma, vt = torch.linalg.svd(torch.from_numpy(left) @ torch.from_numpy(right), full_matrices=False)
    return u.numpy(), sigma.numpy(), vt.numpy()


def svd_scipy(left: Array, right: Array) -> tuple[Array, Array, Array]:
    import scipy.linalg

    mean = np.empty((left.shape[0], right.shape[1]), np.float32, order="F")
    np.matmul(left, right, out=mean)
    u, sigma, vt = scipy.linalg.svd(mean, full_matrices=False, overwrite_a=True, check_finite=False)
    return u, sigma, vt


# Memory ---------------------------------------------------------------------------------------------------------------


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: expected {field}")


def extra_peak(call: Callable[[], object]) -> int:
    """Peak resident bytes during the call above those before it."""
    gc.collect()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            call()
            return resident("VmHWM") - before
        except OSError:
            pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    unit = 1 if sys.platform == "darwin" else 1024
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


# Workers --------------------------------------------------------------------------------------------------------------


def probe(columns: Array, rows: Array) -> list[list[float]]:
    """The product on four fixed vectors, its first entries; enough to compare two results."""
    vectors = np.random.default_rng(99).standard_normal((rows.shape[1], 4))
    seen = (columns.astype(np.float64) @ (rows.astype(np.float64) @ vectors))[:ENTRIES]
    return [[float(x) for x in line] for line in seen]


def true_error(stored: LoraFactors, terms: list[tuple[float, LoraFactors]]) -> float:
    """The relative Frobenius distance of the stored product from a weighted sum of products, in blocks of dense rows."""
    above, below = 0.0, 0.0
    for start in range(0, WIDTH, 512):
        block = slice(start, start + 512)
        exact = np.zeros((512, WIDTH))
        for factor, term in terms:
            exact += (factor * term.scale) * (term.B[block].astype(np.float64) @ term.A.astype(np.float64))
        below += float(np.square(exact).sum())
        exact -= stored.scale * (stored.B[block].astype(np.float64) @ stored.A.astype(np.float64))
        above += float(np.square(exact).sum())
    return float(np.sqrt(above / below))


def measure_ours(name: str, later: bool, repeats: int) -> Measured:
    """A step of one of our strategies, the first from G = 0, or a later one in which every client started from a release."""
    from lamina.protos.adapter import Adapter, LoraFactors
    from lamina.protos.messages import Budget, Update
    from lamina.protos.spec import AdapterSpec
    from lamina.strategies import Options, Strategy, build

    unused = np.random.default_rng(0)

    def strategy_of(ranks: tuple[int, ...]) -> Strategy:
        cap = RANK_CAP if name == "recompress" else None
        return build(name, Options({LAYER: max(ranks)}, {LAYER: 2.0}, rank_cap=cap))

    def second(
        strategy: Strategy, state: ServerState, first: list[Update]
    ) -> tuple[ServerState, list[Update], dict[str, Release]]:
        state = strategy.step(state, first, {}, unused)
        releases, trained = {}, []
        for update in first:
            step = update.adapter.lora[LAYER]
            start = strategy.release(state, Budget({LAYER: step.rank}, {LAYER: WIDTH}, {LAYER: step.scale}))
            releases[update.client_id], got = start, start.trainable.lora[LAYER]
            lora = LoraFactors(got.A + step.A * np.float32(0.1), got.B + step.B * np.float32(0.1), step.scale)
            trained.append(Update("benchmark", 2, update.client_id, "", Adapter({LAYER: lora}), update.num_examples))
        return state, trained, releases

    def prepared(width: int, ranks: tuple[int, ...]) -> Callable[[], ServerState]:
        strategy, sent = strategy_of(ranks), updates(width, ranks)
        state = strategy.init(AdapterSpec({LAYER: (width, width)}))
        releases: dict[str, Release] = {}
        if later:
            state, sent, releases = second(strategy, state, sent)
        terms[:] = [(1.0, state.adapter.lora[LAYER])]
        for update in sent:
            share = weight(update, sent)
            terms.append((share, update.adapter.lora[LAYER]))
            if update.client_id in releases:
                terms.append((-share, releases[update.client_id].trainable.lora[LAYER]))
        return lambda: strategy.step(state, sent, releases, unused)

    terms: list[tuple[float, LoraFactors]] = []
    prepared(64, (4, 2, 1))()
    step = prepared(WIDTH, RANKS)
    taken = extra_peak(step)
    seconds, after = timed(step, repeats)
    stored, report = after.adapter.lora[LAYER], after.report[LAYER]
    return {
        "seconds": seconds,
        "bytes": taken,
        "rank": stored.rank,
        "probe": probe(stored.B, stored.A),
        "relative_error": report.relative_error,
        "certificate": report.dropped_norm / report.target_norm,
        "true_error": true_error(stored, terms),
    }


def measure_dense(library: str, repeats: int) -> Measured:
    """The other side, whose first call is the one whose memory is taken, and is timed too."""
    dense_svd(updates(64, (4, 2, 1)), 4, library)
    sent = updates(WIDTH, RANKS)
    results: list[tuple[Array, Array]] = []
    seconds: list[float] = []

    def call() -> None:
        start = time.process_time()
        results[:] = [dense_svd(sent, RANK_CAP, library)]
        seconds.append(time.process_time() - start)

    taken = extra_peak(call)
    for _ in range(repeats - 1):
        call()
    return {"seconds": min(seconds), "bytes": taken, "rank": RANK_CAP, "probe": probe(*results[0])}


def timed(call: Callable[[], ServerState], repeats: int) -> tuple[float, ServerState]:
    """The least seconds of several calls, and the last result."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        best = min(best, time.process_time() - start)
    return best, result


def work(side: str, repeats: int) -> Measured:
    name, _, variant = side.partition("-")
    return measure_dense(variant, repeats) if name == "dense" else measure_ours(name, variant == "later", repeats)


def in_a_process(side: str, repeats: int) -> Measured:
    """Measure one side in a fresh process with one BLAS thread."""
    one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, __file__, "--worker", side, "--repeats", str(repeats)]
    done = subprocess.run(command, env=os.environ | one | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True)
    measured: Measured = json.loads(done.stdout.splitlines()[-1])
    return measured


# Report ---------------------------------------------------------------------------------------------------------------


def compared(sides: dict[str, Measured]) -> dict[str, float]:
    """The reported numbers."""
    ours, later, exact = (sides[key] for key in ("recompress", "recompress-later", "residual"))
    peers = [side for key, side in sides.items() if key.startswith("dense")]
    seconds, taken = min(side["seconds"] for side in peers), min(side["bytes"] for side in peers)
    mine, theirs = (np.array(side["probe"]) for side in (ours, peers[0]))
    return {
        "speed_vs_dense_svd": seconds / ours["seconds"],
        "memory_vs_dense_svd": taken / ours["bytes"],
        "relative_error": max(exact["relative_error"], exact["true_error"]),
        "certificate_gap": max(
            abs(side["relative_error"] - other)
            for side in (ours, later)
            for other in (side["certificate"], side["true_error"])
        ),
        "distance_from_dense_svd": float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)),
        "speed_vs_dense_svd_later": seconds / later["seconds"],
        "memory_vs_dense_svd_later": taken / later["bytes"],
    }


def table(sides: dict[str, Measured], found: dict[str, float]) -> str:
    """Markdown: what was measured, and the bounds."""
    words = {
        "recompress": f"`recompress`, rank_cap {RANK_CAP}, first round",
        "recompress-later": f"`recompress`, rank_cap {RANK_CAP}, a later round",
        "residual": "`residual`, first round",
        "dense-torch": "dense sum, `torch.linalg.svd`",
        "dense-scipy": "dense sum, `scipy.linalg.svd` in place",
    }
    lines = ["| one layer | CPU seconds | extra peak, MB | rank kept | relative error |", "|---|---|---|---|---|"]
    for key, side in sides.items():
        error = f"{side['relative_error']:.3g}" if "relative_error" in side else ""
        lines.append(f"| {words[key]} | {side['seconds']:.3f} | {side['bytes'] / 1e6:.0f} | {side['rank']} | {error} |")
    lines += ["", "| number | value | bound | holds |", "|---|---|---|---|"]
    rows = [(key, ">=", BOUNDS[key]) for key in ("speed_vs_dense_svd", "memory_vs_dense_svd")]
    rows += [(key, "<=", BOUNDS["relative_error"]) for key in ("relative_error", "certificate_gap")]
    for key, sign, limit in rows:
        lines.append(f"| {key} | {found[key]:.3g} | {sign} {limit:g} | {'yes' if within(key, found) else 'NO'} |")
    for key in ("distance_from_dense_svd", "speed_vs_dense_svd_later", "memory_vs_dense_svd_later"):
        lines.append(f"| {key} | {found[key]:.3g} | | |")
    return "\n".join(lines)


def within(key: str, found: dict[str, float]) -> bool:
    if key.endswith("_vs_dense_svd"):
        return found[key] >= BOUNDS[key]
    return found[key] <= BOUNDS["relative_error"]


def notes() -> str:
    """What the tables mean."""
    return (
        f"A {WIDTH} x {WIDTH} layer, ten clients of ranks {list(RANKS)}; float32 updates with decaying spectra. One BLAS thread "
        f"on every side; numpy {np.__version__}, {platform.machine()}. Speed is the seconds of the faster dense side over ours, "
        "memory the extra peak of the leaner one over ours. In a later round every client started from a release, so the stack "
        "holds the global adapter and both parts of each change. `certificate_gap` is the largest distance of the reported error "
        "from the dropped singular values and from the dense distance; `distance_from_dense_svd` is that of the two results.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="One layer's aggregation against a dense SVD.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, no RESULTS.md; the same size and bounds")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options.repeats)))
        return
    ours, dense = (7, 1) if options.quick else (25, 2)
    plan = {"recompress": ours, "recompress-later": ours, "residual": ours, "dense-torch": dense, "dense-scipy": dense}
    sides = {side: in_a_process(side, repeats) for side, repeats in plan.items()}
    found = compared(sides)
    holds = all(within(key, found) for key in (*BOUNDS, "certificate_gap"))
    body = f"{notes()}\n{table(sides, found)}"
    print(body)
    if not options.quick:
        from results import write_section

        write_section("aggregation", "python benchmarks/aggregation.py", body)
    print(json.dumps({"benchmark": "aggregation", "quick": options.quick, **found, "holds": holds}))


if __name__ == "__main__":
    main()
