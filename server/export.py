"""The global adapter as a directory that peft loads, written without peft or torch: a config, safetensors, a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from lamina.protos.adapter import Adapter, Array, LoraFactors, folded, rescaled
from lamina.protos.config import Config
from lamina.protos.files import write_atomic, write_folder
from lamina.protos.spec import AdapterSpec

_PREFIX = "base_model.model."
# Peft's word for an adapter that has none and brings parameters that were trained whole, all the same.
_NO_FACTORS = "dummy-target-modules"
_HEADS = ("classifier", "score")
_RELEASED = """
Each site measured, on its own text, what it had received: this adapter, cut to the site's rank. Nobody measured the whole.
"""


def peft_config(adapter: Adapter, spec: AdapterSpec) -> dict[str, Any]:
    """Peft's `adapter_config.json` for factors of scale 1.

    Args:
        adapter: The global adapter; each module's rank may differ.
        spec: Task, modules and dense parameters.

    Returns:
        The document. `lora_alpha` equals the rank in every module, so that peft's scale is 1.
    """
    ranks = {module: max(1, factors.rank) for module, factors in adapter.lora.items()}
    rank = max(ranks.values(), default=1)
    # A state from a checkpoint has another order than a fresh one; the file is to have the same bytes.
    pattern = {module: value for module, value in sorted(ranks.items()) if value != rank}
    whole = sorted({_whole(name, spec.task) for name in spec.dense})
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if spec.task == "sequence-classification" else "CAUSAL_LM",
        "base_model_name_or_path": spec.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(adapter.lora) or _NO_FACTORS,
        "modules_to_save": whole or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": spec.fan_in_fan_out,
        "init_lora_weights": True,
    }


def _whole(name: str, task: str) -> str:
    """The module that peft is to keep for a parameter that was trained whole.

    Of a classifier peft keeps what is called so as one, unasked, also where it is of several layers; one of these beside it would
    be kept twice.
    """
    first = name.partition(".")[0]
    return first if task == "sequence-classification" and first in _HEADS else name.rpartition(".")[0]


def peft_tensors(adapter: Adapter) -> dict[str, Array]:
    """Peft's tensors by name, at scale 1, a core folded into B; a module of rank 0 gets rank 1 with zeros, as peft has no rank 0.

    Args:
        adapter: The global adapter.

    Returns:
        Name -> float32 array.
    """
    tensors: dict[str, Array] = {}
    for module, factors in adapter.lora.items():
        d_out, d_in = factors.shape
        if factors.rank == 0:
            factors = LoraFactors(np.zeros((1, d_in), np.float32), np.zeros((d_out, 1), np.float32))
        unit = rescaled(folded(factors), 1.0)
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(unit.A, np.float32)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(unit.B, np.float32)
    for name, value in adapter.dense.items():
        tensors[_PREFIX + name] = np.ascontiguousarray(value, np.float32)
    return tensors


def write_adapter(folder: Path, adapter: Adapter, spec: AdapterSpec, more: Mapping[str, bytes] | None = None) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` and `spec.json`; the folder appears whole.

    Args:
        folder: Where.
        adapter: The global adapter.
        spec: What it belongs to.
        more: Further files, name -> content.
    """
    write_folder(
        folder,
        {
            "adapter_config.json": (json.dumps(peft_config(adapter, spec), indent=1) + "\n").encode(),
            "adapter_model.safetensors": bytes(save(peft_tensors(adapter), {"format": "pt"})),
            "spec.json": spec.to_json().encode(),
            **(more or {}),
        },
    )


def write_card(folder: Path, summary: Mapping[str, Any], spec: AdapterSpec, config: Config) -> None:
    """Write the model card, `README.md`, from the run's summary.

    Args:
        folder: The adapter's folder.
        summary: `summary.json`.
        spec: The schema.
        config: The resolved config.
    """
    evaluation, aggregation = summary["eval"], summary["aggregation"]
    unit = "example" if spec.task == "sequence-classification" else "token"
    figures = [("held-out loss, nats a " + unit, evaluation["base_loss"], evaluation["final_loss"])]
    if evaluation.get("final_accuracy") is not None and spec.task == "sequence-classification":
        figures.append(("held-out accuracy", evaluation["base_accuracy"], evaluation["final_accuracy"]))
    rows = "\n".join(f"| {name} | {_figure(before)} | {_figure(after)} |" for name, before, after in figures)
    privacy = "none" if summary["privacy"] is None else json.dumps(summary["privacy"])
    auto = "AutoModelForSequenceClassification" if spec.labels else "AutoModelForCausalLM"
    labels = f", num_labels={len(spec.labels)}" if spec.labels else ""
    deployed = summary["eval"]["view"] == "release"
    rounds = str(summary["rounds"]) if summary["ended"] == "finished" else f"{summary['rounds']} of {config.rounds}"
    card = f"""---
base_model: {spec.base_model}
library_name: peft
tags: [{"lora, " if spec.modules else ""}federated-learning, lamina]
---
# Federated {"LoRA adapter" if spec.modules else "adapter"}

Trained by {summary["clients"]} clients over {rounds} rounds with Lamina's `{summary["strategy"]}` strategy
(run `{summary["run_id"]}`, seed {summary["seed"]}).

| | base | {"as each site received it" if deployed else "with this adapter"} |
|---|---|---|
{rows}
{_RELEASED if deployed else ""}
- Task: {spec.task}; adapted modules: {len(spec.modules)}; parameters trained whole: {len(spec.dense)}.
- Largest relative distance of a stored aggregate from the exact weighted mean: {aggregation["relative_error"]:.3g}.
- Differential privacy: {privacy}. Without it, the adapter may reveal training text.
- Base model, SHA-256 over its float32 weights: `{spec.hashes.get("weights", "unknown")}`.
- Data: {"each site's own, which never left it" if deployed else _data(config)}.

```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained(BASE{labels})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""
    write_atomic(folder / "README.md", card)


def _data(config: Config) -> str:
    return f"`{config.data.source}`, partition `{config.partition.kind}`"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
