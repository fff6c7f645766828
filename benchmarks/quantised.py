"""How far held-out losses in other number formats are from full precision's, and what compensation takes off.

    python benchmarks/quantised.py [--quick]

The base alone: `tiny`, and it grown to more parameters with the same function (`models.py`: noise of half the weights' size, so
that no weights are copies). `gap` is |loss(format) - loss(full precision)| in nats a token on the test split of the standard
library's ten silos, and of Shakespeare's plays where LAMINA_TEST_DATA names the folder with shakespeare.jsonl; `error` is that of
the difference, by examples. KL is the mean divergence of the format's predictions from full precision's, which no luck of signs
makes small. A ratio of gaps is left out where the gap without compensation is within three errors. `left` is the relative error
of the weights, compensation included.

After a run of `tiny`: four sites with equal ranks train on one format, `recompress`, and the global adapter is evaluated on full
precision (`on full`), and on what the sites have (`on own`). Both are set against the run of the same seed in full precision,
evaluated there; `moved` is the adapter of that run on the sites' base. Mean and standard deviation of the gaps over seeds.

- `gap_with_compensation_over_without`: of nf4 with rank 16, the worst of the bases alone on the standard library.
- `after_a_run_…`: the same ratio of the mean gaps after a run.

Nothing is chosen here, so that the tune split is not used: ranks and formats are a grid, and the learning rate is that of the
quality benchmark. Activations are float32. Restartable: every result is a file under benchmarks/cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.models import grown  # noqa: E402

CACHE = HERE / "cache" / "quantised"
SEEDS = (0, 1, 2)
SMALLEST = "0.9M"
HEADLINE_RANK = 16
# Base -> (width, depth) of `grown`, examples a silo.
BASES: dict[str, tuple[int, int, int]] = {"0.9M": (1, 1, 60), "3.2M": (2, 1, 60), "24M": (4, 2, 20)}
GRID = [(name, rank) for name in ("nf4", "int8", "int8wo", "mixed") for rank in (0, 4, 8, 16, 32)]
# The larger bases are slow; rank 64 is to the largest what 16 is to the smallest.
MIDDLE_GRID = [("nf4", rank) for rank in (0, 4, 8, 16, 32)]
MIDDLE_GRID += [(name, rank) for name in ("int8", "int8wo", "mixed") for rank in (0, 16)]
SHORT_GRID = [("nf4", rank) for rank in (0, 4, 16, 32, 64)] + [
    (name, rank) for name in ("int8", "mixed") for rank in (0, 16)
]
QUICK_GRID = [(name, rank) for name in ("nf4", "int8", "mixed") for rank in (0, 16)]
RUNS = [("nf4", rank) for rank in (0, 4, 16, 32)] + [(name, rank) for name in ("int8", "mixed") for rank in (0, 16)]


@dataclass(frozen=True)
class Alone:
    """A base without an adapter, in one format, on one text."""

    base: str
    text: str
    format: str
    rank: int


@dataclass(frozen=True)
class Federated:
    """A run whose clients all have one format."""

    base: str
    format: str
    rank: int
    seed: int
    quick: bool = False


def cached(case: Alone | Federated, measure: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The result of a case, measured unless it is on disk."""
    words = [str(value).lower() for value in vars(case).values()]
    file = CACHE / f"{type(case).__name__.lower()}-{'-'.join(words)}.json"
    if not file.exists():
        result = measure(case)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.rename(file)
        print(
            file.stem, {k: round(v, 5) for k, v in result.items() if isinstance(v, float)}, file=sys.stderr, flush=True
        )
    return dict(json.loads(file.read_text()))


def source_of(base: str) -> str:
    width, depth, _ = BASES[base]
    return "tiny" if (width, depth) == (1, 1) else str(grown(CACHE, width, depth, 0.5))


def loaded(base: str, number_format: str, rank: int) -> Any:
    from lamina.client.loading import BaseOptions, load_base

    return load_base(BaseOptions(source_of(base), format=number_format, compute="fp32", compensation=rank))


# --- the base alone ---


@functools.cache
def examples(text: str, a_silo: int) -> list[Any]:
    """Test examples of every silo."""
    from lamina.protos.config import Config
    from lamina.simulations.prepare import prepare

    config = Config()
    config.clients.count, config.evaluate.max_examples = 10, a_silo
    if text == "shakespeare":
        config.data.source = str(Path(os.environ["LAMINA_TEST_DATA"]) / "shakespeare.jsonl")
        config.partition.kind = "iid"
    return [example for held in prepare(config).held_out.values() for example in held]


def predictions(base: Any, some: list[Any]) -> list[tuple[Any, Any]]:
    """For each batch: log-probabilities at the targets, and nats of each target's example."""
    import torch

    from lamina.client.losses import IGNORED, collate, pad_id

    found = []
    ordered = sorted(some, key=lambda example: len(example.tokens))
    with torch.no_grad():
        for start in range(0, len(ordered), 16):
            batch = collate(ordered[start : start + 16], pad_id(base), base.device)
            logits = base.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits[:, :-1]
            wanted = batch.targets[:, 1:]
            kept = wanted != IGNORED
            logs = logits.float()[kept].log_softmax(-1)
            nats = torch.zeros(wanted.shape, dtype=torch.float64)
            nats[kept] = -logs.gather(1, wanted[kept][:, None])[:, 0].double()
            found.append((logs, torch.stack([nats.sum(1), kept.sum(1).double()])))
    return found


@functools.lru_cache(maxsize=1)
def in_full(base: str, text: str) -> tuple[Any, list[tuple[Any, Any]]]:
    exact = loaded(base, "fp32", 0)
    return exact, predictions(exact, examples(text, BASES[base][2]))


def alone(case: Alone) -> dict[str, Any]:
    import torch

    exact, wanted = in_full(case.base, case.text)
    other = loaded(case.base, case.format, case.rank)
    got = predictions(other, examples(case.text, BASES[case.base][2]))
    divergence = sum(
        float((one.exp() * (one - two)).sum(dtype=torch.float64)) for (one, _), (two, _) in zip(wanted, got)
    )
    nats = torch.cat([per for _, per in wanted], dim=1)
    rest = torch.cat([per for _, per in got], dim=1)
    count = float(nats[1].sum())
    apart = rest[0] - nats[0]
    mean = float(apart.sum()) / count
    return {
        "full": float(nats[0].sum()) / count,
        "difference": mean,
        "gap": abs(mean),
        "error": float((apart - mean * nats[1]).square().sum().sqrt()) / count,
        "kl": divergence / count,
        "left": weight_error(exact, other),
        "tokens": count,
    }


def weight_error(exact: Any, other: Any) -> float:
    """Norm of what the weights are off, compensation included, over their own."""
    from lamina.client.quantised.selftest import compensated, dequantised

    lost, all_of = 0.0, 0.0
    for module in exact.spec.modules:
        weight, layer = exact.layer(module).base_layer.weight, other.layer(module).base_layer
        rest, beside = weight - dequantised(layer), compensated(layer)
        lost += float((rest if beside is None else rest - beside).double().square().sum())
        all_of += float(weight.double().square().sum())
    return math.sqrt(lost / all_of)


# --- after a run ---


def configured(case: Federated) -> Any:
    from lamina.protos.config import Config

    config = Config()
    config.model.source = source_of(case.base)
    config.seed, config.threads = case.seed, 1
    config.clients.count, config.clients.ranks = 4, 8
    config.rounds, config.train.local_steps = (2, 10) if case.quick else (4, 15)
    config.train.batch_size, config.train.max_length, config.train.learning_rate = 4, 64, 1e-2
    config.evaluate.max_examples = 60 if case.quick else 120
    config.quantisation.format, config.quantisation.compensation = case.format, case.rank
    config.quantisation.compute = "fp32"
    return config


def federated(case: Federated) -> dict[str, Any]:
    """Losses of one run's global adapter, and of the full-precision run's on this one's base."""
    from lamina.client.quantised.selftest import check
    from lamina.protos.adapter import Adapter
    from lamina.server import campaign as campaigns
    from lamina.server.rounds import Loop, run
    from lamina.server.store.base import Store
    from lamina.simulations import engine
    from lamina.simulations.prepare import prepare

    class Nothing(Store):
        def announce(self, completed: Any) -> None:
            return

    config = configured(case)
    prepared = prepare(config)
    own = replace(prepared, base=next(iter(prepared.bases.values())))
    found = campaigns.budgets(config, prepared.base.spec)
    campaign = campaigns.campaign(config, prepared.base.spec, found, "quantised")
    cohort = engine.cohort(config, prepared, found, engine.Quiet())
    state = run(Loop(campaign, cohort.channel(), lambda state, held: None, Nothing()))
    result = {
        "before": engine.evaluate(prepared, Adapter(), config, "").loss,
        "on_full": engine.evaluate(prepared, state.adapter, config, "").loss,
        "on_own": engine.evaluate(own, state.adapter, config, "").loss,
    }
    check(own.base, "after the run")
    kept = CACHE / f"adapter-{case.base}-{case.seed}-{case.quick}.pt".lower()
    if case.format == "fp32":
        save(kept, state.adapter)
    else:
        result["moved"] = engine.evaluate(own, restored(kept), config, "").loss
    return result


def save(file: Path, adapter: Any) -> None:
    import torch

    tensors = {m: (torch.tensor(f.A), torch.tensor(f.B), f.scale) for m, f in adapter.lora.items()}
    torch.save(tensors, file)


def restored(file: Path) -> Any:
    import torch

    from lamina.protos.adapter import Adapter, LoraFactors

    return Adapter({m: LoraFactors(a.numpy(), b.numpy(), scale) for m, (a, b, scale) in torch.load(file).items()})


def over_seeds(number_format: str, rank: int, seeds: tuple[int, ...], quick: bool) -> dict[str, Any]:
    """Gaps of one format, mean and standard deviation."""
    gaps: dict[str, list[float]] = {"on_full": [], "on_own": [], "moved": []}
    for seed in seeds:
        reference = cached(Federated(SMALLEST, "fp32", 0, seed, quick), federated)
        got = cached(Federated(SMALLEST, number_format, rank, seed, quick), federated)
        for name, some in gaps.items():
            some.append(abs(got[name] - reference["on_full"]))
    return {
        name: {"mean": statistics.mean(some), "std": statistics.stdev(some) if len(some) > 1 else 0.0}
        for name, some in gaps.items()
    }


# --- the report ---


def ratio(value: float, without: float) -> str:
    return f"{value / without:.2f}" if without else ""


def clear(result: dict[str, Any]) -> bool:
    """Whether a gap is more than what the choice of examples explains."""
    return bool(result["gap"] > 3 * result["error"])


def of_bases(rows: list[tuple[Alone, dict[str, Any]]]) -> list[str]:
    plain = {(c.base, c.text, c.format): r for c, r in rows if not c.rank}
    lines = ["| base | text | format | rank | left | gap | error | over without | KL | over without |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for case, r in rows:
        without = plain[case.base, case.text, case.format]
        lines.append(
            f"| {case.base} | {case.text} | {case.format} | {case.rank} | {r['left']:.4f} | {r['gap']:.5f} | {r['error']:.5f} | "
            f"{ratio(r['gap'], without['gap']) if case.rank and clear(without) else ''} | {r['kl']:.6f} | "
            f"{ratio(r['kl'], without['kl']) if case.rank else ''} |"
        )
    return lines


def of_runs(rows: list[tuple[str, int, dict[str, Any]]]) -> list[str]:
    plain = {name: gaps for name, rank, gaps in rows if not rank}
    lines = ["| format | rank | on full | over without | on own | over without | moved | over without |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, rank, gaps in rows:
        cells = []
        for kind in ("on_full", "on_own", "moved"):
            cells.append(f"{gaps[kind]['mean']:.4f} ± {gaps[kind]['std']:.4f}")
            cells.append(ratio(gaps[kind]["mean"], plain[name][kind]["mean"]) if rank else "")
        lines.append(f"| {name} | {rank} | {' | '.join(cells)} |")
    return lines


def collect(quick: bool) -> tuple[list[tuple[Alone, dict[str, Any]]], list[tuple[str, int, dict[str, Any]]]]:
    texts = ["stdlib"]
    if (Path(os.environ.get("LAMINA_TEST_DATA") or "/nowhere") / "shakespeare.jsonl").is_file() and not quick:
        texts.append("shakespeare")
    grids = {SMALLEST: QUICK_GRID} if quick else {SMALLEST: GRID, "3.2M": MIDDLE_GRID, "24M": SHORT_GRID}
    bases = []
    for base, grid in grids.items():
        for text in texts if base != "24M" else texts[:1]:
            cases = sorted((Alone(base, text, name, rank) for name, rank in grid), key=order)
            bases += [(case, cached(case, alone)) for case in cases]
    seeds = SEEDS[:1] if quick else SEEDS
    wanted = [("nf4", 0), ("nf4", HEADLINE_RANK)] if quick else RUNS
    return bases, [(name, rank, over_seeds(name, rank, seeds, quick)) for name, rank in wanted]


def order(case: Alone) -> tuple[int, int]:
    return ("nf4", "int8", "int8wo", "mixed").index(case.format), case.rank


def headline(
    bases: list[tuple[Alone, dict[str, Any]]], runs: list[tuple[str, int, dict[str, Any]]]
) -> dict[str, float]:
    gap = {(c.base, c.format, c.rank): r["gap"] for c, r in bases if c.text == "stdlib"}
    names = {base for base, _, _ in gap}
    after = {rank: gaps for name, rank, gaps in runs if name == "nf4"}
    return {
        "gap_with_compensation_over_without": max(gap[b, "nf4", HEADLINE_RANK] / gap[b, "nf4", 0] for b in names),
        **{
            f"after_a_run_{kind}": after[HEADLINE_RANK][kind]["mean"] / after[0][kind]["mean"]
            for kind in ("on_full", "on_own", "moved")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="the smallest base, one seed and a shorter run; two minutes"
    )
    options = parser.parse_args()
    import logging
    import warnings

    import torch

    from lamina.client.model import quiet

    warnings.simplefilter("ignore")
    quiet()
    # bitsandbytes says at every product that it casts what it quantises.
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    CACHE.mkdir(parents=True, exist_ok=True)
    bases, runs = collect(options.quick)
    found = headline(bases, runs)
    lines = ["| number | value | bound | holds |", "|---|---|---|---|"]
    lines += [f"| {name} | {value:.3g} | < 1 | {'yes' if value < 1 else 'NO'} |" for name, value in found.items()]
    lines += ["", "The base alone:", "", *of_bases(bases), "", "After a run:", "", *of_runs(runs)]
    print("\n".join(lines))
    if not options.quick:
        from benchmarks.results import write_section

        external = "LAMINA_TEST_DATA=… " if any(case.text == "shakespeare" for case, _ in bases) else ""
        about = str(__doc__).split("\n", 4)[4]
        write_section("quantised", f"{external}python benchmarks/quantised.py", about + "\n" + "\n".join(lines))
    print(json.dumps({"benchmark": "quantised", "quick": options.quick, **found}))


if __name__ == "__main__":
    main()
