"""Ranks by importance against uniform ranks, of as many numbers, on the standard library's silos.

Ten clients fine-tune the small base at context 64, with rank 4 each or with the unequal ranks of the quality benchmark. Either
every module has the client's rank, or each client spends as many numbers on the modules that its own training text asks for.
The learning rate of each is chosen on the tune split with one seed; losses are of the test split, over three seeds at that rate.
Restartable: every finished curve is a file under benchmarks/cache.

    python benchmarks/importance.py [--quick] [--cases 4-2x60-residual,mixed-20x5-recompress] [--workers 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.curves import Memory, all_of, read, work  # noqa: E402
from lamina.protos.ranks import SPREAD, numbers  # noqa: E402

SETTINGS = {"4": [4] * 10, "mixed": [32, 16, 8, 8, 4, 4, 2, 2, 2, 2]}
REGIMES = {"2x60": (2, 60), "20x5": (20, 5)}
CASES = "4-2x60-residual,mixed-2x60-residual,4-2x60-recompress"
ALLOCATIONS = ("uniform", "importance")
# The best rates of the quality benchmark; on tune 0.005 was behind for both, and 0.03 diverges there.
RATES = (1e-2, 2e-2)
SEEDS = (0, 1, 2)
T_QUANTILE = 4.303  # of two degrees of freedom, three seeds
MODULES = 28  # that are adapted in the small base
# The quick form: three clients, fewer steps, one rate and seed.
QUICK_CLIENTS, QUICK_STEPS, QUICK_RATE = (0, 3, 6), 20, 1e-2


@dataclass(frozen=True)
class Curve:
    """One allocation in one setting, at one rate and seed."""

    setting: str
    regime: str
    strategy: str
    allocation: str
    rate: float
    seed: int
    quick: bool = False

    @property
    def file(self) -> Path:
        folder = HERE / "cache" / ("importance-quick" if self.quick else "importance")
        return folder / f"{self.setting}-{self.regime}-{self.strategy}-{self.allocation}-{self.rate:g}-{self.seed}.json"

    @property
    def words(self) -> str:
        return f"{self.setting},{self.regime},{self.strategy},{self.allocation},{self.rate!r},{self.seed},{int(self.quick)}"


def spoken(words: str) -> Curve:
    setting, regime, strategy, allocation, rate, seed, quick = words.split(",")
    return Curve(setting, regime, strategy, allocation, float(rate), int(seed), quick == "1")


def configured(curve: Curve) -> Any:
    from lamina.protos.config import Config

    rounds, steps = REGIMES[curve.regime]
    ranks = SETTINGS[curve.setting]
    config = Config()
    config.rounds, config.seed, config.threads = rounds, curve.seed, 1
    config.strategy.name, config.lora.allocation = curve.strategy, curve.allocation
    config.clients.ranks = [ranks[k] for k in QUICK_CLIENTS] if curve.quick else list(ranks)
    config.clients.count = len(config.clients.ranks)
    # The same for both, so that the global adapter may keep, and clients receive, as many directions of a module; uniform
    # ranks need less of it.
    config.aggregation.rank_cap = 2 * SPREAD * max(ranks)
    config.clients.download_rank = SPREAD * sum(config.clients.ranks)
    config.train.local_steps, config.train.batch_size, config.train.max_length = steps, 4, 64
    if curve.quick:
        config.train.local_steps = min(steps, QUICK_STEPS)
    config.train.learning_rate = curve.rate
    config.evaluate.max_examples = 48 if curve.quick else 96
    return config


def measure(curve: Curve, prepared: dict[str, Any]) -> dict[str, Any]:
    """Run one curve: test loss after the first and the last round, tune loss at the end, and the bytes of it all."""
    from lamina.server import campaign as campaigns
    from lamina.server.rounds import Loop, run
    from lamina.simulations import engine

    config, test = configured(curve), prepared["test"]
    started = time.monotonic()
    chosen = engine.chosen_ranks(config, test, engine.Quiet())
    scoring = time.monotonic() - started
    spec = test.base.spec
    found = campaigns.budgets(config, spec, chosen)
    campaign = campaigns.campaign(config, spec, found, "importance")
    cohort = engine.cohort(config, test, found, engine.Quiet())

    def evaluate(state: Any, held: Any) -> Any:
        return engine.evaluate(test, state.adapter, config, "") if state.round in (1, config.rounds) else None

    store = Memory()
    state = run(Loop(campaign, cohort.channel(), evaluate, store))
    tuned = engine.evaluate(replace(test, held_out=prepared["tune"].held_out), state.adapter, config, "")
    return {
        "test": store.records[-1]["loss"],
        "tune": tuned.loss,
        "first": store.records[0]["loss"],
        "adapter_bytes": [4 * numbers(spec, budget.train) for budget in found.values()],
        "global_bytes": sum(4 * f.rank * sum(f.shape) for f in state.adapter.lora.values()),
        "bytes_down": sum(r["bytes_down"] for r in store.records),
        "bytes_up": sum(r["bytes_up"] for r in store.records),
        "relative_error": max(r["relative_error"] for r in store.records),
        "ranks": {client: dict(budget.train) for client, budget in found.items()},
        "seconds_scoring": scoring,
        "seconds": time.monotonic() - started,
    }


def chosen_rate(case: tuple[str, str, str, str]) -> float:
    """The rate with the lowest tune loss at seed 0, among those at which no seed measured so far diverged."""
    tuned = {}
    for rate in RATES:
        results = [read(curve) for seed in SEEDS if (curve := Curve(*case, rate, seed)).file.exists()]
        if results and all(result["tune"] is not None for result in results):
            tuned[rate] = results[0]["tune"]
    return min(tuned, key=lambda rate: tuned[rate])


def collect(
    cases: list[tuple[str, str, str]], quick: bool, workers: int
) -> dict[tuple[str, str, str], dict[str, list[Curve]]]:
    """Everything that is to be reported, measured: case -> allocation -> a curve a seed."""
    if quick:
        found = {case: {name: [Curve(*case, name, QUICK_RATE, 0, True)] for name in ALLOCATIONS} for case in cases}
        all_of(__file__, (curve for some in found.values() for curves in some.values() for curve in curves), workers)
        return found
    for case in cases:  # one after the other, so that the first are whole when time runs out
        all_of(__file__, (Curve(*case, name, rate, 0) for rate in RATES for name in ALLOCATIONS), workers)
        while True:
            curves = [Curve(*case, name, chosen_rate((*case, name)), seed) for name in ALLOCATIONS for seed in SEEDS]
            all_of(__file__, curves, workers)
            if all(read(curve)["test"] is not None for curve in curves):
                break
    return {
        case: {name: [Curve(*case, name, chosen_rate((*case, name)), seed) for seed in SEEDS] for name in ALLOCATIONS}
        for case in cases
    }


def figures(curves: list[Curve]) -> dict[str, Any]:
    results = [read(curve) for curve in curves]
    tests = [result["test"] for result in results]
    return {
        "test": statistics.mean(tests),
        "std": statistics.stdev(tests) if len(tests) > 1 else None,
        "tests": tests,
        "first": statistics.mean(result["first"] for result in results),
        "learning_rate": curves[0].rate,
        "adapter_bytes": statistics.mean(sum(result["adapter_bytes"]) for result in results),
        "global_bytes": statistics.mean(result["global_bytes"] for result in results),
        "bytes_up": statistics.mean(result["bytes_up"] for result in results),
        "bytes_down": statistics.mean(result["bytes_down"] for result in results),
        "relative_error": max(result["relative_error"] for result in results),
        "untrained": statistics.mean(MODULES - len(ranks) for result in results for ranks in result["ranks"].values()),
        "seconds_scoring": statistics.mean(result["seconds_scoring"] for result in results),
        "seconds": statistics.mean(result["seconds"] for result in results),
    }


def compared(found: dict[str, list[Curve]]) -> dict[str, Any]:
    """Both allocations, and their difference seed by seed."""
    rows = {name: figures(curves) for name, curves in found.items()}
    apart = [b - a for a, b in zip(rows["uniform"]["tests"], rows["importance"]["tests"], strict=True)]
    return {
        "rows": rows,
        "importance_minus_uniform": statistics.mean(apart),
        "std": statistics.stdev(apart) if len(apart) > 1 else None,
        "by_seed": apart,
    }


def verdict(one: dict[str, Any]) -> str:
    """Better or worse where zero is outside the 95 % interval of Student's t; otherwise neither."""
    if one["std"] is None:
        return "one seed"
    error = one["std"] / len(one["by_seed"]) ** 0.5
    if abs(one["importance_minus_uniform"]) <= T_QUANTILE * error:
        return "no difference that three seeds show"
    return "better" if one["importance_minus_uniform"] < 0 else "NOT better: worse"


def report(results: dict[tuple[str, str, str], dict[str, Any]]) -> list[str]:
    lines = [
        "`importance_minus_uniform` is the mean over seeds of the difference in test loss, nats/token; below zero, importance is",
        "better.",
        "",
        "| ranks | regime | strategy | importance_minus_uniform | std over seeds | importance is |",
        "|---|---|---|---|---|---|",
    ]
    for (setting, regime, strategy), one in results.items():
        std = "one seed" if one["std"] is None else f"{one['std']:.4f}"
        lines.append(
            f"| {setting} | {regime} | {strategy} | {one['importance_minus_uniform']:+.4f} | {std} | {verdict(one)} |"
        )
    lines += [
        "",
        "| ranks | regime | strategy | allocation | test loss | std | rate | after round 1 | adapters of the clients (kB) | "
        "up (MB) | down (MB) | global adapter (kB) | aggregation error | modules untrained |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (setting, regime, strategy), one in results.items():
        for name, f in one["rows"].items():
            std = "one seed" if f["std"] is None else f"{f['std']:.4f}"
            lines.append(
                f"| {setting} | {regime} | {strategy} | {name} | {f['test']:.4f} | {std} | {f['learning_rate']:g} | "
                f"{f['first']:.4f} | {f['adapter_bytes'] / 1e3:.0f} | {f['bytes_up'] / 1e6:.2f} | {f['bytes_down'] / 1e6:.2f} | "
                f"{f['global_bytes'] / 1e3:.0f} | {f['relative_error']:.1e} | {f['untrained']:.1f} of {MODULES} |"
            )
    lines += [
        "",
        "`mixed` is 32, 16, 8, 8, 4, 4, 2, 2, 2, 2. The clients' adapters are of equal size up to one rank of one module a",
        f"client. Both allocations have one rank cap, {2 * SPREAD} times the largest rank (recompress), and one download rank,",
        f"{SPREAD} times the sum of ranks (residual). Rates are 0.01 or 0.02.",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three clients, one seed, one rate; about two minutes")
    parser.add_argument("--cases", default=CASES, help="ranks (4 or mixed), regime and strategy of each")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--work", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work((spoken(words) for words in options.work), configured, measure, "tune")
        return
    cases = [
        (setting, regime, strategy) for setting, regime, strategy in (c.split("-") for c in options.cases.split(","))
    ]
    results = {case: compared(found) for case, found in collect(cases, options.quick, options.workers).items()}
    lines = report(results)
    print("\n".join(lines))
    if not options.quick:
        from results import write_section

        command = "python benchmarks/importance.py"
        if options.cases != CASES:
            command += f" --cases {options.cases}"
        write_section("importance", command, "\n".join(lines))
    headline = {"-".join(case): one for case, one in results.items()}
    print(json.dumps({"benchmark": "importance", "quick": options.quick, "results": headline}))


if __name__ == "__main__":
    main()
