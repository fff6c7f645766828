"""What a run has cost its clients' privacy, by round and by client, against its budget."""

from __future__ import annotations

from lamina.protos.pages.charts import Axis, Series, escape, line_chart, usable
from lamina.protos.pages.rows import bar
from lamina.protos.pages.tables import num, pair, section, table
from lamina.server.pages.loading import Run

_MODES = {
    "example-dp": "Each client added its noise itself, so this holds against the coordinator too.",
    "client-dp": "The coordinator added the noise, so this holds against the other clients and whoever has the adapter.",
}


def of_run(run: Run) -> str:
    """Both parts; nothing for a run without privacy."""
    if not run.get("privacy"):
        return ""
    return pair(_by_round(run), _by_client(run))


def _by_round(run: Run) -> str:
    spent, budget = [record.get("epsilon") for record in run.rounds], run.get("privacy.budget")
    if not any(map(usable, spent)):
        return section("Privacy by round", "No epsilon was recorded by round.", tag="figure")
    rounds = [float(record["round"]) for record in run.rounds]
    tips = [f"round {record['round']}: ε {num(value)} spent so far" for record, value in zip(run.rounds, spent)]
    references = [(f"budget {num(budget, 2)}", budget)] if usable(budget) else []
    most = max(filter(usable, [*spent, budget]))
    unit, mode = escape(run.get("privacy.unit") or "unit"), _MODES.get(run.get("privacy.mode"), "")
    return section(
        "Privacy by round",
        f"The ε of all rounds so far for one {unit}, of the client that has spent most. {mode} "
        "It is computed from every step together; the ε of single rounds do not add up to it.",
        line_chart(
            [Series("spent", rounds, spent, "c0", tips)],
            Axis("round", whole=True),
            Axis("ε", bounds=(0.0, 1.06 * most or 1.0)),  # from zero, or the first round would look free
            "Privacy by round",
            references,
        ),
        "figure",
    )


def _by_client(run: Run) -> str:
    found = {client: value for client, value in (run.get("privacy.per_client") or {}).items() if usable(value)}
    budget, rdp = run.get("privacy.budget"), run.get("privacy.epsilon_rdp")
    check = (
        f" By RDP, a looser bound that is computed in another way, the largest is {num(rdp)}." if usable(rdp) else ""
    )
    if not found:
        why = (
            "One mechanism covers all clients."
            if run.get("privacy.mode") == "client-dp"
            else ("Only sums of updates arrived, so the budget, which each site keeps, stands for what was spent.")
        )
        return section("Privacy by client", f"{why}{check}", tag="figure")
    names = {c.ident: str(c) for c in run.clients}
    most = max([*found.values(), *([budget] if usable(budget) else [])])
    rows = []
    for client, value in sorted(found.items(), key=lambda one: -one[1]):
        name = names.get(client, f"client {client}")
        left = num(max(0.0, budget - value)) if usable(budget) else "–"
        rows.append([escape(name), num(value) + bar(value, most, "c0", f"{name}: ε {num(value)}"), left])
    return section(
        "Privacy by client",
        "What each client has spent and what its budget leaves it, as far as the coordinator knows: a round that a client "
        f"trained and that does not count is known by that client's later word alone; its own ledger has it.{check}",
        table([("t", "client"), ("b", "ε spent"), ("n", "left")], rows),
    )
