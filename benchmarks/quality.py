"""Held-out loss of the aggregation methods under unequal ranks, on the standard library's silos.

Ten clients with ranks 32,16,8,8,4,4,2,2,2,2 fine-tune the small base at context 64 in two regimes: 2 rounds of 60 local steps,
and 20 rounds of 5. Each method's learning rate is chosen on the tune split with one seed; losses are of the test split, over
three seeds at that rate. Restartable: every finished curve is a file under benchmarks/cache.

    python benchmarks/quality.py [--quick] [--workers 2]
"""

from __future__ import annotations

import argparse
import itertools
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

RANKS = [32, 16, 8, 8, 4, 4, 2, 2, 2, 2]
REGIMES = {"2x60": (2, 60), "20x5": (20, 5)}
# Name -> (strategy, ranks). fedavg is context, not a rival: its rank budgets differ.
METHODS: dict[str, tuple[str, list[int]]] = {
    "recompress": ("recompress", RANKS),
    "residual": ("residual", RANKS),
    "stack": ("stack", RANKS),
    "zeropad": ("zeropad", RANKS),
    "flexlora": ("flexlora", RANKS),
    "fedavg_r2": ("fedavg", [2] * 10),
    "fedavg_r8": ("fedavg", [8] * 10),
}
RATES = (3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
CONTEXT = ("fedavg_r2", "fedavg_r8")
# The quick form: four clients of ranks 32, 8, 4 and 2, one seed, the rate that the full run chose for most methods.
QUICK_CLIENTS = (0, 2, 4, 6)
QUICK_RATE = 1e-2


@dataclass(frozen=True)
class Curve:
    """One method at one rate and seed."""

    regime: str
    method: str
    rate: float
    seed: int
    quick: bool = False

    @property
    def file(self) -> Path:
        folder = HERE / "cache" / ("quality-quick" if self.quick else "quality")
        return folder / f"{self.regime}-{self.method}-{self.rate:g}-{self.seed}.json"

    @property
    def words(self) -> str:
        return f"{self.regime},{self.method},{self.rate!r},{self.seed},{int(self.quick)}"


def configured(curve: Curve) -> Any:
    from lamina.protos.config import Config

    rounds, steps = REGIMES[curve.regime]
    strategy, ranks = METHODS[curve.method]
    config = Config()
    config.rounds, config.seed, config.threads = rounds, curve.seed, 1
    config.strategy.name = strategy
    config.clients.ranks = [ranks[k] for k in QUICK_CLIENTS] if curve.quick else list(ranks)
    config.clients.count = len(config.clients.ranks)
    config.train.local_steps, config.train.batch_size, config.train.max_length = steps, 4, 64
    config.train.learning_rate = curve.rate
    config.evaluate.max_examples = 48 if curve.quick else 96
    return config


def measure(curve: Curve, prepared: dict[str, Any]) -> dict[str, Any]:
    """Run one curve: test loss at chosen rounds with the bytes so far, tune loss at the end."""
    from lamina.protos.adapter import Adapter
    from lamina.protos.errors import TrainingError
    from lamina.server import campaign as campaigns
    from lamina.server.rounds import Loop, run
    from lamina.simulations import engine

    config = configured(curve)
    test = replace(prepared["test"], train=dict(prepared["test"].train))
    found = campaigns.budgets(config, test.base.spec)
    campaign = campaigns.campaign(config, test.base.spec, found, "quality")
    cohort = engine.cohort(config, test, found, engine.Quiet())
    started = time.monotonic()
    shown = {1, 2, 5, 10, config.rounds}

    base = engine.evaluate(test, Adapter(), config, "").loss

    def evaluate(state: Any, held: Any) -> Any:
        number = state.round
        if number not in shown:
            return None
        figures = engine.evaluate(test, state.adapter, config, "")
        if number >= 5 and figures.loss > 1.2 * base:
            raise TrainingError(f"round {number}: {figures.loss:.2f} where the base has {base:.2f}; given up")
        return figures

    store = Memory()
    state = run(Loop(campaign, cohort.channel(), evaluate, store))
    tuned = engine.evaluate(replace(test, held_out=prepared["tune"].held_out), state.adapter, config, "")
    down = list(itertools.accumulate(r["bytes_down"] for r in store.records))
    up = list(itertools.accumulate(r["bytes_up"] for r in store.records))
    return {
        "test": store.records[-1]["loss"],
        "tune": tuned.loss,
        "worst": store.records[-1]["loss_worst"],
        "curve": [
            {"round": r["round"], "loss": r["loss"], "bytes_down": d, "bytes_up": u}
            for r, d, u in zip(store.records, down, up)
            if r["loss"] is not None
        ],
        "bytes_down": down[-1],
        "bytes_up": up[-1],
        "relative_error": max(r["relative_error"] for r in store.records),
        "seconds": time.monotonic() - started,
    }


def chosen_rate(regime: str, method: str) -> float:
    """The rate with the lowest tune loss at seed 0, among those at which no seed measured so far diverged."""
    tuned = {}
    for rate in RATES:
        results = [read(curve) for seed in SEEDS if (curve := Curve(regime, method, rate, seed)).file.exists()]
        if all(result["tune"] is not None for result in results):
            tuned[rate] = results[0]["tune"]
    return min(tuned, key=lambda rate: tuned[rate])


def diverged() -> list[str]:
    """Every curve that was given up, for the record."""
    curves = [
        Curve(*pair, rate, seed) for pair in itertools.product(REGIMES, METHODS) for rate in RATES for seed in SEEDS
    ]
    return [curve.file.stem for curve in curves if curve.file.exists() and read(curve)["test"] is None]


def collect(quick: bool, workers: int, context_seeds: int) -> dict[str, dict[str, Any]]:
    """All results: regime -> method -> figures."""
    pairs = [pair for pair in itertools.product(REGIMES, METHODS) if not (quick and pair[1] in CONTEXT)]
    if quick:
        curves = {pair: [Curve(*pair, QUICK_RATE, 0, True)] for pair in pairs}
        all_of(__file__, [curve for some in curves.values() for curve in some], workers)
    else:
        all_of(__file__, [Curve(*pair, rate, 0) for rate in RATES for pair in pairs], workers)
        seeds = {method: SEEDS[:context_seeds] if method in CONTEXT else SEEDS for method in METHODS}
        while True:
            curves = {pair: [Curve(*pair, chosen_rate(*pair), seed) for seed in seeds[pair[1]]] for pair in pairs}
            all_of(__file__, [curve for some in curves.values() for curve in some], workers)
            if all(read(curve)["test"] is not None for some in curves.values() for curve in some):
                break
    losses: dict[str, dict[str, Any]] = {regime: {} for regime in REGIMES}
    for (regime, method), some in curves.items():
        results = [read(curve) for curve in some]
        tests = [result["test"] for result in results]
        first = [result["curve"][0]["loss"] for result in results]
        losses[regime][method] = {
            "mean": statistics.mean(tests),
            "std": statistics.stdev(tests) if len(tests) > 1 else 0.0,
            "seeds": len(tests),
            "bytes_down": results[0]["bytes_down"],
            "bytes_up": results[0]["bytes_up"],
            "learning_rate": some[0].rate,
            "after_round_1": statistics.mean(first),
            "relative_error": max(result["relative_error"] for result in results),
            "seconds": statistics.mean(result["seconds"] for result in results),
            "curve": results[0]["curve"],
        }
    return losses


def findings(losses: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """What a pilot led us to expect, each true or false here."""
    mean = {(regime, method): figures["mean"] for regime, some in losses.items() for method, figures in some.items()}
    down = {
        (regime, method): figures["bytes_down"] for regime, some in losses.items() for method, figures in some.items()
    }
    rivals = ("recompress", "stack", "zeropad", "flexlora")
    first = {method: losses["2x60"][method]["after_round_1"] for method in ("stack", "residual", "zeropad")}
    found = {}
    for regime in REGIMES:
        found[f"residual lowest in {regime}"] = all(mean[regime, "residual"] < mean[regime, rival] for rival in rivals)
        found[f"residual at no more than stack's bytes in {regime}"] = down[regime, "residual"] <= down[regime, "stack"]
        found[f"recompress below zeropad in {regime}"] = mean[regime, "recompress"] < mean[regime, "zeropad"]
        found[f"recompress below flexlora in {regime}"] = mean[regime, "recompress"] < mean[regime, "flexlora"]
    found["recompress below stack in 20x5"] = mean["20x5", "recompress"] < mean["20x5", "stack"]
    found["recompress at a fraction of stack's bytes in 20x5"] = (
        down["20x5", "recompress"] < 0.5 * down["20x5", "stack"]
    )
    if losses["2x60"]["stack"]["learning_rate"] == losses["2x60"]["residual"]["learning_rate"]:
        found["after one round stack and residual coincide"] = abs(first["stack"] - first["residual"]) < 1e-4
    found["after one round of 60 steps stacking beats zero-padding"] = first["stack"] < first["zeropad"]
    return found


def spread(figures: dict[str, Any]) -> str:
    """Standard deviation over seeds, or that there is one seed."""
    return "one seed" if figures["seeds"] == 1 else f"{figures['std']:.4f}"


def report(losses: dict[str, dict[str, Any]], found: dict[str, bool], command: str, quick: bool) -> None:
    """Print the tables; the full run also writes RESULTS.md and the plot."""
    lines = []
    for regime, some in losses.items():
        lines += [f"**{regime}** (rounds × local steps)", ""]
        lines += [
            "| method | test loss (nats/token) | std | rate | after round 1 | down (MB) | up (MB) | aggregation error |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for method, f in sorted(some.items(), key=lambda item: item[1]["mean"]):
            lines.append(
                f"| {method} | {f['mean']:.4f} | {spread(f)} | {f['learning_rate']:g} | {f['after_round_1']:.4f} | "
                f"{f['bytes_down'] / 1e6:.1f} | {f['bytes_up'] / 1e6:.1f} | {f['relative_error']:.1e} |"
            )
        lines.append("")
    lines += [f"- {'holds' if true else 'DOES NOT HOLD'}: {what}" for what, true in found.items()]
    if not quick:
        lines += ["", f"Given up because they diverged (regime-method-rate-seed): {', '.join(diverged()) or 'none'}."]
        lines += ["A rate is eligible only where no seed diverged; the grid is 0.003, 0.01, 0.03."]
        lines += [
            "The fedavg rows are context: equal ranks, which the sites here do not have. See docs/log.md on fedavg_r8."
        ]
    print("\n".join(lines))
    if not quick:
        from results import write_section

        plot(losses)
        pictures = "\n".join(f"![loss against bytes, {regime}](plots/quality-{regime}.svg)" for regime in losses)
        write_section("quality", command, "\n".join(lines) + "\n\n" + pictures)


def plot(losses: dict[str, dict[str, Any]]) -> None:
    """Loss against cumulative bytes down, one SVG a regime."""
    from lamina.protos.pages.charts import STYLE, Axis, Series, line_chart

    for regime, some in losses.items():
        lines = [
            Series(
                label=method,
                x=[max(point["bytes_down"], 1e4) / 1e6 for point in figures["curve"]],
                y=[point["loss"] for point in figures["curve"]],
                style=f"c{index} d{index % 4}",
            )
            for index, (method, figures) in enumerate(some.items())
        ]
        title = f"Test loss against bytes sent to clients, {regime}, seed 0"
        drawn = line_chart(
            lines, Axis("sent to clients so far (MB)", log=True), Axis("test loss (nats/token)"), title, size=(760, 420)
        )
        # As a file of its own it needs a size, and room for the labels that a page lets run over its edge.
        drawn = drawn.replace('viewBox="0 0 760 420"', 'viewBox="-14 -8 800 440" width="800" height="440"')
        head, rest = drawn.split(">", 1)
        namespace = "" if "xmlns" in head else ' xmlns="http://www.w3.org/2000/svg"'
        (HERE / "plots").mkdir(exist_ok=True)
        frame = "svg{background:var(--bg);font-family:system-ui,sans-serif;width:auto}"
        (HERE / "plots" / f"quality-{regime}.svg").write_text(
            f"{head}{namespace}><style>{STYLE}{frame}</style>{rest}\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one seed, one rate, four clients, no fedavg; about three minutes"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--context-seeds", type=int, default=3, help="seeds of the fedavg rows, which are context only")
    parser.add_argument("--work", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(
            [
                Curve(r, m, float(rate), int(seed), q == "1")
                for r, m, rate, seed, q in (w.split(",") for w in options.work)
            ],
            configured,
            measure,
            "test",
        )
        return
    losses = collect(options.quick, options.workers, options.context_seeds)
    found = findings(losses)
    command = "python benchmarks/quality.py" + (" --quick" if options.quick else "")
    if not options.quick and options.context_seeds != len(SEEDS):
        command += f" --context-seeds {options.context_seeds}"
    report(losses, found, command, options.quick)
    slim = {r: {m: {k: v for k, v in f.items() if k != "curve"} for m, f in some.items()} for r, some in losses.items()}
    print(json.dumps({"benchmark": "quality", "quick": options.quick, "losses": slim, "findings": found}))


if __name__ == "__main__":
    main()
