"""A run as a user sees it: the directory that it leaves, sweeps, reports, exports, and being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e import commands
from tests.e2e.commands import failed, files, here, lamina, run_words

KEYS = {
    "round", "clients", "rejections", "loss", "bytes_up", "bytes_down", "relative_error", "release_error", "seconds",
    "epsilon",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(llama: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by a process of its own, with its updates kept."""
    path = tmp_path_factory.mktemp("finished") / "run"
    ended = lamina(*run_words(llama, notes, path, "keep_updates=true", "strategy=residual", "data.generate=1"))
    assert ended.code == 0, ended
    assert "Traceback" not in ended.err
    # Quiet where it is no terminal: no control characters, one line a round, and where to look.
    assert "\x1b" not in ended.out
    assert "held-out" in ended.out
    assert str(path / "adapter") in ended.out.replace("\n", "")
    return path


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    names = set(files(finished))
    wanted = {"config.yaml", "rounds.jsonl", "summary.json", "report.html"}
    wanted |= {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md"}
    wanted |= {f"rounds/0002/{part}/{client}.safetensors" for part in ("updates", "releases") for client in "012"}
    wanted |= {"rounds/0002/releases/0.frozen.safetensors", "rounds/0002/global.safetensors"}
    assert wanted <= names
    assert not [name for name in names if name.endswith(".partial")]
    records = [json.loads(line) for line in (finished / "rounds.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2]
    assert all(set(record) >= KEYS for record in records)
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["schema"], summary["rounds"], summary["clients"], summary["privacy"]) == (1, 2, 3, None)
    assert summary["communication"]["bytes_up"] == sum(record["bytes_up"] for record in records)
    assert summary["communication"]["bytes_down"] == sum(record["bytes_down"] for record in records)
    assert summary["aggregation"]["relative_error"] <= 1e-6
    assert set(summary["eval"]["per_client"]) == {"0", "1", "2"}
    assert summary["eval"]["view"] == "exported"


def test_the_agreed_check_passes(finished: Path) -> None:
    given = os.environ.get("LAMINA_CONTRACT", "")
    data = os.environ.get("LAMINA_TEST_DATA", "")
    script = Path(given) if given else Path(data or ".").parent / "contract" / "check_run.py"
    if not (given or data) or not script.is_file():
        pytest.skip("no check_run.py: set LAMINA_CONTRACT to it, or LAMINA_TEST_DATA to the folder beside its own")
    done = subprocess.run(
        [sys.executable, str(script), str(finished)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_report_is_one_file_without_outside_links(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    for mark in ('src="http', "src='http", "@import url(http", '<link rel="stylesheet" href'):
        assert mark not in page


def test_a_sweep_makes_a_run_each_and_prints_json(
    llama: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = run_words(llama, notes, tmp_path / "sweep", "rounds=1", "strategy=recompress,stack", "seed=0,1")
    ended = here(capsys, *words, "--multirun", "--json")
    assert ended.code == 0
    found = json.loads(ended.out)
    assert [(one["strategy"], one["seed"]) for one in found] == [
        ("recompress", 0),
        ("recompress", 1),
        ("stack", 0),
        ("stack", 1),
    ]
    assert len({one["path"] for one in found}) == 4
    for one in found:
        assert Path(one["path"]).parent == tmp_path / "sweep"
        assert (Path(one["path"]) / "summary.json").is_file()
    assert (tmp_path / "sweep" / "report.html").is_file()

    paths = [one["path"] for one in found]
    compared = here(capsys, "report", *paths, f"output={tmp_path / 'all.html'}")
    assert compared.code == 0
    page = (tmp_path / "all.html").read_text()
    assert "recompress" in page
    assert "stack" in page
    as_json = here(capsys, "report", *paths[:2], f"output={tmp_path / 'two.html'}", "--json")
    assert [one["path"] for one in json.loads(as_json.out)] == paths[:2]


def test_baselines_are_measured_on_request(
    llama: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = here(capsys, *run_words(llama, notes, tmp_path / "run", "baselines=[base,local,central]"), "--json")
    (found,) = json.loads(ended.out)
    assert set(found["baselines"]) == {"base", "local", "central"}
    assert found["baselines"]["base"]["loss"] == pytest.approx(found["eval"]["base_loss"], rel=1e-9)
    assert found["baselines"]["central"]["loss"] < found["eval"]["base_loss"]


def test_export_merges_in_bf16(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "export"
    ended = here(capsys, "export", str(finished), f"output={output}", "merge=true", "dtype=bf16", "--json")
    assert ended.code == 0
    done = json.loads(ended.out)
    assert done["logits_relative_distance"] <= done["tolerance"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(files(output))
    assert (output / "merged" / "model.safetensors").is_file()
    assert "base_model" in (output / "README.md").read_text()
    failed(here(capsys, "export", str(finished), f"output={output}"))
    failed(here(capsys, "export", str(finished), f"output={tmp_path / 'x'}", "merge=true", "dtype=int4"))
    failed(here(capsys, "export", str(tmp_path)))


def test_spec_writes_what_a_coordinator_needs(
    llama: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lamina.protos.spec import read

    ended = here(capsys, "spec", str(llama), f"output={tmp_path / 'a.json'}", "--json")
    assert ended.code == 0
    spec = read(tmp_path / "a.json")
    assert json.loads(ended.out)["modules"] == len(spec.modules) == 14
    assert set(spec.hashes) == {"weights", "config", "tokenizer", "chat_template"}
    words = ["task=sequence-classification", "labels=b,a", f"output={tmp_path / 'b.json'}"]
    assert here(capsys, "spec", str(bert), *words).code == 0
    assert read(tmp_path / "b.json").labels == ("b", "a")
    for wrong in (["task=sequence-classification"], ["labels=a,b"], ["seed=x"], ["task=poetry"]):
        failed(here(capsys, "spec", str(bert), f"output={tmp_path / 'c.json'}", *wrong))
    failed(here(capsys, "spec", str(tmp_path / "none")))
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("command", ["", "simulate", "report", "export", "spec"])
def test_help_shows_usage_and_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    ended = here(capsys, *([command] if command else []), "--help")
    assert ended.code == 0
    assert "usage:" in ended.out
    assert f"lamina {command}".strip() in ended.out


def test_without_a_command_or_with_a_wrong_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert here(capsys).code == 2
    assert "Did you mean simulate?" in failed(here(capsys, "simulte"))


def wait_for_rounds(path: Path, rounds: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + commands.TIMEOUT_S
    while time.monotonic() < deadline:
        file = path / "rounds.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= rounds:
            return
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    pytest.fail("no round in time")


def test_a_killed_run_resumes_to_the_same_bytes(
    llama: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rounds=8", "train.local_steps=12", "strategy=stack", "wire.format=int8", "clients.fraction=0.7"]
    path = tmp_path / "killed"
    process = commands.start(*run_words(llama, notes, path, *words))
    wait_for_rounds(path, 2, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (path / "summary.json").exists()
    resumed = lamina("simulate", f"resume={path}")
    assert resumed.code == 0, resumed
    whole = lamina(*run_words(llama, notes, tmp_path / "whole", *words))
    assert whole.code == 0, whole
    assert files(path / "adapter", "README.md") == files(tmp_path / "whole" / "adapter", "README.md")
    losses = [
        [json.loads(line)["loss"] for line in (run / "rounds.jsonl").read_text().splitlines()]
        for run in (path, tmp_path / "whole")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
