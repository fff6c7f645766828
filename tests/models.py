"""Bases of a few KB, made from a config: what the product loads, without a download."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

TINY = Path(__file__).parent.parent / "simulations" / "tiny"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_VOCABULARY = 1024


def add_tokenizer(folder: Path) -> Path:
    """Copy the shipped tokenizer beside a model."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        shutil.copy(TINY / name, folder / name)
    return folder


def _saved(model: Any, folder: Path) -> Path:
    from lamina.client.model import quiet

    quiet()
    model.float().save_pretrained(folder)
    return add_tokenizer(folder)


def _save_llama(folder: Path, seed: int, **sizes: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = LlamaConfig(vocab_size=_VOCABULARY, num_attention_heads=4, tie_word_embeddings=True, **ends, **sizes)
    return _saved(LlamaForCausalLM(config), folder)


def save_llama(folder: Path, seed: int = 0) -> Path:
    """Two layers, four query and two key heads, every target at least 8 wide."""
    return _save_llama(
        folder,
        seed,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )


def save_bert(folder: Path, seed: int = 0) -> Path:
    """One layer; no pooler, no head: a classifier must initialise both."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=1,
        hidden_dropout_prob=0.1,
    )
    return _saved(BertModel(config, add_pooling_layer=False), folder)


def save_roberta(folder: Path, seed: int = 0) -> Path:
    """One layer; a classifier's head of two layers, which must be initialised."""
    import torch
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=66,
        initializer_range=0.2,
        pad_token_id=1,
    )
    return _saved(RobertaModel(config, add_pooling_layer=False), folder)


def save_gpt2(folder: Path, seed: int = 0) -> Path:
    """Two layers of transformers' Conv1D, whose weight is (d_in, d_out)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=_VOCABULARY,
        n_embd=16,
        n_inner=24,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return _saved(GPT2LMHeadModel(config), folder)


def save_wide_llama(folder: Path, seed: int = 0) -> Path:
    """One layer of 128 numbers, so that a rank of 16 in three modules does not fill the space of the inputs."""
    return _save_llama(
        folder,
        seed,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.06,
    )
