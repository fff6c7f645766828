"""Plans that are carried out under a real limit of what was planned, and limits that end whoever takes more."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lamina.client.hardware import Profile, groups, upward
from lamina.client.loading import TINY
from lamina.client.making import Wanted as Copy
from lamina.client.making import make
from lamina.client.sizing.limit import CONTROL_GROUP, DATA_LIMIT, _sweep, release
from lamina.client.sizing.planner import Wanted, plan
from lamina.client.sizing.probe import Trial, measure
from lamina.client.sizing.shape import held_as, shape_of

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's"),
]
MEMBERSHIP, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Takes so many MB beyond the limit's start, in pieces as training would.
TAKING = """
import sys, time
from lamina.client.sizing import limit
if sys.argv[2] == "no group":
    limit._joined = lambda pid, num_bytes: False
print(limit.limit_increment(100_000_000), flush=True)
held = [bytearray(b"x") * 5_000_000 for _ in range(int(sys.argv[1]) // 5)]
time.sleep(0.2)
print("lived")
"""


def left_over() -> list[Path]:
    """Groups of processes that have ended; others that run here may be about to remove theirs."""
    found: list[Path] = []
    for _ in range(50):
        found = []
        for version, path in groups(MEMBERSHIP, "memory"):
            folder = upward(MOUNT if version == 2 else MOUNT / "memory", path)[0]
            made = [one for one in folder.glob("lamina-*") if one.is_dir()]
            found.extend(one for one in made if not Path("/proc", one.name.removeprefix("lamina-")).exists())
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.mark.parametrize("how", ["any", "no group"])
def test_a_process_lives_within_its_limit_and_ends_beyond_it(how: str) -> None:
    for megabytes, lives in ((50, True), (200, False)):
        process = subprocess.Popen(
            [sys.executable, "-c", TAKING, str(megabytes), how],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()},
        )  # fmt: skip
        out, err = process.communicate(timeout=60)
        release(process.pid)
        lines = out.split("\n")
        assert lines[0] in ((CONTROL_GROUP, DATA_LIMIT) if how == "any" else (DATA_LIMIT,)), err
        assert ("lived" in lines) == lives, err
        # Ended by the system or the thread, or an allocation failed.
        assert process.returncode == 0 if lives else process.returncode == -signal.SIGKILL or "MemoryError" in err
    assert not [one for one in left_over() if one.name == f"lamina-{process.pid}"]


# Hidden, intermediate, layers, vocabulary, heads, key-value heads, tied: 6, 13 and 26 million parameters.
MODELS = {
    "6M": (256, 704, 5, 4096, 4, 4, False),
    "13M": (448, 1216, 5, 4096, 7, 7, True),
    "26M": (576, 1536, 6, 6144, 9, 3, True),
}
# Model, source, MB.
BUDGETS = [
    ("6M", "full", 120), ("6M", "int8", 130), ("13M", "full", 160), ("13M", "nf4", 110),
    ("26M", "nf4", 130), ("26M", "nf4", 300), ("26M", "full", 420),
]  # fmt: skip


def test_groups_whose_process_and_parent_were_killed_are_removed_by_the_next(tmp_path: Path) -> None:
    (version, path), *_ = sorted(groups(MEMBERSHIP, "memory"))
    folder = upward(MOUNT if version == 2 else MOUNT / "memory", path)[0] / "lamina-999999999"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no control group can be made here")
    _sweep(folder.parent)
    assert not folder.exists()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, found = tmp_path_factory.mktemp("models"), {}
    for name, (hidden, intermediate, layers, vocab, heads, kv_heads, tied) in MODELS.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=vocab,
            num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        )  # fmt: skip
        full = found[name, "full"] = folder / name
        LlamaForCausalLM(config).save_pretrained(full)
        for file in TINY.glob("tokenizer*"):
            shutil.copy(file, full)
        for number_format in {source for model, source, _ in BUDGETS if model == name} - {"full"}:
            copy = found[name, number_format] = folder / f"{name}-{number_format}"
            make(Copy(str(full), copy, number_format, "fp32"), lambda text: None)
    return found


def planned(source: Path, megabytes: int) -> tuple[Any, Trial]:
    shape = shape_of(str(source))
    held = held_as(str(source), shape)
    machine = Profile("cpu", "x", 10**10, 10**10, 1, features=("avx2",))
    wanted = Wanted(
        rank=16, batch_size=4, max_length=128, memory_bytes=megabytes * 10**6, file_bytes=held.file_bytes,
        only=(held.format, held.compute) if held.copy else None,
    )  # fmt: skip
    one = plan(machine, shape, wanted)
    trial = Trial(
        str(source), one.format, one.compute, one.rank, one.micro_batch, one.max_length, one.checkpointing, threads=1
    )
    return one, trial


def test_plans_are_carried_out_under_a_limit_of_their_budget(sources: dict[tuple[str, str], Path]) -> None:
    seen = set()
    for model, source, megabytes in BUDGETS:
        one, trial = planned(sources[model, source], megabytes)
        taken = measure(Trial(**{**vars(trial), "limit_bytes": one.budget_bytes}))
        assert taken is not None, (model, source, megabytes, one)
        assert taken.increment_bytes <= one.budget_bytes == megabytes * 10**6
        seen.add((one.format, one.checkpointing, one.micro_batch, one.rank, one.max_length))
        print(model, source, megabytes, taken.increment_bytes // 10**6, one.peak_bytes // 10**6)
    assert len({number_format for number_format, *_ in seen}) == 3
    assert len(seen) >= 5
    assert not left_over()


def test_a_plan_of_a_large_budget_does_not_fit_a_small_limit(sources: dict[tuple[str, str], Path]) -> None:
    one, trial = planned(sources["26M", "nf4"], 2000)
    assert one.peak_bytes > 250 * 10**6
    assert measure(Trial(**{**vars(trial), "limit_bytes": 130 * 10**6})) is None
    assert not left_over()
