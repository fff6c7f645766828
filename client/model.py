"""The one file that talks to transformers and peft: load a frozen base, put adapters in and take them out.

One base stays in memory. Adapters are swapped by replacing the factor parameters in place, so ranks may differ from client to
client without a copy of the model. A frozen part rides beside the trainable one, in factors or, where smaller, as one matrix.
Weights come from safetensors files only; no code from a model repository is run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors import SafetensorError
from transformers.pytorch_utils import Conv1D

from lamina.client.frozen import Frozen
from lamina.client.hashes import hash_chat_template, hash_config, hash_tokenizer, hash_weights
from lamina.protos import seeds
from lamina.protos.adapter import Adapter, Array, LoraFactors
from lamina.protos.errors import ConfigError
from lamina.protos.spec import AdapterSpec

TINY = Path(__file__).parent.parent / "simulations" / "tiny"
_SLOT = "default"
# What transformers and safetensors raise for files that are missing, truncated or not what they claim to be.
_LOADING = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
_PREFIX = "base_model.model."


@dataclass(eq=False)
class Base:
    """A loaded base with LoRA slots. `model` is the peft-wrapped module, `spec` what adapters of it must fit."""

    model: Any
    tokenizer: Any
    spec: AdapterSpec
    device: torch.device
    revision: str = ""
    frozen: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def layer(self, module: str) -> Any:
        """The peft layer of a module."""
        return self.model.get_submodule(_PREFIX + module)

    def parameter(self, name: str) -> torch.nn.Parameter:
        """A dense parameter by its name in the plain model."""
        return self.model.get_parameter(_PREFIX + name)  # type: ignore[no-any-return]


def resolved(source: str) -> str:
    """The directory or hub id behind `model.source`.

    Args:
        source: `tiny`, a directory, or a hub id.

    Returns:
        What transformers loads.

    Raises:
        ConfigError: If it looks like a path and is none.
    """
    if source == "tiny":
        return str(TINY)
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model.source={source}: expected a model directory with config.json, found none there.")
        return str(path)
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ConfigError(
            f"model.source={source}: expected tiny, a model directory or a hub id owner/name. No such directory."
        )
    return source


@dataclass(frozen=True)
class BaseOptions:
    """How to load a base.

    Attributes:
        source: See `resolved`.
        revision: Commit of a hub id.
        task: `causal-lm` or `sequence-classification`.
        labels: Ordered label list, for classification.
        target_modules: Suffixes, or `all-linear`.
        seed: Of newly initialised parameters.
        device: `auto` or a torch device.
    """

    source: str
    revision: str = ""
    task: str = "causal-lm"
    labels: tuple[str, ...] = ()
    target_modules: str | Sequence[str] = "all-linear"
    seed: int = 0
    device: str = "auto"


def pick_device(name: str) -> torch.device:
    """The device to train on.

    Args:
        name: `auto` takes cuda, xpu, mps or cpu, the first there is.

    Returns:
        A torch device.

    Raises:
        ConfigError: If the device asked for is not there.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "xpu": torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return torch.device(next((kind for kind, there in present.items() if there), "cpu"))
    if not present.get(name, name == "cpu"):
        raise ConfigError(
            f"train.device={name}: expected a device that is here, got none. Set train.device=cpu or auto."
        )
    return torch.device(name)


def load_base(options: BaseOptions) -> Base:
    """Load, check, hash and prepare a base.

    Args:
        options: What to load.

    Returns:
        The base with rank-0 slots in every target module.

    Raises:
        ConfigError: If the model cannot be loaded, lacks weights for a causal-lm, or has none of the target modules.
    """
    source = resolved(options.source)
    tokenizer = load_tokenizer(source, options.revision)
    model, missing = _load_model(source, options, tokenizer)
    new = tuple(sorted(missing))
    if new and options.task == "causal-lm":
        raise ConfigError(
            f"{options.source}: expected weights for every parameter, none for {list(new)[:5]}. Use a causal-lm."
        )
    weights = {name: p for name, p in model.state_dict().items() if name not in missing}
    hashes = {
        "weights": hash_weights(weights),
        "config": hash_config(model.config),
        "tokenizer": hash_tokenizer(tokenizer),
        "chat_template": hash_chat_template(tokenizer),
    }
    targets = target_modules(model, options.target_modules, new)
    dense = {name: model.get_parameter(name).detach().float().cpu().numpy().copy() for name in new}
    spec = AdapterSpec(
        modules=targets,
        task=options.task,
        labels=options.labels,
        dense=dense,
        base_model=options.source,
        hashes=hashes,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
    )
    revision = getattr(model.config, "_commit_hash", None) or options.revision
    return _with_slots(model, tokenizer, spec, pick_device(options.device), revision)


def check_length(base: Base, max_length: int) -> None:
    """Raise unless the base's positions reach as far as examples may.

    Args:
        base: The base.
        max_length: Tokens in an example.

    Raises:
        ConfigError: If they do not.
    """
    longest = getattr(base.model.config, "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise ConfigError(
            f"train.max_length={max_length}: expected at most {longest}, what the base's positions reach."
        )


def load_tokenizer(source: str, revision: str = "") -> Any:
    """The tokenizer, with a padding token.

    Args:
        source: Directory or hub id.
        revision: Commit of a hub id.

    Returns:
        A transformers tokenizer; `pad_token` falls back to the end-of-text token.

    Raises:
        ConfigError: If there is none.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=False
        )
    except _LOADING as error:
        raise ConfigError(f"{source}: expected a tokenizer, got: {_first_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _load_model(source: str, options: BaseOptions, tokenizer: Any) -> tuple[Any, set[str]]:
    torch.manual_seed(seeds.integer(options.seed, "new-parameters"))
    arguments: dict[str, Any] = {
        "revision": options.revision or "main",
        "dtype": torch.float32,
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    auto = transformers.AutoModelForCausalLM
    if options.task == "sequence-classification":
        auto = transformers.AutoModelForSequenceClassification
        arguments["id2label"] = dict(enumerate(options.labels))
        arguments["label2id"] = {label: index for index, label in enumerate(options.labels)}
        arguments["num_labels"] = len(options.labels)
        arguments["pad_token_id"] = tokenizer.pad_token_id
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        model, info = auto.from_pretrained(source, **arguments)
    except _LOADING as error:
        raise ConfigError(
            f"model.source={options.source}: expected a {options.task} model with safetensors weights, got: "
            f"{_first_line(error)} Check the directory or hub id, model.revision, and the network."
        ) from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    return model, set(info["missing_keys"])


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def target_modules(model: Any, wanted: str | Sequence[str], new: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The modules to adapt, by full name, with (d_out, d_in).

    Args:
        model: A transformers model.
        wanted: Suffixes such as `q_proj`, or `all-linear`: every linear layer but the output head.
        new: Newly initialised parameters; their modules are trained whole instead.

    Returns:
        Module -> shape, in the model's order.

    Raises:
        ConfigError: If a suffix matches nothing; the suffixes that exist are listed.
    """
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


def _with_slots(model: Any, tokenizer: Any, spec: AdapterSpec, device: torch.device, revision: str) -> Base:
    model = get_peft_model(
        model,
        PeftLoraConfig(
            r=1, lora_alpha=1, target_modules=list(spec.modules), fan_in_fan_out=spec.fan_in_fan_out, lora_dropout=0.0
        ),
    )
    model.requires_grad_(False)
    base = Base(model.to(device).eval(), tokenizer, spec, device, revision)
    for module in spec.modules:
        base.layer(module).base_layer.register_forward_hook(_FrozenHook(base.frozen, module))
    put(base, Adapter(), None, trainable=False)
    return base


class _FrozenHook:
    """Adds the frozen part of one module to the output of its base layer."""

    def __init__(self, frozen: dict[str, tuple[torch.Tensor, ...]], module: str) -> None:
        self._frozen, self._module = frozen, module

    def __call__(self, _: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        parts = self._frozen.get(self._module)
        if parts is None:
            return output
        extra = inputs[0].to(parts[0].dtype)
        for part in parts:
            extra = torch.nn.functional.linear(extra, part)
        return output + extra.to(output.dtype)


def put(base: Base, adapter: Adapter, frozen: Frozen | None, trainable: bool = True) -> None:
    """Put an adapter into the slots; modules that it lacks get rank 0, dense parameters that it lacks their first values.

    Args:
        base: The base; changed in place.
        adapter: What to train or evaluate.
        frozen: What rides beside it, or None.
        trainable: Whether gradients are wanted.
    """
    base.frozen.clear()
    if frozen is not None:
        base.frozen.update({m: tuple(t.to(base.device) for t in parts) for m, parts in frozen.parts.items()})
    for module, (d_out, d_in) in base.spec.modules.items():
        factors = adapter.lora.get(module)
        rows = np.zeros((0, d_in), np.float32) if factors is None else factors.A
        columns = np.zeros((d_out, 0), np.float32) if factors is None else factors.B
        layer = base.layer(module)
        for slot, values in ((layer.lora_A, rows), (layer.lora_B, columns)):
            tensor = torch.tensor(values, dtype=torch.float32, device=base.device)
            slot[_SLOT].weight = torch.nn.Parameter(tensor, requires_grad=trainable and tensor.numel() > 0)
        layer.r[_SLOT], layer.scaling[_SLOT] = rows.shape[0], 1.0 if factors is None else factors.scale
        # A slot of rank 0 is skipped rather than multiplied through.
        layer._disable_adapters = rows.shape[0] == 0
    for name, first in base.spec.dense.items():
        parameter = base.parameter(name)
        parameter.data.copy_(torch.tensor(adapter.dense.get(name, first)))
        parameter.requires_grad_(trainable)


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
        if layer.r[_SLOT] > 0:
            rows, columns = _numpy(layer.lora_A[_SLOT].weight), _numpy(layer.lora_B[_SLOT].weight)
            lora[module] = LoraFactors(rows, columns, float(layer.scaling[_SLOT]))
    return Adapter(lora, {name: _numpy(base.parameter(name)) for name in base.spec.dense})


def _numpy(tensor: torch.Tensor) -> Array:
    return tensor.detach().float().cpu().numpy().copy()


def trainable_parameters(base: Base) -> dict[str, torch.nn.Parameter]:
    """What an optimizer is to move, by a stable name, in the spec's order.

    Args:
        base: The base.

    Returns:
        `<module>.lora_A`, `<module>.lora_B` and dense names.
    """
    found: dict[str, torch.nn.Parameter] = {}
    for module in base.spec.modules:
        layer = base.layer(module)
        for name, slot in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            if slot[_SLOT].weight.requires_grad:
                found[f"{module}.{name}"] = slot[_SLOT].weight
    for name in base.spec.dense:
        if base.parameter(name).requires_grad:
            found[name] = base.parameter(name)
    return found


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
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
