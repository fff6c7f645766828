"""What each party could read of the training text from what it receives in a run."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from lamina.audits.page.marking import block, listing, side_by_side
from lamina.audits.page.reading import entries, inline, number, objects, plain
from lamina.audits.page.words import VIEWS, leaking, percent, view
from lamina.protos.pages.charts import Axis, Scale
from lamina.protos.pages.rows import dot_row, scaled
from lamina.protos.pages.tables import num, section, table

Document = Mapping[str, Any]
_SHOWN, _MOST, _CLIENTS = 4, 24, 40  # examples at once and in all, clients of a party


def of(document: Document) -> str:
    """Recall of every party beside chance, by client, and what was recovered beside the original."""
    parties = [(name, one) for name, one in entries(document, "reconstruction") if isinstance(one, Mapping)][:20]
    if not parties:
        return ""
    order = [*VIEWS]
    parties.sort(key=lambda one: order.index(one[0]) if one[0] in order else len(order))
    scale, ticks = scaled([], "share of tokens", Axis("", bounds=(0.0, 1.0)))
    heads = [
        ("t w", "who"),
        ("n", "tokens recovered"),
        ("s", ticks),
        ("n", "AUC"),
        ("n", "text (ROUGE-L)"),
        ("t", "of whom"),
    ]
    body = table(heads, [_row(name, one, scale) for name, one in parties])
    clients = "".join(_clients(name, one, scale) for name, one in parties)
    return section(
        "What could each party read?",
        "Each party was given exactly what it sees in a run and looked in it for the tokens (words and parts of words) of the "
        "training text. Hollow: chance, which is what guessing would recover; filled: what was recovered, orange where it "
        "is more than 6 points above chance. ROUGE-L says how much of a text came out in the right order, from 0 to 1.",
        f"{body}{clients}",
    ) + _examples(parties)


def _row(name: str, one: Mapping[str, Any], scale: Scale) -> list[str]:
    recall, chance = number(one, "recall"), number(one, "chance")
    who = view(name)
    if one.get("applicable") is False or recall is None:
        why = inline(one.get("why"), 300) if plain(one.get("why")) else "not measured"
        return [f'{who}<div class="muted">{why}</div>', "–", "", "–", "–", ""]
    tip = f"{plain(name)}: {percent(recall)} of the tokens recovered, {percent(chance)} by chance"
    style = leaking(recall, chance)
    dots = dot_row([(chance, style), (recall, style)], scale, tip, joined=True)
    whom = "single clients" if one.get("individuals") is True else "all clients together"
    size = f"{num(number(one, 'tokens'), 0)} tokens" + (
        f", {num(number(one, 'clients'), 0)} clients" if number(one, "clients") is not None else ""
    )
    return [
        who,
        f'{percent(recall)}<br><small class="muted">chance {percent(chance)}</small>',
        dots,
        f'{num(number(one, "auc"))}<br><small class="muted">chance 0.5</small>',
        f'{num(number(one, "rouge_l"))}<br><small class="muted">chance {num(number(one, "rouge_l_chance"))}</small>',
        f'{whom}<div class="muted">{size}</div>',
    ]


def _clients(name: str, one: Mapping[str, Any], scale: Scale) -> str:
    """The same for each client that a party could read apart."""
    found = [(client, each) for client, each in entries(one, "by_client") if isinstance(each, Mapping)]
    if one.get("applicable") is False or not found:
        return ""
    rows = []
    for client, each in found[:_CLIENTS]:
        recall, chance = number(each, "recall"), number(each, "chance")
        tip = f"{plain(client)}: {percent(recall)} recovered, {percent(chance)} by chance"
        style = leaking(recall, chance)
        row = dot_row([(chance, style), (recall, style)], scale, tip, joined=True)
        rows.append([inline(client), percent(recall), row, percent(chance)])
    rest = (
        f'<p class="muted">{len(found) - _CLIENTS:,} more clients are in audit.json.</p>'
        if len(found) > _CLIENTS
        else ""
    )
    heads = [("t", "client"), ("n", "recovered"), ("s", ""), ("n", "chance")]
    return (
        f"<details><summary>Client by client, as seen by {view(name)}</summary>{table(heads, rows, '')}{rest}</details>"
    )


def _examples(parties: list[tuple[str, Mapping[str, Any]]]) -> str:
    lists = [[(name, example) for example in objects(one, "examples")] for name, one in parties]
    every = [one for turn in zip_longest(*lists) for one in turn if one is not None]  # one of each party, then a second
    if not every:
        return ""
    shown = []
    for name, example in every[:_MOST]:
        original, recovered = side_by_side(example.get("original"), example.get("recovered"))
        whose = f" of {inline(example.get('client'))}" if plain(example.get("client")) else ""
        shown.append(
            f'<div class="pair">{block(f"Original{whose}", original)}{block(f"Read by {view(name)}", recovered)}</div>'
        )
    return section(
        "Recovered text beside the original",
        "Marked is what was recovered: words and signs that both sides have, each as often as both have it. Short common words "
        "agree by chance too; look for names, numbers and rare words.",
        listing(shown, _SHOWN, "examples", len(every)),
    )
