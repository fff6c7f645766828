"""Checkpoints: all that was saved comes back, any damage is named, older rounds stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamina.protos.adapter import Adapter, LoraFactors
from lamina.protos.errors import CheckpointError, ConfigError
from lamina.server.store import checkpoint, run_directory
from lamina.server.store.checkpoint import Checkpoint
from lamina.strategies.base import LayerReport, ServerState
from tests.runs import same_bits

IDENTITY = {"base weights hash": "abc", "seed": 0, "clients.ranks": [4, 2]}


def made_adapter(seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    factors = LoraFactors(rng.normal(size=(2, 5)).astype(np.float32), rng.normal(size=(3, 2)).astype(np.float32), 1.5)
    return Adapter({"layer.q_proj": factors}, {"head.weight": rng.normal(size=(2, 3)).astype(np.float32)})


def made(round_number: int) -> Checkpoint:
    state = ServerState(
        round_number,
        made_adapter(round_number),
        {"increment": made_adapter(100 + round_number)},
        ({"noise_multiplier": 1.0},),
        {"layer.q_proj": LayerReport(1e-8, 0.5, 2.0, (1.5, 0.25))},
    )
    return Checkpoint(
        state, {"round": round_number, "loss": 1.0}, IDENTITY, {"0": round_number - 1}, {"x.bin": b"\x00\xff"}
    )


def saved(path: Path, rounds: int, keep: int = 2) -> Path:
    for number in range(1, rounds + 1):
        checkpoint.save(path, made(number), keep)
    return path


def test_everything_comes_back(tmp_path: Path) -> None:
    last = checkpoint.load_last(saved(tmp_path, 3))
    wanted = made(3)
    assert last is not None
    assert same_bits(last.state.adapter, wanted.state.adapter)
    assert same_bits(last.state.optimizer["increment"], wanted.state.optimizer["increment"])
    assert last.state.report == wanted.state.report
    assert last.state.privacy_history == wanted.state.privacy_history
    assert (last.state.round, last.record, last.identity, last.held, last.extra) == (
        3,
        wanted.record,
        wanted.identity,
        wanted.held,
        wanted.extra,
    )


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    saved(tmp_path, 4, keep)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"round-{number:04d}" for number in range(max(1, 5 - keep), 5)]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_last(tmp_path) is None


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def damaged(path: Path) -> None:
    """Loading must fail, name the folder and the older round, and change nothing."""
    before = snapshot(path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_last(path)
    assert "round-0002" in str(caught.value)
    assert "go on from round 1" in str(caught.value)
    assert caught.value.exit_code == 2
    assert snapshot(path) == before


FILES = ("state.json", "global.safetensors", "optimizer-increment.safetensors", "x.bin")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.0, 0.01, 0.2, 0.4, 0.6, 0.8, 0.97, 1.0])
@pytest.mark.parametrize("mask", [0x01, 0x80])
def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, name: str, part: float, mask: int) -> None:
    file = checkpoint.folder(saved(tmp_path, 2), 2) / name
    content = bytearray(file.read_bytes())
    content[min(int(part * len(content)), len(content) - 1)] ^= mask
    file.write_bytes(bytes(content))
    damaged(tmp_path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_found(tmp_path: Path, name: str, kept: float) -> None:
    file = checkpoint.folder(saved(tmp_path, 2), 2) / name
    content = file.read_bytes()
    file.write_bytes(content[: min(int(len(content) * kept), len(content) - 1)])
    damaged(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(tmp_path: Path, name: str) -> None:
    (checkpoint.folder(saved(tmp_path, 2), 2) / name).unlink()
    damaged(tmp_path)


def test_the_older_round_loads_when_the_corrupt_one_is_removed(tmp_path: Path) -> None:
    newest = checkpoint.folder(saved(tmp_path, 2), 2)
    (newest / "global.safetensors").write_bytes(b"")
    damaged(tmp_path)
    shutil.rmtree(newest)
    last = checkpoint.load_last(tmp_path)
    assert last is not None
    assert same_bits(last.state.adapter, made(1).state.adapter)


def test_another_schema_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SCHEMA", 9)
    saved(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="schema 9"):
        checkpoint.load_last(tmp_path)


def test_what_a_crash_left_unfinished_is_passed_over(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    unfinished = tmp_path / "checkpoints" / ".round-0002.partial"
    unfinished.mkdir()
    (unfinished / "state.json").write_text("{")
    last = checkpoint.load_last(tmp_path)
    assert last is not None
    assert last.state.round == 1
    saved(tmp_path, 2)
    assert not unfinished.exists()


# The run directory ----------------------------------------------------------------------------------------------------


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]


def running(path: Path, rounds: int, lines: list[str]) -> Path:
    saved(path, rounds)
    (path / "rounds.jsonl").write_text("".join(lines))
    return path


def line(number: int) -> str:
    return json.dumps({"round": number, "loss": 1.0}) + "\n"


@pytest.mark.parametrize(
    "lines",
    [
        [line(1), line(2)],
        [line(1)],
        [line(1), line(2)[:7]],
        [line(1), line(2), line(3)],
        [line(1), line(2), line(3)[:4]],
    ],
)
def test_the_records_are_brought_to_agree_with_the_checkpoint(tmp_path: Path, lines: list[str]) -> None:
    last = run_directory.resume(running(tmp_path, 2, lines), IDENTITY)
    assert last is not None
    # A round whose line was not written is announced again: its held-out figures are taken anew.
    announced = len(lines) > 1 and lines[1] == line(2)
    assert last.completed.announced == announced
    assert [record["round"] for record in records(tmp_path)] == ([1, 2] if announced else [1])


def test_a_missing_or_malformed_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="some are missing"):
        run_directory.resume(running(tmp_path / "a", 2, [line(2)]), IDENTITY)
    with pytest.raises(CheckpointError, match="line 1"):
        run_directory.resume(running(tmp_path / "b", 2, ["{\n", line(2)]), IDENTITY)


@pytest.mark.parametrize(("key", "value"), [("base weights hash", "xyz"), ("seed", 1), ("clients.ranks", [4, 4])])
def test_another_identity_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    running(tmp_path, 2, [line(1), line(2)])
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        run_directory.resume(tmp_path, IDENTITY | {key: value})
    assert snapshot(tmp_path) == before


def test_a_directory_with_a_run_in_it_is_not_overwritten(tmp_path: Path) -> None:
    run_directory.create(tmp_path / "run", "rounds: 1\n")
    with pytest.raises(ConfigError, match="resume="):
        run_directory.create(tmp_path / "run", "rounds: 2\n")
    assert (tmp_path / "run" / "config.yaml").read_text() == "rounds: 1\n"


def test_a_place_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError):
        run_directory.create(tmp_path / "file", "")
    with pytest.raises(ConfigError):
        run_directory.create(tmp_path / "file" / "below", "")
