"""The page of one run: what came of it, for whom, at what cost, and what it takes to repeat it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lamina.server.pages import clients, layers, losses
from lamina.server.pages.charts import Axis, Series, escape, line_chart, signed, usable
from lamina.server.pages.loading import Run
from lamina.server.pages.tables import change, count, duration, num, pair, perplexity, section, size, table, tiles

_TALKS = 6  # prompts shown at once
_NAMES = 12  # clients or rounds named beside a reason

# Key in rounds.jsonl, head of its column, text of a value.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("loss", "loss", num),
    ("accuracy", "accuracy", num),
    ("loss_worst", "worst", num),
    ("train_loss", "training loss", num),
    ("bytes_up", "up", size),
    ("bytes_down", "down", size),
    ("relative_error", "aggregate error", num),
    ("release_error", "release error", num),
    ("seconds", "time", duration),
    ("epsilon", "ε", num),
)


def body(run: Run) -> str:
    """Everything inside the page's frame."""
    strategy, cohort = escape(run.get("strategy") or "run"), count(run.get("clients") or 0, "client")
    origin = (run.get("run_id"), *_sources(run))
    where = " · ".join(escape(part) for part in (*origin, f"seed {run.get('seed')}") if part)
    modules = layers.modules(run)
    return (
        '<header><div class="muted">Lamina run report</div>'
        f"<h1>{strategy}, {count(len(run.rounds), 'round')}, {cohort}</h1>"
        f'<div class="muted">{where}</div><p class="lede">{_lede(run)}</p></header>'
        f"{_headline(run)}{losses.of_run(run)}{clients.before_and_after(run)}"
        f"{pair(_errors(run), layers.heat(modules))}{layers.spectra(modules)}"
        f"{_talks(run)}{_rejections(run)}{_details(run)}{_provenance(run)}"
    )


def _sources(run: Run) -> tuple[str | None, str | None]:
    """Base and data; in a deployment both are each site's, and the coordinator's settings for them mean nothing."""
    if run.get("eval.view") == "release":
        return "the sites' base", "the sites' own data"
    return run.config.get("model.source"), run.config.get("data.source")


def _lede(run: Run) -> str:
    """The finding in plain words."""
    base, final = run.get("eval.base_loss"), run.get("eval.final_loss")
    if not (usable(base) and usable(final)):
        return "No held-out loss was recorded before and after this run."
    verb = "fell" if final < base else "rose"
    path = f"{verb} from {num(base)} to {num(final)}" if final != base else f"stayed at {num(base)}"
    text = f"The held-out loss {path} nats per token. "
    changes = [(c.change, str(c)) for c in run.clients if c.change is not None]
    worse = [one for one in changes if one[0] > 0]
    if worse:
        most, client = max(worse, key=lambda one: one[0])
        return (
            f"{text}{len(worse)} of {count(len(changes), 'client')} ended worse than the base model, "
            f"{escape(client)} the most ({signed(f'{most:+.3f}')})."
        )
    if len(changes) < 2:
        return text
    if any(difference == 0 for difference, _ in changes):
        return text + "No client ended worse than the base model."
    return text + ("Both" if len(changes) == 2 else f"All {len(changes)}") + " clients improved."


def _headline(run: Run) -> str:
    get = run.get
    base, final = get("eval.base_loss"), get("eval.final_loss")
    rows = [("Held-out loss (nats/token)", "–", "not recorded")]
    if base is not None or final is not None:
        perplexities = f"{change(base, final)}; perplexity {perplexity(base)} → {perplexity(final)}"
        rows = [("Held-out loss (nats/token)", f"{num(base)} → {num(final)}", perplexities)]
    if get("eval.final_accuracy") is not None:
        a, b = get("eval.base_accuracy"), get("eval.final_accuracy")
        rows.append(("Held-out accuracy", f"{num(a)} → {num(b)}", change(a, b)))
    measured = [(c.after, c) for c in run.clients if usable(c.after)]
    if measured:
        loss, worst = max(measured, key=lambda one: one[0])
        rows.append(("Worst client", num(loss), f"{escape(worst)}, from {num(worst.before)}"))
    clock = ", ".join(f"{word} {duration(get(f'seconds.{word}'))}" for word in ("train", "aggregate", "evaluate"))
    rows += [
        ("Sent up", size(get("communication.bytes_up")), "updates, over all clients and rounds"),
        ("Sent down", size(get("communication.bytes_down")), "releases, over all clients and rounds"),
        (
            "Aggregation error",
            num(get("aggregation.relative_error")),
            f"relative, the largest; of releases {num(get('aggregation.release_error'))}",
        ),
        (
            "Rounds × clients",
            f"{len(run.rounds)} × {num(get('clients'), 0)}",
            count(get("rejections") or 0, "rejected update"),
        ),
        ("Time", duration(get("seconds.total")), clock),
    ]
    if get("privacy"):
        spent = [r["epsilon"] for r in run.rounds if usable(r.get("epsilon"))]
        budget = max(spent, default=None) if get("privacy.epsilon") is None else get("privacy.epsilon")
        how = ", ".join(escape(part) for key in ("mode", "unit", "accountant") if (part := get(f"privacy.{key}")))
        rows.append(("Privacy", f"ε = {num(budget, 2)}", f"at δ = {num(get('privacy.delta'), 6)}; {how}"))
    return tiles(rows, "figures")


def _errors(run: Run) -> str:
    """Aggregation error by round."""
    rounds = [r["round"] for r in run.rounds]
    lines = []
    for key, label, style in (("relative_error", "aggregate", "c0"), ("release_error", "release", "c1 d1")):
        values = [r.get(key) for r in run.rounds]
        if any(map(usable, values)):
            tips = [f"round {number}: {label} {num(value)}" for number, value in zip(rounds, values)]
            lines.append(Series(label, rounds, values, style, tips))
    if not lines:
        return section("Aggregation error", "No aggregation error was recorded.", tag="figure")
    axes = Axis("round", whole=True), Axis("relative error", log=True)
    return section(
        "Aggregation error",
        "Distance of the stored aggregate from the exact weighted mean of the clients' changes, relative to its size, "
        "the largest over layers. About 10⁻⁷ is the rounding of 32-bit numbers; more was cut by the rank cap or averaged "
        "inexactly. The release error is what a client's own rank left out of what it received.",
        line_chart(lines, *axes, "Aggregation error by round"),
        "figure",
    )


def _talks(run: Run) -> str:
    """Generations before and after training."""
    if not run.generations:
        return ""
    names = {c.ident: str(c) for c in run.clients}
    blocks = []
    for talk in run.generations:
        client = str(talk.get("client") or "an unnamed client")
        asked = _said(f"Prompt of {escape(names.get(client, client))}", talk.get("prompt"))
        if talk.get("reference") is not None:
            asked += _said("Reference", talk["reference"])
        answered = _said("Base model", talk.get("before")) + _said("After the run", talk.get("after"))
        blocks.append(f'<div class="talk"><div class="pair">{asked}</div><div class="pair">{answered}</div></div>')
    shown, rest = "".join(blocks[:_TALKS]), "".join(blocks[_TALKS:])
    if rest:
        shown += f"<details><summary>{count(len(blocks) - _TALKS, 'more prompt')}</summary>{rest}</details>"
    return section("What it writes", "The same prompts to the base model and to the model after the run.", shown)


def _said(title: str, text: object) -> str:
    return f'<div><h3>{title}</h3><pre dir="auto">{escape("–" if text is None else text)}</pre></div>'


def _rejections(run: Run) -> str:
    """Updates that admission refused, by reason."""
    refused: dict[str, list[tuple[Any, Any]]] = {}
    for record in run.rounds:
        for item in record.get("rejections") or []:
            reason = str(item.get("reason") or "not recorded")
            refused.setdefault(reason, []).append((item.get("client_id", "–"), record["round"]))
    if not refused:
        return ""
    rows = [
        [
            escape(reason),
            f"{len(found):,}",
            _few([client for client, _ in found]),
            _few([number for _, number in found]),
        ]
        for reason, found in sorted(refused.items(), key=lambda one: -len(one[1]))
    ]
    return section(
        "Rejected updates",
        "Updates that admission refused; the run went on without them.",
        table([("t", "reason"), ("n", "updates"), ("t", "clients"), ("t", "rounds")], rows),
    )


def _few(values: list[Any]) -> str:
    names = list(dict.fromkeys(str(value) for value in values))
    return escape(", ".join(names[:_NAMES]) + (", …" if len(names) > _NAMES else ""))


def _details(run: Run) -> str:
    """All rounds as numbers, and the resolved configuration."""
    used = [column for column in _COLUMNS if any(r.get(column[0]) is not None for r in run.rounds)]
    rows = [
        [str(r["round"]), str(len(r.get("clients") or [])), *(text(r.get(key)) for key, _, text in used)]
        for r in run.rounds
    ]
    rounds = table([("n", "round"), ("n", "clients"), *(("n", name) for _, name, _ in used)], rows)
    return (
        f"<section><h2>Details</h2><details><summary>All rounds as a table</summary>{rounds}</details>"
        f"<details><summary>Resolved configuration</summary><pre class=config>{escape(run.config_text)}</pre></details>"
        "</section>"
    )


def _provenance(run: Run) -> str:
    facts = [
        ("run", run.get("run_id")),
        ("directory", run.name),
        ("strategy", run.get("strategy")),
        ("seed", run.get("seed")),
        *zip(("model", "data"), _sources(run), strict=True),
        ("losses measured on", run.get("eval.view")),
        ("adapter", run.get("adapter")),
        *((f"corpus {key}", value) for key, value in (run.get("corpus") or {}).items()),
        *(run.get("versions") or {}).items(),
    ]
    rows = [(escape(name), escape(value), "") for name, value in facts if value is not None]
    return section("Provenance", "What it takes to find or repeat this run.", tiles(rows, "facts"))
