"""Running `lamina` as a user does: a process of its own, or its entry point in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300


def environment() -> dict[str, str]:
    """This process's, with the checkout importable and nothing to be had from a hub."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONWARNINGS": "",
    }


@dataclass(frozen=True)
class Ended:
    """A finished command."""

    code: int
    out: str
    err: str


def lamina(*words: str, cwd: Path | None = None) -> Ended:
    """Run one command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "lamina", *words],
        env=environment(),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def start(*words: str) -> subprocess.Popen[bytes]:
    """Start one command and do not wait for it."""
    return subprocess.Popen(
        [sys.executable, "-m", "lamina", *words],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def here(capsys: pytest.CaptureFixture[str], *words: str) -> Ended:
    """Run one command by its entry point in this process, where importing torch is already paid for."""
    from lamina.__main__ import main

    capsys.readouterr()
    code = main(list(words))
    said = capsys.readouterr()
    return Ended(code, said.out, said.err)


def run_words(llama: Path, notes: Path, output: Path, *more: str) -> list[str]:
    """The words of a run that takes about a second."""
    words = [
        f"model={llama}",
        f"data={notes}",
        "partition.column=silo",
        "clients.count=3",
        "clients.ranks=[4,2,1]",
        "rounds=2",
        "train.local_steps=2",
        "train.batch_size=4",
        "train.max_length=24",
        "evaluate.max_examples=2",
        "data.generate=0",
        "train.device=cpu",
        "threads=1",
        f"output={output}",
    ]
    found = {word.partition("=")[0]: word for word in words}
    found.update({word.partition("=")[0]: word for word in more})
    return ["simulate", *found.values()]


def files(folder: Path, *but: str) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in but
    }


def failed(ended: Ended, code: int = 2) -> str:
    """The message of a command that failed as it should: the code, one error, no traceback."""
    assert ended.code == code, ended
    assert "error:" in ended.err
    assert "Traceback" not in ended.err + ended.out
    return ended.err


def data_folder() -> Path:
    """The outside data, or a skip that says so."""
    folder = os.environ.get("LAMINA_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LAMINA_TEST_DATA is not set: this test reads outside data")
    return Path(folder)


def words_of(ended: Sequence[str]) -> str:
    """Words as one line, for messages."""
    return " ".join(ended)
