"""Whether an attacker can tell who was trained on: ROC curves, tables of the attacks, and exposure of planted sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lamina.audits.estimators.gaussian import largest_tpr
from lamina.audits.page.reading import at, entries, inline, interval, listed, number, plain, real
from lamina.audits.page.words import claimed, epsilon, from_zero, percent, percents, shift_of, spread, under
from lamina.protos.pages.charts import COLOURS, DASHES, Axis, Series, line_chart, usable
from lamina.protos.pages.rows import scaled, span_row
from lamina.protos.pages.tables import num, pair, section, table

Document = Mapping[str, Any]

_ATTACKS, _POINTS = 12, 400  # shown of the attacks, and of the points of a curve
_RATES = ("0.01", "0.001")  # false-alarm rates of the table
_OF = {"canaries": "planted canaries", "rows": "the run's own rows"}
_FINAL = ", final adapter"  # ends the name of an attack on what everyone sees, beside one on what a coordinator sees
# How an audit names its attacks -> a word of explanation.
_NAMES = {
    "loss": "how well the trained model predicts the text",
    "calibrated": "how well it predicts it, compared with the public base model",
    "min-k++": "the least expected words of the text",
    "min-k++ calibrated": "the same, compared with the public base model",
    "margin": "how sure the trained model is of the label",
    "rmia": "compared with models trained with and without it",
    "lira": "a likelihood ratio over models trained with and without it",
}


def of(document: Document) -> str:
    """ROC curves and the table, of canaries or rows, and of the natural rows where both were measured."""
    parts = []
    whose = _OF.get(plain(at(document, "membership.of")), "the audited examples")
    for key, title in (("membership.attacks", whose), ("membership.rows", _OF["rows"])):
        attacks = [(name, one) for name, one in entries(document, key) if isinstance(one, Mapping)][:_ATTACKS]
        if attacks:
            parts.append((title, attacks))
    if not parts:
        return ""
    primary, members = at(document, "membership.attack"), number(document, "membership.members")
    others = number(document, "membership.others")
    sizes = f" Here: {num(members, 0)} members and {num(others, 0)} others." if members is not None else ""
    charts = [
        _roc(document, attacks, title, others if index == 0 else None) for index, (title, attacks) in enumerate(parts)
    ]
    tables = [
        _table(attacks, f"Attacks on {title}", plain(primary), others if index == 0 else None)
        for index, (title, attacks) in enumerate(parts)
    ]
    one_chart = len(charts) == 1
    intro = section(
        "Can it be told who was trained on?",
        "An attacker scores texts, some of which were trained on (members) and some not, and accuses those with the highest "
        f"scores. A curve on the dashed diagonal is guessing; the higher it lies above it, the more is given away.{sizes}",
        "" if one_chart else f'<p class="caption">{_reading(document)}</p>',
    )
    beside = [section("How to read the curves", _reading(document), tag="figure")] if one_chart else []
    return intro + pair(*charts, *beside) + "".join(tables)


def _reading(document: Document) -> str:
    """How to read the curves, in words."""
    value, _ = claimed(document)
    line = (
        f" The dotted line is the most that a Gaussian mechanism with exactly the claimed ε = {epsilon(value)} allows: a "
        "curve that lies clearly above it speaks against the claim."
        if _curve(document, _OF["canaries"]) is not None
        else ""
    )
    return (
        "To the left are attackers who accuse few and want to be sure; that is where harm is done, so both axes are "
        f"logarithmic.{line} AUC is the chance that a member gets a higher score than another: 0.5 is guessing, 1 is "
        "certainty. Small print holds 95 % intervals: with other samples of this size, the figure would lie about there."
    )


def _roc(document: Document, attacks: Sequence[tuple[str, Any]], title: str, others: float | None) -> str:
    """Share of members found over false alarms, both in percent on log axes, with chance and what the claim allows."""
    lines: list[tuple[float, Series]] = []
    smallest = [1 / others if others and others >= 1 else 0.01]
    for index, (name, one) in enumerate(attacks):
        points = [
            (real(p[0]), real(p[1]))
            for p in listed(one, "roc")[:_POINTS]
            if isinstance(p, list | tuple) and len(p) == 2
        ]
        kept = sorted((x, y) for x, y in points if x is not None and y is not None and 0 <= x <= 1 and 0 < y <= 1)
        if not kept:
            continue
        smallest += [x for x, _ in kept if x > 0][:1]
        label, style = f"{_short(name)} {num(number(one, 'auc'), 2)}", _style(index)
        tip = f"{plain(name)}: AUC {num(number(one, 'auc'))}"
        order = number(one, "auc") or 0.0
        lines.append((order, Series(label, [100 * x for x, _ in kept], [100 * y for _, y in kept], style, tip=tip)))
    if not lines:
        return section(f"ROC, {title}", "No curve was recorded.", tag="figure")
    floor = 10.0 ** max(-5, math.floor(math.log10(min(smallest))))
    grid = [floor ** (1 - step / 60) for step in range(61)]
    chance = Series("chance 0.50", [100 * x for x in grid], [100 * x for x in grid], "ref d1")
    drawn = [chance, *(line for _, line in sorted(lines, key=lambda one: one[0]))]  # the last is labelled at the top
    mu = _curve(document, title)
    if mu is not None:
        drawn.append(
            Series("most allowed", [100 * x for x in grid], [100 * float(largest_tpr(mu, x)) for x in grid], "c6 d2")
        )
    bounds = (100 * floor, 100.0)
    return section(
        f"ROC, {title}",
        "Members found against others wrongly accused; the number beside a name is its AUC.",
        line_chart(
            drawn,
            Axis("others wrongly accused (%)", log=True, bounds=bounds),
            Axis("members found (%)", log=True, bounds=bounds),
            f"ROC curves of attacks on {title}",
            size=(500, 340),
        ),
        "figure",
    )


def _curve(document: Document, title: str) -> float | None:
    """μ of the claim's curve, where the claim is about what is attacked: a canary is a record or a user of its own, a row is not
    a user, and neither is a client.
    """
    unit = plain(at(document, "claim.unit"))
    fits = unit == "record" or (unit == "user" and title != _OF["rows"])
    return shift_of(document) if fits else None


def _short(name: str) -> str:
    """A name for the end of a line."""
    short = plain(name).replace(_FINAL, ", final")
    return short if len(short) <= 20 else short[:19] + "…"


def _style(index: int) -> str:
    return f"c{index % COLOURS} d{index // COLOURS % DASHES}"


def _table(attacks: Sequence[tuple[str, Any]], title: str, primary: str, others: float | None) -> str:
    """AUC with its interval beside chance, and the share of members found at two rates of false alarms."""
    spans = [(number(one, "auc"), interval(one, "auc_interval")) for _, one in attacks]
    values = [0.5, 1.0, *(auc for auc, _ in spans), *(end for _, span in spans if span for end in span)]
    low = min(value for value in values if usable(value))
    scale, ticks = scaled(values, "AUC", Axis("", bounds=(min(low, 0.4), 1.0)))
    rows = []
    for index, ((name, one), (auc, span)) in enumerate(zip(attacks, spans, strict=True)):
        about = _NAMES.get(name.removesuffix(_FINAL), "")
        first = " (chosen beforehand)" if name == primary else ""
        needs = f"; needs {inline(one.get('needs'))}" if plain(one.get("needs")) else ""
        note = f"{about}{needs}".removeprefix("; ")
        key = f'<span class="run"><i class="{_style(index)}"></i><span>{inline(name, 40)}{first}</span></span>'
        tip = f"{plain(name)}: AUC {num(auc)}{spread(span)}, chance 0.5"
        row = span_row(span or (None, None), [(auc, f"fill c{index % COLOURS}")], [0.5], scale, tip)
        rows.append(
            [f'{key}<div class="muted">{note}</div>', f"{num(auc)}{under(spread(span))}", row]
            + [_rate(at(one, "tpr_at_fpr"), rate, number(one, "others") or others) for rate in _RATES]
        )
    heads = [
        ("t w", "attack"),
        ("n", "AUC"),
        ("s", ticks),
        *(("n", f"found at {percent(float(r))} false alarms") for r in _RATES),
    ]
    return section(title, "Upright strokes mark chance, an AUC of 0.5.", table(heads, rows))


def _rate(rates: Any, rate: str, others: float | None) -> str:
    """The share of members found at a rate of false alarms, its interval and chance level."""
    one = rates.get(rate) if isinstance(rates, Mapping) else None
    if not isinstance(one, Mapping):
        one = {"value": one}
    chance = f"chance {percent(float(rate))}"
    if one.get("measurable") is False:
        few = f"not measurable with {num(others, 0)} others" if others is not None else "not measurable: too few others"
        return f'<small class="muted">{few}</small>'
    return f"{percent(number(one, 'value'))}{under(percents(interval(one, 'interval')))}{under(chance)}"


def exposure(document: Document) -> str:
    """How far planted sequences stand out among all that could have been planted."""
    ceiling, candidates = number(document, "exposure.ceiling"), number(document, "exposure.candidates")
    kinds = [(name, one) for name, one in entries(document, "exposure.canaries") if isinstance(one, Mapping)][:_ATTACKS]
    if not kinds:
        return ""
    most = [ceiling, *(number(one, key) for _, one in kinds for key in ("max", "ceiling"))]
    scale, ticks = scaled([], "exposure, bits", from_zero(most))
    rows = []
    for name, one in kinds:
        mean, largest, chance = (number(one, key) for key in ("mean", "max", "chance"))
        own = ceiling if (found := number(one, "ceiling")) is None else found
        tip = f"{plain(name)}: mean {num(mean, 1)} bits, chance {num(chance, 1)}, ceiling {num(own, 1)}"
        row = span_row((mean, largest), [(mean, "fill c0"), (largest, "open c0")], [chance, own], scale, tip)
        extracted = f"{num(number(one, 'extracted'), 0)} of {num(number(one, 'count'), 0)}"
        among = candidates if (many := number(one, "candidates")) is None else many
        kind = f'{inline(name)}<div class="muted">among {num(among, 0)}</div>'
        rows.append([kind, num(mean, 1), num(largest, 1), row, num(chance, 1), num(own, 1), extracted])
    return section(
        "Do planted sequences stand out?",
        "Random sequences, and sequences that end in a token new to the data, were planted in the training data and ranked "
        "among others that could have been. Exposure is how many bits of the search an attacker is spared: at the ceiling the "
        "planted one comes first and can be read out of the model. Dot: mean; ring: largest; strokes: chance and ceiling.",
        table(
            [
                ("t", "kind"),
                ("n", "mean"),
                ("n", "largest"),
                ("s", ticks),
                ("n", "chance"),
                ("n", "ceiling"),
                ("n", "extracted"),
            ],
            rows,
        ),
    )
