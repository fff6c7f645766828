"""What a client asks for when it registers is weighed before anything is remembered, and its words reach no log as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import deployment
from tests.hostile import Hostile

UP = "block.up_proj"
RANKS: list[Any] = [
    {"\ud800": 1}, {"\ud800": "x"}, {"a" * 100_000: 1}, {"a" * 100_000: "x"}, {"é\n\x1b[31mEVIL": "x"}, {UP: 2**80}, {UP: -1},
    {UP: 0}, {UP: 1.0}, {UP: True}, {UP: None}, {UP: {"a": 1}}, {UP: [1]}, {str(n): 1 for n in range(10_000)}, [1], "x", 3,
    {UP: float("nan")}, {UP: 3},
]  # fmt: skip


@pytest.mark.parametrize("ask", [False, True])
def test_ranks_that_are_none_are_refused_in_a_line(
    tmp_path: Path, ask: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spec.json").write_text(deployment.spec().to_json())
    words = deployment.words(tmp_path / "spec.json", "insecure=true", "clients.deadline_s=60")
    with deployment.coordinator(tmp_path / "run", words) as running:
        west = Hostile("west", running.port, None, tmp_path / "west")
        said = [
            west.call("Register", west.raw("register", json.dumps(_asking(ask, ranks=ranks)).encode()))
            for ranks in RANKS
        ]
        said += [
            west.call("Register", west.statement("register", _asking(ask, format=number_format)))
            for number_format in ("evil", 5, None, ["nf4"], {"nf4": 1}, "nf4" * 10**5)
        ]
        assert west.register()["rank"] == 2
        west.close()
    for one in said:
        code, _, text = one.partition(": ")
        assert code in ("INVALID_ARGUMENT", "FAILED_PRECONDITION"), one[:300]
        assert text.isprintable()
        assert len(text) <= 2100
    records = [json.loads(line) for line in (running.path / "events.jsonl").read_text().splitlines()]
    assert [one["fields"]["ranks"] for one in records if one["kind"] == "register"] == [None]
    assert not [one for one in running.events if one["event"] == "fault"]
    assert "Traceback" not in capfd.readouterr().err


def test_who_asks_without_end_is_told_to_wait(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(deployment.spec().to_json())
    words = deployment.words(tmp_path / "spec.json", "insecure=true", "clients.deadline_s=60")
    with deployment.coordinator(tmp_path / "run", words) as running:
        west, south = (Hostile(name, running.port, None, tmp_path / name) for name in ("west", "south"))
        said = [west.call("Register", west.statement("register", _asking(True))) for _ in range(80)]
        assert said[0] == "OK"
        assert said[-1].startswith("RESOURCE_EXHAUSTED: client west: asked for the terms too often")
        assert south.call("Register", south.statement("register", _asking(True))) == "OK"
        assert west.register()["rank"] == 2  # which is another matter
        west.close()
        south.close()


def _asking(ask: bool, **more: Any) -> dict[str, Any]:
    return (
        {"kind": "register", "versions": [1], "rank": None, "held": -1, "run_id": ""}
        | ({"ask": True} if ask else {})
        | more
    )
