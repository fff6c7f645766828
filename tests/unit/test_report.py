"""The report page: what it shows, what it refuses, and that nothing from a file becomes markup."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lamina.protos.errors import ConfigError
from lamina.server.report import load_run, render, write_report
from tests.pages import EVIL, TAGS, Page, refers_outside, svgs

Json = dict[str, Any]
CONFIG = "seed: 0\nstrategy: {name: recompress}\n"
WRONG = {"loss": "low", "per_client_loss": {"a": []}, "rejections": "many", "round": 1.5, "clients": 2, "seconds": True}


def a_round(number: int, **changed: Any) -> Json:
    losses = {"a": 3.0 - 0.25 * number, "b": 4.0 + 0.0625 * number}
    record: Json = {
        "round": number,
        "clients": ["a", "b"],
        "rejections": [],
        "accuracy": None,
        "epsilon": None,
    }
    record |= {"loss": 3.5 - 0.125 * number, "loss_worst": losses["b"], "loss_spread": 0.5, "per_client_loss": losses}
    record |= {"train_loss": 2.0, "bytes_up": 1_000_000, "bytes_down": 2_000_000, "seconds": 1.5}
    record |= {"relative_error": 3.2e-8, "release_error": 0.01}
    return record | changed


def a_summary(**changed: Any) -> Json:
    clients = {
        "a": {"name": "Oslo", "base_loss": 3.0, "final_loss": 2.5, "tokens": 12345},
        "b": {"name": "Bergen", "base_loss": 4.0, "final_loss": 4.125, "tokens": 678},
    }
    accuracy = {"base_accuracy": None, "final_accuracy": None}
    summary: Json = {
        "schema": 1,
        **{"run_id": "run-7", "strategy": "recompress", "rounds": 2, "clients": 2, "seed": 0},
        "eval": {"view": "exported", "base_loss": 3.5, "final_loss": 3.25, "per_client": clients} | accuracy,
        "communication": {"bytes_up": 2_000_000, "bytes_down": 4_560_000_000},
        "aggregation": {"seconds": 0.5, "relative_error": 3.2e-8, "release_error": 0.01},
        **{"privacy": None, "rejections": 0},
        "seconds": {"total": 200.0, "train": 3.0, "aggregate": 0.5, "evaluate": 1.0},
        "adapter": "adapter",
        "client_ranks": {"a": 8, "b": 16},
    }
    return summary | changed


def write_run(
    path: Path, summary: Json | None = None, rounds: list[Json] | None = None, config: str = CONFIG, **files: Any
) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(config)
    (path / "summary.json").write_text(json.dumps(summary or a_summary()))
    records = [a_round(1), a_round(2)] if rounds is None else rounds
    (path / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def page_of(*runs: Path) -> Page:
    return Page(render([load_run(run) for run in runs]))


def some_layers(modules: int) -> Json:
    kinds = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"]
    return {
        f"model.layers.{n // 4}.{kinds[n % 4]}": {"singular_values": [2.0, 1.0, 0.0], "rank": 3, "relative_error": 1e-8}
        for n in range(modules)
    }


def test_headline_shows_what_the_run_recorded(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "run")).text
    for shown in ("3.500 → 3.250", "−0.250", "4.125", "Bergen, from 4.000", "2.0 MB", "4.6 GB", "3 min 20 s", "2 × 2"):
        assert shown in text
    assert "3.2\u202f×\u202f10⁻⁸" in text
    assert f"perplexity {math.exp(3.5):.2f} → {math.exp(3.25):.2f}" in text
    assert "1 of 2 clients ended worse than the base model, Bergen the most (+0.125)" in text


def test_loss_chart_has_a_point_a_round_and_the_base_with_perplexity(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    assert f"round 2: 3.250 nats/token, perplexity {math.exp(3.25):.2f} ; 6.0 MB" in page.text.replace(";", " ;")
    assert "base model: 3.500 nats/token" in page.text
    assert "round 2, worst client (Bergen): 4.125 nats/token" in page.text
    assert "sent so far, up and down (MB)" in page.text


def test_baselines_are_labelled_lines(tmp_path: Path) -> None:
    baselines = {"base": {"loss": 3.5}, "local": {"loss": 3.375}, "central": {"loss": 2.75}}
    page = page_of(write_run(tmp_path / "run", a_summary(baselines=baselines)))
    for label in ("base model 3.500", "each site alone 3.375", "pooled data 2.750"):
        assert label in page.text
    assert "pooled data" not in page_of(write_run(tmp_path / "without")).text


def test_clients_are_sorted_by_improvement_with_rank_and_tokens(tmp_path: Path) -> None:
    page = render([load_run(write_run(tmp_path / "run"))])
    table = page[page.index("Clients, before and after") : page.index("Aggregation error</h2>")]
    assert table.index("Oslo") < table.index("Bergen")
    assert "12,345" in table
    assert "Bergen: 4.000 before, 4.125 after, +0.125 nats/token" in table
    oslo, bergen = table.split("<tr>")[2:]
    assert "c1" not in oslo
    assert "c1" in bergen  # the colour of a client that got worse


def test_accuracy_column_appears_only_where_recorded(tmp_path: Path) -> None:
    summary = a_summary()
    summary["eval"]["per_client"]["a"] |= {"base_accuracy": 0.5, "final_accuracy": 0.75}
    assert "0.500 → 0.750" in page_of(write_run(tmp_path / "run", summary)).text
    assert "accuracy" not in page_of(write_run(tmp_path / "without")).text


def test_privacy_shows_epsilon_and_says_why_losses_are_missing(tmp_path: Path) -> None:
    privacy = {"mode": "example-dp", "unit": "record", "epsilon": 1.25, "delta": 1e-5, "accountant": "prv"}
    nothing = {"base_loss": None, "final_loss": None}
    silent = {"view": "release", "base_accuracy": None, "final_accuracy": None, **nothing, "per_client": {"a": nothing}}
    rounds = [
        a_round(n, loss=None, loss_worst=None, loss_spread=None, per_client_loss={"a": None}, epsilon=0.5 * n)
        for n in (1, 2)
    ]
    text = page_of(write_run(tmp_path / "run", a_summary(privacy=privacy, eval=silent), rounds)).text
    assert "ε = 1.25" in text
    assert "example-dp, record, prv" in text
    assert "with privacy on, losses stay with the clients" in text
    assert "No held-out losses of single clients were recorded" in text


def test_privacy_is_shown_by_round_and_by_client_against_the_budget(tmp_path: Path) -> None:
    privacy = {"mode": "example-dp", "unit": "record", "epsilon": 3.0, "delta": 1e-5, "accountant": "pld"}
    privacy |= {"per_client": {"a": 3.0, "b": 1.5}, "epsilon_rdp": 3.4, "budget": 8.0}
    rounds = [a_round(n, epsilon=float(n)) for n in (1, 2, 3)]
    html = render([load_run(write_run(tmp_path / "run", a_summary(privacy=privacy), rounds))])
    text = Page(html).text
    assert "ε = 3.00 of 8.00" in text
    assert "Privacy by round" in text
    assert "budget 8.00" in text
    assert "round 2: ε 2.000 spent so far" in html
    assert "By RDP, a looser bound that is computed in another way, the largest is 3.400." in text
    assert all(left in text for left in ("5.000", "6.500"))
    central = privacy | {"mode": "client-dp", "unit": "client", "per_client": {}, "budget": None}
    text = page_of(write_run(tmp_path / "central", a_summary(privacy=central), rounds)).text
    assert "One mechanism covers all clients." in text
    assert "Privacy by" not in page_of(write_run(tmp_path / "none")).text


def test_rounds_without_evaluation_leave_no_gap_in_the_line(tmp_path: Path) -> None:
    bare: Json = {"loss": None, "loss_worst": None, "loss_spread": None, "per_client_loss": {}}
    rounds = [a_round(1, **bare), a_round(2), a_round(3, **bare)]
    page = render([load_run(write_run(tmp_path / "run", rounds=rounds))])
    assert "mean 3.250" in page  # the last recorded loss, not the last round's
    line = next(g for g in svgs(page)[0] if g.tag == "g" and "c0" in g.attrib["class"])
    assert line[0].attrib["d"].count("M") == 1
    assert len(line.findall("circle")) == 2  # base and round 2


@pytest.mark.parametrize("modules", [1, 28, 300])
def test_spectra_draw_every_module(tmp_path: Path, modules: int) -> None:
    page = render([load_run(write_run(tmp_path / "run", layers=some_layers(modules)))])
    drawn = [path for svg in svgs(page) for path in svg.iter("path") if "of it" in "".join(path.itertext())]
    assert len(drawn) == modules
    assert f"model.layers.{(modules - 1) // 4}." in page
    # squares 4 and 1: the first direction holds 80 %, so 99 % takes two of the three
    assert "2 of 3 directions hold 99 %" in page
    assert f"norm {math.sqrt(5):.3f}" in page


def test_modules_outside_layers_and_of_experts_are_named(tmp_path: Path) -> None:
    names = ["score", "h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.mlp.experts.3.up", "h.1.mlp.experts.4.up"]
    page = page_of(write_run(tmp_path / "run", layers={name: {"singular_values": [1.0]} for name in names}))
    for shown in ("Outside the layers: score 1.000", "attn.c_proj", "mlp.c_proj", "h.1.mlp.experts.4.up"):
        assert shown in page.text
    assert page.text.count(" mlp.experts") == 0  # the two experts share the row "up"


def test_generations_rejections_and_provenance(tmp_path: Path) -> None:
    said = [{"client": "a", "prompt": "Dear", "reference": "Madam", "before": "dear dear", "after": "Sir"}]
    refused = [{"client_id": "b", "reason": "non-finite"}]
    rounds = [a_round(1, rejections=refused), a_round(2, rejections=[{}] * 3)]
    summary = a_summary(corpus={"source": "stdlib", "hash": "9f2c"}, versions={"numpy": "2.4"})
    text = page_of(write_run(tmp_path / "run", summary, rounds, generations=said)).text
    for shown in ("Prompt of Oslo", "Madam", "dear dear", "Sir", "non-finite", "not recorded", "9f2c", "run-7", "2.4"):
        assert shown in text
    assert "strategy: {name: recompress}" in text  # the config as written


def test_optional_sections_are_left_out(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "run")).text
    for heading in ("Singular values", "Where the adapter", "What it writes", "Rejected updates"):
        assert heading not in text


def test_run_without_rounds_still_has_a_page(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "run", a_summary(rounds=0), rounds=[])).text
    assert "No held-out loss was recorded for any round." in text
    assert "No aggregation error was recorded." in text


def test_comparison_has_every_run_and_the_settings_that_differ(tmp_path: Path) -> None:
    first = write_run(tmp_path / "one", config="output: x\nseed: 0\nrounds: 2\ntrain: {learning_rate: 0.125}\n")
    other = a_summary(strategy="residual", communication={"bytes_up": 7_000_000, "bytes_down": 1})
    other["eval"] = other["eval"] | {"final_loss": 3.0}
    second = write_run(tmp_path / "two", other, config="output: y\nseed: 0\nrounds: 2\ntrain: {learning_rate: 0.5}\n")
    page = page_of(first, second)
    for shown in (
        "recompress",
        "residual",
        "3.250",
        "−0.250",
        "3.000",
        "−0.500",
        "7.0 MB",
        "train.learning_rate",
        "0.125",
    ):
        assert shown in page.text
    assert "lowest final loss is 3.000 nats per token, by residual" in page.text
    differing = page.text[page.text.index("The settings in which the runs differ") :]
    assert "seed" not in differing
    assert "output " not in differing.replace("output directory", "")
    assert "recompress 4.125; residual 4.125" in page.text  # Bergen under both runs


def test_runs_of_one_strategy_are_told_apart(tmp_path: Path) -> None:
    seeds = [write_run(tmp_path / f"r{n}", a_summary(seed=n)) for n in (1, 2)]
    assert "recompress, seed 2" in page_of(*seeds).text
    same = [write_run(tmp_path / f"s{n}") for n in (1, 2)]
    assert {"s1", "s2"} <= set(page_of(*same).words)


def test_twelve_runs_have_distinct_lines(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"r{n}", a_summary(seed=n)) for n in range(12)]
    chart = svgs(render([load_run(run) for run in runs]))
    lines = [g.attrib["class"].strip() for svg in chart for g in svg.iter("g")]
    assert len(set(lines)) == 12


@pytest.mark.parametrize("runs", [1, 2])
def test_page_loads_nothing_from_outside(tmp_path: Path, runs: int) -> None:
    link = "https://example.org/x"
    summary = a_summary(corpus={"source": link})
    paths = [write_run(tmp_path / f"{n}", summary, config=f"a: {link}\nn: {n}\n") for n in range(runs)]
    raw = render([load_run(path) for path in paths])
    assert not refers_outside(raw)
    assert "Content-Security-Policy" in raw


def test_text_from_files_never_becomes_markup(tmp_path: Path) -> None:
    clients = {EVIL: {"name": EVIL, "base_loss": 3.0, "final_loss": 3.5, "tokens": 1}}
    evaluated = a_summary()["eval"] | {"per_client": clients, "view": EVIL}
    summary = a_summary(
        **dict.fromkeys(["run_id", "strategy", "adapter"], EVIL),
        **{"corpus": {EVIL: EVIL}, "versions": {EVIL: EVIL}, "eval": evaluated},
        baselines={EVIL: {"loss": 3.0}},
        privacy={"mode": EVIL, "unit": EVIL, "epsilon": 1.0, "delta": 1e-5, "accountant": EVIL}
        | {"per_client": {EVIL: 1.0}, "budget": 8.0, "epsilon_rdp": 1.2},
    )
    refused = [{"client_id": EVIL, "reason": EVIL}]
    rounds = [a_round(1, clients=[EVIL], rejections=refused, per_client_loss={EVIL: 3.0})]
    said = [dict.fromkeys(("client", "prompt", "reference", "before", "after"), EVIL)]
    layers = {f"{EVIL}.0.{EVIL}": {"singular_values": [1.0]}, EVIL: {"singular_values": [1.0]}}
    config = "'</pre><script>': '</style><script>'\n"
    run = load_run(write_run(tmp_path / "run", summary, rounds, config, generations=said, layers=layers))
    other = load_run(write_run(tmp_path / "other", summary | {"seed": 1}, rounds))
    for raw in (render([run]), render([run, other])):
        assert "<script" not in raw
        assert set(Page(raw).tags) <= set(TAGS.split())
        assert "alert('x')" in Page(raw).text
        raw.encode()  # the lone surrogate is gone
        assert "\x00" not in raw
        assert len(svgs(raw)) > 2


@pytest.mark.parametrize("name", ["config.yaml", "rounds.jsonl", "summary.json"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name}: expected .* got no such file"):
        load_run(run)


@pytest.mark.parametrize(
    "line",
    [
        "[2]",
        "{}",
        json.dumps(a_round(1)),
        *(json.dumps(a_round(2, **{key: bad})) for key, bad in WRONG.items()),
    ],
)
def test_malformed_round_names_file_and_line(tmp_path: Path, line: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "rounds.jsonl").write_text(json.dumps(a_round(1)) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=r"rounds\.jsonl, line 2: expected .* got"):
        load_run(run)


def test_torn_last_line_is_left_out_and_a_torn_line_before_it_refused(tmp_path: Path) -> None:
    run, whole, torn = write_run(tmp_path / "run"), json.dumps(a_round(1)), '{"round": 2, "loss"'
    (run / "rounds.jsonl").write_text(f"{whole}\n{torn}")
    assert load_run(run).rounds == [a_round(1)]
    (run / "rounds.jsonl").write_text(f"{whole}\n{torn}\n{json.dumps(a_round(3))}\n")
    with pytest.raises(ConfigError, match=r"rounds\.jsonl, line 2: expected"):
        load_run(run)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", json.dumps(a_summary(schema=2))),
        ("summary.json", json.dumps(a_summary(seconds={"total": "long"}))),
        ("config.yaml", "a: ["),
        ("config.yaml", "just words"),
        ("layers.json", '{"m": {"singular_values": 3}}'),
        ("generations.json", "{}"),
    ],
)
def test_malformed_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    run = write_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"{name}: expected .* got"):
        load_run(run)


def test_no_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one run"):
        render([])


def test_write_replaces_the_page_and_leaves_nothing_else(tmp_path: Path) -> None:
    run, output = write_run(tmp_path / "run"), tmp_path / "pages" / "report.html"
    write_report([run], output)
    output.write_text("old")
    write_report([run], output)
    assert output.read_text(encoding="utf-8") == render([load_run(run)])
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    (run / "summary.json").unlink()
    with pytest.raises(ConfigError):
        write_report([run], output)
    assert "3.250" in output.read_text(encoding="utf-8")  # a failed report leaves the old page
    with pytest.raises(ConfigError, match="a file that can be written"):
        write_report([write_run(tmp_path / "second")], tmp_path / "pages")
