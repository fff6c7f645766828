"""`lamina log`: words, listings, files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamina.protos.errors import ConfigError
from lamina.server.commands.log import main
from tests.logs import Event, unsigned, written

EVENTS: list[Event] = [
    ("begin", {"run_id": "r", "certificate": ""}),
    ("register", {"client_id": "\x1b[31mnorth", "certificate": "-----BEGIN CERTIFICATE-----\nx"}),
    ("round", {"round": 1, "note": "n" * 300}),
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "events.jsonl").write_text("".join(written(EVENTS, unsigned)[0]))
    return tmp_path


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("log", ["--help"]) == main("log", ["verify", "-h"]) == 0
    told = capsys.readouterr().out
    assert "lamina log verify RUN_DIR" in told
    assert "examples:" in told


def test_words_that_cannot_be_used(run_dir: Path, tmp_path: Path) -> None:
    wrong = {
        (): "expected verify or show, got nothing",
        ("verfy", str(run_dir)): "Did you mean verify",
        ("verify",): "expected one run directory, got 0",
        ("show", "a", "b"): "expected one run directory, got 2",
        ("verify", str(run_dir), "cert=x"): "no such setting",
        ("show", str(run_dir), "ca=x"): "no such setting",
        ("verify", str(tmp_path / "absent")): "expected a run directory with events.jsonl",
        ("verify", str(run_dir), "ca=absent.pem"): "absent.pem: expected a file that can be read",
        ("verify", str(run_dir), "witness=absent"): "absent: expected a file that can be read",
        ("verify", str(run_dir), f"witness={run_dir}/events.jsonl"): "events.jsonl, line 1: expected a record's number",
    }
    for words, message in wrong.items():
        with pytest.raises(ConfigError) as caught:
            main("log", list(words))
        assert message in str(caught.value)
    (run_dir / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=r"summary\.json: expected a JSON object"):
        main("log", ["verify", str(run_dir)])


def test_an_unsigned_log(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("log", ["verify", str(run_dir), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["signed"], report["coordinator"], report["ca"]) == (False, None, None)
    assert (report["records"], report["rounds"], report["unwitnessed"]) == (3, [1], 3)


def test_a_listing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("log", ["show", str(run_dir)]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    lines = told.splitlines()
    assert lines[0] == '     0  2026-05-01T12:00:00.000Z  begin        {"certificate":"","run_id":"r"}'
    assert '{"certificate":"(PEM)","client_id":"\\u001b[31mnorth"}' in lines[1]
    assert lines[2].endswith("...")
    assert max(map(len, lines[:-1])) < 210
    assert "3 lines, not checked" in lines[3]
    assert main("log", ["show", str(run_dir), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(entry["line"], entry["n"], entry["kind"], entry["fields"]) for entry in listed] == [
        (number, number - 1, kind, fields) for number, (kind, fields) in enumerate(EVENTS, 1)
    ]


def test_a_listing_of_what_does_not_hold(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = written(EVENTS, unsigned)[0]
    odd = [
        lines[0],
        "junk\n",
        lines[2].replace('"round":1', '"round":2'),
        '{"n":5,"prev":"\x1b"}\n',
        '{"n":1}\n',
        lines[2][:9],
    ]
    (run_dir / "events.jsonl").write_text("".join(odd))
    assert main("log", ["show", str(run_dir)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(": expected")[0] for line in told[1:6]] == [
        "line 2: form",
        "line 3: hash",
        "line 4: form",
        "line 5: form",
        "line 6: newline",
    ]
    assert main("log", ["show", str(run_dir), "--json"]) == 0
    assert [entry.get("why") for entry in json.loads(capsys.readouterr().out)] == [
        None, "form", "hash", "form", "form", "newline",
    ]  # fmt: skip
