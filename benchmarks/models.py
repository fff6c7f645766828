"""Bases of other sizes without training one: the shipped `tiny` model grown, so that it computes the same function.

Width: every hidden unit, attention head and intermediate unit is there `width` times, and whatever reads them takes a share of
each. RMSNorm sees the same mean square; the last norm's weight is divided by the width, which keeps the logits where input and
output embeddings are tied. Depth: each block is followed by copies whose two outputs into the residual stream are zero.

Shares need not be equal. As the copies of a unit have one value, noise whose sum over the copies is zero changes no output,
whatever its size, and no two weights of a layer are copies then. Noise is also on the two outputs of an inserted block.
"""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def grown(folder: Path, width: int, depth: int, noise: float = 0.0, seed: int = 0) -> Path:
    """A larger base that computes what `tiny` does, to rounding; made once.

    Args:
        folder: In which the base gets a folder of its own, named after the other arguments.
        width: How many times as wide: 4 with depth 2 is 24 million parameters.
        depth: How many times as deep.
        noise: Of the linear layers' weights, relative to the root mean square of each; without effect at width 1, where there
            are no copies that it could tell apart.
        seed: Of the noise.

    Returns:
        The base's folder, as transformers loads it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from lamina.client.loading import TINY

    made = folder / f"tiny-width{width}-depth{depth}-noise{noise:g}-seed{seed}"
    if (made / "config.json").is_file():
        return made
    old = LlamaForCausalLM.from_pretrained(TINY)
    config = LlamaConfig(**old.config.to_dict())
    config.hidden_size *= width
    config.intermediate_size *= width
    config.num_attention_heads *= width
    config.num_key_value_heads *= width
    config.num_hidden_layers *= depth
    model = LlamaForCausalLM(config)
    model.load_state_dict(_weights(old.state_dict(), width, depth, noise, seed))
    model.tie_weights()
    part = folder / f".{made.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, part)
    part.rename(made)
    return made


def _weights(old: dict[str, Any], width: int, depth: int, noise: float, seed: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)

    def wide(name: str, tensor: Any, inserted: bool) -> Any:
        """One tensor of the grown model."""
        if tensor.dim() == 1:
            return tensor.repeat(width) / (width if name == "model.norm.weight" else 1)
        if not name.startswith("model.layers."):
            return tensor.repeat(1, width)
        share = tensor.double().repeat(width, width) / width
        d_out, d_in = tensor.shape
        drawn = torch.randn(d_out * width, width, d_in, generator=generator, dtype=torch.float64)
        drawn -= drawn.mean(dim=1, keepdim=True)
        drawn *= noise * float(share.square().mean().sqrt()) * math.sqrt(width / max(1, width - 1))
        if inserted and name.endswith(_OUTPUTS):
            share.zero_()
        return (share + drawn.reshape(share.shape)).float()

    found = {}
    for name, tensor in old.items():
        if not name.startswith("model.layers."):
            found[name] = wide(name, tensor, False)
            continue
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        for copy in range(depth):
            found[f"model.layers.{int(layer) * depth + copy}.{rest}"] = wide(name, tensor, copy > 0)
    return found
