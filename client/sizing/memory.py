"""How many bytes a training step takes, from the model's configuration alone.

Every term is counted, none is fitted but the cost of a logit and the runtime's own share, which a probe corrects on the machine.
The sum is the rise of resident memory over that after the imports, at its peak within a step.

Saved for the backward pass of one layer, a token, with a compute format of `a` bytes: the inputs of two norms in float32, query,
key, value and output of the attention, what the non-linearity of the feed-forward part needs, the input of every adapted linear
layer (in float32 each on its own where the base computes in 16 bits, as peft casts it; once for layers that share it else), and
the rows of A. Frozen weights save nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# The input of these is their own; the other linear layers of a parent read one and the same.
_OWN_INPUT = ("o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2", "wo", "w2", "dense_4h_to_h")
# Logits, their float32 copy, its log-softmax, one of them reused for the gradient.
LOGIT_BYTES = 12
# Logits are formed for at most this many bytes of float32 at a time.
LOSS_CHUNK_BYTES = 32 * 2**20
# Of libraries and buffers that grow with no size of the model's.
RUNTIME_BYTES = 44 * 10**6
# Linux maps so much of a file around what is touched.
WINDOW_BYTES = 64 * 1024
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "nf4": 0.5 + (1 + 4 / 256) / 64}
COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 2}


@dataclass(frozen=True)
class Shape:
    """Of a model, what its memory depends on.

    Attributes:
        linears: Every linear layer but the output head -> (d_out, d_in).
        others: Parameters elsewhere, with the embeddings; tied ones once.
        hidden: Width of the residual stream.
        intermediate: Width of the feed-forward part.
        layers: Number of blocks.
        attention: Numbers that a token's query and output have, each.
        key_value: Numbers that a token's key and value have, each.
        vocab: Size of the vocabulary; of the labels for a classifier.
        gated: Whether the feed-forward part has a gate.
        embedding: Numbers of the input embeddings where nothing else reads them, 0 where they are tied to the output head.
    """

    linears: Mapping[str, tuple[int, int]]
    others: int
    hidden: int
    intermediate: int
    layers: int
    attention: int
    key_value: int
    vocab: int
    gated: bool = True
    embedding: int = 0

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.others + sum(d_out * d_in for d_out, d_in in self.linears.values())


@dataclass(frozen=True)
class Step:
    """How a step is taken.

    Attributes:
        formats: Linear layer -> number format of its weights; `default` for those that it lacks.
        default: Number format of the linear layers.
        compute: Number format of activations, embeddings and norms.
        ranks: Linear layer -> rank that is trained.
        tokens: Of a micro-batch: examples times length.
        checkpointing: Whether activations are computed again in the backward pass.
        optimizer: `adamw`, `adamw8bit` or `paged_adamw8bit`.
        frozen: Linear layer -> rank of the frozen part beside it.
        compensation: Linear layer -> rank of its compensation.
        dense: Parameters that are trained whole.
        file_bytes: Of weights that are read and not kept as they are: another format than the file's.
        seen_tokens: Tokens that are looked up in input embeddings that stay in the mapped file, or None for enough of all kinds
            that the whole table is resident.
    """

    default: str
    compute: str
    ranks: Mapping[str, int]
    tokens: int
    checkpointing: bool = False
    optimizer: str = "adamw"
    formats: Mapping[str, str] = field(default_factory=dict)
    frozen: Mapping[str, int] = field(default_factory=dict)
    compensation: Mapping[str, int] = field(default_factory=dict)
    dense: int = 0
    file_bytes: int = 0
    seen_tokens: int | None = None


def loss_chunk_tokens(vocab: int) -> int:
    """For how many tokens logits are formed at one time.

    Args:
        vocab: Size of the vocabulary.

    Returns:
        At least 16.
    """
    return max(16, LOSS_CHUNK_BYTES // (4 * vocab))


def terms(shape: Shape, step: Step, overhead_bytes: int = RUNTIME_BYTES) -> dict[str, int]:
    """Bytes of a step at its peak, by what they are for.

    Args:
        shape: The model.
        step: How a step is taken.
        overhead_bytes: The runtime's own share, as a probe found it.

    Returns:
        Term -> bytes; their sum is the peak.
    """
    a, wide = COMPUTE_BYTES[step.compute], step.compute != "fp32"
    trained = {module: rank for module, rank in step.ranks.items() if rank}
    factors = sum(rank * sum(shape.linears[module]) for module, rank in trained.items()) + step.dense
    found = {
        "weights": _weights(shape, step, a),
        "adapter, gradients and optimizer": factors * (8 + OPTIMIZER_BYTES[step.optimizer]),
        "frozen part": 4 * sum(rank * sum(shape.linears[module]) for module, rank in step.frozen.items()),
        "compensation": a * sum(rank * sum(shape.linears[module]) for module, rank in step.compensation.items()),
    }
    layer = _saved(shape, trained, a, wide) / max(1, shape.layers)
    logits = LOGIT_BYTES * shape.vocab * min(step.tokens, loss_chunk_tokens(shape.vocab))
    if step.checkpointing:
        boundaries = step.tokens * shape.layers * shape.hidden * a
        again = int(step.tokens * layer)
        found |= {"activations": boundaries + max(0, again - logits), "logits": logits}
    else:
        found |= {"activations": int(step.tokens * layer * shape.layers), "logits": logits}
    found["dequantised"] = max((_dequantised(shape, step, module, a) for module in shape.linears), default=0)
    found["runtime"] = overhead_bytes
    return {name: math.ceil(value) for name, value in found.items()}


def peak_bytes(shape: Shape, step: Step, overhead_bytes: int = RUNTIME_BYTES) -> int:
    """The rise of resident memory at its peak.

    Args:
        shape: The model.
        step: How a step is taken.
        overhead_bytes: The runtime's own share.

    Returns:
        Bytes: of a step, or of loading where that takes more.
    """
    found = terms(shape, step, overhead_bytes)
    loading = found["weights"] + step.file_bytes + found["runtime"]
    return max(sum(found.values()), loading)


def _weights(shape: Shape, step: Step, a: int) -> float:
    total = float(shape.others * a) - _untouched(shape, step, a)
    for module, (d_out, d_in) in shape.linears.items():
        number_format = step.formats.get(module, step.default)
        total += d_out * d_in * WEIGHT_BYTES[number_format] + (4 * d_out if number_format == "int8" else 0)
    return total


def _untouched(shape: Shape, step: Step, a: int) -> float:
    """Bytes of mapped input embeddings that no token has touched; the system maps a window around each that one has."""
    if step.seen_tokens is None or not shape.embedding:
        return 0.0
    table = shape.embedding * a
    return table * math.exp(-step.seen_tokens * WINDOW_BYTES / table)


def _saved(shape: Shape, trained: Mapping[str, int], a: int, wide: bool) -> float:
    """Bytes a token that all layers keep for the backward pass."""
    norms = 8 * shape.hidden * shape.layers
    attention = a * 2 * (shape.attention + shape.key_value) * shape.layers
    feed_forward = a * (3 if shape.gated else 2) * shape.intermediate * shape.layers
    inputs, shared = 0, set()
    for module in trained:
        parent, _, name = module.rpartition(".")
        d_in = shape.linears[module][1]
        if wide:
            inputs += 4 * d_in
        elif name in _OWN_INPUT:
            inputs += a * d_in
        elif parent not in shared:
            shared.add(parent)
            inputs += a * d_in
    return norms + attention + feed_forward + inputs + 4 * sum(trained.values())


def _dequantised(shape: Shape, step: Step, module: str, a: int) -> int:
    d_out, d_in = shape.linears[module]
    number_format = step.formats.get(module, step.default)
    copies = {"nf4": 1, "int8": 2}.get(number_format, 0) * d_out * d_in * a
    if number_format == "int8" and step.checkpointing:
        # Those of the layer that is computed again are kept for its gradient.
        copies += a * sum(rows * columns for rows, columns in shape.linears.values()) // max(1, shape.layers)
    return copies
