"""What of a model its memory depends on, from its configuration alone: the model is built without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers.pytorch_utils import Conv1D

from lamina.client.loading import LOADING, first_line, resolved
from lamina.client.quantised import copies
from lamina.client.quantised.layers import head_name
from lamina.client.sizing.memory import Shape
from lamina.protos.errors import ConfigError

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_FEED_FORWARD = ("intermediate_size", "ffn_dim", "n_inner", "d_ff")


def shape_of(source: str, revision: str = "", task: str = "causal-lm", labels: int = 0) -> Shape:
    """The shape of a model.

    Args:
        source: See `model.source`; a folder with nothing but config.json will do.
        revision: Commit of a hub id.
        task: `causal-lm` or `sequence-classification`.
        labels: Of a classifier.

    Returns:
        Its shape.

    Raises:
        ConfigError: If there is no configuration of a model for the task.
    """
    classifies = task == "sequence-classification"
    auto = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    try:
        config = transformers.AutoConfig.from_pretrained(
            resolved(source), revision=revision or "main", trust_remote_code=False
        )
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if classifies:
            config.num_labels = labels
        with init_empty_weights():
            model = auto.from_config(config)
        model.tie_weights()
        return _shape(model, config.get_text_config(), labels if classifies else config.get_text_config().vocab_size)
    except Exception as error:  # noqa: BLE001  a configuration from outside may break the model's own code in any way
        raise ConfigError(
            f"model.source={source}: expected config.json of a {task} model, got: {first_line(error)}"
        ) from None


@dataclass(frozen=True)
class Held:
    """What a base's files are.

    Attributes:
        format: Number format of the linear layers.
        copy: Whether it is a quantised copy, which trains in its own formats alone.
        compute: Of a copy: format of the activations.
        modules: Of a mixed copy: linear layer -> number format.
        compensation: Of a copy: rank of the compensation factors.
        file_bytes: Of the full-precision file that bases in other formats are made from; 0 for a copy.
    """

    format: str
    copy: bool = False
    compute: str = ""
    modules: Mapping[str, str] = field(default_factory=dict)
    compensation: int = 0
    file_bytes: int = 0


def held_as(source: str, shape: Shape, revision: str = "") -> Held:
    """What a base's files are, its weights not read.

    Args:
        source: See `model.source`.
        shape: Of the model.
        revision: Commit of a hub id.

    Returns:
        From the manifest of a copy, else from the configuration and, where they are there, the sizes of the files.

    Raises:
        ConfigError: If a copy's manifest cannot be read, or there is no configuration.
    """
    folder = resolved(source)
    copy = copies.read_manifest(folder)
    if copy is not None:
        return Held(copy.format, True, copy.compute, copy.formats, copy.compensation)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, revision=revision or "main", trust_remote_code=False)
    except LOADING as error:
        raise ConfigError(f"model.source={source}: expected config.json, got: {first_line(error)}") from None
    number_format = _DTYPES.get(str(getattr(config, "dtype", None)).removeprefix("torch."), "fp32")
    files = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else 0
    return Held(number_format, file_bytes=files or (4 if number_format == "fp32" else 2) * shape.parameters)


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _shape(model: Any, config: Any, outputs: int) -> Shape:
    head = head_name(model)
    linears: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if name == head:
            continue
        if isinstance(module, torch.nn.Linear):
            linears[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            linears[name] = (int(module.weight.shape[1]), int(module.weight.shape[0]))
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    key_value = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    intermediate = next((int(v) for n in _FEED_FORWARD if (v := getattr(config, n, None))), 4 * hidden)
    return Shape(
        linears=linears,
        others=sum(p.numel() for p in model.parameters()) - sum(a * b for a, b in linears.values()),
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        attention=heads * head_dim,
        key_value=key_value,
        vocab=outputs,
        embedding=0 if _tied(model) else config.vocab_size * hidden,
        positions=int(getattr(config, "max_position_embeddings", None) or 0),
        gated=any("gate" in name.rpartition(".")[2] for name in linears),
    )
