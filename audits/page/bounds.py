"""How much ε the audit could prove: bounds from one run and the estimate from client canaries, beside claim and ceilings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamina.audits.page.reading import at, interval, number
from lamina.audits.page.words import claimed, epsilon, from_zero, percent, spread
from lamina.protos.pages.rows import scaled, span_row
from lamina.protos.pages.tables import num, section, table

Document = Mapping[str, Any]
_BOUNDS = (
    ("epsilon_lower", "ceiling", "for any mechanism", "holds whatever the noise is"),
    (
        "epsilon_lower_fdp",
        "ceiling_fdp",
        "for Gaussian noise",
        "stronger, and holds only if the noise is Gaussian (f-DP)",
    ),
)


def of(document: Document) -> str:
    """Both bounds on one axis with the claim and the ceilings."""
    get = {key: number(document, f"one_run.{key}") for names in _BOUNDS for key in names[:2]}
    found = [(get[key], get[top], name, note) for key, top, name, note in _BOUNDS]
    if all(bound is None for bound, *_ in found):
        return ""
    value, _ = claimed(document)
    most = [value, *(one for bound, ceiling, *_ in found for one in (bound, ceiling))]
    scale, ticks = scaled([], "ε", from_zero(most))
    rows = []
    for bound, ceiling, name, note in found:
        style = "c1" if bound is not None and value is not None and bound > value else "c0"
        tip = f"{name}: ε at least {num(bound, 2)}, ceiling {num(ceiling, 2)}, claim {num(value, 2)}"
        row = span_row((0.0, bound), [(bound, f"fill {style}"), (ceiling, "open ref")], [value], scale, tip)
        rows.append(
            [
                f'{name}<div class="muted">{note}</div>',
                f"<b>{epsilon(bound)}</b>",
                row,
                epsilon(ceiling),
                epsilon(value),
            ]
        )
    against = f"; stroke: the claim. A dot above the stroke refutes the claim. {_power(document, value)}"
    if value is None:
        against = ". Nothing was claimed that it could refute."
    return section(
        "How much ε could be proved?",
        f"{_method(document)} Dot: ε that is proved from below; ring: the ceiling, which no audit of this size can pass"
        f"{against}",
        table([("t", "bound"), ("n", "ε at least"), ("s", ticks), ("n", "ceiling"), ("n", "claim")], rows),
    )


def _method(document: Document) -> str:
    canaries, guesses, right = (number(document, f"one_run.{key}") for key in ("canaries", "guesses", "right"))
    level = number(document, "one_run.significance")
    often = (
        f" A bound above the true ε comes out in at most {percent(level)} of audits."
        if level is not None and 0 < level < 1
        else ""
    )
    coins = (
        f"{num(canaries, 0)} rows of the run stand for canaries: their hash, taken for a coin, decided which were trained on."
        if at(document, "membership.of") == "rows"
        else f"Of {num(canaries, 0)} canaries, each was trained on or left out by the toss of a coin."
    )
    return (
        f"{coins} The audit guessed for "
        f"{num(guesses, 0)} of them which it was, and {num(right, 0)} guesses were right; by chance it would be "
        f"{num(guesses / 2 if guesses is not None else None, 0)}.{often}"
    )


def _power(document: Document, value: float | None) -> str:
    """What an audit of this size can say about the claim."""
    ceiling, fdp = number(document, "one_run.ceiling"), number(document, "one_run.ceiling_fdp")
    top = max([one for one in (ceiling, fdp) if one is not None], default=None)
    if value is None or top is None or ceiling is None:
        return ""
    if top < value:
        return (
            f"Here both ceilings lie below the claim of {epsilon(value)}: the audit is under-powered, which means that it "
            "could not have refuted the claim even by guessing right every time. Such a result is no evidence for the claim; "
            "more canaries are."
        )
    if ceiling < value:
        return (
            f"Only the bound for Gaussian noise could have refuted the claim of {epsilon(value)}; the other could not."
        )
    return f"Both ceilings lie above the claim of {epsilon(value)}, so a gross failure would have been seen."


def client_canaries(document: Document) -> str:
    """ε at the level of whole clients, estimated from canary clients, beside the analytic value."""
    value, analytic = number(document, "client_canaries.epsilon"), number(document, "client_canaries.analytic")
    if value is None and analytic is None:
        return ""
    span = interval(document, "client_canaries.interval")
    scale, ticks = scaled([], "ε", from_zero([value, analytic, *(span or ())]))
    tip = f"estimated ε {num(value, 2)}{spread(span, 2)}, analytic {num(analytic, 2)}"
    row = span_row(span or (None, None), [(value, "fill c0")], [analytic], scale, tip)
    names = ("canaries", "clients", "rounds", "dimension")
    get = {key: num(number(document, f"client_canaries.{key}"), 0) for key in names}
    refused = number(document, "client_canaries.refused")
    lost = f" {num(refused, 0)} of their updates were refused, which makes the estimate smaller." if refused else ""
    estimate = f"{epsilon(value)}{spread(span, 2)}" if value is not None else "no finite estimate"
    return section(
        "Can a whole client be noticed?",
        f"{get['canaries']} made-up clients with random changes, larger than may pass, took part with {get['clients']} "
        f"clients over {get['rounds']} rounds ({get['dimension']} numbers each).{lost} How far the final adapter leans "
        "towards them gives an estimate of ε for one client: an estimate, not a proof. The stroke is what theory says of "
        "the mechanism; far above it the noise is too weak or the clipping does not hold.",
        table(
            [("t", ""), ("n", "estimated ε"), ("s", ticks), ("n", "analytic ε")],
            [["canary clients", estimate, row, epsilon(analytic)]],
        ),
    )
