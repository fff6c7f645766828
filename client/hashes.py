"""What identifies a base model, whatever files it came in: hashes over weights, config, tokenizer and chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

# Fields of a model's config that say where or with what it was loaded, not what it computes.
_VOLATILE = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "architectures",
    "problem_type",
)


def hash_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and float32 bytes of all weights, whatever file layout they came in.

    Args:
        weights: Name -> tensor.

    Returns:
        Hex.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].detach().float().cpu().contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def hash_config(config: Any) -> str:
    """SHA-256 over what a model's config says of its computation.

    Args:
        config: A transformers config.

    Returns:
        Hex.
    """
    kept = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's vocabulary and rules, without the settings of a call.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        Hex.
    """
    return hashlib.sha256(_tokenizer_text(tokenizer).encode()).hexdigest()


def hash_chat_template(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's chat template, of the empty string where it has none.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        Hex.
    """
    return hashlib.sha256(json.dumps(getattr(tokenizer, "chat_template", None) or "").encode()).hexdigest()


def _tokenizer_text(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        document = json.loads(backend.to_str())
        document.update(truncation=None, padding=None)
        return json.dumps(document, sort_keys=True)
    return json.dumps(tokenizer.get_vocab(), sort_keys=True)
