"""The top of the page: the verdict with its reasons, what it is a verdict on, and the figures that it rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lamina.audits.estimators.gaussian import largest_tpr
from lamina.audits.page.reading import at, entries, inline, interval, listed, number, plain, real
from lamina.audits.page.words import claimed, client, epsilon, percent, shift_of, spread, unit_of, view
from lamina.protos.pages.rows import bar
from lamina.protos.pages.tables import count, num, pair, section, table, tiles

Document = Mapping[str, Any]

# Verdict -> its mark, what stands above the page, and the sentence below it; {} is the claim.
_VERDICTS = {
    "consistent": (
        "good",
        "The claim is consistent with all that was measured",
        "Nothing in this audit found more than the claim of {} allows. That is evidence, not proof: a bound from below cannot "
        "show that there is no better attack.",
    ),
    "violated": (
        "bad",
        "The claim does not hold",
        "This audit found more than the claim of {} allows, or a mechanism that is not the one that was claimed. "
        "Treat what was trained as if it had no such protection.",
    ),
    "under-powered": (
        "unsure",
        "The attacks were too small to test the claim",
        "Nothing found speaks against the claim of {}, but the attacks of an audit of this size could not have refuted it even "
        "if every one of its guesses had been right. Checks of the mechanism, where there are any below, could have.",
    ),
    "no-claim": (
        "plain",
        "No privacy was claimed",
        "The run promises no ε. The page shows what each party could learn from it.",
    ),
}
_UNKNOWN = ("unsure", "No verdict was recorded", "The audit did not come to an end, or was written by another version.")
_BANNER = (
    "This page shows text of the audited data, and text recovered from it. Keep it as carefully as the data itself."
)
_NO_BANNER = "Text of the audited data was left out of this page, as show_text=false asks."
_REASONS, _CLIENTS = 20, 30  # shown


def of(document: Document) -> str:
    """Verdict, reasons, banner, figures and claim."""
    mark, title, sentence = _VERDICTS.get(plain(document.get("verdict")), _UNKNOWN)
    reasons = [f"<li>{inline(one, 600)}</li>" for one in listed(document, "reasons")[:_REASONS]]
    quick = " A quick audit: its samples are small." if document.get("quick") is True else ""
    banner = _NO_BANNER if at(document, "settings.show_text") is False else _BANNER
    return (
        f'<header><div class="muted">Lamina privacy audit</div><h1>{title}</h1><div class="muted">{_subject(document)}</div>'
        f'<div class="verdict {mark}"><p class="lede">{sentence.format(_amount(document))}{quick}</p>'
        f"{'<ul>' + ''.join(reasons) + '</ul>' if reasons else ''}</div>"
        f'<p class="banner" role="note">{banner}</p></header>{_figures(document)}{_claim(document)}'
    )


def _amount(document: Document) -> str:
    value, _ = claimed(document)
    return f"ε = {epsilon(value)}" if value is not None else "privacy"


def _subject(document: Document) -> str:
    """Which run, or which campaign of its own, was audited."""
    subject = document.get("subject")
    kind = {"run": "run", "campaign": "the audit's own training"}.get(plain(at(subject, "kind")), "")
    rounds, clients = number(subject, "rounds"), number(subject, "clients")
    parts = [
        f"{kind} {inline(at(subject, 'run_id'))}".strip() if at(subject, "run_id") else kind,
        *(inline(at(subject, key)) for key in ("strategy", "task", "model", "data") if plain(at(subject, key))),
        count(int(rounds), "round") if rounds is not None else "",
        count(int(clients), "client") if clients is not None else "",
        inline(document.get("made_at")) if plain(document.get("made_at")) else "",
    ]
    return " · ".join(part for part in parts if part)


def _figures(document: Document) -> str:
    """The four figures that say most, each with its chance level or ceiling."""
    value, delta = claimed(document)
    rows = []
    if value is not None:
        rows.append(
            ("Claimed ε", epsilon(value), f"at δ = {num(delta, 6)}, for {unit_of(document)[0]}; lower is safer")
        )
    auc, span = number(document, "membership.auc"), interval(document, "membership.auc_interval")
    if auc is not None:
        rows.append(
            (
                "Telling members apart (AUC)",
                num(auc),
                f"chance 0.5, certain 1{'; 95 % interval' + spread(span) if span else ''}",
            )
        )
    lower, ceiling = number(document, "one_run.epsilon_lower"), number(document, "one_run.ceiling")
    if lower is not None:
        fdp, most = number(document, "one_run.epsilon_lower_fdp"), number(document, "one_run.ceiling_fdp")
        gaussian = f"; if the noise is Gaussian {epsilon(fdp)} of at most {epsilon(most)}" if fdp is not None else ""
        rows.append(("ε proved from below", epsilon(lower), f"of at most {epsilon(ceiling)}{gaussian}"))
    # A prepared base is tried on invented notes: it says what could be done, and nothing of this run's text.
    seen = [
        (number(one, "recall"), number(one, "chance"), name)
        for name, one in entries(document, "reconstruction")
        if name != "malicious-coordinator"
    ]
    found = [(recall, chance, name) for recall, chance, name in seen if recall is not None]
    if found:
        recall, chance, name = max(found, key=lambda one: one[0] - (one[1] or 0.0))
        rows.append(("Training tokens recovered", percent(recall), f"by {view(name)}; chance {percent(chance)}"))
    return tiles(rows, "figures" if len(rows) != 3 else "figures by3") if rows else ""


def _claim(document: Document) -> str:
    """What was promised, in plain words."""
    value, delta = claimed(document)
    if value is None:
        return ""
    short, full = unit_of(document)
    relation = plain(at(document, "claim.relation"))
    neighbours = (
        f"data with and without {short}. Replacing {short} counts as two such steps"
        if relation == "add-or-remove-one"
        else inline(relation)
    )
    facts = [
        ("ε and δ", f"{epsilon(value)} and {num(delta, 6)}", ""),
        ("protects", f"{short}: {full}", ""),
        ("compared are", neighbours, ""),
        ("noise is added by", _noised(document), ""),
        ("what ε means", _meaning(document, value, short), ""),
    ]
    left = section("The claim", "What the training promised before it ran.", tiles(facts, "facts"), "figure")
    return pair(left, _by_client(document)) if entries(document, "claim.per_client") else f"<section>{left}</section>"


def _noised(document: Document) -> str:
    mode = plain(at(document, "claim.mode"))
    return {
        "example-dp": "each client, before anything leaves it, so it holds against the coordinator too",
        "client-dp": "the coordinator, so it holds against all but the coordinator itself",
    }.get(mode, inline(mode))


def _meaning(document: Document, value: float, short: str) -> str:
    factor = f"{num(math.exp(value), 0 if value > 3 else 1)} times" if value < 50 else "any factor"
    text = f"No outcome is more than {factor} as likely with {short} as without, or the other way round, but for a chance of δ."
    mu = shift_of(document)
    if mu is None:
        return text
    return (
        f"{text} With Gaussian noise: an attack that wrongly accuses 1 % of those who took no part "
        f"finds at most {percent(float(largest_tpr(mu, 0.01)))} of those who did."
    )


def _by_client(document: Document) -> str:
    """ε of each client, the largest first."""
    found = [(name, real(one)) for name, one in entries(document, "claim.per_client")]
    known = sorted(((name, one) for name, one in found if one is not None), key=lambda one: -one[1])
    most = max([*(one for _, one in known), claimed(document)[0] or 0.0], default=1.0)
    rows = [
        [client(name), epsilon(one) + bar(one, most, "c0", f"{plain(name)}: ε {num(one)}")]
        for name, one in known[:_CLIENTS]
    ]
    rest = f" {len(known) - _CLIENTS:,} more are in audit.json." if len(known) > _CLIENTS else ""
    caption = f"ε that each client's own data has spent; a full bar is the claim or the largest.{rest}"
    return section("ε by client", caption, table([("t", "client"), ("b", "ε")], rows), "figure")
