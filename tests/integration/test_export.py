"""What is written out is what was trained: base plus adapter, peft's loading of it, and the merged model agree."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.numpy import load_file

from lamina.client.export import export_adapter, merge
from lamina.client.model import put
from lamina.protos.adapter import Adapter, LoraFactors, product
from lamina.protos.config import Config
from lamina.protos.errors import AdapterMismatch, ConfigError
from lamina.protos.spec import read
from lamina.server.export import write_adapter
from lamina.simulations.prepare import Prepared, prepare
from lamina.simulations.run import simulate
from tests import models
from tests.runs import Quiet, classification, small
from tests.texts import LABELS

TOKENS = torch.arange(5, 29).reshape(2, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def peft_logits(base: Any, folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(base, str(folder)).eval())


def plain(config: Config) -> Any:
    if config.task == "causal-lm":
        return transformers.AutoModelForCausalLM.from_pretrained(config.model.source, dtype=torch.float32).eval()
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        config.model.source, num_labels=len(LABELS), pad_token_id=1, dtype=torch.float32
    ).eval()


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((one.float() - other.float()).norm() / other.float().norm()) < tolerance


def written(config: Config, prepared: Prepared) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A finished run, its adapter's logits in the engine, and those of the base."""
    done = simulate(config, Quiet(), prepared)
    put(prepared.base, read_adapter(done.path / "adapter", prepared), None, trainable=False)
    tuned = logits(prepared.base.model)
    put(prepared.base, Adapter(), None, trainable=False)
    return done.path, tuned, logits(prepared.base.model)


def read_adapter(folder: Path, prepared: Prepared) -> Adapter:
    """The adapter from its file, by names alone."""
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model."
    lora = {
        module: LoraFactors(tensors[f"{prefix}{module}.lora_A.weight"], tensors[f"{prefix}{module}.lora_B.weight"], 1.0)
        for module in prepared.base.spec.modules
    }
    return Adapter(lora, {name: tensors[prefix + name] for name in prepared.base.spec.dense})


CASES = (
    "llama",
    "gpt2",
    "bert",
    "llama core",
    "gpt2 core",
    "bert core",
    "llama norm",
    "gpt2 norm",
    "bert norm",
    "bert head",
    "roberta",
    "roberta head",
)


@pytest.fixture(params=CASES)
def config(request: pytest.FixtureRequest, notes: Path, questions: Path, tmp_path: Path) -> Config:
    model, _, trained = request.param.partition(" ")
    base: Path = request.getfixturevalue(model)
    words = [f"output={tmp_path / 'run'}", "rounds=2", "train.local_steps=4", "lora.lora_alpha=12"]
    if trained:
        words += ["strategy=core" if trained == "core" else f"adapter.kind={trained}", "train.learning_rate=0.1"]
    if model in ("bert", "roberta"):
        return classification(base, questions, *words)
    made = small(base, notes, *words)
    if trained in ("norm", "head"):
        return made
    made.lora.rank_pattern = {"c_proj": 1} if model == "gpt2" else {"k_proj": 0, "layers.1.mlp.up_proj": 1}
    return made


def test_engine_peft_and_merged_models_agree(config: Config, tmp_path: Path) -> None:
    prepared = prepare(config)
    path, tuned, base = written(config, prepared)
    assert not close(tuned, base, 1e-2)
    assert close(peft_logits(plain(config), path / "adapter"), tuned)
    # peft would find this out by itself, with a warning: the file must say it.
    transposed = json.loads((path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]
    assert transposed == (type(plain(config)).__name__ == "GPT2LMHeadModel" and config.adapter.kind == "lora")

    negotiated = export_adapter(path, tmp_path / "export")
    assert close(peft_logits(plain(config), tmp_path / "export"), tuned)
    merged = merge(path, tmp_path / "export" / "merged", negotiated, "fp32")
    assert merged.distance < 1e-5
    auto = (
        transformers.AutoModelForCausalLM
        if config.task == "causal-lm"
        else transformers.AutoModelForSequenceClassification
    )
    loaded = auto.from_pretrained(tmp_path / "export" / "merged").eval()
    assert close(logits(loaded), tuned)
    assert type(loaded).__name__ == type(plain(config)).__name__
    if config.task == "sequence-classification":
        assert loaded.config.id2label == dict(enumerate(sorted(LABELS)))
    # The tokenizer comes along, and the weights are safetensors only.
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "export" / "merged")
    assert again("hello there")["input_ids"] == prepared.base.tokenizer("hello there")["input_ids"]
    assert not list((tmp_path / "export").rglob("*.bin"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 5e-2), ("fp16", 1e-2)])
def test_a_merged_model_is_cast_once(llama: Path, notes: Path, tmp_path: Path, dtype: str, tolerance: float) -> None:
    config = small(llama, notes, f"output={tmp_path / 'run'}", "train.local_steps=4")
    path, tuned, _ = written(config, prepare(config))
    merge(path, tmp_path / "merged", read(path / "adapter" / "spec.json"), dtype)
    stored = load_file_dtypes(tmp_path / "merged" / "model.safetensors")
    assert stored == {{"bf16": "BF16", "fp16": "F16"}[dtype]}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert close(logits(loaded), tuned, tolerance)


def load_file_dtypes(path: Path) -> set[str]:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {part["dtype"] for name, part in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("cored", [False, True])
def test_scales_other_than_one_and_cores_are_folded_into_the_factors(
    llama: Path, notes: Path, tmp_path: Path, cored: bool
) -> None:
    prepared = prepare(small(llama, notes))
    rng = np.random.default_rng(0)
    lora = {
        module: LoraFactors(
            rng.normal(size=(1 + index % 4, d_in)).astype(np.float32) * 0.1,
            rng.normal(size=(d_out, 1 + index % 4)).astype(np.float32) * 0.1,
            0.25 * (1 + index % 3),
            rng.normal(size=(1 + index % 4, 1 + index % 4)).astype(np.float32) if cored else None,
        )
        for index, (module, (d_out, d_in)) in enumerate(prepared.base.spec.modules.items())
    }
    write_adapter(tmp_path / "adapter", Adapter(lora), prepared.base.spec)
    stored = read_adapter(tmp_path / "adapter", prepared)
    for module, factors in lora.items():
        assert np.allclose(product(stored.lora[module]), product(factors), atol=1e-6)
    put(prepared.base, Adapter(lora), None, trainable=False)
    tuned = logits(prepared.base.model)
    assert close(peft_logits(plain(small(llama, notes)), tmp_path / "adapter"), tuned)


def test_another_base_is_not_merged_into(llama: Path, notes: Path, tmp_path: Path) -> None:
    config = small(llama, notes, f"output={tmp_path / 'run'}", "train.local_steps=1", "rounds=1")
    path = simulate(config, Quiet()).path
    other = models.save_llama(tmp_path / "other", seed=9)
    with pytest.raises(AdapterMismatch, match="base"):
        merge(path, tmp_path / "merged", read(path / "adapter" / "spec.json"), "fp32", str(other))
    assert not (tmp_path / "merged").exists()


def test_merged_logits_that_differ_write_nothing(
    llama: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(llama, notes, f"output={tmp_path / 'run'}", "train.local_steps=1", "rounds=1")
    path = simulate(config, Quiet()).path
    monkeypatch.setattr("lamina.client.export.TOLERANCE", {"bf16": 1e-12})
    with pytest.raises(AdapterMismatch, match="Nothing was written"):
        merge(path, tmp_path / "merged", read(path / "adapter" / "spec.json"), "bf16")
    assert not (tmp_path / "merged").exists()


def test_an_unfinished_run_or_a_taken_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finished run"):
        export_adapter(tmp_path, tmp_path / "out")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    with pytest.raises(ConfigError, match="Choose another"):
        export_adapter(tmp_path, tmp_path / "taken")
    assert (tmp_path / "taken" / "file").read_text() == "x"
