"""`lamina plan` and `lamina quantise` as a person uses them, plans that are carried out, and a run in which formats differ."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from lamina.__main__ import main
from lamina.client.hardware import Profile
from lamina.client.loading import TINY
from lamina.client.making import Wanted as Copy
from lamina.client.making import make
from lamina.client.sizing.planner import NothingFits, Wanted, plan
from lamina.client.sizing.probe import Trial, measure
from lamina.client.sizing.shape import shape_of

pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": False,
}  # fmt: skip


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_plan_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "plan")
    assert code == 0
    assert "rank 8 on all layers" in out
    assert "a batch of 8, as the experiment asks" in out
    code, out, _ = said(capsys, "plan", "device=cpu", "--json")
    found = json.loads(out)
    assert found["profile"]["kind"] == "cpu"
    assert sum(found["plan"]["terms"].values()) <= found["plan"]["peak_bytes"] <= found["plan"]["budget_bytes"]


def test_a_plan_for_70_billion_parameters_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    words = ("plan", f"model={tmp_path}", "rank=16", "batch_size=8", "max_length=1024")
    code, out, _ = said(capsys, *words, "--what-if", "cuda:80GiB", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["parameters"] == 70_553_706_496  # the published count
    assert (found["plan"]["format"], found["plan"]["compute"]) == ("nf4", "bf16")
    assert found["plan"]["micro_batch"] * found["plan"]["accumulation"] == 8
    code, _, err = said(capsys, *words, "--what-if=cuda:24GiB")
    assert code == 2
    assert "The smallest that there is: nf4 base, rank 1" in err


@pytest.mark.parametrize(
    "words",
    [["--what-if"], ["--what-if", "tpu:1GB"], ["rank=0"], ["memory=lots"], ["deadline_s=x"], ["model=/nowhere"], ["x"],
     ["deadline_s=-1"], ["deadline_s=nan"], ["max_length=513"], ["--what-if", "cpu:4GiB,cores=0"], ["rank=²"],
     ["rank=" + "9" * 5000], ["memory=" + "9" * 400], ["memory=0"], ["memory=-1"]],
)  # fmt: skip
def test_words_that_are_none(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "plan", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_quantise_writes_a_copy_that_plans_and_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "quantise", "tiny", str(tmp_path / "copy"), "format=nf4", "compute=fp32", "--json")
    assert code == 0
    assert json.loads(out)["format"] == "nf4"
    assert "quantising 28 matrices" in err
    code, out, _ = said(capsys, "plan", f"model={tmp_path / 'copy'}", "--json")
    assert json.loads(out)["parameters"] == shape_of("tiny").parameters
    code, _, err = said(capsys, "quantise", "tiny", str(tmp_path / "copy"))
    assert code == 2
    assert "expected no such folder" in err
    code, _, err = said(capsys, "quantise", "tiny", str(tmp_path / "other"), "format=nf3")
    assert code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_plan_that_is_carried_out_stays_within_its_budget(tmp_path: Path) -> None:
    """The smallest budget takes another format and computes activations again; each plan runs in a process of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=8, vocab_size=8192, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    source = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(source)
    for found in TINY.glob("tokenizer*"):
        shutil.copy(found, source)
    copy = tmp_path / "nf4"
    make(Copy(str(source), copy, "nf4", "fp32"), lambda text: None)
    shape, seen = shape_of(str(source)), set()
    for megabytes in (150, 260, 900):
        machine = Profile("cpu", "x", 10**10, 10**10, 1, features=("avx2",))
        wanted = Wanted(rank=16, batch_size=8, max_length=192, memory_bytes=megabytes * 10**6, formats=("fp32", "nf4"))
        one = plan(machine, shape, wanted)
        trial = Trial(
            str(copy if one.format == "nf4" else source), one.format, one.compute, one.rank, one.micro_batch, one.max_length,
            one.checkpointing, threads=1,
        )  # fmt: skip
        taken = measure(trial)
        assert taken is not None
        assert taken.increment_bytes <= megabytes * 10**6, one
        seen.add((one.format, one.checkpointing, one.micro_batch))
    assert len(seen) == 3
    with pytest.raises(NothingFits):
        plan(machine, shape, Wanted(memory_bytes=10**7))


def test_clients_of_four_formats_learn_as_those_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "simulate", "clients.count=4", "clients.ranks=8", "rounds=2", "train.local_steps=4", "train.max_length=48",
        "evaluate.max_examples=20", "data.generate=0",
    )  # fmt: skip
    losses: dict[str, Any] = {}
    for name, formats in (("one", "fp32"), ("four", "[fp32,int8,nf4,mixed]")):
        code, _, err = said(capsys, *words, f"quantisation.format={formats}", f"output={tmp_path / name}")
        assert code == 0, err
        losses[name] = json.loads((tmp_path / name / "summary.json").read_text())["eval"]
    assert losses["four"]["base_loss"] == losses["one"]["base_loss"]  # measured on the full-precision base
    assert losses["four"]["final_loss"] < losses["four"]["base_loss"]
    assert losses["four"]["final_loss"] == pytest.approx(losses["one"]["final_loss"], rel=0.02)
    assert losses["four"]["final_loss"] != losses["one"]["final_loss"]
    code, _, err = said(capsys, *words, "quantisation.format=[fp32,nf4]", f"output={tmp_path / 'few'}")
    assert code == 2
    assert "one entry for each of 4 clients" in err
    code, _, err = said(capsys, *words, "quantisation.format=nf5", f"output={tmp_path / 'none'}")
    assert code == 2
