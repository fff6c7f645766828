"""The page of one run: what came of it, for whom, at what cost, and what it takes to repeat it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from lamina.protos.pages.charts import Axis, Series, escape, line_chart, signed, usable
from lamina.protos.pages.tables import change, count, duration, num, pair, perplexities, section, size, table, tiles
from lamina.server.pages import clients, layers, losses, privacy
from lamina.server.pages.loading import Run

_VIEWS = {"exported": "the whole adapter", "release": "what each site received, cut to its rank"}
# Why a site is not in the run at its end.
_GONE = {"left": "left the run", "revoked": "had its certificate revoked", "absent": "never came"}
# What became of an update that did not count, by the code of the failure.
_FAILED = {"left": "the site left", "revoked": "certificate revoked"}
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
    rounds = count(len(run.rounds), "round")
    if run.get("ended") == "stopped":
        rounds = f"{len(run.rounds)} of {_planned(run)} rounds"
    return (
        '<header><div class="muted">Lamina run report</div>'
        f"<h1>{strategy}, {rounds}, {cohort}</h1>"
        f'<div class="muted">{where}</div><p class="lede">{_lede(run)}</p>{_course(run)}</header>'
        f"{_headline(run)}{losses.of_run(run)}{clients.before_and_after(run)}{privacy.of_run(run)}"
        f"{pair(_errors(run), layers.heat(modules))}{layers.spectra(modules)}"
        f"{_talks(run)}{_rejections(run)}{_details(run)}{_provenance(run)}"
    )


def _sources(run: Run) -> tuple[str | None, str | None]:
    """Base and data; in a deployment both are each site's, and the coordinator's settings for them mean nothing."""
    if run.deployed:
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


def _course(run: Run) -> str:
    """Whether an operator stopped the run, and which sites were not there to its end or in none of its rounds."""
    said = []
    if run.get("ended") == "stopped":
        said.append(f"An operator stopped the run after {len(run.rounds)} of {_planned(run)} rounds.")
    times = Counter(client for record in run.rounds for client in record.get("clients") or [])
    gone = run.get("gone") or {}
    for client, why in gone.items():
        part = "" if why == "absent" else f"; its updates count in {count(times[client], 'round')}"
        said.append(f"Site {escape(client)} {escape(_GONE.get(why, why))}{part}.")
    idle = [client for client in run.get("client_ranks") or {} if client not in {*times, *gone}]
    if run.deployed and idle:
        said.append(f"No update of {_few(idle)} counts in any round.")
    return f"<p>{' '.join(said)}</p>" if said else ""


def _planned(run: Run) -> str:
    return escape(run.config.get("rounds", "–"))


def _headline(run: Run) -> str:
    get = run.get
    base, final = get("eval.base_loss"), get("eval.final_loss")
    rows = []
    if base is not None or final is not None:
        note = f"{change(base, final)}; perplexity {perplexities(base, final)}"
        rows.append(("Held-out loss (nats/token)", f"{num(base)} → {num(final)}", note))
    if get("eval.final_accuracy") is not None:
        a, b = get("eval.base_accuracy"), get("eval.final_accuracy")
        rows.append(("Held-out accuracy", f"{num(a)} → {num(b)}", change(a, b)))
    measured = [(c.after, c) for c in run.clients if usable(c.after)]
    if measured:
        loss, worst = max(measured, key=lambda one: one[0])
        rows.append(("Worst client", num(loss), f"{escape(worst)}, from {num(worst.before)}"))
    parts = [f"{word} {duration(get(f'seconds.{word}'))}" for word in ("aggregate", "evaluate")]
    if not get("privacy"):  # else clients do not tell how long they trained
        parts.insert(0, f"train {duration(get('seconds.train'))} over all {'sites' if run.deployed else 'clients'}")
    clock = ", ".join(parts)
    rows += [
        ("Sent up", size(get("communication.bytes_up")), "updates, over all clients and rounds"),
        ("Sent down", size(get("communication.bytes_down")), "releases, over all clients and rounds"),
        ("Aggregation error", num(get("aggregation.relative_error")), "relative, the largest over rounds and layers"),
        ("Release error", num(get("aggregation.release_error")), "relative, the largest over rounds and clients"),
        ("Rounds × clients", f"{len(run.rounds)} × {num(get('clients'), 0)}", _tally(run)),
        ("Time", duration(get("seconds.total")), clock),
    ]
    if get("privacy"):
        spent = [r["epsilon"] for r in run.rounds if usable(r.get("epsilon"))]
        cost = max(spent, default=None) if get("privacy.epsilon") is None else get("privacy.epsilon")
        of = f" of {num(get('privacy.budget'), 2)}" if usable(get("privacy.budget")) else ""
        how = ", ".join(escape(part) for key in ("mode", "unit", "accountant") if (part := get(f"privacy.{key}")))
        rows.append(("Privacy", f"ε = {num(cost, 2)}{of}", f"at δ = {num(get('privacy.delta'), 6)}; {how}"))
    return tiles(rows, "figures" if len(rows) % 4 == 0 or len(rows) % 3 else "figures by3")


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


def _why(item: Mapping[str, Any]) -> tuple[str, str]:
    """What became of an update that did not count, in a word and in full."""
    reason, code = item.get("reason"), item.get("code")
    if reason != "failed":
        return "refused", f"refused: {reason or 'not recorded'}"
    if code in _FAILED:
        return str(code), _FAILED[code]
    return "failed", f"failed at the client{f': {code}' if code else ''}"


def _tally(run: Run) -> str:
    """How many updates did not count, by what became of them."""
    found = Counter(_why(item)[0] for record in run.rounds for item in record.get("rejections") or [])
    return ", ".join(f"{times:,} {word}" for word, times in found.most_common()) or "no update refused"


def _rejections(run: Run) -> str:
    """Updates that did not count, by reason."""
    refused: dict[str, list[tuple[Any, Any]]] = {}
    for record in run.rounds:
        for item in record.get("rejections") or []:
            refused.setdefault(_why(item)[1], []).append((item.get("client_id", "–"), record["round"]))
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
        "Updates that did not count",
        "What was refused on arrival, and what never came, as a client failed, left or was revoked; the run went on without.",
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
    get, log = run.get, run.get("log") or {}
    head = f"record {num(log.get('n'), 0)}, {log.get('hash')}" if log else None
    facts = [
        ("run", get("run_id")),
        ("ended", (get("ended_at") or "").replace("T", " ").replace("+00:00", " UTC") or None),
        ("coordinator", get("coordinator") or None),
        ("consortium", get("consortium") or None),
        ("strategy", get("strategy")),
        ("seed", get("seed")),
        *zip(("model", "data"), _sources(run), strict=True),
        ("base weights, SHA-256", get("base.weights")),
        ("losses are of", _VIEWS.get(get("eval.view"), get("eval.view"))),
        ("event log up to here", head),
        *((f"corpus {key}", value) for key, value in (run.get("corpus") or {}).items()),
        *(run.get("versions") or {}).items(),
    ]
    rows = [(escape(name), escape(value), "") for name, value in facts if value is not None]
    return section("Provenance", "What it takes to find or repeat this run.", tiles(rows, "facts"))
