"""`report.html`: one self-contained page about a run, or one that compares several, from run directories alone.

The page loads nothing from outside and works without scripts; its charts are SVG from `lamina.server.charts`. Every text
that comes from a file is escaped. Losses are nats per token. What was not recorded (privacy, an optional file) is left
out or said in one line. Nothing here computes a result: the page shows what the run wrote down.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lamina.protos.errors import ConfigError
from lamina.protos.files import write_atomic
from lamina.server import charts
from lamina.server.charts import Axis, Band, Series, escape, signed, usable

Schema = Mapping[str, tuple[type, ...]]  # dotted key, `*` for every entry -> types; null passes everywhere
_NUMBER, _MAP = (int, float), (Mapping,)
_KINDS: Mapping[tuple[type, ...], str] = {
    _NUMBER: "a number",
    _MAP: "an object",
    (list,): "a list",
    (str,): "a string",
    (list, int): "a list or a count",
}


def _typed(keys: str, kinds: tuple[type, ...] = _NUMBER, under: str = "") -> Schema:
    return {under + key: kinds for key in keys.split()}


_ROUND: Schema = {
    **_typed("per_client_loss rejections.*", _MAP),
    **_typed("rejections", (list, int)),
    **_typed("clients", (list,)),
    **_typed("round loss accuracy loss_worst loss_spread train_loss bytes_up bytes_down relative_error release_error"),
    **_typed("seconds epsilon per_client_loss.*"),
}
_SUMMARY: Schema = {
    **_typed("eval eval.per_client eval.per_client.* communication aggregation privacy seconds baselines", _MAP),
    **_typed("baselines.* client_ranks corpus versions", _MAP),
    **_typed("run_id strategy eval.view eval.per_client.*.name", (str,)),
    **_typed("base_loss final_loss base_accuracy final_accuracy", under="eval."),
    **_typed("base_loss final_loss base_accuracy final_accuracy tokens", under="eval.per_client.*."),
    **_typed("rounds clients seed rejections communication.* aggregation.* seconds.* privacy.epsilon privacy.delta"),
    **_typed("client_ranks.* baselines.*.loss"),
}
_LAYERS: Schema = {
    **_typed("*", _MAP),
    **_typed("*.singular_values", (list,)),
    **_typed("*.singular_values.* *.rank *.relative_error"),
}
_MANY = 60  # rows from which a table of clients scrolls inside its own frame
_RUNS = 6  # runs up to which the comparison writes a column of numbers for each

_STYLE = """
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
main{max-width:1060px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:.1rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;font-weight:650;margin:0 0 .3rem}h3{font-size:.9rem;font-weight:600;margin:0;overflow-wrap:anywhere}
section{margin-top:3rem}p{margin:.3rem 0;max-width:46rem}figure{margin:0}
.muted,.caption,dt,dd small,summary{color:var(--muted)}.caption{font-size:.875rem;line-height:1.45;margin:.2rem 0 .9rem}
.lede{font-size:1.08rem;margin-top:1rem}code,pre{font:.82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.pair{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:2.5rem}.pair>*{min-width:0}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,210px),1fr));gap:1.2rem 1.6rem}
dl{margin:0}.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));gap:1.6rem 2rem;margin-top:2rem}
.figures>div{border-top:2px solid var(--rule);padding-top:.5rem}dt{font-size:.82rem}dd{margin:0;overflow-wrap:anywhere}
.figures dd{font-size:1.45rem;line-height:1.3;font-variant-numeric:tabular-nums}
.figures dd small{display:block;font-size:.82rem;line-height:1.4;margin-top:.15rem}
.facts>div{display:grid;grid-template-columns:minmax(7rem,13rem) 1fr;gap:1rem;padding:.15rem 0}
.wrap{overflow-x:auto}.many{max-height:70vh;overflow-y:auto}.many thead{position:sticky;top:0;background:var(--bg);z-index:1}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--muted);text-align:left;vertical-align:bottom}td,th{padding:.15rem .9rem .15rem 0}
thead th{border-bottom:1px solid var(--rule);padding-bottom:.3rem}td:last-child,th:last-child{padding-right:0}
.ruled td{vertical-align:top;border-bottom:1px solid var(--rule);padding-top:.3rem;padding-bottom:.3rem}
.n,.o{text-align:right;white-space:nowrap}.g{width:44%}td.g{padding-top:0;padding-bottom:0}.heat thead{display:none}
.b{width:8rem;padding-left:1rem}.k{white-space:nowrap}.g:last-child{width:75%}.t{overflow-wrap:anywhere;min-width:6rem}
.run{display:inline-flex;vertical-align:top;gap:.5em;text-align:left;max-width:17rem}
.run span{overflow-wrap:break-word;min-width:0}
.run i{flex:none;width:1.4em;border-top:3px solid var(--c);margin-top:.65em}
.run .d1{border-top-style:dashed}.run .d2{border-top-style:dotted}.run .d3{border-top-style:double}
.q{display:inline-block;width:.72em;height:.72em;background:var(--c);margin:0 .08em;border-radius:1px}
i{print-color-adjust:exact;-webkit-print-color-adjust:exact}.facts dd{font-size:.9rem}
.talk{border-top:1px solid var(--rule);padding:.9rem 0}.talk pre{margin:.1rem 0 .6rem}.talk .pair{gap:0 2.5rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere}.config{background:var(--soft);padding:1rem;border-radius:4px}
summary{cursor:pointer;padding:.3rem 0}
@media (max-width:560px){main{padding:1.5rem 1rem}.o{display:none}h1{font-size:1.5rem}
.figures{grid-template-columns:repeat(auto-fit,minmax(145px,1fr));gap:1.2rem}.figures dd{font-size:1.2rem}
.panels{grid-template-columns:1fr 1fr}.g{width:38%}td,th{padding-right:.55rem}}
@media print{@page{margin:14mm}:root{--bg:#fff}body{font-size:10.5pt}main{max-width:none;padding:0}section{margin-top:1.6rem}
table{font-size:8.5pt}.wrap,.many{overflow:visible}.caption,h2{break-after:avoid}.figures{grid-template-columns:repeat(4,1fr)}
svg[viewBox] text{font-size:14px}.pair{grid-template-columns:1fr 1fr}
.many{max-height:none}figure,tr,.talk,.figures>div{break-inside:avoid}
details::details-content{content-visibility:visible;block-size:auto}.config{background:none;padding:0}}
"""


@dataclass(frozen=True)
class Client:
    """One client's held-out result: losses in nats per token before and after the run."""

    ident: str
    name: str
    rank: float | None
    tokens: float | None
    before: float | None
    after: float | None
    accuracy: str  # before and after, "" where not recorded

    def __str__(self) -> str:
        return f"client {self.ident}" if self.name == self.ident else self.name


@dataclass(frozen=True)
class Run:
    """What a run directory holds, checked: `config` maps dotted keys to text, `config_text` is config.yaml as written."""

    name: str
    config_text: str
    config: Mapping[str, str]
    rounds: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    layers: Mapping[str, Any]
    generations: tuple[Mapping[str, Any], ...]

    def get(self, key: str) -> Any:
        """The value at a dotted key of summary.json, or None."""
        value: Any = self.summary
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def clients(self) -> list[Client]:
        """Every client with its losses, the largest improvement first."""
        ranks = self.get("client_ranks") or {}
        last = (self.rounds[-1].get("per_client_loss") or {}) if self.rounds else {}
        held = {key: {"final_loss": loss} for key, loss in last.items()} | dict(self.get("eval.per_client") or {})
        found = []
        for key, v in ((key, value or {}) for key, value in held.items()):
            scores = v.get("base_accuracy"), v.get("final_accuracy")
            shown = "" if scores == (None, None) else " → ".join(_num(score) for score in scores)
            losses = v.get("base_loss"), v.get("final_loss")
            found.append(Client(key, v.get("name") or key, ranks.get(key), v.get("tokens"), *losses, shown))
        return sorted(found, key=lambda c: c.after - c.before if usable(c.after) and usable(c.before) else math.inf)


def _entries(value: Any, parts: Sequence[str], name: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted name, value) that a key of a `Schema` stands for."""
    if not parts:
        yield name[1:], value
    elif parts[0] == "*" and isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _entries(item, parts[1:], f"{name}.{key}")
    elif isinstance(value, Mapping):
        yield from _entries(value.get(parts[0]), parts[1:], f"{name}.{parts[0]}")


def _check(record: Any, schema: Schema, where: str, top: type = dict) -> None:
    wrong = [] if isinstance(record, top) else [("the content", "an object" if top is dict else "a list", record)]
    wrong += [
        (name, _KINDS[kinds], value)
        for key, kinds in schema.items()
        for name, value in _entries(record, key.split("."))
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool))
    ]
    if wrong:
        name, kind, value = wrong[0]
        raise ConfigError(
            f"{where}: expected {name} to be {kind}, got {type(value).__name__}. Restore it or repeat the run."
        )


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 18 else float(digits))
    except (ValueError, RecursionError) as error:
        at = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(f"{where}: expected JSON, got something else{at}. Restore it or repeat the run.") from error


def _read(path: Path, missing: str | None = None) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if missing is not None and isinstance(error, FileNotFoundError):
            return missing
        got = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}"
        raise ConfigError(
            f"{path}: expected a UTF-8 file of a finished run, got {got}. Give `lamina report` the "
            "run's `output` directory."
        ) from error


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values as text."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def load_run(run_dir: Path) -> Run:
    """Read and check the files of a run directory.

    Args:
        run_dir: Directory with config.yaml, rounds.jsonl and summary.json; layers.json and generations.json may lack.

    Returns:
        The run; its values have the types that the page needs, and null where nothing was recorded.

    Raises:
        ConfigError: If a required file is missing, or any file is malformed; names the file, and the line of rounds.jsonl.
    """
    run_dir = Path(run_dir)
    texts = {name: _read(run_dir / name) for name in ("config.yaml", "rounds.jsonl", "summary.json")}
    try:
        config = yaml.safe_load(texts["config.yaml"])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{run_dir / 'config.yaml'}: expected YAML, got something else. Restore it.") from error
    _check(config, {}, str(run_dir / "config.yaml"))
    rounds: list[Mapping[str, Any]] = []
    for line, text in enumerate(texts["rounds.jsonl"].split("\n"), start=1):
        if text.strip():
            where = f"{run_dir / 'rounds.jsonl'}, line {line}"
            record = _parse(text, where)
            _check(record, _ROUND, where)
            last = rounds[-1]["round"] if rounds else 0
            if not isinstance(record.get("round"), int) or record["round"] <= last:
                raise ConfigError(
                    f"{where}: expected a round number above {last}, got {record.get('round')!r}. "
                    "Restore it or repeat the run."
                )
            rounds.append(record)
    summary = _parse(texts["summary.json"], str(run_dir / "summary.json"))
    _check(summary, _SUMMARY, str(run_dir / "summary.json"))
    if summary.get("schema") != 1:
        raise ConfigError(
            f"{run_dir / 'summary.json'}: expected schema 1, got {summary.get('schema')}. Use the version of "
            "Lamina that wrote the run."
        )
    layers, talks = (
        _parse(_read(run_dir / name, empty), str(run_dir / name))
        for name, empty in (("layers.json", "{}"), ("generations.json", "[]"))
    )
    _check(layers, _LAYERS, str(run_dir / "layers.json"))
    _check(talks, {"*": _MAP}, str(run_dir / "generations.json"), list)
    name = run_dir.resolve().name
    return Run(
        name, texts["config.yaml"], dict(_flat(config)), tuple(rounds), summary, layers, tuple(filter(None, talks))
    )


def _num(value: float | None, places: int = 3) -> str:
    """A number for reading: fixed places, or a power of ten when it is very small or large."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else signed("∞" if value > 0 else "-∞")
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return signed(mantissa) + "\u202f×\u202f" + charts.power(int(exponent))
    return signed(f"{value:,.{places}f}") if value else "0"


def _change(before: float | None, after: float | None) -> str:
    if not (usable(before) and usable(after)):
        return "–"
    return signed(f"{after - before:+.3f}")


def _perplexity(loss: float | None) -> str:
    if not usable(loss):
        return "–"
    value = math.exp(loss) if loss < 700 else math.inf
    return _num(value, 2 if value < 100 else 0)


def _unit(most: float) -> tuple[float, str]:
    """The decimal unit of bytes in which `most` reads well."""
    power = min(4, int(math.log10(most) // 3)) if usable(most) and most >= 1 else 0
    return 1000.0**power, ("B", "kB", "MB", "GB", "TB")[power]


def _bytes(value: float | None) -> str:
    if not usable(value):
        return "–"
    divisor, unit = _unit(value)
    return f"{value / divisor:.{0 if unit == 'B' else 1}f} {unit}"


def _time(value: float | None) -> str:
    if not usable(value):
        return "–"
    if value < 60:
        return f"{value:.3g} s" if value < 10 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _count(number: float, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], kind: str = "ruled") -> str:
    """A table from finished cells; a head is (class, markup): t text, n number, o hidden when narrow, g graphic, b bar."""
    head = "".join(f'<th class="{css}" scope="col">{text}</th>' for css, text in heads)
    body = "".join(
        "<tr>" + "".join(f'<td class="{css}">{cell}</td>' for (css, _), cell in zip(heads, row)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wrap{" many" if len(rows) > _MANY else ""}"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _section(title: str, caption: str, body: str, tag: str = "section") -> str:
    """A titled part with its one caption; title, caption and body are markup."""
    return f'<{tag}><h2>{title}</h2><p class="caption">{caption}</p>{body}</{tag}>' if body or caption else ""


def _tiles(rows: Sequence[tuple[str, str, str]], css: str) -> str:
    return (
        f'<dl class="{css}">'
        + "".join(
            f"<div><dt>{name}</dt><dd>{value}{f'<small>{note}</small>' if note else ''}</dd></div>"
            for name, value, note in rows
        )
        + "</dl>"
    )


def _loss_axis() -> Axis:
    return Axis("held-out loss (nats/token)", hint=lambda loss: f"perplexity {_perplexity(loss)}")


def _history(run: Run) -> tuple[list[float], list[float], list[float | None]]:
    """Rounds, bytes moved so far (up and down) and mean loss, from the base model (round 0) on where it is known."""
    moved = list(accumulate((r.get("bytes_up") or 0) + (r.get("bytes_down") or 0) for r in run.rounds))
    rounds, losses = [float(r["round"]) for r in run.rounds], [r.get("loss") for r in run.rounds]
    base = run.get("eval.base_loss")
    return (
        ([0.0, *rounds], [0.0, *moved], [base, *losses])
        if usable(base)
        else (rounds, [float(m) for m in moved], losses)
    )


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def _tips(run: Run) -> list[str]:
    """One tooltip a point of `_history`."""
    rounds, moved, losses = _history(run)
    return [
        f"{'base model' if n == 0 else f'round {n:.0f}'}: {_num(loss)} nats/token, perplexity {_perplexity(loss)}"
        f"; {_bytes(total)} moved so far"
        for n, total, loss in zip(rounds, moved, losses)
    ]


def _by_client(run: Run) -> list[dict[str, float]]:
    """The usable losses of the clients at each point of `_history`."""
    start = [{c.ident: c.before for c in run.clients()}] if usable(run.get("eval.base_loss")) else []
    return [
        {key: loss for key, loss in losses.items() if usable(loss)}
        for losses in [*start, *(r.get("per_client_loss") or {} for r in run.rounds)]
    ]


def _worst(run: Run) -> tuple[list[float | None], list[str]]:
    """The worst client's loss at each point of `_history`, with tooltips that name it where it is known."""
    names = {c.ident: str(c) for c in run.clients()}
    rounds, _, _ = _history(run)
    recorded = [None] * (len(rounds) - len(run.rounds)) + [r.get("loss_worst") for r in run.rounds]
    worst, tips = [], []
    for number, losses, noted in zip(rounds, _by_client(run), recorded):
        key = max(losses, key=lambda k: losses[k], default=None)
        loss = noted if noted is not None or key is None else losses[key]
        who = "" if key is None or losses[key] != loss else f" ({names.get(key) or f'client {key}'})"
        worst.append(loss)
        tips.append(f"round {number:.0f}, worst client{who}: {_num(loss)} nats/token, perplexity {_perplexity(loss)}")
    return worst, tips


def _band(run: Run) -> tuple[Band, str]:
    """The spread over clients and its meaning."""
    rounds, _, losses = _history(run)
    held = [list(values.values()) for values in _by_client(run)]
    if any(held):
        ends = [tuple(np.percentile(values, [10, 90]).tolist()) if values else (None, None) for values in held]
        return Band(
            rounds, [a for a, _ in ends], [b for _, b in ends], "c0"
        ), "The band holds the middle 80 % of clients. "
    widths = [None] * (len(rounds) - len(run.rounds)) + [r.get("loss_spread") for r in run.rounds]
    pairs = [(x, m, w) for x, m, w in zip(rounds, losses, widths) if usable(m) and usable(w)]
    band = Band([x for x, _, _ in pairs], [m - w for _, m, w in pairs], [m + w for _, m, w in pairs], "c0")
    return band, "The band is the mean plus and minus the recorded spread over clients. " if pairs else ""


def _losses(run: Run) -> str:
    """Loss by round and by bytes."""
    rounds, moved, losses = _history(run)
    if not any(usable(r.get("loss")) for r in run.rounds):
        return _section(
            "Loss by round",
            "No held-out loss was recorded for any round"
            + (": with privacy on, losses stay with the clients." if run.get("privacy") else "."),
            "",
        )
    worst, tips = _worst(run)
    band, meaning = _band(run)
    known = {"base": "base model", "local": "each site alone", "central": "pooled data"}
    baselines = {key: (value or {}).get("loss") for key, value in (run.get("baselines") or {}).items()}
    baselines = {"base": run.get("eval.base_loss"), **baselines}
    references = [(f"{known.get(key, key)} {_num(loss)}", loss) for key, loss in baselines.items() if usable(loss)]
    lines = [
        Series(f"mean {_num(_last(losses))}", rounds, losses, "c0", _tips(run)),
        Series(f"worst {_num(_last(worst))}", rounds, worst, "c1 d1", tips),
    ][: 2 if any(map(usable, worst)) else 1]
    compared = ", ".join(name.rsplit(" ", 1)[0] for name, _ in references)
    meaning += f"Thin dashed lines: {escape(compared)}." if compared else ""
    chart = charts.line_chart(
        lines, Axis("round", whole=True), _loss_axis(), "Held-out loss by round", references, band
    )
    first = _section(
        "Loss by round",
        f"Mean held-out loss of the clients after each round, and that of the worst client; lower is better. {meaning}",
        chart,
        "figure",
    )
    divisor, unit = _unit(max(moved))
    axis = Axis(f"sent so far, up and down ({unit})", bounds=(0.0, max(moved) / divisor))
    line = Series(f"mean {_num(_last(losses))}", [m / divisor for m in moved], losses, "c0", _tips(run))
    chart = charts.line_chart([line], axis, _loss_axis(), "Held-out loss by bytes", references)
    second = (
        _section(
            "Loss by bytes sent",
            "The same mean loss against everything sent so far, updates up and releases down, "
            "over all clients: what a better model costs on the network.",
            chart,
            "figure",
        )
        if max(moved)
        else ""
    )
    return f'<section class="pair">{first}{second}</section>'


def _headline(run: Run) -> str:
    base, final, clients = run.get("eval.base_loss"), run.get("eval.final_loss"), run.clients()
    hurt = [c for c in clients if usable(c.after)]
    worst = max(hurt, key=lambda c: c.after or 0.0, default=None)
    up, down = run.get("communication.bytes_up"), run.get("communication.bytes_down")
    rows = [
        (
            "Held-out loss (nats/token)",
            f"{_num(base)} → {_num(final)}",
            f"{_change(base, final)}; perplexity {_perplexity(base)} → {_perplexity(final)}",
        )
    ]
    if base is None and final is None:
        rows = [("Held-out loss (nats/token)", "–", "not recorded")]
    if run.get("eval.final_accuracy") is not None:
        a, b = run.get("eval.base_accuracy"), run.get("eval.final_accuracy")
        rows.append(("Held-out accuracy", f"{_num(a)} → {_num(b)}", _change(a, b)))
    if worst:
        rows.append(("Worst client", _num(worst.after), f"{escape(worst)}, from {_num(worst.before)}"))
    rows += [
        ("Sent up", _bytes(up), "updates, over all clients and rounds"),
        ("Sent down", _bytes(down), "releases, over all clients and rounds"),
        (
            "Aggregation error",
            _num(run.get("aggregation.relative_error")),
            f"relative, the largest; of releases {_num(run.get('aggregation.release_error'))}",
        ),
        (
            "Rounds × clients",
            f"{len(run.rounds)} × {_num(run.get('clients'), 0)}",
            _count(run.get("rejections") or 0, "rejected update"),
        ),
        (
            "Time",
            _time(run.get("seconds.total")),
            ", ".join(f"{word} {_time(run.get(f'seconds.{word}'))}" for word in ("train", "aggregate", "evaluate")),
        ),
    ]
    if run.get("privacy"):
        budget = run.get("privacy.epsilon")
        spent = [r["epsilon"] for r in run.rounds if usable(r.get("epsilon"))]
        budget = budget if budget is not None else max(spent, default=None)
        how = ", ".join(
            escape(run.get(f"privacy.{key}")) for key in ("mode", "unit", "accountant") if run.get(f"privacy.{key}")
        )
        rows.append(("Privacy", f"ε = {_num(budget, 2)}", f"at δ = {_num(run.get('privacy.delta'), 6)}; {how}"))
    return _tiles(rows, "figures")


def _lede(run: Run) -> str:
    """The finding in plain words."""
    base, final = run.get("eval.base_loss"), run.get("eval.final_loss")
    if not (usable(base) and usable(final)):
        return "No held-out loss was recorded before and after this run."
    verb = "fell" if final < base else "rose"
    path = f"{verb} from {_num(base)} to {_num(final)}" if final != base else f"stayed at {_num(base)}"
    text = f"The held-out loss {path} nats per token. "
    pairs = [(c.after - c.before, c) for c in run.clients() if usable(c.after) and usable(c.before)]
    worse = [pair for pair in pairs if pair[0] > 0]
    if worse:
        change, client = max(worse, key=lambda pair: pair[0])
        text += (
            f"{len(worse)} of {_count(len(pairs), 'client')} ended worse than the base model, {escape(client)} the "
            f"most ({signed(f'{change:+.3f}')})."
        )
    elif len(pairs) > 1:
        every = "Both" if len(pairs) == 2 else f"All {len(pairs)}"
        improved = max(change for change, _ in pairs) < 0
        text += f"{every} clients improved." if improved else "No client ended worse than the base model."
    return text


def _label(client: Client) -> str:
    return escape(client.name) + (
        "" if client.name == client.ident else f' <span class="muted">{escape(client.ident)}</span>'
    )


def _clients(run: Run) -> str:
    """Every client before and after, as a table with dumbbells."""
    clients = [c for c in run.clients() if usable(c.before) or usable(c.after)]
    if not clients:
        return _section("Clients", "No held-out losses of single clients were recorded.", "")
    scale = charts.fit([v for c in clients for v in (c.before, c.after)], Axis(""), 3, 97)
    ticks = charts.tick_row([(scale.at(v), text) for v, text in scale.ticks(4)], "held-out loss, nats per token")
    dumbbells = []
    for c in clients:
        worse = usable(c.before) and usable(c.after) and c.after > c.before
        tip = f"{c}: {_num(c.before)} before, {_num(c.after)} after, {_change(c.before, c.after)} nats/token"
        dots = [(v, "c1" if worse else "c0") for v in (c.before, c.after)]
        dumbbells.append(charts.dot_row(dots, scale, tip, joined=True))
    columns = [
        ("t", "client", [_label(c) for c in clients]),
        ("o", "rank", [_num(c.rank, 0) for c in clients]),
        ("o", "held-out tokens", [_num(c.tokens, 0) for c in clients]),
        ("g", ticks, dumbbells),
        ("o", "before", [_num(c.before) for c in clients]),
        ("n", "after", [_num(c.after) for c in clients]),
        ("n", "change", [_change(c.before, c.after) for c in clients]),
        ("o", "accuracy", [c.accuracy for c in clients]),
    ]
    columns = [column for column in columns if set(column[2]) - {"", "–"}]
    heads, rows = [(css, head) for css, head, _ in columns], list(zip(*(cells for _, _, cells in columns)))
    return _section(
        "Clients, before and after",
        "Each client's loss on its own held-out text (nats/token), from the base model "
        "(hollow) to the end of the run (filled), the largest improvement first. Orange marks a client that got "
        "worse.",
        _table(heads, rows, ""),
    )


def _errors(run: Run) -> str:
    """Aggregation error by round."""
    rounds = [float(r["round"]) for r in run.rounds]
    lines = []
    for key, label, style in (("relative_error", "aggregate", "c0"), ("release_error", "release", "c1 d1")):
        values = [r.get(key) for r in run.rounds]
        if any(map(usable, values)):
            tips = [f"round {n:.0f}: {label} {_num(v)}" for n, v in zip(rounds, values)]
            lines.append(Series(label, rounds, values, style, tips))
    chart = (
        charts.line_chart(
            lines, Axis("round", whole=True), Axis("relative error", log=True), "Aggregation error by round"
        )
        if lines
        else ""
    )
    meaning = (
        "Distance of the stored aggregate from the exact weighted mean of the clients' changes, relative to its size, "
        "the largest over layers. About 10⁻⁷ is the rounding of 32-bit numbers; more was cut by the rank cap or averaged "
        "inexactly. The release error is what a client's own rank left out of what it received."
    )
    return _section("Aggregation error", meaning if lines else "No aggregation error was recorded.", chart, "figure")


@dataclass(frozen=True)
class _Module:
    """A module of the final adapter: its place, and the singular values of its change of the weights."""

    name: str
    layer: int | None
    kind: str
    values: tuple[float, ...]
    rank: float | None
    error: float | None

    @property
    def norm(self) -> float:
        return math.hypot(*self.values)


def _modules(run: Run) -> list[_Module]:
    """Modules with layer and kind read from their names (`model.layers.3.mlp.up_proj` is 3, `mlp.up_proj`)."""
    found = []
    for name, record in run.layers.items():
        parts = re.split(r"(?:^|\.)(\d{1,6})\.", name, maxsplit=1)
        layer, kind = (int(parts[1]), parts[2]) if len(parts) == 3 else (None, name)
        values = tuple(sorted((abs(v) for v in (record or {}).get("singular_values") or [] if usable(v)), reverse=True))
        found.append(
            _Module(
                name,
                layer,
                re.sub(r"\b\d+\b", "*", kind),
                values,
                (record or {}).get("rank"),
                (record or {}).get("relative_error"),
            )
        )
    last = Counter(kind.rsplit(".", 1)[-1] for kind in {m.kind for m in found})
    short = {kind: kind.rsplit(".", 1)[-1] for kind in {m.kind for m in found} if last[kind.rsplit(".", 1)[-1]] == 1}
    return [_Module(m.name, m.layer, short.get(m.kind, m.kind), m.values, m.rank, m.error) for m in found]


def _heat(modules: Sequence[_Module]) -> str:
    """Size of the adapter by layer and kind of module."""
    layers = sorted({m.layer for m in modules if m.layer is not None})
    kinds = list(dict.fromkeys(m.kind for m in modules if m.layer is not None))
    if not layers:
        return ""
    cells: dict[tuple[str, int], list[_Module]] = {}
    for m in modules:
        if m.layer is not None:
            cells.setdefault((m.kind, m.layer), []).append(m)
    norms = {key: math.hypot(*(m.norm for m in held)) for key, held in cells.items()}
    most, rows, every = max(norms.values()), [], math.ceil(len(layers) / 10)
    for kind in kinds:
        tips = [
            "; ".join(
                f"{m.name}: norm {_num(m.norm)}, rank {_num(m.rank, 0)}, relative error {_num(m.error)}"
                for m in cells.get((kind, layer), [])
            )
            or f"{kind}, layer {layer}: not adapted"
            for layer in layers
        ]
        rows.append([escape(kind), charts.heat_row([norms.get((kind, layer)) for layer in layers], tips, 0.0, most)])
    ticks = [((i + 0.5) / len(layers) * 100, str(layer)) for i, layer in enumerate(layers) if i % every == 0]
    rows.append(['<span class="muted">layer</span>', charts.tick_row(ticks, "layer")])
    keys = "".join(f'<i class="q q{step}"></i>' for step in range(charts.STEPS))
    outside = [m for m in modules if m.layer is None]
    more = (
        f" Outside the layers: {', '.join(f'{escape(m.name)} {_num(m.norm)}' for m in outside[:8])}." if outside else ""
    )
    return _section(
        "Where the adapter changed the model",
        f"Size of the final change of the weights (Frobenius norm) by layer and module: 0 {keys} {_num(most)}.{more}",
        _table([("t", ""), ("w", "")], rows, "heat"),
        "figure",
    )


def _spectra(modules: Sequence[_Module]) -> str:
    """Singular values by kind of module, one line a layer, as small multiples."""
    kept = [m for m in modules if m.values and m.values[0] > 0]
    if not kept:
        return ""
    top = max(m.values[0] for m in kept)
    floor = max(min(v for m in kept for v in m.values if v > 0), top * 1e-6)
    deepest = max((m.layer or 0 for m in kept), default=0) or 1
    longest = float(max(len(m.values) for m in kept))
    kinds = list(dict.fromkeys(m.kind for m in kept))
    panels = []
    for kind in kinds[:12]:
        lines = [
            Series(
                "",
                list(range(1, len(m.values) + 1)),
                [v if v >= floor else None for v in m.values],
                f"q{2 + round((m.layer or 0) / deepest * (charts.STEPS - 3))}",
                tip=f"{m.name}: largest {_num(m.values[0])}, {_directions(m)}",
            )
            for m in kept
            if m.kind == kind
        ]
        chart = charts.line_chart(
            lines,
            Axis("direction", whole=True, bounds=(1.0, longest)),
            Axis("singular value", log=True, bounds=(floor, top)),
            f"Singular values of {kind}",
            size=(250, 190),
        )
        panels.append(f"<figure><h3>{escape(kind)}</h3>{chart}</figure>")
    more = f" {len(kinds) - 12} more kinds of module are not drawn." if len(kinds) > 12 else ""
    keys = "".join(f'<i class="q q{step}"></i>' for step in range(2, charts.STEPS))
    return _section(
        "Singular values by layer",
        "Strength of each direction in which the final adapter changes a weight matrix, "
        f"one line a layer from the first to the last {keys}. A line that falls early needs less rank than it "
        f"has; one that is still flat at its end would use more.{more}",
        f'<div class="panels">{"".join(panels)}</div>',
    )


def _directions(module: _Module) -> str:
    """How many directions hold 99 % of the squared norm."""
    share = np.cumsum(np.square(module.values)) / module.norm**2
    return f"{int(np.searchsorted(share, 0.99)) + 1} of {len(module.values)} directions hold 99 % of it"


def _talks(run: Run) -> str:
    """Generations before and after training."""
    blocks, names = [], {c.ident: str(c) for c in run.clients()}
    for talk in run.generations:
        parts = [
            (
                "prompt",
                f"Prompt of {escape(names.get(str(talk.get('client')), talk.get('client')) or 'an unnamed client')}",
            ),
            ("reference", "Reference"),
            ("before", "Base model"),
            ("after", "After the run"),
        ]
        said = [
            f'<div><h3>{title}</h3><pre dir="auto">{escape("–" if talk.get(key) is None else talk[key])}</pre></div>'
            for key, title in parts
            if key != "reference" or talk.get(key) is not None
        ]
        asked, answered = "".join(said[:-2]), "".join(said[-2:])
        blocks.append(f'<div class="talk"><div class="pair">{asked}</div><div class="pair">{answered}</div></div>')
    shown, rest = "".join(blocks[:6]), "".join(blocks[6:])
    more = f"<details><summary>{_count(len(blocks) - 6, 'more prompt')}</summary>{rest}</details>" if rest else ""
    return (
        _section("What it writes", "The same prompts to the base model and to the model after the run.", shown + more)
        if blocks
        else ""
    )


def _rejections(run: Run) -> str:
    """Updates that admission refused, by reason."""
    counts: Counter[str] = Counter()
    who: dict[str, dict[str, None]] = {}
    when: dict[str, dict[str, None]] = {}
    for record in run.rounds:
        refused = record.get("rejections") or []
        for item in [{}] * refused if isinstance(refused, int) else refused:
            reason = str((item or {}).get("reason") or "not recorded")
            counts[reason] += 1
            who.setdefault(reason, {})[str((item or {}).get("client_id", "–"))] = None
            when.setdefault(reason, {})[str(record["round"])] = None
    if not counts:
        return ""
    rows = [
        [
            escape(reason),
            f"{count:,}",
            *(
                escape(", ".join(list(names)[:12]) + (", …" if len(names) > 12 else ""))
                for names in (who[reason], when[reason])
            ),
        ]
        for reason, count in counts.most_common()
    ]
    return _section(
        "Rejected updates",
        "Updates that admission refused; the run went on without them.",
        _table([("t", "reason"), ("n", "updates"), ("t", "clients"), ("t", "rounds")], rows),
    )


def _details(run: Run) -> str:
    """All rounds as numbers, the resolved configuration, and where the run came from."""
    columns = [
        ("loss", "loss", _num),
        ("accuracy", "accuracy", _num),
        ("loss_worst", "worst", _num),
        ("train_loss", "training loss", _num),
        ("bytes_up", "up", _bytes),
        ("bytes_down", "down", _bytes),
        ("relative_error", "aggregate error", _num),
        ("release_error", "release error", _num),
        ("seconds", "time", _time),
        ("epsilon", "ε", _num),
    ]
    used = [column for column in columns if any(r.get(column[0]) is not None for r in run.rounds)]
    rows = [
        [str(r["round"]), str(len(r.get("clients") or [])), *(text(r.get(key)) for key, _, text in used)]
        for r in run.rounds
    ]
    table = _table([("n", "round"), ("n", "clients"), *(("n", name) for _, name, _ in used)], rows)
    facts = [
        ("run", run.get("run_id")),
        ("directory", run.name),
        ("strategy", run.get("strategy")),
        ("seed", run.get("seed")),
        ("model", run.config.get("model.source")),
        ("data", run.config.get("data.source")),
        ("losses measured on", run.get("eval.view")),
        ("adapter", run.get("adapter")),
        *((f"corpus {key}", value) for key, value in (run.get("corpus") or {}).items()),
        *((key, value) for key, value in (run.get("versions") or {}).items()),
        *((key.removeprefix("versions."), value) for key, value in run.config.items() if key.startswith("versions.")),
    ]
    source = _tiles([(escape(name), escape(value), "") for name, value in facts if value is not None], "facts")
    return (
        f"<section><h2>Details</h2><details><summary>All rounds as a table</summary>{table}</details>"
        f"<details><summary>Resolved configuration</summary><pre class=config>{escape(run.config_text)}</pre></details>"
        "</section>" + _section("Provenance", "What it takes to find or repeat this run.", source)
    )


def _run_page(run: Run) -> str:
    modules = _modules(run)
    where = " · ".join(
        escape(part)
        for part in (
            run.get("run_id"),
            run.config.get("model.source"),
            run.config.get("data.source"),
            f"seed {run.get('seed')}",
        )
        if part
    )
    title = ", ".join(
        (
            escape(run.get("strategy") or "run"),
            _count(len(run.rounds), "round"),
            _count(run.get("clients") or 0, "client"),
        )
    )
    grid = f'<section class="pair">{_errors(run)}{_heat(modules)}</section>'
    return (
        f'<header><div class="muted">Lamina run report</div><h1>{title}</h1><div class="muted">{where}</div>'
        f'<p class="lede">{_lede(run)}</p></header>{_headline(run)}{_losses(run)}{_clients(run)}{grid}{_spectra(modules)}'
        f"{_talks(run)}{_rejections(run)}{_details(run)}"
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """The shortest names that tell the runs apart."""
    strategies = [str(run.get("strategy") or "run") for run in runs]
    for names in (
        strategies,
        [f"{s}, seed {run.get('seed')}" for s, run in zip(strategies, runs)],
        [run.name for run in runs],
        [f"{run.name}, {run.get('run_id')}" for run in runs],
    ):
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({number})" for number, run in enumerate(runs, start=1)]


def _styles(runs: Sequence[Run]) -> list[str]:
    """A colour a strategy and a dash a repetition; a colour a run where that would not tell them apart."""
    strategies = [run.get("strategy") for run in runs]
    counts, seen = Counter(strategies), Counter[Any]()
    grouped = 1 < len(counts) <= charts.COLOURS and 1 < min(counts.values()) <= max(counts.values()) <= charts.DASHES
    order, styles = list(counts), []
    for number, strategy in enumerate(strategies):
        colour, dash = (order.index(strategy), seen[strategy]) if grouped else (number, number // charts.COLOURS)
        styles.append(f"c{colour % charts.COLOURS} d{dash % charts.DASHES}")
        seen[strategy] += 1
    return styles


def _key(name: str, style: str) -> str:
    return f'<span class="run"><i class="{style}"></i><span>{escape(name)}</span></span>'


def _figures_table(runs: Sequence[Run], names: Sequence[str], styles: Sequence[str]) -> str:
    """One line a run."""
    most = {way: max((run.get(f"communication.bytes_{way}") or 0 for run in runs), default=0) for way in ("up", "down")}
    private = any(run.get("privacy") for run in runs)
    rows = []
    for run, name, style in zip(runs, names, styles):
        worst = max((c.after for c in run.clients() if usable(c.after)), default=None)
        base, final = run.get("eval.base_loss"), run.get("eval.final_loss")
        sent = []
        for way, longest in most.items():
            value = run.get(f"communication.bytes_{way}")
            sent.append(_bytes(value) + charts.bar(value, longest, style, f"{name}: {_bytes(value)} {way}"))
        rows.append(
            [
                _key(name, style),
                escape(run.get("strategy") or "–"),
                escape(run.get("seed")),
                _num(final),
                _change(base, final),
                _num(worst),
                *sent,
                _num(run.get("aggregation.relative_error")),
                *([_num(run.get("privacy.epsilon"), 2)] if private else []),
                _time(run.get("seconds.total")),
            ]
        )
    heads = [
        ("t", "run"),
        ("t", "strategy"),
        ("n", "seed"),
        ("n", "final loss"),
        ("n", "change"),
        ("n", "worst client"),
        ("b", "sent up"),
        ("b", "sent down"),
        ("n", "relative error"),
        *([("n", "ε")] if private else []),
        ("n", "time"),
    ]
    return _table(heads, rows)


def _overlays(runs: Sequence[Run], names: Sequence[str], styles: Sequence[str]) -> str:
    """Loss by round and by bytes, all runs over each other."""
    held = [(run, name, style, _history(run)) for run, name, style in zip(runs, names, styles)]
    held = [item for item in held if any(usable(loss) for loss in item[3][2])]
    if not held:
        return _section("Loss by round", "None of the runs recorded a held-out loss by round.", "")
    tips = {id(run): [f"{name}, {tip}" for tip in _tips(run)] for run, name, _, _ in held}
    most = max(max(moved, default=0.0) for _, _, _, (_, moved, _) in held)
    divisor, unit = _unit(most)
    by_round = [Series(name, rounds, loss, style, tips[id(run)]) for run, name, style, (rounds, _, loss) in held]
    by_bytes = [
        Series(name, [m / divisor for m in moved], loss, style, tips[id(run)])
        for run, name, style, (_, moved, loss) in held
    ]
    first = charts.line_chart(by_round, Axis("round", whole=True), _loss_axis(), "Held-out loss by round, all runs")
    second = charts.line_chart(
        by_bytes,
        Axis(f"sent so far, up and down ({unit})", bounds=(0.0, most / divisor)),
        _loss_axis(),
        "Held-out loss by bytes sent, all runs",
    )
    return (
        '<section class="pair">'
        + _section("Loss by round", "Mean held-out loss after each round; lower is better.", first, "figure")
        + _section(
            "Loss by bytes sent",
            "The same loss against everything sent so far; further left is cheaper.",
            second,
            "figure",
        )
        + "</section>"
    )


def _clients_by_run(runs: Sequence[Run], names: Sequence[str], styles: Sequence[str]) -> str:
    """Final loss of every client under every run, the hardest client first."""
    finals = [{c.ident: c.after for c in run.clients() if usable(c.after)} for run in runs]
    labels = {c.ident: _label(c) for run in reversed(runs) for c in run.clients()}
    losses = {key: [final.get(key) for final in finals] for key in labels if any(key in final for final in finals)}
    if not losses:
        return _section("Clients", "No final losses of single clients were recorded.", "")
    mean = {key: float(np.mean([v for v in values if v is not None])) for key, values in losses.items()}
    scale = charts.fit([v for values in losses.values() for v in values], Axis(""), 3, 97)
    ticks = charts.tick_row([(scale.at(v), text) for v, text in scale.ticks(4)], "final held-out loss, nats per token")
    numbers = len(runs) <= _RUNS
    heads = [("t", "client"), ("g", ticks), *((("o", _key(n, s)) for n, s in zip(names, styles)) if numbers else ())]
    rows = []
    for key in sorted(losses, key=lambda k: -mean[k]):
        tip = "; ".join(f"{name} {_num(value)}" for name, value in zip(names, losses[key]))
        row = charts.dot_row(list(zip(losses[key], styles)), scale, tip)
        rows.append([labels[key], row, *(map(_num, losses[key]) if numbers else ())])
    return _section(
        "Final loss of each client",
        "Held-out loss at the end of each run (nats/token), the hardest client first; "
        "one dot a run, in the colours of the lines above; hover over a row for numbers.",
        _table(heads, rows, ""),
    )


def _config_table(runs: Sequence[Run], names: Sequence[str], styles: Sequence[str]) -> str:
    keys = sorted({key for run in runs for key in run.config if key != "output"})
    rows = [
        [f"<code>{escape(key)}</code>", *(f"<code>{escape(run.config.get(key, '–'))}</code>" for run in runs)]
        for key in keys
        if len({run.config.get(key) for run in runs}) > 1
    ]
    heads = [("k", "key"), *(("t", _key(name, style)) for name, style in zip(names, styles))]
    return _section(
        "Configuration",
        "The settings in which the runs differ, apart from the output directory."
        if rows
        else "The runs have the same settings, apart from the output directory.",
        _table(heads, rows) if rows else "",
    )


def _comparison(runs: Sequence[Run]) -> str:
    names, styles = _names(runs), _styles(runs)
    finals = [
        (run.get("eval.final_loss"), name) for run, name in zip(runs, names) if usable(run.get("eval.final_loss"))
    ]
    lede = "No run recorded a final loss."
    if finals:
        (best, name), (last, worst) = min(finals), max(finals)
        lede = (
            f"The lowest final loss is {_num(best)} nats per token, by {escape(name)}; the highest is {_num(last)}, "
            f"by {escape(worst)}."
        )
    table = _section(
        "Figures",
        "One line a run. Losses in nats per token; the change is from the base model; the worst client "
        "is the one with the highest final loss; the relative error is the largest distance of a stored aggregate "
        "from the exact weighted mean.",
        _figures_table(runs, names, styles),
    )
    return (
        f'<header><div class="muted">Lamina comparison</div><h1>{_count(len(runs), "run")} compared</h1>'
        f'<p class="lede">{lede}</p></header>{table}{_overlays(runs, names, styles)}'
        f"{_clients_by_run(runs, names, styles)}{_config_table(runs, names, styles)}"
    )


def render(runs: Sequence[Run]) -> str:
    """The page about one run, or the comparison of several.

    Args:
        runs: At least one run, from `load_run`.

    Returns:
        A whole HTML document that refers to nothing outside itself.

    Raises:
        ConfigError: If there is no run.
    """
    if not runs:
        raise ConfigError("report: expected at least one run directory, got none. Name one: lamina report RUN_DIR.")
    body = _run_page(runs[0]) if len(runs) == 1 else _comparison(runs)
    title = (
        f"Lamina: {escape(runs[0].get('run_id') or runs[0].name)}" if len(runs) == 1 else f"Lamina: {len(runs)} runs"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{charts.STYLE}{_STYLE}</style>'
        f"</head><body><main>\n{body}\n</main></body></html>\n"
    )


def write_report(run_dirs: Sequence[Path], output: Path) -> None:
    """Write the page so that a reader never sees half of it.

    Args:
        run_dirs: Run directories, one for a run page, several for a comparison.
        output: File to write; its directory is made where missing.

    Raises:
        ConfigError: If a run cannot be read, or the file cannot be written.
    """
    page = render([load_run(Path(run_dir)) for run_dir in run_dirs])
    try:
        write_atomic(Path(output), page)
    except OSError as error:
        got = type(error).__name__
        raise ConfigError(f"{output}: expected a file that can be written, got {got}. Give another path.") from error
