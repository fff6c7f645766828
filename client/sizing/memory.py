"""How many bytes a training step takes, from the model's configuration alone.

Every term is counted; the cost of a logit and what libraries take whatever the model are measured, and a probe corrects the
latter on the machine. The sum is the rise of resident memory over that after the imports, at its peak within a step.

Saved for the backward pass of one layer, a token, with a compute format of `a` bytes: the inputs of two norms in float32, query,
key, value and output of the attention, what the non-linearity of the feed-forward part needs, the input of every adapted linear
layer (in float32 each on its own where the base computes in 16 bits, as peft casts it; else once for layers that share it, and
not again what the attention keeps), and the rows of A. Frozen weights save nothing.

The peak is at the loss, with the logits, or just after in the gradient of the last layer, with what it takes for a while.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lamina.client.losses import loss_chunk_tokens
from lamina.protos.allocator import LARGE_BYTES

# The input of these is their own; the other linear layers of a parent read one and the same.
_OWN_INPUT = ("o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2", "wo", "w2", "dense_4h_to_h")
_ATTENTION = ("attn", "attention")
# Logits, their float32 copy, its log-softmax, one of them reused for the gradient.
LOGIT_BYTES = 12
# Of libraries and buffers that grow with no size of the model's, without what a format or computing again adds; measured.
RUNTIME_BYTES = 31 * 10**6
# Of these before anything is multiplied.
LOADING_BYTES = 11 * 10**6
# Kernels that a format of weights, 16-bit activations or computing again call; measured.
FORMAT_BYTES = {"nf4": 3 * 10**6, "int8": 5 * 10**6, "mixed": 5 * 10**6}
WIDE_BYTES, AGAIN_BYTES = 6 * 10**6, 3_400_000
# Of a linear layer with its slots, as objects of Python; measured.
OBJECT_BYTES = 135_000
# Linux maps up to so much of a file around what is touched, by how the file lies in its cache.
WINDOW_BYTES = 2 * 2**20
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "nf4": 0.5 + (1 + 4 / 256) / 64}
# Of a mixed base whose layers are not chosen yet: at most, for a budget of up to 8 bits.
WEIGHT_BYTES |= {"int8wo": 1.0, "fp8wo": 1.0, "mixed": 1.0}
_BY_ROW = ("int8", "int8wo", "fp8wo", "mixed")
COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Further columns of a sketch, so that the last singular values that are asked for are found too.
OVERSAMPLED = 8
# What of a round has gradients and moments: both factors, B, either in turn, a core, or in place of factors norms or a head.
TRAINED = ("AB", "B", "turns", "core", "norm", "head")
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
        positions: Tokens that the model's positions reach, 0 for any.
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
    positions: int = 0

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
        by_row: Gradients that are held at one time, each of one example by itself, as example-dp clips them; else 0.
        file_bytes: Of weights that are read and not kept as they are: another format than the file's.
        train: One of `TRAINED`.
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
    by_row: int = 0
    file_bytes: int = 0
    train: str = "AB"
    seen_tokens: int | None = None


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
    held = (
        sum(rank * (sum(shape.linears[m]) + rank * (step.train == "core")) for m, rank in trained.items()) + step.dense
    )
    moving = sum(_moving(shape.linears[m], rank, step.train) for m, rank in trained.items()) + step.dense
    found = {
        "weights": _weights(shape, step, a),
        "adapter, gradients and optimizer": 4 * held + moving * (4 + OPTIMIZER_BYTES[step.optimizer]),
        "frozen part": 4 * sum(rank * sum(shape.linears[module]) for module, rank in step.frozen.items()),
        "compensation": a * sum(rank * sum(shape.linears[module]) for module, rank in step.compensation.items()),
    }
    if step.by_row:
        found["gradients by row"] = 4 * moving * (step.by_row + 1)  # and their clipped sum
    saved = step.tokens * _saved(shape, trained, a, wide)
    if step.train == "norm":  # the gradient of a scale needs what it multiplies, in float32
        saved += 8 * shape.hidden * shape.layers * step.tokens
    found["activations"] = step.tokens * shape.layers * shape.hidden * a if step.checkpointing else saved
    found["logits"] = LOGIT_BYTES * shape.vocab * min(step.tokens, loss_chunk_tokens(shape.vocab))
    again = saved / max(1, shape.layers) if step.checkpointing else 0
    found["gradient of a layer, beyond the logits"] = max(0, again + _passing(shape, step, a, wide) - found["logits"])
    found["scattered"] = _scattered(shape, step, trained, a, wide)
    found["runtime"] = overhead_bytes + _kernels(shape, step, wide)
    return {name: math.ceil(value) for name, value in found.items()}


def _moving(sides: tuple[int, int], rank: int, train: str) -> int:
    """Numbers of one module that have gradients and moments."""
    d_out, d_in = sides
    width = {"AB": d_out + d_in, "B": d_out, "turns": max(sides), "core": rank}
    return rank * width[train]


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
    loading = found["weights"] + max(step.file_bytes, _tested(shape, step)) + min(overhead_bytes, LOADING_BYTES)
    return max(sum(found.values()), loading)


def _tested(shape: Shape, step: Step) -> int:
    """Bytes of the self-test at loading: the numbers of one quantised matrix in float32."""
    return 4 * max((rows * columns for _, rows, columns in _coded(shape, step)), default=0)


def _coded(shape: Shape, step: Step) -> list[tuple[str, int, int]]:
    """The matrices that are held as codes: number format and sides."""
    found = [(step.formats.get(module, step.default), *sides) for module, sides in shape.linears.items()]
    return [one for one in found if one[0] not in COMPUTE_BYTES]


def _weights(shape: Shape, step: Step, a: int) -> float:
    total = float(shape.others * a) - _untouched(shape, step, a)
    for module, (d_out, d_in) in shape.linears.items():
        number_format = step.formats.get(module, step.default)
        total += d_out * d_in * WEIGHT_BYTES[number_format] + (4 * d_out if number_format in _BY_ROW else 0)
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
            # The attention keeps its output itself; another layer's input is its own.
            inputs += 0 if any(word in parent.rpartition(".")[2] for word in _ATTENTION) else a * d_in
        elif parent not in shared:
            shared.add(parent)
            inputs += a * d_in
    return norms + attention + feed_forward + inputs + 4 * sum(trained.values())


def _passing(shape: Shape, step: Step, a: int, wide: bool) -> float:
    """Bytes that the gradient of a layer takes for a while: those of its feed-forward part, and a matrix made from its codes."""
    gradients = a * (3 if shape.gated else 2) * shape.intermediate + (4 * shape.intermediate if wide else 0)
    matrix = max((a * rows * columns for _, rows, columns in _coded(shape, step)), default=0)
    return step.tokens * (gradients + 2 * a * shape.hidden) + matrix


def _scattered(shape: Shape, step: Step, trained: Mapping[str, int], a: int, wide: bool) -> int:
    """Bytes of holes between small buffers, which the C library does not give back.

    What is below its threshold comes from one heap. There a gradient or moment of a factor takes a place that an activation had,
    and the rest of it is too small for the next one. So each small factor can cost as much as the largest small activation, with
    activations computed again those of one layer.
    """
    widths = [shape.hidden, shape.attention, shape.key_value, shape.intermediate]
    pieces = [step.tokens * width * a for width in widths]
    pieces += [step.tokens * 4 * width for width in (*set(trained.values()), *(widths if wide else ()))]
    largest = max((piece for piece in pieces if piece < LARGE_BYTES), default=0)
    factors = [4 * rank * side for module, rank in trained.items() for side in shape.linears[module]]
    small = sum(size < LARGE_BYTES for size in factors) + (2 * shape.layers + 1 if step.train == "norm" else 0)
    return largest * small // (max(1, shape.layers) if step.checkpointing else 1)


def _kernels(shape: Shape, step: Step, wide: bool) -> int:
    held = {step.default, *step.formats.values()}
    found = max((FORMAT_BYTES.get(one, 0) for one in held), default=0) + OBJECT_BYTES * len(shape.linears)
    return found + (WIDE_BYTES if wide else 0) + (AGAIN_BYTES if step.checkpointing else 0)
