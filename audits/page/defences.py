"""What each defence costs and what it stops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamina.audits.page.reading import entries, inline, interval, number, objects, plain, real
from lamina.audits.page.words import VIEWS, epsilon, leaking, percent, reader, spread, under
from lamina.protos.pages.charts import Axis, Scale
from lamina.protos.pages.rows import bar, dot_row, scaled, span_row
from lamina.protos.pages.tables import num, section, table

Document = Mapping[str, Any]
_ROWS = 30


def of(document: Document) -> str:
    """One row a defence: loss, ε, membership and tokens recovered, each with a bar beside chance."""
    found = objects(document, "defences")[:_ROWS]
    if not found:
        return ""
    names = {name for one in found for name, value in entries(one, "recall") if value is not None}
    views = [*(name for name in VIEWS if name in names), *sorted(names - set(VIEWS))][:6]
    gain = max([_gain(one) or 0.0 for one in found], default=0.0)
    auc, _ = scaled([], "AUC", Axis("", bounds=(0.4, 1.0)))
    share, _ = scaled([], "share of tokens", Axis("", bounds=(0.0, 1.0)))
    proved = any(number(one, "epsilon_lower") is not None for one in found)
    rows = []
    for one in found:
        name, value = plain(one.get("name")), number(one, "auc")
        told = f'<div class="muted">{inline(one.get("words"), 240)}</div>' if plain(one.get("words")) else ""
        kept = _gain(one)
        tip = f"{name}: {num(kept)} of {num(gain)} nats gained over the base model"
        tell = span_row((0.5, value), [(value, "fill c0")], [0.5], auc, f"{name}: AUC {num(value)}, chance 0.5")
        span = interval(one, "auc_interval")
        row = [
            f"{inline(one.get('name'))}{told}",
            num(number(one, "loss")) + bar(kept, gain, "c2", tip),
            epsilon(number(one, "epsilon")),
            f"{num(value)}{under(spread(span)) if span else ''}{tell}",
            percent(real(one.get("tpr_at_fpr_0.01"))),
        ]
        row += [_recall(one, party, name, share) for party in views]
        rows.append([*row, epsilon(number(one, "epsilon_lower"))] if proved else row)
    heads = [("t w", "defence"), ("b", "held-out loss"), ("n", "ε"), ("b", "AUC"), ("n", "found at 1 %")]
    heads += [("b", f"read {reader(party)}") for party in views] + ([("n", "ε proved")] if proved else [])
    base = next((value for one in found if (value := number(one, "base_loss")) is not None), None)
    return section(
        "What does each defence cost, and what does it stop?",
        "The same attacks on the same data with each defence on. The green bar under a loss (nats per token) is what "
        f"training still gains over the base model{f' ({num(base)})' if base is not None else ''}: short bars are the price. "
        "The AUC row starts at chance (0.5); 1 % is the chance level of members found at 1 % false alarms. Tokens read: "
        "hollow chance, filled recovered.",
        table(heads, rows, "ruled tight"),
    )


def _gain(one: Mapping[str, Any]) -> float | None:
    before, after = number(one, "base_loss"), number(one, "loss")
    return before - after if before is not None and after is not None else None


def _recall(one: Mapping[str, Any], party: str, name: str, scale: Scale) -> str:
    recall, chance = (real(dict(entries(one, key)).get(party)) for key in ("recall", "chance"))
    if recall is None:
        return "–"
    style = leaking(recall, chance)
    tip = f"{name}, {plain(party)}: {percent(recall)} recovered, {percent(chance)} by chance"
    row = dot_row([(chance, style), (recall, style)], scale, tip, joined=True)
    return f"{percent(recall)}{under(f'chance {percent(chance)}')}{row}"
