"""What of a model its memory depends on, from its configuration alone: the model is built without weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers.pytorch_utils import Conv1D

from lamina.client.loading import LOADING, first_line, head_name, resolved
from lamina.client.sizing.memory import Shape
from lamina.protos.errors import ConfigError

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
    except LOADING as error:
        raise ConfigError(
            f"model.source={source}: expected config.json of a {task} model, got: {first_line(error)}"
        ) from None


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
        gated=any("gate" in name.rpartition(".")[2] for name in linears),
    )
