"""What each party could read of the training text from what it receives in a run."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from lamina.audits.page.marking import block, listing, side_by_side
from lamina.audits.page.reading import entries, inline, interval, number, objects, plain, real
from lamina.audits.page.words import VIEWS, client, leaking, percent, percents, under, view
from lamina.protos.pages.charts import Axis, Scale
from lamina.protos.pages.rows import dot_row, scaled
from lamina.protos.pages.tables import num, section, table

Document = Mapping[str, Any]
_PREPARED = ("tuned.values", "honest.values", "tuned.pairs", "honest.pairs")
_RUN = (
    "Each party was given exactly what it sees in a run and looked in it for the tokens (words and parts of words) of the "
    "training text. Hollow: chance, which is what the same search finds in noise; filled: what was recovered, orange where it is "
    "more than 6 points above chance. ROUGE-L says how much of a text came out in the right order, from 0 to 1."
)
_CLOSE = (
    "The same search in two rounds of two steps, over a row each, with the run's other settings: the fewer rows are in an "
    "update, the more can be read off it. It says what the settings allow, not what this run gave away."
)
_SHOWN, _MOST, _CLIENTS = 4, 24, 40  # examples at once and in all, clients of a party


def of(document: Document) -> str:
    """Recall of every party beside chance, by client, and what was recovered beside the original; of small rounds, too."""
    return _of(document, "reconstruction", "What could each party read?", _RUN) + _of(
        document, "close_up", "What could each party read off small rounds?", _CLOSE
    )


def _of(document: Document, key: str, title: str, lede: str) -> str:
    parties = [(name, one) for name, one in entries(document, key) if isinstance(one, Mapping)][:20]
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
    # What a prepared base gives is the same in both: invented notes, not the run's rounds.
    notes = "".join(_notes(one) for _, one in parties) if key == "reconstruction" else ""
    clients = "".join(_clients(name, one, scale) for name, one in parties)
    return section(title, lede, f"{body}{notes}{clients}") + _examples(parties)


def _row(name: str, one: Mapping[str, Any], scale: Scale) -> list[str]:
    recall, chance = number(one, "recall"), number(one, "chance")
    who = view(name)
    if one.get("applicable") is False or recall is None:
        why = inline(one.get("why"), 300) if plain(one.get("why")) else "not measured"
        return [f'{who}<div class="muted">{why}</div>', "–", "", "–", "–", ""]
    tip = f"{plain(name)}: {percent(recall)} of the tokens recovered, {percent(chance)} by chance"
    style = leaking(recall, chance)
    dots = dot_row([(chance, style), (recall, style)], scale, tip, joined=True)
    rouge, by_chance = number(one, "rouge_l"), number(one, "rouge_l_chance")
    span = interval(one, "recall_interval")
    by_noise = found if (found := number(one, "auc_chance")) is not None else 0.5
    whom = "single clients" if one.get("individuals") is True else "all clients together"
    size = f"{num(number(one, 'tokens'), 0)} tokens" + (
        f", {num(number(one, 'clients'), 0)} clients" if number(one, "clients") is not None else ""
    )
    why = f'<div class="muted">{inline(one.get("why"), 300)}</div>' if plain(one.get("why")) else ""
    return [
        f"{who}{why}",
        f"{percent(recall)}{under(percents(span)) if span else ''}{under(f'chance {percent(chance)}')}",
        dots,
        f"{num(number(one, 'auc'))}{under(f'chance {num(by_noise)}')}",
        f"{num(rouge)}{under(f'chance {num(by_chance)}') if rouge is not None else ''}",
        f'{whom}<div class="muted">{size}</div>',
    ]


def _notes(one: Mapping[str, Any]) -> str:
    """What a coordinator that prepared the base read of invented notes, beside one that did not, and beside guessing."""
    kinds = [kind for kind, _ in entries(one, "notes.tuned.values")][:_CLIENTS]
    if not kinds:
        return ""
    get = {
        key: dict(entries(one, f"notes.{key}")) for key in (*_PREPARED, "tuned.values_chance", "tuned.pairs_untrained")
    }
    guessed = number(one, "notes.tuned.pairs_chance")
    rows = []
    for kind in kinds:
        figures = [real(get[key].get(kind)) for key in _PREPARED]
        chance = [real(get["tuned.values_chance"].get(kind)), guessed if kind in get["tuned.pairs"] else None]
        shown = [
            f"{percent(figure)}{under(f'chance {percent(level)}')}" if figure is not None else "–"
            for figure, level in zip(figures, (chance[0], chance[0], chance[1], chance[1]), strict=True)
        ]
        rows.append([inline(kind, 40), *shown, percent(real(get["tuned.pairs_untrained"].get(kind)))])
    heads = [("t", "in invented notes"), ("n", "found, prepared base"), ("n", "found, honest base")]
    heads += [("n", "matched, prepared"), ("n", "matched, honest"), ("n", "matched, no update")]
    caption = (
        "The coordinator first had the base model learn public notes of the same form by heart, or did not (honest), and "
        "then read a client's update. Found: values of the client's notes among its best guesses. Matched: names given "
        "their own value; without an update it has only the base."
    )
    title = "<h3>A prepared base, on invented notes</h3>"
    return f'<figure class="notes">{title}<p class="caption">{caption}</p>{table(heads, rows)}</figure>'


def _clients(name: str, one: Mapping[str, Any], scale: Scale) -> str:
    """The same for each client that a party could read apart."""
    found = [(ident, each) for ident, each in entries(one, "by_client") if isinstance(each, Mapping)]
    if one.get("applicable") is False or not found:
        return ""
    rows = []
    for ident, each in found[:_CLIENTS]:
        recall, chance = number(each, "recall"), number(each, "chance")
        tip = f"{plain(ident)}: {percent(recall)} recovered, {percent(chance)} by chance"
        style = leaking(recall, chance)
        row = dot_row([(chance, style), (recall, style)], scale, tip, joined=True)
        rows.append([client(ident), percent(recall), row, percent(chance)])
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
        whose = f" of {client(example.get('client'))}" if plain(example.get("client")) else ""
        shown.append(
            f'<div class="pair">{block(f"Original{whose}", original)}{block(f"Read by {view(name)}", recovered)}</div>'
        )
    return section(
        "Recovered text beside the original",
        "Marked is what was recovered: words and signs that both sides have, each as often as both have it. Short common words "
        "agree by chance too; look for names, numbers and rare words.",
        listing(shown, _SHOWN, "examples", len(every)),
    )
