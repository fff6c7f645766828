"""What differential privacy costs in quality: a language model by epsilon, and an encoder by what is trained and shots per class.

**stdlib**: ten silos of the standard library, ranks 32,16,8,8,4,4,2,2,2,2, example-dp with each site's own noise, 3 rounds of 6
steps of 32 rows expected. Held-out loss at epsilon infinity (no privacy), 8, 4 and 1 for ffa, alternate and recompress. The rate
of each cell is chosen on the tune split with seed 0; losses are of the test split, over three seeds at that rate.

**banking77**: a real encoder and the ten most frequent intents of banking77, two sites with an equal share of 10 or 50 questions
for each intent, 2 rounds of 8 steps of a quarter of a site's questions. LoRA of rank 8, the layer norms (FiLM-type) or the head
alone is trained; the head in every arm. Accuracy on 40 questions of the test file for each intent, 3 seeds; the rate is chosen in
the same way, on questions of the training file that no site has.

Restartable: every finished curve is a file under benchmarks/cache.

    LAMINA_TEST_DATA=… python benchmarks/private_quality.py [--quick] [--workers 2] [--only stdlib|banking77]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.curves import all_of, read  # noqa: E402

CACHE = HERE / "cache" / "private-quality"
EPSILONS = (0.0, 8.0, 4.0, 1.0)  # 0 stands for no privacy
STRATEGIES = ("ffa", "alternate", "recompress")
RANKS = [32, 16, 8, 8, 4, 4, 2, 2, 2, 2]
KINDS = ("lora", "norm", "head")
SHOTS = (10, 50)
SHOT_EPSILONS = (0.0, 8.0, 1.0)
SEEDS = (0, 1, 2)
RATES = {"stdlib": (3e-3, 1e-2), "lora": (3e-3, 1e-2), "norm": (1e-2, 3e-2), "head": (3e-2, 1e-1)}
INTENTS, SITES, TUNE_QUESTIONS = 10, 2, 200


@dataclass(frozen=True)
class Curve:
    """One run: which arm, at which epsilon, rate and seed."""

    data: str
    arm: str
    shots: int
    epsilon: float
    rate: float
    seed: int
    quick: bool = False

    @property
    def file(self) -> Path:
        name = f"{self.data}-{self.arm}-{self.shots}-{self.epsilon:g}-{self.rate:g}-{self.seed}"
        return (CACHE / ("quick" if self.quick else "full")) / f"{name}.json"

    @property
    def words(self) -> str:
        return json.dumps([self.data, self.arm, self.shots, self.epsilon, self.rate, self.seed, self.quick])


def configured(curve: Curve) -> Any:
    from lamina.protos.config import Config

    config = Config()
    config.seed, config.threads, config.train.learning_rate = curve.seed, 1, curve.rate
    config.evaluate.every, config.data.generate = 1000, 0
    if curve.epsilon:
        config.privacy.mode, config.privacy.epsilon, config.privacy.delta = "example-dp", curve.epsilon, 1e-5
    if curve.data == "stdlib":
        config.strategy.name, config.clients.ranks = curve.arm, list(RANKS)
        config.rounds, config.train.local_steps, config.train.batch_size = 3, 6, 32
        config.train.micro_batch, config.train.max_length, config.evaluate.max_examples = 16, 64, 96
        if curve.quick:
            config.clients.ranks, config.clients.count, config.rounds = [8, 4], 2, 2
        return config
    from benchmarks.encoder import encoder

    config.task, config.model.source = "sequence-classification", str(encoder())
    config.data.label_column, config.partition.kind = "category", "iid"
    config.adapter.kind, config.strategy.name, config.clients.ranks = curve.arm, "ffa", 8
    config.clients.count = SITES
    config.data.source, config.data.holdout = str(questions(curve)), str(held_out(curve))
    config.rounds, config.train.local_steps = (1, 8) if curve.quick else (2, 8)
    config.train.batch_size = INTENTS * curve.shots // (4 * SITES)
    config.train.max_length = 32
    return config


def rows(name: str) -> list[dict[str, str]]:
    """The questions of the most frequent intents."""
    with (Path(os.environ["LAMINA_TEST_DATA"]) / name).open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    with (Path(os.environ["LAMINA_TEST_DATA"]) / "banking77_train.csv").open(encoding="utf-8", newline="") as file:
        counts = Counter(row["category"] for row in csv.DictReader(file))
    kept = sorted(counts, key=lambda intent: (-counts[intent], intent))[:INTENTS]
    return [row for row in found if row["category"] in kept]


def write(path: Path, some: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(some[0]))
        writer.writeheader()
        writer.writerows(some)
    return partial.replace(path)


def few_shot(curve: Curve) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The first `shots` questions of each intent in an order that the seed gives, and those after them."""
    shuffled = rows("banking77_train.csv")
    random.Random(curve.seed).shuffle(shuffled)
    seen: dict[str, int] = {}
    taken, rest = [], []
    for row in shuffled:
        seen[row["category"]] = seen.get(row["category"], 0) + 1
        (taken if seen[row["category"]] <= curve.shots else rest).append(row)
    return taken, rest


def questions(curve: Curve) -> Path:
    return write(CACHE / f"train-{curve.shots}-{curve.seed}.csv", few_shot(curve)[0])


def held_out(curve: Curve) -> Path:
    """Questions of the test file; for the choice of a rate, other questions of the training file."""
    path = write(CACHE / f"test-{curve.seed}.csv", rows("banking77_test.csv"))
    write(CACHE / f"tune-{curve.shots}-{curve.seed}.csv", few_shot(curve)[1][:TUNE_QUESTIONS])
    return path


def measure(curve: Curve) -> dict[str, Any]:
    """Run one curve: figures of the test split and of the tune split at its end, and the cost."""
    from lamina.protos.adapter import Adapter
    from lamina.server import campaign as campaigns
    from lamina.server.rounds import Loop, run
    from lamina.simulations import engine
    from lamina.simulations.prepare import prepare

    config = configured(curve)
    # Under example-dp rows are held out one by one: every arm is measured on these.
    test = prepare(configured(replace(curve, epsilon=1.0)))
    other = configured(replace(curve, epsilon=1.0))
    if curve.data == "stdlib":
        other.evaluate.split = "tune"
    else:
        other.data.holdout = str(CACHE / f"tune-{curve.shots}-{curve.seed}.csv")
    tune = prepare(other)
    found = campaigns.budgets(config, test.base.spec)
    campaign = campaigns.campaign(config, test.base.spec, found, "private-quality")
    cohort = engine.cohort(config, test, found, engine.Quiet())
    started = time.monotonic()
    state = run(Loop(campaign, cohort.channel(), lambda state, held: None))
    figures = engine.evaluate(test, state.adapter, config, "")
    tuned = engine.evaluate(replace(test, held_out=tune.held_out), state.adapter, config, "")
    base = None
    if curve.data == "stdlib":
        base = engine.evaluate(test, Adapter({}, dict(test.base.spec.dense)), config, "").loss
    trained = sum(f.A.size + f.B.size for f in state.adapter.lora.values())
    return {
        "base": base,
        "test": figures.loss,
        "tune": tuned.loss,
        "accuracy": figures.accuracy,
        "tune_accuracy": tuned.accuracy,
        "epsilon": max(_spent(site) for site in cohort.sites.values()),
        "adapter_numbers": trained + sum(value.size for value in state.adapter.dense.values()),
        "seconds": time.monotonic() - started,
    }


def _spent(site: Any) -> float:
    private = getattr(site, "private", None)
    return 0.0 if private is None else float(private.mechanism.epsilon)


def work(curves: list[Curve]) -> None:
    """Measure what is not on disk yet, in this process; a run that diverges is recorded as such."""
    import torch

    from lamina.client.model import quiet
    from lamina.protos.errors import TrainingError

    warnings.simplefilter("ignore")
    quiet()
    torch.set_num_threads(1)
    for curve in curves:
        if curve.file.exists():
            continue
        try:
            result = measure(curve)
        except TrainingError as error:
            result = {"diverged": str(error), "test": None, "tune": None, "accuracy": None, "tune_accuracy": None}
        curve.file.parent.mkdir(parents=True, exist_ok=True)
        partial = curve.file.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.rename(curve.file)
        print(
            f"{curve.file.stem}: {result['test']} {result['accuracy']} in {result.get('seconds', 0):.0f} s", flush=True
        )


def cells(data: str, quick: bool) -> list[Curve]:
    """One curve a cell of the table, at seed 0; the rate is still to be chosen."""
    if data == "stdlib":
        arms = [("ffa", 0)] if quick else [(name, 0) for name in STRATEGIES]
        return [
            Curve(data, *arm, epsilon, 0.0, 0, quick) for arm in arms for epsilon in ((0.0, 8.0) if quick else EPSILONS)
        ]
    kinds, shots = (("head",), SHOTS[:1]) if quick else (KINDS, SHOTS)
    epsilons = (0.0, 8.0) if quick else SHOT_EPSILONS
    return [Curve(data, kind, some, epsilon, 0.0, 0, quick) for kind in kinds for some in shots for epsilon in epsilons]


def rates(cell: Curve) -> tuple[float, ...]:
    found = RATES["stdlib" if cell.data == "stdlib" else cell.arm]
    return found[-1:] if cell.quick else found


def chosen(cell: Curve) -> float:
    """The rate with the best tune figure at seed 0."""

    def figure(rate: float) -> float:
        found = read(replace(cell, rate=rate))
        if found["tune"] is None:
            return float("inf")
        return float(found["tune"] if cell.data == "stdlib" else -found["tune_accuracy"])

    return min(rates(cell), key=figure)


def collected(data: str, quick: bool, workers: int) -> dict[Curve, list[dict[str, Any]]]:
    """Cell at its chosen rate -> figures by seed."""
    some = cells(data, quick)
    all_of(__file__, [replace(cell, rate=rate) for cell in some for rate in rates(cell)], workers)
    picked = [replace(cell, rate=chosen(cell)) for cell in some]
    seeds = SEEDS[:1] if quick else SEEDS
    all_of(__file__, [replace(cell, seed=seed) for cell in picked for seed in seeds], workers)
    return {cell: [read(replace(cell, seed=seed)) for seed in seeds] for cell in picked}


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def table(data: str, found: dict[Curve, list[dict[str, Any]]]) -> list[str]:
    figure = "test" if data == "stdlib" else "accuracy"
    epsilons = sorted({cell.epsilon for cell in found}, key=lambda epsilon: -epsilon if epsilon else -1e9)
    shown = ["∞" if not epsilon else f"{epsilon:g}" for epsilon in epsilons]
    head = ["strategy"] if data == "stdlib" else ["trained", "shots", "numbers"]
    what = "test loss (nats/token)" if data == "stdlib" else "accuracy"
    lines = [f"| {' | '.join(head)} | {' | '.join(f'{what}, ε = {one} (rate)' for one in shown)} |"]
    lines.append("|---" * (len(head) + len(epsilons)) + "|")
    for arm, shots in dict.fromkeys((cell.arm, cell.shots) for cell in found):
        row = [cell for cell in found if (cell.arm, cell.shots) == (arm, shots)]
        row.sort(key=lambda cell: epsilons.index(cell.epsilon))
        first = [arm] if data == "stdlib" else [arm, str(shots), f"{found[row[0]][0]['adapter_numbers']:,}"]
        figures = [[one[figure] for one in found[cell] if one[figure] is not None] for cell in row]
        shown_cells = [f"{spread(some)} ({cell.rate:g})" if some else "diverged" for some, cell in zip(figures, row)]
        lines.append(f"| {' | '.join([*first, *shown_cells])} |")
    if data == "stdlib":
        lines.append(
            f"\nThe base alone: {statistics.mean(one['base'] for some in found.values() for one in some):.4f}."
        )
    return lines


def mean_of(found: dict[Curve, list[dict[str, Any]]], arm: str, shots: int, epsilon: float, key: str) -> float:
    (cell,) = [one for one in found if (one.arm, one.shots, one.epsilon) == (arm, shots, epsilon)]
    return statistics.mean(one[key] for one in found[cell])


def findings(all_found: dict[str, dict[Curve, list[dict[str, Any]]]]) -> dict[str, bool]:
    """The shape of the published findings, each true or false here."""
    true: dict[str, bool] = {}
    if "stdlib" in all_found:
        found = all_found["stdlib"]
        for arm in STRATEGIES:
            losses = [mean_of(found, arm, 0, epsilon, "test") for epsilon in EPSILONS]
            true[f"{arm}: the loss rises as epsilon falls"] = losses == sorted(losses)
        lost = {a: mean_of(found, a, 0, 1.0, "test") - mean_of(found, a, 0, 0.0, "test") for a in STRATEGIES}
        true["at epsilon 1 ffa loses less than recompress, which trains both factors"] = (
            lost["ffa"] < lost["recompress"]
        )
    if "banking77" in all_found:
        found = all_found["banking77"]

        def lost_share(kind: str, shots: int, epsilon: float) -> float:
            without = mean_of(found, kind, shots, 0.0, "accuracy")
            return 1 - mean_of(found, kind, shots, epsilon, "accuracy") / without

        for epsilon in SHOT_EPSILONS[1:]:
            for kind in KINDS:
                few, many = (lost_share(kind, shots, epsilon) for shots in SHOTS)
                true[f"{kind}: more shots lose a smaller share at epsilon {epsilon:g}"] = many < few
            share = {kind: lost_share(kind, SHOTS[-1], epsilon) for kind in KINDS}
            true[f"at {SHOTS[-1]} shots and epsilon {epsilon:g} the norms lose less than LoRA"] = (
                share["norm"] < share["lora"]
            )
            true[f"at {SHOTS[-1]} shots and epsilon {epsilon:g} the head loses less than LoRA"] = (
                share["head"] < share["lora"]
            )
    return true


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two clients, the head alone, one seed, one rate")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--only", choices=["stdlib", "banking77"], help="one of the two tables")
    parser.add_argument("--work", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work([Curve(*json.loads(one)) for one in options.work])
        return
    names = [options.only] if options.only else ["stdlib", "banking77"]
    if "banking77" in names and "LAMINA_TEST_DATA" not in os.environ:
        raise SystemExit("expected LAMINA_TEST_DATA to name the folder with banking77_train.csv and banking77_test.csv")
    found = {name: collected(name, options.quick, options.workers) for name in names}
    true = {} if options.quick else findings(found)
    lines = [line for name in names for line in (f"**{name}**", "", *table(name, found[name]), "")]
    lines += [f"- {'holds' if holds else 'DOES NOT HOLD'}: {what}" for what, holds in true.items()]
    print("\n".join(lines))
    if not options.quick and not options.only:
        from results import write_section

        write_section("private_quality", "LAMINA_TEST_DATA=… python benchmarks/private_quality.py", "\n".join(lines))
    slim = {
        name: {
            f"{cell.arm} {cell.shots} {cell.epsilon:g}": [
                one["test" if name == "stdlib" else "accuracy"] for one in some
            ]
            for cell, some in found[name].items()
        }
        for name in names
    }
    print(json.dumps({"benchmark": "private_quality", "quick": options.quick, "figures": slim, "findings": true}))


if __name__ == "__main__":
    main()
