"""The one base in memory: put adapters into its slots and take them out.

Adapters are swapped in place, so ranks may differ from client to client without a copy of the model. A frozen part rides beside
the trainable one, in factors or, where smaller, as one matrix.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

from lamina.client.frozen import Frozen
from lamina.protos.adapter import Adapter, Array, LoraFactors
from lamina.protos.spec import AdapterSpec

SLOT = "default"
PREFIX = "base_model.model."


@dataclass(eq=False)
class Base:
    """A loaded base with LoRA slots.

    Attributes:
        model: The module, wrapped by peft.
        tokenizer: Of the base.
        spec: What adapters of it must fit; its hashes are those of the full-precision base.
        device: Where it is.
        revision: Commit of a hub id.
        format: Number format of the linear layers.
        dtype: Of activations and of what is not quantised.
        split_head: Whether logits are the output head on the body's last state and nothing else, so that they can be formed
            in pieces.
        frozen: What rides beside the trainable factors, by module.
        tried: Ways to train whose gradients row by row have passed their self-test.
    """

    model: Any
    tokenizer: Any
    spec: AdapterSpec
    device: torch.device
    revision: str = ""
    format: str = "fp32"
    dtype: torch.dtype = torch.float32
    split_head: bool = False
    frozen: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    tried: set[tuple[object, ...]] = field(default_factory=set)

    @property
    def vocab(self) -> int:
        """Numbers that the output head gives for a token."""
        return int(self.model.config.vocab_size)

    def layer(self, module: str) -> Any:
        """The peft layer of a module."""
        return self.model.get_submodule(PREFIX + module)

    def parameter(self, name: str) -> torch.nn.Parameter:
        """A dense parameter by its name in the plain model."""
        return self.model.get_parameter(PREFIX + name)  # type: ignore[no-any-return]


class FrozenHook:
    """Adds the frozen part of one module to the output of its base layer, and the compensation of its quantisation."""

    def __init__(
        self, frozen: dict[str, tuple[torch.Tensor, ...]], module: str, compensation: tuple[torch.Tensor, ...] = ()
    ) -> None:
        self._frozen, self._module, self.compensation = frozen, module, compensation

    def __call__(self, _: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """The layer's output with the frozen part's added."""
        for parts in (self.compensation, self._frozen.get(self._module, ())):
            if parts:
                extra = inputs[0].to(parts[0].dtype)
                for part in parts:
                    extra = torch.nn.functional.linear(extra, part)
                output = output + extra.to(output.dtype)
        return output


def head_splits(base: Base) -> bool:
    """Whether the logits of a causal-lm are its output head on the last state of its body, and nothing else.

    Args:
        base: With empty slots.

    Returns:
        False where a model scales or caps its logits, or has no head of that kind.
    """
    model = base.model.get_base_model()
    head = model.get_output_embeddings()
    body = getattr(model, model.base_model_prefix, None)
    if head is None or body is None or body is model:
        return False
    tokens = torch.arange(8, device=base.device).remainder(base.model.config.vocab_size).unsqueeze(0)
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
        parts = head(body(input_ids=tokens, use_cache=False).last_hidden_state)
    return bool(torch.equal(whole, parts))


def last_state(base: Base, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the output head is applied to.

    Args:
        base: One whose head splits off.
        tokens: (batch, length).
        mask: (batch, length).

    Returns:
        (batch, length, hidden), in the compute format.
    """
    model = base.model.get_base_model()
    body = getattr(model, model.base_model_prefix)
    return body(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def head_of(base: Base) -> torch.nn.Module:
    """The output head.

    Args:
        base: One whose head splits off.

    Returns:
        A linear layer from hidden to vocabulary.
    """
    return base.model.get_base_model().get_output_embeddings()  # type: ignore[no-any-return]


def put(base: Base, adapter: Adapter, frozen: Frozen | None, trainable: bool = True, sides: str = "AB") -> None:
    """Put an adapter into the slots; modules that it lacks get rank 0, dense parameters that it lacks their first values.

    Args:
        base: The base; changed in place.
        adapter: What to train or evaluate.
        frozen: What rides beside it, or None.
        trainable: Whether gradients are wanted.
        sides: Of which factors, or of the core, where they are.
    """
    base.frozen.clear()
    if frozen is not None:
        base.frozen.update({m: tuple(t.to(base.device) for t in parts) for m, parts in frozen.parts.items()})
    for module, (d_out, d_in) in base.spec.modules.items():
        factors = adapter.lora.get(module)
        rows = np.zeros((0, d_in), np.float32) if factors is None else factors.A
        columns = np.zeros((d_out, 0), np.float32) if factors is None else factors.B
        layer = base.layer(module)
        for side, slot, values in (("A", layer.lora_A, rows), ("B", layer.lora_B, columns)):
            _fill(slot[SLOT], values, base.device, trainable and side in sides and values.size > 0)
        _fill_core(layer.lora_B[SLOT], factors, base.device, trainable and sides == "core")
        layer.r[SLOT], layer.scaling[SLOT] = rows.shape[0], 1.0 if factors is None else factors.scale
        # A slot of rank 0 is skipped rather than multiplied through.
        layer._disable_adapters = rows.shape[0] == 0
    for name, first in base.spec.dense.items():
        parameter = base.parameter(name)
        parameter.data.copy_(torch.tensor(adapter.dense.get(name, first)))
        parameter.requires_grad_(trainable)


def _fill(slot: Any, values: Array, device: torch.device, trainable: bool) -> None:
    """Put factors into one side of a slot, in the memory that it has where they fit exactly."""
    held = slot.weight
    if held.shape == values.shape and held.dtype == torch.float32 and held.device.type == device.type:
        held.grad = None
        held.requires_grad_(False).copy_(torch.from_numpy(np.ascontiguousarray(values, np.float32)))
        held.requires_grad_(trainable)
    else:
        tensor = torch.tensor(values, dtype=torch.float32, device=device)
        slot.weight = torch.nn.Parameter(tensor, requires_grad=trainable)


def _fill_core(slot: Any, factors: LoraFactors | None, device: torch.device, trainable: bool) -> None:
    """Put a core, or none, before the columns of a slot, as a linear layer of its own."""
    values = None if factors is None else factors.core
    if values is None or not values.size:
        slot.core = None
        return
    if core_of(slot) is None or slot.core.weight.shape != values.shape:
        rank = values.shape[0]
        slot.core = torch.nn.utils.skip_init(  # type: ignore[no-untyped-call]
            torch.nn.Linear, rank, rank, bias=False, device=device
        )
    _fill(slot.core, values, device, trainable)


def core_of(slot: Any) -> torch.nn.Linear | None:
    """The core before the columns of a slot.

    Args:
        slot: `layer.lora_B[SLOT]`.

    Returns:
        A linear layer from r to r without bias, or None.
    """
    return getattr(slot, "core", None)


def through_core(slot: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """A forward pre-hook of a slot's columns: what the rows gave goes through the core first, where there is one.

    Args:
        slot: `layer.lora_B[SLOT]`.
        inputs: (..., r).

    Returns:
        What the columns are applied to, or None for the inputs.
    """
    core = core_of(slot)
    return None if core is None else (core(inputs[0]),)


def take(base: Base) -> Adapter:
    """The adapter in the slots, as float32 copies.

    Args:
        base: The base.

    Returns:
        Modules of rank > 0, and all dense parameters of the spec.
    """
    lora = {}
    for module in base.spec.modules:
        layer = base.layer(module)
        if layer.r[SLOT] > 0:
            rows, columns = _numpy(layer.lora_A[SLOT].weight), _numpy(layer.lora_B[SLOT].weight)
            between = core_of(layer.lora_B[SLOT])
            core = None if between is None else _numpy(between.weight)
            lora[module] = LoraFactors(rows, columns, float(layer.scaling[SLOT]), core)
    return Adapter(lora, {name: _numpy(base.parameter(name)) for name in base.spec.dense})


def _numpy(tensor: torch.Tensor) -> Array:
    return tensor.detach().float().cpu().numpy().copy()


def trainable_parameters(base: Base) -> dict[str, torch.nn.Parameter]:
    """What an optimizer is to move, by a stable name, in the spec's order.

    Args:
        base: The base.

    Returns:
        `<module>.lora_A`, `<module>.lora_B`, `<module>.lora_core` and dense names.
    """
    found: dict[str, torch.nn.Parameter] = {}
    for module in base.spec.modules:
        layer = base.layer(module)
        rows, columns = layer.lora_A[SLOT], layer.lora_B[SLOT]
        slots: dict[str, Any] = {"lora_A": rows, "lora_B": columns, "lora_core": core_of(columns)}
        for name, slot in slots.items():
            if slot is not None and slot.weight.requires_grad:
                found[f"{module}.{name}"] = slot.weight
    for name in base.spec.dense:
        if base.parameter(name).requires_grad:
            found[name] = base.parameter(name)
    return found


def set_checkpointing(base: Base, on: bool) -> None:
    """Have activations computed again in the backward pass, or kept.

    Args:
        base: The base; changed in place.
        on: Which.
    """
    if on:
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.model.gradient_checkpointing_disable()


@contextmanager
def training_mode(base: Base) -> Iterator[None]:
    """Dropout and the like on, and off again.

    Args:
        base: The base.

    Yields:
        Nothing.
    """
    base.model.train()
    try:
        yield
    finally:
        base.model.eval()


def quiet() -> None:
    """Silence the progress bars and warnings of the libraries underneath; ours take their place."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for library in ("bitsandbytes", "torchao"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
