"""Secure sums with a model: a simulation trains as in the clear, loses clients amid a sum, and is gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lamina.protos.adapter import product
from lamina.protos.errors import TrainingError
from lamina.server.store import run_directory
from lamina.simulations.run import simulate
from tests.runs import Quiet, small

WORDS = ("partition=iid", "clients.count=5", "clients.ranks=[4,2,1,3,4]")


@pytest.mark.parametrize("strategy", ["ffa", "alternate", "core"])
def test_training_is_that_of_a_run_in_the_clear(llama: Path, notes: Path, tmp_path: Path, strategy: str) -> None:
    found = {}
    for name in ("false", "true"):
        words = (*WORDS, f"strategy={strategy}", f"privacy.secagg={name}", f"output={tmp_path / name}")
        found[name] = simulate(small(llama, notes, *words), Quiet()).summary
    assert found["true"]["eval"]["final_loss"] == pytest.approx(found["false"]["eval"]["final_loss"], abs=1e-4)
    assert found["true"]["aggregation"]["relative_error"] < 1e-6
    # Four bytes a number at the global ranks, and a weight, from each of five clients.
    first, second = (record["bytes_up"] for record in run_directory.read_records(tmp_path / "true"))
    assert (first % (5 * 4), second % (5 * 4)) == (0, 0)
    assert found["true"]["communication"]["bytes_up"] == first + second


def test_clients_that_are_lost_and_a_run_that_goes_on(llama: Path, notes: Path, tmp_path: Path) -> None:
    more = ("strategy=alternate", "clients.dropout_rate=0.25", "seed=4", "train.schedule=constant")
    words = (*WORDS, "privacy.secagg=true", *more)
    whole = simulate(small(llama, notes, *words, "rounds=4", f"output={tmp_path / 'whole'}"), Quiet())
    simulate(small(llama, notes, *words, "rounds=2", f"output={tmp_path / 'parts'}"), Quiet())
    again = (*words, "rounds=4", f"resume={tmp_path / 'parts'}")
    parts = simulate(small(llama, notes, *again), Quiet())
    records = run_directory.read_records(tmp_path / "whole")
    assert min(len(record["clients"]) for record in records) < 5
    assert [r["clients"] for r in records] == [r["clients"] for r in run_directory.read_records(tmp_path / "parts")]
    assert whole.summary["eval"]["final_loss"] == pytest.approx(parts.summary["eval"]["final_loss"], abs=1e-6)
    text = json.dumps(records)
    assert "num_examples" not in text
    assert all(record["train_loss"] is None for record in records)


def test_a_change_beyond_the_range_ends_the_run_in_words(llama: Path, notes: Path, tmp_path: Path) -> None:
    words = (*WORDS, "strategy=ffa", "privacy.secagg=true", "privacy.secagg_range=1e-4", f"output={tmp_path / 'run'}")
    with pytest.raises(TrainingError, match="secagg_range"):
        simulate(small(llama, notes, *words), Quiet())


def test_the_exported_adapter_is_the_global_one(llama: Path, notes: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    from lamina.server.store import checkpoint

    words = (*WORDS, "strategy=ffa", "privacy.secagg=true", "aggregation.weights=uniform", f"output={tmp_path / 'run'}")
    simulate(small(llama, notes, *words), Quiet())
    last = checkpoint.load_last(tmp_path / "run")
    assert last is not None
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(last.state.adapter.lora)
    assert max(np.abs(product(factors)).max() for factors in last.state.adapter.lora.values()) > 1e-4
