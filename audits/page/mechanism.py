"""The mechanism that the claim rests on, what it has spent, and the checks that it is what it is said to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamina.audits.page.reading import at, inline, listed, number, objects, plain, real
from lamina.audits.page.words import claimed, epsilon
from lamina.protos.pages.charts import Axis, Series, line_chart
from lamina.protos.pages.tables import num, pair, section, table, tiles

Document = Mapping[str, Any]

_CHECKS = {
    "noise": "the noise is as strong as claimed",
    "sensitivity": "no one contributes more than the clipping allows",
    "independence": "noise is fresh every time",
    "sampling": "batches are drawn at random as claimed",
    "accounting": "the ledger adds up",
    "memory": "members are told apart no better than the claim allows",
    "client canaries": "a whole client leaves no more trace than the ledger says",
}
_ROUNDS = 1000  # drawn


def of(document: Document) -> str:
    """The parameters of the mechanism beside ε by round."""
    if not isinstance(document.get("mechanism"), Mapping):
        return ""
    get = {
        key: number(document, f"mechanism.{key}")
        for key in ("max_grad_norm", "noise_multiplier", "sample_rate", "steps")
    }
    value, anew = claimed(document)[0], number(document, "mechanism.epsilon_recomputed")
    above = value is not None and anew is not None and anew > 1.001 * value
    facts = [
        ("clipping norm C", num(get["max_grad_norm"]), "the most that one unit may add to a step"),
        ("noise multiplier σ", num(get["noise_multiplier"]), "standard deviation of the noise, in units of C"),
        ("sampling rate q", num(get["sample_rate"], 4), "chance of a unit to be in a step at all"),
        ("steps", num(get["steps"], 0), ""),
        ("accountant", inline(at(document, "mechanism.accountant")), "the method that adds up the steps"),
        (
            "ε recomputed",
            f'<b class="no">{epsilon(anew)}</b>' if above else epsilon(anew),
            f"claimed: {epsilon(value)}",
        ),
    ]
    left = section(
        "Mechanism and ledger",
        "How the noise was made, and the ε that this audit computes from it anew, without trust in the run's own figure.",
        tiles(facts, "facts"),
        "figure",
    )
    return pair(left, _by_round(document))


def _by_round(document: Document) -> str:
    spent = [real(value) for value in listed(document, "mechanism.epsilon_by_round")[:_ROUNDS]]
    budget, (value, _) = number(document, "mechanism.budget"), claimed(document)
    known = [one for one in spent if one is not None]
    if not known:
        return section("ε by round", "ε was not recorded by round.", tag="figure")
    references = [(f"budget {epsilon(budget)}", budget)] if budget is not None else []
    if value is not None and (budget is None or not _same([value], [budget])):
        references.append((f"claim {epsilon(value)}", value))
    rounds = [float(number) for number in range(1, len(spent) + 1)]
    tips = [f"round {index}: ε {num(one)} spent so far" for index, one in enumerate(spent, start=1)]
    reported = [real(one) for one in listed(document, "mechanism.epsilon_reported_by_round")[:_ROUNDS]]
    told = []
    if any(one is not None for one in reported) and not _same(spent, reported):
        told.append(Series("reported", [float(n) for n in range(1, len(reported) + 1)], reported, "c1 d1"))
    most = max(*known, *(one for one in reported if one is not None), *(level for _, level in references), 0.0)
    return section(
        "ε by round",
        "ε of all rounds so far together, computed anew. Above the budget line the promise is broken."
        + (" Dashed: what the run itself reported." if told else ""),
        line_chart(
            [Series(f"spent {epsilon(known[-1])}", rounds, spent, "c0", tips), *told],
            Axis("round", whole=True),
            Axis("ε", bounds=(0.0, 1.06 * most or 1.0)),
            "ε by round",
            references,
        ),
        "figure",
    )


def _same(spent: Sequence[float | None], reported: Sequence[float | None]) -> bool:
    """Whether two lists hold the same, to the places that a page shows: what was computed anew, and what was said."""
    both = [(a, b) for a, b in zip(spent, reported) if a is not None and b is not None]
    return len(spent) == len(reported) and all(abs(a - b) <= 0.005 * max(abs(a), abs(b)) for a, b in both)


def checks(document: Document) -> str:
    """What was expected of the mechanism and what was measured."""
    rows = []
    for one in objects(document, "checks")[:50]:
        name, holds = plain(one.get("name")), one.get("holds")
        verdict = {True: '<b class="yes">holds</b>', False: '<b class="no">fails</b>'}
        said = verdict.get(holds) if isinstance(holds, bool) else None
        note = f'<div class="muted">{inline(one.get("text"), 400)}</div>' if plain(one.get("text")) else ""
        rows.append(
            [
                f"{inline(_CHECKS.get(name, name))}{note}",
                inline(one.get("expected"), 200),
                inline(one.get("measured"), 200),
                said or '<span class="muted">not measured</span>',
            ]
        )
    if not rows:
        return ""
    return section(
        "Is the mechanism what it is said to be?",
        "Each part of the mechanism was measured and held against what the claim needs of it. Where one fails, the ε of the "
        "ledger means nothing.",
        table([("t w", "check"), ("t", "expected"), ("t", "measured"), ("k", "result")], rows),
    )
