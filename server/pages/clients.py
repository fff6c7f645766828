"""Single clients' losses: before and after one run, and at the end of several."""

from __future__ import annotations

from lamina.protos.pages.charts import Scale, escape, usable
from lamina.protos.pages.rows import dot_row, scaled
from lamina.protos.pages.tables import change, num, section, table
from lamina.server.pages.loading import Client, Run


def label(client: Client) -> str:
    """A client's name, with its id where that is another."""
    more = "" if client.name == client.ident else f' <span class="muted">{escape(client.ident)}</span>'
    return escape(client.name) + more


def before_and_after(run: Run) -> str:
    """Every client of one run, as a table with dumbbells."""
    clients = [c for c in run.clients if usable(c.before) or usable(c.after)]
    if not clients:
        return section("Clients", "No held-out losses of single clients were recorded.")
    scale, ticks = scaled([v for c in clients for v in (c.before, c.after)], "held-out loss, nats per token")
    columns = [
        ("t", "client", [label(c) for c in clients]),
        ("o", "rank", [num(c.rank, 0) for c in clients]),
        ("o", "held-out tokens", [num(c.tokens, 0) for c in clients]),
        ("g", ticks, [_dumbbell(c, scale) for c in clients]),
        ("o", "before", [num(c.before) for c in clients]),
        ("n", "after", [num(c.after) for c in clients]),
        ("n", "change", [change(c.before, c.after) for c in clients]),
        ("o", "accuracy", ["" if c.accuracy == (None, None) else " → ".join(map(num, c.accuracy)) for c in clients]),
    ]
    columns = [column for column in columns if set(column[2]) - {"", "–"}]
    return section(
        "Clients, before and after",
        "Each client's loss on its own held-out text (nats/token), from the base model (hollow) to the end of the run "
        "(filled), the largest improvement first. Orange marks a client that got worse.",
        table([(css, head) for css, head, _ in columns], list(zip(*(cells for _, _, cells in columns))), ""),
    )


def _dumbbell(client: Client, scale: Scale) -> str:
    losses = (client.before, client.after)
    tip = f"{client}: {num(client.before)} before, {num(client.after)} after, {change(*losses)} nats/token"
    style = "c1" if client.change is not None and client.change > 0 else "c0"
    return dot_row([(loss, style) for loss in losses], scale, tip, joined=True)
