"""The page that compares several runs: one line, one colour and one column each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lamina.protos.pages.charts import COLOURS, DASHES, escape, usable
from lamina.protos.pages.rows import bar, dot_row, scaled
from lamina.protos.pages.tables import change, count, duration, num, pair, section, size, table
from lamina.server.pages import losses
from lamina.server.pages.clients import label
from lamina.server.pages.loading import Run

_NUMBERS = 6  # runs up to which the table of clients has a column of numbers for each


@dataclass(frozen=True)
class _Entry:
    """A run with the name and the line style that tell it apart."""

    run: Run
    name: str
    style: str

    @property
    def key(self) -> str:
        """The name beside its line, as markup."""
        return f'<span class="run"><i class="{self.style}"></i><span>{escape(self.name)}</span></span>'


def body(runs: Sequence[Run]) -> str:
    """Everything inside the page's frame."""
    entries = [_Entry(*parts) for parts in zip(runs, _names(runs), _styles(runs))]
    finals = [(loss, entry.name) for entry in entries if usable(loss := entry.run.get("eval.final_loss"))]
    lede = "No run recorded a final loss."
    if finals:
        (best, name), (last, worst) = min(finals), max(finals)
        lede = (
            f"The lowest final loss is {num(best)} nats per token, by {escape(name)}; the highest is {num(last)}, "
            f"by {escape(worst)}."
        )
    deployed = [entry.name for entry in entries if entry.run.deployed]
    if finals and 0 < len(deployed) < len(entries):
        lede += (
            f" They were not measured alike: those of {escape(', '.join(deployed))} are of what each site received, cut to its "
            "rank, the others of the whole adapter."
        )
    return (
        f'<header><div class="muted">Lamina comparison</div><h1>{count(len(runs), "run")} compared</h1>'
        f'<p class="lede">{lede}</p></header>{_figures(entries)}{_losses(entries)}{_clients(entries)}{_settings(entries)}'
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """The shortest names that tell the runs apart."""
    strategies = [str(run.get("strategy") or "run") for run in runs]
    for names in (
        strategies,
        [f"{strategy}, seed {run.get('seed')}" for strategy, run in zip(strategies, runs)],
        [run.name for run in runs],
        [f"{run.name}, {run.get('run_id')}" for run in runs],
    ):
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({number})" for number, run in enumerate(runs, start=1)]


def _styles(runs: Sequence[Run]) -> list[str]:
    """A colour a strategy and a dash a repetition; a colour a run where that would not tell them apart."""
    strategies = [run.get("strategy") for run in runs]
    counts, seen = Counter(strategies), Counter[Any]()
    grouped = 1 < len(counts) <= COLOURS and 1 < min(counts.values()) <= max(counts.values()) <= DASHES
    order, styles = list(counts), []
    for number, strategy in enumerate(strategies):
        colour, dash = (order.index(strategy), seen[strategy]) if grouped else (number, number // COLOURS)
        styles.append(f"c{colour % COLOURS} d{dash % DASHES}")
        seen[strategy] += 1
    return styles


def _figures(entries: Sequence[_Entry]) -> str:
    """One line a run."""
    most = {
        key: max(entry.run.get(key) or 0 for entry in entries)
        for key in ("communication.bytes_up", "communication.bytes_down")
    }
    private = any(entry.run.get("privacy") for entry in entries)
    rows = []
    for entry in entries:
        get = entry.run.get
        sent = [
            size(get(key)) + bar(get(key), longest, entry.style, f"{entry.name}: {size(get(key))} {key.split('_')[-1]}")
            for key, longest in most.items()
        ]
        row = [
            entry.key,
            escape(get("strategy") or "–"),
            escape(get("seed")),
            num(get("eval.final_loss")),
            change(get("eval.base_loss"), get("eval.final_loss")),
            num(max((c.after for c in entry.run.clients if usable(c.after)), default=None)),
            *sent,
            num(get("aggregation.relative_error")),
            *([num(get("privacy.epsilon"), 2)] if private else []),
            duration(get("seconds.total")),
        ]
        rows.append(row)
    numbers = [("n", name) for name in ("seed", "final loss", "change", "worst client")]
    sums = [("n", name) for name in ("relative error", *(["ε"] if private else []), "time")]
    heads = [("t", "run"), ("t", "strategy"), *numbers, ("b", "sent up"), ("b", "sent down"), *sums]
    return section(
        "Figures",
        "One line a run. Losses in nats per token; the change is from the base model; the worst client is the one with "
        "the highest final loss; the relative error is the largest distance of a stored aggregate from the exact "
        "weighted mean.",
        table(heads, rows),
    )


def _losses(entries: Sequence[_Entry]) -> str:
    """Loss by round and by bytes, all runs over each other."""
    curves = [losses.Curve(e.name, e.style, losses.points(e.run), f"{e.name}, ") for e in entries]
    curves = [curve for curve in curves if any(usable(point.loss) for point in curve.points)]
    if not curves:
        return section("Loss by round", "None of the runs recorded a held-out loss by round.")
    return pair(
        section(
            "Loss by round",
            "Mean held-out loss after each round; lower is better.",
            losses.by_round(curves, "Held-out loss by round, all runs"),
            "figure",
        ),
        section(
            "Loss by bytes sent",
            "The same loss against everything sent so far; further left is cheaper.",
            losses.by_bytes(curves, "Held-out loss by bytes sent, all runs"),
            "figure",
        ),
    )


def _clients(entries: Sequence[_Entry]) -> str:
    """Final loss of every client under every run, the hardest client first."""
    finals = [{c.ident: c.after for c in entry.run.clients if usable(c.after)} for entry in entries]
    labels = {c.ident: label(c) for entry in reversed(entries) for c in entry.run.clients}
    by_client = {ident: [final.get(ident) for final in finals] for ident in labels}
    mean = {
        ident: float(np.mean([loss for loss in row if loss is not None]))
        for ident, row in by_client.items()
        if any(loss is not None for loss in row)
    }
    if not mean:
        return section("Clients", "No final losses of single clients were recorded.")
    scale, ticks = scaled([loss for row in by_client.values() for loss in row], "final held-out loss, nats per token")
    numbers = entries if len(entries) <= _NUMBERS else []
    rows = []
    for ident in sorted(mean, key=lambda ident: -mean[ident]):
        row = by_client[ident]
        tip = "; ".join(f"{entry.name} {num(loss)}" for entry, loss in zip(entries, row))
        dots = dot_row([(loss, entry.style) for entry, loss in zip(entries, row)], scale, tip)
        rows.append([labels[ident], dots, *(num(loss) for loss, _ in zip(row, numbers))])
    return section(
        "Final loss of each client",
        "Held-out loss at the end of each run (nats/token), the hardest client first; "
        "one dot a run, in the colours of the lines above; hover over a row for numbers.",
        table([("t", "client"), ("g", ticks), *(("o", entry.key) for entry in numbers)], rows, ""),
    )


def _settings(entries: Sequence[_Entry]) -> str:
    """The configuration keys in which the runs differ; what a deployment leaves to its sites is in no configuration of it."""
    keys = {key for entry in entries for key in entry.run.config if key != "output"}
    for entry in entries:
        keys -= {key for key in keys if entry.run.deployed and key not in entry.run.config}
    values = {key: [entry.run.config.get(key, "–") for entry in entries] for key in sorted(keys)}
    rows = [
        [f"<code>{escape(cell)}</code>" for cell in (key, *row)] for key, row in values.items() if len(set(row)) > 1
    ]
    if not rows:
        return section("Configuration", "The runs have the same settings, apart from the output directory.")
    return section(
        "Configuration",
        "The settings in which the runs differ, apart from the output directory"
        + (" and from what a deployment's sites decide." if any(entry.run.deployed for entry in entries) else "."),
        table([("k", "key"), *(("t", entry.key) for entry in entries)], rows),
    )
