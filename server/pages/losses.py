"""Held-out loss by round and by bytes, of one run or of several over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lamina.protos.pages.charts import Axis, Band, Series, escape, line_chart, usable
from lamina.protos.pages.tables import num, pair, perplexity, section, size, unit
from lamina.server.pages.loading import Run

_LOSS = Axis("held-out loss (nats/token)", hint=lambda loss: f"perplexity {perplexity(loss)}")
_ROUND = Axis("round", whole=True)
_BASELINES = {"base": "base model", "local": "each site alone", "central": "pooled data"}

References = Sequence[tuple[str, float]]


class Point(NamedTuple):
    """Where a run stands after a round: bytes moved so far (up and down), mean loss, and the clients' usable losses."""

    round: int
    moved: float
    loss: float | None
    clients: Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """A run's points as one line; `prefix` begins each tooltip."""

    label: str
    style: str
    points: Sequence[Point]
    prefix: str = ""

    def over(self, x: Sequence[float]) -> Series:
        """The mean loss, one point at each x."""
        tips = [
            f"{self.prefix}{f'round {p.round}' if p.round else 'base model'}: {num(p.loss)} nats/token, "
            f"perplexity {perplexity(p.loss)}; {size(p.moved)} moved so far"
            for p in self.points
        ]
        return Series(self.label, x, [p.loss for p in self.points], self.style, tips)


def points(run: Run) -> list[Point]:
    """The base model, where it was measured, and every round."""
    found, moved, base = [], 0.0, run.get("eval.base_loss")
    if usable(base):
        found.append(Point(0, 0.0, base, {c.ident: c.before for c in run.clients if usable(c.before)}))
    for record in run.rounds:
        moved += (record.get("bytes_up") or 0) + (record.get("bytes_down") or 0)
        losses = (record.get("per_client_loss") or {}).items()
        held = {key: loss for key, loss in losses if usable(loss)}
        found.append(Point(record["round"], moved, record.get("loss"), held))
    return found


def by_round(
    curves: Sequence[Curve],
    title: str,
    references: References = (),
    worst: Sequence[Series] = (),
    band: Band | None = None,
) -> str:
    """The curves over the rounds, with the worst client's line, reference lines and a band where given."""
    lines = [curve.over([p.round for p in curve.points]) for curve in curves]
    return line_chart([*lines, *worst], _ROUND, _LOSS, title, references, band)


def by_bytes(curves: Sequence[Curve], title: str, references: References = ()) -> str:
    """The curves over everything sent so far, with reference lines where given."""
    most = max(p.moved for curve in curves for p in curve.points)
    divisor, name = unit(most)
    lines = [curve.over([p.moved / divisor for p in curve.points]) for curve in curves]
    axis = Axis(f"sent so far, up and down ({name})", bounds=(0.0, most / divisor))
    return line_chart(lines, axis, _LOSS, title, references)


def of_run(run: Run) -> str:
    """Both charts of one run, with its worst client, the spread over clients and the baselines."""
    if not any(usable(record.get("loss")) for record in run.rounds):
        why = ": with privacy on, losses stay with the clients." if run.get("privacy") else "."
        return section("Loss by round", f"No held-out loss was recorded for any round{why}")
    held = points(run)
    final = next(p.loss for p in reversed(held) if p.loss is not None)
    curve = Curve(f"mean {num(final)}", "c0", held)
    figures = {key: one.get("loss") for key, one in (run.get("baselines") or {}).items()}
    figures = {"base": run.get("eval.base_loss"), **figures}
    baselines = [(_BASELINES.get(key, key), loss) for key, loss in figures.items() if usable(loss)]
    references = [(f"{name} {num(loss)}", loss) for name, loss in baselines]
    worst, band = _spread(run, held)
    meaning = "The band holds the middle 80 % of clients. " if band else ""
    if baselines:
        meaning += f"Thin dashed lines: {escape(', '.join(name for name, _ in baselines))}."
    first = section(
        "Loss by round",
        f"Mean held-out loss of the clients after each round, and that of the worst client; lower is better. {meaning}",
        by_round([curve], "Held-out loss by round", references, worst, band),
        "figure",
    )
    second = section(
        "Loss by bytes sent",
        "The same mean loss against everything sent so far, updates up and releases down, "
        "over all clients: what a better model costs on the network.",
        by_bytes([curve], "Held-out loss by bytes", references),
        "figure",
    )
    return pair(first, second if held[-1].moved else "")


def _spread(run: Run, held: Sequence[Point]) -> tuple[list[Series], Band | None]:
    """The worst client's line and the band of the middle 80 %, at the points that have losses of single clients."""
    known = [p for p in held if p.clients]
    if not known:
        return [], None
    names = {c.ident: str(c) for c in run.clients}
    rounds = [float(p.round) for p in known]
    worst, tips = [], []
    for p in known:
        key = max(p.clients, key=lambda k: p.clients[k])
        loss = p.clients[key]
        who = names.get(key, f"client {key}")
        worst.append(loss)
        tips.append(f"round {p.round}, worst client ({who}): {num(loss)} nats/token, perplexity {perplexity(loss)}")
    low, high = np.transpose([np.percentile(list(p.clients.values()), [10, 90]) for p in known]).tolist()
    line = Series(f"worst {num(worst[-1])}", rounds, worst, "c1 d1", tips)
    return [line], Band(rounds, low, high, "c0")
