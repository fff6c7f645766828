"""Where and how the final adapter changes the model, module by module."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lamina.protos.pages.charts import STEPS, Axis, Series, escape, line_chart, usable
from lamina.protos.pages.rows import heat_row, tick_row
from lamina.protos.pages.tables import num, section, table
from lamina.server.pages.loading import Run

_PANELS = 12  # kinds of module whose singular values are drawn
_OUTSIDE = 8  # modules outside the layers that are named


@dataclass(frozen=True)
class Module:
    """A module of the final adapter: its place, and the singular values of its change of the weights."""

    name: str
    layer: int | None
    kind: str
    values: Sequence[float]
    rank: float | None
    error: float | None

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return math.hypot(*self.values)


def modules(run: Run) -> list[Module]:
    """Modules with layer and kind read from their names (`model.layers.3.mlp.up_proj` is 3, `up_proj`)."""
    found = []
    for name, record in run.layers.items():
        parts = re.split(r"(?:^|\.)(\d{1,6})\.", name, maxsplit=1)
        layer, kind = (int(parts[1]), parts[2]) if len(parts) == 3 else (None, name)
        kind = re.sub(r"\b\d+\b", "*", kind)  # the experts of a layer are one kind
        values = sorted(filter(usable, record.get("singular_values") or []), reverse=True)
        found.append(Module(name, layer, kind, values, record.get("rank"), record.get("relative_error")))
    kinds = {m.kind for m in found}
    ends = Counter(_end(kind) for kind in kinds)
    return [replace(m, kind=_end(m.kind)) if ends[_end(m.kind)] == 1 else m for m in found]


def _end(kind: str) -> str:
    return kind.rsplit(".", 1)[-1]


def heat(held: Sequence[Module]) -> str:
    """Size of the adapter by layer and kind of module."""
    cells: dict[str, dict[int, list[Module]]] = {}
    for m in held:
        if m.layer is not None:
            cells.setdefault(m.kind, {}).setdefault(m.layer, []).append(m)
    if not cells:
        return ""
    layers = sorted({layer for row in cells.values() for layer in row})
    most = max(_norm(cell) or 0.0 for row in cells.values() for cell in row.values())
    rows = []
    for kind, row in cells.items():
        line = [row.get(layer, []) for layer in layers]
        tips = [
            "; ".join(
                f"{m.name}: norm {num(m.norm)}, rank {num(m.rank, 0)}, relative error {num(m.error)}" for m in cell
            )
            or f"{kind}, layer {layer}: not adapted"
            for layer, cell in zip(layers, line)
        ]
        rows.append([escape(kind), heat_row([_norm(cell) for cell in line], tips, 0.0, most)])
    every = math.ceil(len(layers) / 10)
    ticks = [((i + 0.5) / len(layers) * 100, str(layer)) for i, layer in enumerate(layers) if i % every == 0]
    rows.append(['<span class="muted">layer</span>', tick_row(ticks, "layer")])
    outside = ", ".join(f"{escape(m.name)} {num(m.norm)}" for m in [m for m in held if m.layer is None][:_OUTSIDE])
    more = f" Outside the layers: {outside}." if outside else ""
    return section(
        "Where the adapter changed the model",
        "Size of the final change of the weights (Frobenius norm) by layer and module: "
        f"0 {_keys(0)} {num(most)}.{more}",
        table([("t", ""), ("w", "")], rows, "heat"),
        "figure",
    )


def _norm(cell: Sequence[Module]) -> float | None:
    return math.hypot(*(m.norm for m in cell)) if cell else None


def _keys(first: int) -> str:
    return "".join(f'<i class="q q{step}"></i>' for step in range(first, STEPS))


def spectra(held: Sequence[Module]) -> str:
    """Singular values by kind of module, one line a layer, as small multiples."""
    kept = [m for m in held if m.values and m.values[0] > 0]
    if not kept:
        return ""
    top = max(m.values[0] for m in kept)
    floor = max(min(v for m in kept for v in m.values if v > 0), top * 1e-6)
    deepest = max(m.layer or 0 for m in kept) or 1
    x = Axis("direction", whole=True, bounds=(1.0, float(max(len(m.values) for m in kept))))
    y = Axis("singular value", log=True, bounds=(floor, top))
    kinds, panels = list(dict.fromkeys(m.kind for m in kept)), []
    for kind in kinds[:_PANELS]:
        lines = [
            Series(
                "",
                range(1, len(m.values) + 1),
                [v if v >= floor else None for v in m.values],
                f"q{2 + round((m.layer or 0) / deepest * (STEPS - 3))}",
                tip=f"{m.name}: largest {num(m.values[0])}, {_directions(m)}",
            )
            for m in kept
            if m.kind == kind
        ]
        chart = line_chart(lines, x, y, f"Singular values of {kind}", size=(250, 190))
        panels.append(f"<figure><h3>{escape(kind)}</h3>{chart}</figure>")
    rest = len(kinds) - _PANELS
    return section(
        "Singular values by layer",
        "Strength of each direction in which the final adapter changes a weight matrix, "
        f"one line a layer from the first to the last {_keys(2)}. A line that falls early needs less rank than it "
        "has; one that is still flat at its end would use more."
        + (f" {rest} more kinds of module are not drawn." if rest > 0 else ""),
        f'<div class="panels">{"".join(panels)}</div>',
    )


def _directions(module: Module) -> str:
    """How many directions hold 99 % of the squared norm."""
    share = np.cumsum(np.square(module.values)) / module.norm**2
    return f"{int(np.searchsorted(share, 0.99)) + 1} of {len(module.values)} directions hold 99 % of it"
