"""Everything that a user can get wrong: exit code 2, one clear sentence, no traceback, the last good state kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import models, texts
from tests.e2e.commands import failed, files, here, lamina, run_words

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def good(llama: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds that may be resumed with more."""
    from lamina.__main__ import main

    path = tmp_path_factory.mktemp("good") / "run"
    assert main(run_words(llama, notes, path, "train.schedule=constant", "train.local_steps=1")) == 0
    return path


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "run"))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.learning_rat=0.1", "train.learning_rate"),
        ("stratgy=stack", "strategy"),
        ("rounds=0", "rounds=0"),
        ("rounds=three", "rounds"),
        ("clients.ranks=[8,8]", "clients.count=2"),
        ("clients.ranks=0", "clients.ranks"),
        ("strategy=fedavgg", "Did you mean fedavg?"),
        ("strategy=fedavg", "one rank"),
        ("seed=0,1", "--multirun"),
        ("partition=natual", "natural"),
        ("train.learning_rate=-1", "train.learning_rate"),
        ("data.text_column=body", "no column 'body'"),
        ("partition.column=hospital", "hospital"),
        ("clients.count=9", "clients."),
        ("lora.target_modules=[query]", "It has: down_proj, gate_proj, k_proj"),
        ("data=nowhere.jsonl", "nowhere.jsonl"),
        ("model=./nowhere", "nowhere"),
        ("train.max_length=65", "at most 64"),
        ("privacy=example-dp", "privacy.mode"),
        ("output=/dev/null/run", "output"),
        ("--frobnicate", "no such option"),
        ("nonsense", "key=value"),
    ],
)
def test_a_wrong_word_is_named(llama: Path, notes: Path, tmp_path: Path, capsys: Capture, word: str, said: str) -> None:
    ended = here(capsys, *run_words(llama, notes, tmp_path / "run", word))
    message = failed(ended)
    assert said in message
    assert texts.SECRET not in message + ended.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", ["train.learning_rat=0.1", "lora.target_modules=[query]"])
def test_a_process_of_its_own_says_the_same(llama: Path, notes: Path, tmp_path: Path, word: str) -> None:
    failed(lamina(*run_words(llama, notes, tmp_path / "run", word)))


def test_an_empty_silo_is_named(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = [row | {"silo": "full"} for row in texts.notes()[:20]] + [texts.notes()[0] | {"silo": "bare"}]
    data = texts.write_jsonl(tmp_path / "rows.jsonl", rows)
    words = run_words(llama, data, tmp_path / "run", "clients.count=2", "clients.ranks=2")
    assert "silo 'bare'" in failed(here(capsys, *words))
    empty = texts.write_jsonl(tmp_path / "empty.jsonl", [])
    assert "empty.jsonl" in failed(here(capsys, *run_words(llama, empty, tmp_path / "run")))


@pytest.mark.parametrize("name", ["cut.jsonl", "cut.csv", "cut.parquet"])
def test_a_truncated_data_file_is_named(llama: Path, tmp_path: Path, capsys: Capture, name: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / name
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(texts.notes()), path)
    elif path.suffix == ".csv":
        texts.write_csv(path, texts.notes())
    else:
        texts.write_jsonl(path, texts.notes())
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b" ")])
    message = failed(here(capsys, *run_words(llama, path, tmp_path / "run")))
    assert name in message
    assert texts.SECRET not in message


def test_a_loss_that_is_not_finite_keeps_the_rounds_before(
    llama: Path, notes: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from lamina.client import losses, train

    path = tmp_path / "run"
    real = losses.losses
    calls = iter(range(10_000))

    def broken(*given: object) -> object:
        total, hits, count = real(*given)  # type: ignore[arg-type]
        # Three clients of one step a round: the eighth step is in round 3.
        return (total * torch.tensor(float("nan")) if next(calls) == 7 else total), hits, count

    monkeypatch.setattr(train, "losses", broken)
    words = run_words(llama, notes, path, "rounds=4", "train.local_steps=1")
    message = failed(here(capsys, *words))
    assert "client 1, round 3, step 1" in message
    assert len((path / "rounds.jsonl").read_text().splitlines()) == 2
    assert not (path / "summary.json").exists()
    monkeypatch.undo()
    assert here(capsys, "simulate", f"resume={path}").code == 0
    assert json.loads((path / "summary.json").read_text())["rounds"] == 4


def test_a_learning_rate_that_blows_up_is_no_traceback(
    llama: Path, notes: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["train.learning_rate=1e30", "train.max_grad_norm=0", "train.local_steps=4"]
    message = failed(here(capsys, *run_words(llama, notes, tmp_path / "run", *words)))
    assert "Lower train.learning_rate" in message


@pytest.mark.parametrize(
    ("name", "kept"),
    [("state.json", 0.5), ("global.safetensors", 0.9), ("global.safetensors", 1.0), ("clients.json", 0.0)],
)
def test_a_damaged_checkpoint_is_named_and_kept(copied: Path, capsys: Capture, name: str, kept: float) -> None:
    file = copied / "checkpoints" / "round-0002" / name
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))] if kept < 1 else content[:-1] + bytes([content[-1] ^ 1]))
    before = files(copied)
    message = failed(here(capsys, "simulate", f"resume={copied}", "rounds=3"))
    assert "round-0002" in message
    assert "go on from round 1" in message
    assert files(copied) == before
    # Doing as the message says goes on from the older round.
    shutil.rmtree(copied / "checkpoints" / "round-0002")
    assert here(capsys, "simulate", f"resume={copied}", "rounds=3").code == 0
    assert json.loads((copied / "summary.json").read_text())["rounds"] == 3


def test_another_base_than_the_checkpoints_is_refused(copied: Path, tmp_path: Path, capsys: Capture) -> None:
    before = files(copied)
    other = models.save_llama(tmp_path / "other", seed=5)
    assert "base" in failed(here(capsys, "simulate", f"resume={copied}", "rounds=3", f"model={other}"))
    assert files(copied) == before
    assert here(capsys, "simulate", f"resume={copied}", "rounds=3").code == 0


@pytest.mark.parametrize("word", ["seed=1", "strategy=stack", "train.batch_size=2"])
def test_other_settings_than_the_checkpoints_are_refused(copied: Path, capsys: Capture, word: str) -> None:
    before = files(copied)
    assert word.split("=")[0].split(".")[-1] in failed(here(capsys, "simulate", f"resume={copied}", "rounds=3", word))
    assert files(copied) == before


def test_a_directory_that_is_no_run_is_not_resumed(tmp_path: Path, capsys: Capture) -> None:
    assert "config.yaml" in failed(here(capsys, "simulate", f"resume={tmp_path}"))
    assert "resume" in failed(here(capsys, "simulate", f"resume={tmp_path / 'none'}"))
    failed(here(capsys, "report", str(tmp_path / "none")))
    failed(here(capsys, "report"))
    failed(here(capsys, "report", str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_written_over(llama: Path, notes: Path, good: Path, capsys: Capture) -> None:
    before = files(good)
    assert "resume=" in failed(here(capsys, *run_words(llama, notes, good)))
    assert files(good) == before


def test_a_missed_quorum_has_its_own_code(llama: Path, notes: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["clients.quorum=3", "clients.dropout_rate=0.9"]
    ended = here(capsys, *run_words(llama, notes, tmp_path / "run", *words))
    assert "quorum" in failed(ended, code=3)


def test_a_model_without_safetensors_is_refused(llama: Path, notes: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors" in failed(here(capsys, *run_words(folder, notes, tmp_path / "run")))


def test_a_yaml_file_with_a_wrong_key_is_named(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "run.yaml").write_text("train:\n  learning_rat: 1\n")
    assert "train.learning_rate" in failed(here(capsys, "simulate", "--config", str(tmp_path / "run.yaml")))
    failed(here(capsys, "simulate", "--config"))
    failed(here(capsys, "simulate", "--config", str(tmp_path / "none.yaml")))


def test_a_site_declares_its_own_public_number_and_nothing_else_of_privacy(tmp_path: Path, capsys: Capture) -> None:
    """Without that key no site could take part under example-dp at all; mode and noise are the coordinator's terms."""
    words = [
        "client",
        "insecure=true",
        "client.name=0",
        "client.coordinator=127.0.0.1:1",
        f"data={tmp_path / 'no.jsonl'}",
    ]
    assert "no.jsonl: expected a file" in failed(here(capsys, *words, "privacy.nominal_examples=60"))
    for other in ("privacy=none", "privacy.epsilon=8", "privacy.noise_multiplier=1"):
        assert "the coordinator decides that for all sites" in failed(here(capsys, *words, other))
