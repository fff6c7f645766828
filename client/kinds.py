"""What of a model is trained: by `adapter.kind` the modules that get factors, and the parameters that are trained whole.

- `lora`: factors in linear layers; what a classifier has to draw anew, whole.
- `norm`: the scale, and the shift where there is one, of every LayerNorm and RMSNorm; a classifier's head beside. Scale and
  shift of every feature are what FiLM layers learn: the arm that tunes few parameters in FedPEFT (Sun et al. 2022,
  arXiv:2210.01708) and in few-shot classification under privacy (Tobaben et al. 2023, arXiv:2302.01190).
- `head`: a classifier's head alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from lamina.protos.errors import ConfigError

_NORMS = ("LayerNorm", "RMSNorm")  # as the names of their classes end


def adapted(model: Any, kind: str, wanted: str | Sequence[str], new: Collection[str]) -> dict[str, tuple[int, int]]:
    """The modules that get factors, by full name, with (d_out, d_in).

    Args:
        model: A transformers model.
        kind: See `adapter.kind`.
        wanted: Suffixes such as `q_proj`, or `all-linear`: every linear layer but the output head.
        new: Newly initialised parameters; their modules are trained whole instead.

    Returns:
        Module -> shape, in the model's order; none unless the kind is `lora`.

    Raises:
        ConfigError: If a suffix matches nothing; the suffixes that exist are listed.
    """
    if kind != "lora":
        return {}
    head = model.get_output_embeddings()
    whole = {name.rsplit(".", 1)[0] for name in new}
    linear: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if module is head or name in whole:
            continue
        if isinstance(module, torch.nn.Linear):
            linear[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            linear[name] = (int(module.weight.shape[1]), int(module.weight.shape[0]))
    suffixes = [wanted] if isinstance(wanted, str) else list(wanted)
    if suffixes == ["all-linear"]:
        return linear
    for suffix in suffixes:
        if not any(_matches(name, suffix) for name in linear):
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ConfigError(f"lora.target_modules: this model has no {suffix!r}. It has: {', '.join(known)}.")
    return {name: shape for name, shape in linear.items() if any(_matches(name, suffix) for suffix in suffixes)}


def _matches(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def whole(model: Any, kind: str, task: str, new: Collection[str]) -> tuple[str, ...]:
    """The parameters that are trained whole.

    Args:
        model: A transformers model, in whatever number format.
        kind: See `adapter.kind`.
        task: `causal-lm` or `sequence-classification`.
        new: Newly initialised parameters.

    Returns:
        Names in order. A head, with `norm` and `head`, is all outside of the classifier's body and whatever is new.

    Raises:
        ConfigError: If there are none of that kind.
    """
    if kind == "lora":
        return tuple(sorted(new))
    found = set(new)
    if task == "sequence-classification":
        body = f"{model.base_model_prefix}."
        found |= {name for name, _ in model.named_parameters() if not name.startswith(body)}
    elif kind == "head":
        raise ConfigError(
            "adapter.kind=head: expected task=sequence-classification, got causal-lm, whose output head is as large as its "
            "vocabulary. Set adapter.kind=norm or lora."
        )
    if kind == "norm":
        norms = {name for name, module in model.named_modules() if _is_norm(module)}
        if not norms:
            raise ConfigError(
                "adapter.kind=norm: expected a model with LayerNorm or RMSNorm, found none. Set adapter.kind=lora."
            )
        found |= {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in norms}
    return tuple(sorted(found))


def _is_norm(module: Any) -> bool:
    name = type(module).__name__
    own = [parameter for _, parameter in module.named_parameters(recurse=False)]
    return name.endswith(_NORMS) and bool(own) and all(parameter.dim() == 1 for parameter in own)
