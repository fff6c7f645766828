"""A run that is interrupted after any round and resumed gives the bits of one that was not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lamina.protos.config import Config
from lamina.protos.errors import CheckpointError, ConfigError
from lamina.server.store.base import Completed
from lamina.simulations.prepare import Prepared, prepare
from lamina.simulations.run import simulate
from tests import models, texts
from tests.runs import Quiet, small

# `bytes_up` counts the digits of the seconds that clients report, so it may differ by a few bytes.
TIMES = ("seconds", "seconds_collect", "seconds_aggregate", "seconds_evaluate", "seconds_train", "bytes_up")


class Killed(Exception):
    """The process is gone."""


def interrupted(config: Config, prepared: Prepared, after: int) -> None:
    def stop(completed: Completed) -> None:
        if completed.state.round == after:
            raise Killed

    with pytest.raises(Killed):
        simulate(config, Quiet(after=stop), prepared)


def records(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def adapter_files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "adapter").iterdir() if file.name != "README.md"}


RUNS = {
    "stack in int8": ["strategy=stack", "wire.format=int8", "clients.fraction=0.7", "clients.join_round=[1,1,2]"],
    "recompress": ["strategy=recompress", "clients.dropout_rate=0.2", "seed=3", "wire.format=bf16"],
    "zeropad with kept moments": ["strategy=zeropad", "train.keep_optimizer=true", "train.proximal=0.1"],
    "residual in int8": ["strategy=residual", "wire.format=int8"],
    "ffa with kept moments": ["strategy=ffa", "train.keep_optimizer=true", "clients.fraction=0.7", "wire.format=bf16"],
    "client-dp over sampled clients": [
        "strategy=alternate", "privacy=client-dp", "privacy.epsilon=8", "privacy.force=true", "clients.fraction=0.4",
    ],
    "core with kept moments": [
        "strategy=core", "train.keep_optimizer=true", "clients.join_round=[1,1,2]", "wire.format=int8",
    ],
    "norms": ["adapter.kind=norm", "train.keep_optimizer=true", "clients.fraction=0.7", "wire.format=fp16"],
    "example-dp with kept moments": [
        "strategy=ffa", "privacy=example-dp", "privacy.noise_multiplier=1", "privacy.delta=1e-3", "train.keep_optimizer=true",
    ],
    "alternate in int8": ["strategy=alternate", "wire.format=int8", "clients.join_round=[1,1,2]"],
}  # fmt: skip


@pytest.mark.parametrize("name", list(RUNS))
def test_resuming_after_any_round_gives_the_same_bits(llama: Path, notes: Path, tmp_path: Path, name: str) -> None:
    config = small(llama, notes, "rounds=3", f"output={tmp_path / 'whole'}", *RUNS[name])
    prepared = prepare(config)
    whole = simulate(config, Quiet(), prepared)
    for after in (1, 2):
        path = tmp_path / f"stopped-{after}"
        stopped = replace(config, output=str(path))
        interrupted(stopped, prepared, after)
        assert len(records(path)) == after
        assert not (path / "summary.json").exists()
        # A process of its own would load the base and the data again.
        resumed = simulate(replace(stopped, resume=str(path)), Quiet(), prepare(config) if after == 1 else prepared)
        assert adapter_files(path) == adapter_files(whole.path)
        assert records(path) == records(whole.path)
        assert resumed.summary["eval"] == whole.summary["eval"]
        assert resumed.summary["run_id"] == whole.summary["run_id"]


def test_stopping_twice_and_before_the_first_round(llama: Path, notes: Path, tmp_path: Path) -> None:
    config = small(llama, notes, "rounds=3", f"output={tmp_path / 'whole'}")
    prepared = prepare(config)
    simulate(config, Quiet(), prepared)
    path = tmp_path / "stopped"
    stopped = replace(config, output=str(path))
    interrupted(stopped, prepared, 1)
    again = replace(stopped, resume=str(path))
    interrupted(again, prepared, 2)
    simulate(again, Quiet(), prepared)
    assert adapter_files(path) == adapter_files(tmp_path / "whole")
    for file in (path / "checkpoints").iterdir():
        for part in file.iterdir():
            part.unlink()
        file.rmdir()
    simulate(again, Quiet(), prepared)
    assert adapter_files(path) == adapter_files(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(llama: Path, notes: Path, tmp_path: Path) -> None:
    config = small(llama, notes, f"output={tmp_path / 'run'}")
    prepared = prepare(config)
    done = simulate(config, Quiet(), prepared)
    before, lines = adapter_files(done.path), records(done.path)
    simulate(replace(config, resume=str(done.path)), Quiet(), prepared)
    assert (adapter_files(done.path), records(done.path)) == (before, lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1"], "seed"),
        (["train.learning_rate=0.5"], "train.learning_rate"),
        (["clients.ranks=[4,4,4]"], "clients.ranks"),
        (["strategy=stack"], "strategy.name"),
        (["rounds=5"], "rounds"),
        (["wire.format=int8"], "wire.format"),
    ],
)
def test_another_setting_is_refused_by_name(
    llama: Path, notes: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    config = small(llama, notes, f"output={tmp_path / 'run'}", "train.local_steps=1", "rounds=1")
    done = simulate(config, Quiet())
    before = {file: file.read_bytes() for file in done.path.rglob("*") if file.is_file()}
    changed = small(llama, notes, f"output={tmp_path / 'run'}", "train.local_steps=1", "rounds=1", *words)
    with pytest.raises(CheckpointError, match=said.replace(".", r"\.")):
        simulate(replace(changed, resume=str(done.path)), Quiet())
    assert {file: file.read_bytes() for file in done.path.rglob("*") if file.is_file()} == before


def test_more_rounds_can_be_added_under_a_constant_schedule(llama: Path, notes: Path, tmp_path: Path) -> None:
    words = ["train.schedule=constant", "train.local_steps=1"]
    whole = small(llama, notes, "rounds=3", f"output={tmp_path / 'whole'}", *words)
    prepared = prepare(whole)
    simulate(whole, Quiet(), prepared)
    first = small(llama, notes, "rounds=2", f"output={tmp_path / 'grown'}", *words)
    simulate(first, Quiet(), prepared)
    simulate(replace(first, rounds=3, resume=str(tmp_path / "grown")), Quiet(), prepared)
    assert adapter_files(tmp_path / "grown") == adapter_files(tmp_path / "whole")
    assert records(tmp_path / "grown") == records(tmp_path / "whole")


@pytest.mark.parametrize("mode", ["client-dp", "example-dp"])
def test_rounds_that_the_noise_was_calibrated_for_stay(llama: Path, notes: Path, tmp_path: Path, mode: str) -> None:
    """Two rounds had the noise of a budget of 8 for two; six more, with that for eight, would cost more than 8 in all."""
    words = [
        "train.schedule=constant", "train.local_steps=1", "strategy=ffa", f"privacy={mode}", "privacy.force=true",
        "privacy.delta=1e-3", "train.batch_size=2",
    ]  # fmt: skip
    first = small(llama, notes, "rounds=2", "privacy.epsilon=8", f"output={tmp_path / 'run'}", *words)
    simulate(first, Quiet())
    with pytest.raises(CheckpointError, match="expected rounds 2 as the run began with, got 8"):
        simulate(replace(first, rounds=8, resume=str(tmp_path / "run")), Quiet())
    by_hand = small(llama, notes, "rounds=1", "privacy.noise_multiplier=2", f"output={tmp_path / 'hand'}", *words)
    simulate(by_hand, Quiet())
    more = simulate(replace(by_hand, rounds=2, resume=str(tmp_path / "hand")), Quiet())
    assert more.summary["rounds"] == 2


def test_fewer_rounds_than_done_is_refused(llama: Path, notes: Path, tmp_path: Path) -> None:
    words = ["train.schedule=constant", "train.local_steps=1", f"output={tmp_path / 'run'}"]
    done = simulate(small(llama, notes, "rounds=2", *words), Quiet())
    with pytest.raises(ConfigError, match="at least 2"):
        simulate(replace(small(llama, notes, "rounds=1", *words), resume=str(done.path)), Quiet())


def test_other_weights_and_other_rows_are_refused(llama: Path, notes: Path, tmp_path: Path) -> None:
    base, rows = models.save_llama(tmp_path / "base"), texts.notes()
    data = texts.write_jsonl(tmp_path / "notes.jsonl", rows)
    words = [f"output={tmp_path / 'run'}", "train.local_steps=1", "rounds=1"]
    config = small(base, data, *words)
    done = simulate(config, Quiet())
    rows[3]["text"] += " more"
    texts.write_jsonl(data, rows)
    with pytest.raises(CheckpointError, match="corpus hash"):
        simulate(replace(config, resume=str(done.path)), Quiet())
    texts.write_jsonl(data, texts.notes())
    models.save_llama(base, seed=1)
    with pytest.raises(CheckpointError, match="base weights hash"):
        simulate(replace(config, resume=str(done.path)), Quiet())
    models.save_llama(base, seed=0)
    simulate(replace(config, resume=str(done.path)), Quiet())
