"""Making a loaded model ready: LoRA slots in every adapted module, and layers that would train wrongly mended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES

from lamina.client.model import PREFIX, SLOT, Base, FrozenHook, head_splits, put, through_core
from lamina.client.quantised import formats, int8_layers, odd_rows, selftest
from lamina.protos.adapter import Adapter
from lamina.protos.spec import AdapterSpec


def with_slots(
    model: Any, tokenizer: Any, spec: AdapterSpec, device: torch.device, number_format: str, compute: str,
    beside: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> Base:  # fmt: skip
    """A loaded model, frozen, with slots of rank 0, and tested.

    Args:
        model: Of transformers; changed in place.
        tokenizer: Of it.
        spec: With the modules to adapt and the parameters that are trained whole.
        device: Where it goes.
        number_format: Of its linear layers.
        compute: Of activations.
        beside: Module -> its compensation factors.

    Returns:
        The base.

    Raises:
        ConfigError: If a gradient is not what algebra says.
    """
    model = get_peft_model(
        model,
        PeftLoraConfig(
            r=1,
            lora_alpha=1,
            target_modules=list(spec.modules) or DUMMY_TARGET_MODULES,
            fan_in_fan_out=spec.fan_in_fan_out,
            lora_dropout=0.0,
        ),
    )
    model.requires_grad_(False)
    base = Base(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        spec=spec,
        device=device,
        format=number_format,
        dtype=formats.DTYPES[compute],
    )
    for layer in base.model.modules():  # those without slots, too: the gradient of others passes through them
        if isinstance(layer, torch.nn.Linear):
            _mend(layer, base.dtype)
    for module in spec.modules:
        factors = tuple(factor.to(device) for factor in beside.get(module, ()))
        base.layer(module).base_layer.register_forward_hook(FrozenHook(base.frozen, module, factors))
        base.layer(module).lora_B[SLOT].register_forward_pre_hook(through_core)
    for module in sorted({name.rpartition(".")[0] for name in spec.dense}) if base.dtype != torch.float32 else ():
        _in_float32(base.model.get_submodule(PREFIX + module), base.dtype)
    put(base, Adapter(), None, trainable=False)
    base.split_head = spec.task == "causal-lm" and head_splits(base)
    selftest.check(base, "at loading")
    return base


def _mend(layer: Any, dtype: torch.dtype) -> None:
    """Let a layer of bitsandbytes train as it should; another is left as it is."""
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        # Else an evaluation packs the weights for a kernel that has no gradient, and training goes on with wrong ones.
        layer.support_avx512bf16_for_cpu = False
    if hasattr(layer, "compute_dtype"):
        layer.compute_dtype = dtype  # a copy's may be another
        state = getattr(layer.weight, "quant_state", None)
        if state is not None:
            state.dtype = dtype  # in which the library gives the matrix back
        odd_rows.mend(layer)
    int8_layers.mend(layer)


def _in_float32(layer: torch.nn.Module, dtype: torch.dtype) -> None:
    """Have a layer that is trained whole keep float32 numbers in a base of 16 bits, where small steps would be rounded away."""

    def widened(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)

    layer.float()
    layer.register_forward_pre_hook(widened)
    layer.register_forward_hook(lambda _, inputs, output: output.to(dtype))


def let_go_of_the_file(model: Any) -> None:
    """Copy what is kept as it is in the file, which else stays mapped as a whole for the sake of a few parameters.

    Args:
        model: Changed in place.
    """
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter and parameter.dtype.is_floating_point:
            parameter.data = parameter.data.clone()
