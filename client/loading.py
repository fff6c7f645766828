"""Loading a base with transformers and peft: the only place that reads its files.

Weights come from safetensors files only; no code from a model repository is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from lamina.client import kinds
from lamina.client.hardware import pick_device, profile
from lamina.client.hashes import hash_chat_template, hash_config, hash_tokenizer, hash_weights
from lamina.client.model import Base, set_checkpointing
from lamina.client.quantised import compensation, copies, formats, mixed
from lamina.client.quantised.layers import linear_layers, not_quantised
from lamina.client.slots import let_go_of_the_file, with_slots
from lamina.protos import seeds
from lamina.protos.adapter import Array
from lamina.protos.errors import ConfigError
from lamina.protos.spec import AdapterSpec

TINY = Path(__file__).parent.parent / "simulations" / "tiny"
WEIGHTS = "model.safetensors"
# What transformers and safetensors raise for files that are missing, truncated or not what they claim to be.
LOADING = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


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
        kind: What is trained, see `kinds`.
        target_modules: Suffixes, or `all-linear`; of kind `lora`.
        seed: Of newly initialised parameters.
        device: `auto` or a torch device.
        format: Number format of the linear layers, of `formats.FORMATS`; `auto` is that of a copy, fp32 of another base.
        compute: Of activations and of what is not quantised: `auto`, `fp32`, `bf16` or `fp16`.
        checkpointing: Whether activations are computed again in the backward pass.
        bits: Budget of the format `mixed`, a weight.
        compensation: Rank of what is added for what quantisation loses, 0 for none; a copy's own goes with it unasked.
    """

    source: str
    revision: str = ""
    task: str = "causal-lm"
    labels: tuple[str, ...] = ()
    kind: str = "lora"
    target_modules: str | Sequence[str] = "all-linear"
    seed: int = 0
    device: str = "auto"
    format: str = "auto"
    compute: str = "auto"
    checkpointing: bool = False
    bits: float = 5.0
    compensation: int = 0


def load_base(options: BaseOptions) -> Base:
    """Load, check, hash and prepare a base.

    Args:
        options: What to load.

    Returns:
        The base with rank-0 slots in every target module.

    Raises:
        ConfigError: If the model cannot be loaded, lacks weights for a causal-lm, has none of the target modules or nothing of
            the kind to train, or cannot be had in the number format.
    """
    source = resolved(options.source)
    tokenizer = load_tokenizer(source, options.revision)
    copy = copies.read_manifest(source)
    if copy is not None:
        copies.check_files(Path(source), copy)
    device = pick_device(options.device)
    options = _with_format(options, copy, device)
    compute = formats.DTYPES[options.compute]
    known = dict(copy.base) if copy else {}
    left_out: Sequence[str] = ()
    first: dict[str, Array] = {}  # of what is trained whole, the same values in whatever format
    whole: set[str] = set()  # modules of these, which are not quantised
    exact: dict[str, torch.Tensor] = {}
    if not copy and options.format != "fp32":
        # The hashes are those of the full-precision base, which is dropped before the smaller one is made, or becomes it.
        model, missing = load_model(source, replace(options, format="fp32"), tokenizer, "auto")
        first = _values(model, kinds.whole(model, options.kind, options.task, missing))
        linears = linear_layers(model)
        whole = {name.rpartition(".")[0] for name in missing} | (
            {name.rpartition(".")[0] for name in first} & set(linears)
        )
        left_out = [*not_quantised(model, options.format, options.compute), *sorted(whole)]
        known = {"weights": weights_hash(model, missing), "config": hash_config(model.config)}
        if options.compensation:
            kept = [module for module in linears if module not in whole]
            exact = {module: model.get_submodule(module).weight.detach() for module in kept}
    if options.format == "mixed" and copy is None:
        shapes = {module: shape for module, shape in linear_layers(model).items() if module not in whole}
        mixed.quantise(model, mixed.chosen(model, shapes, options.bits), options.compute)
    else:
        model = None
        model, missing = load_model(source, options, tokenizer, compute, left_out)
    if copy is not None:
        _check_format(model, copy, source)
    beside = _of_copy(source, copy) if copy else compensation.of_model(model, exact, options.compensation, compute)
    exact.clear()
    new = tuple(sorted(missing))
    if new and options.task == "causal-lm":
        raise ConfigError(
            f"{options.source}: expected weights for every parameter, none for {list(new)[:5]}. Use a causal-lm."
        )
    hashes = {
        "weights": known.get("weights") or weights_hash(model, missing),
        "config": known.get("config") or hash_config(model.config),
        "tokenizer": hash_tokenizer(tokenizer),
        "chat_template": hash_chat_template(tokenizer),
    }
    targets = kinds.adapted(model, options.kind, options.target_modules, new)
    spec = AdapterSpec(
        modules=targets,
        task=options.task,
        labels=options.labels,
        dense=first or _values(model, kinds.whole(model, options.kind, options.task, new)),
        base_model=copy.base_model if copy else options.source,
        hashes=hashes,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
    )
    if options.format != "fp32" and copy is None:
        let_go_of_the_file(model)
    base = with_slots(model, tokenizer, spec, device, options.format, options.compute, beside)
    base.revision = getattr(model.config, "_commit_hash", None) or options.revision
    if options.checkpointing:
        set_checkpointing(base, True)
    return base


def _values(model: Any, names: Sequence[str]) -> dict[str, Array]:
    """Copies in float32."""
    found = {name: model.get_parameter(name).detach() for name in names}
    codes = [name for name, values in found.items() if not values.dtype.is_floating_point]
    if codes:
        raise ConfigError(f"adapter.kind: expected numbers to train, got the codes of a quantised copy in {codes[:3]}.")
    return {name: values.float().cpu().numpy().copy() for name, values in found.items()}


def _with_format(options: BaseOptions, copy: copies.Manifest | None, device: torch.device) -> BaseOptions:
    """The options with the copy's format where it is one, and with the compute format decided."""
    number_format = options.format
    if copy is not None:
        if number_format not in ("auto", copy.format):
            raise ConfigError(
                f"quantisation.format={number_format}: expected {copy.format}, the format of the copy "
                f"model.source={options.source}. Name the full-precision base, or another copy."
            )
        if options.compensation not in (0, copy.compensation):
            raise ConfigError(
                f"quantisation.compensation={options.compensation}: expected {copy.compensation}, the rank of the copy "
                f"model.source={options.source}. Name the full-precision base, or another copy."
            )
        number_format = copy.format
    elif number_format == "auto":
        number_format = "fp32"
    compute = options.compute
    if compute == "auto":
        compute = formats.compute_of(copy.compute if copy else "", number_format, profile(device.type))
    formats.check(number_format, compute)
    return replace(options, format=number_format, compute=compute)


def weights_hash(model: Any, missing: set[str]) -> str:
    """The hash of a base's weights.

    Args:
        model: In full precision.
        missing: Parameters that its files lack.

    Returns:
        Hex.
    """
    return hash_weights({name: p for name, p in model.state_dict().items() if name not in missing})


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
    except LOADING as error:
        raise ConfigError(f"{source}: expected a tokenizer, got: {first_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(
    source: str, options: BaseOptions, tokenizer: Any, dtype: torch.dtype | str, left_out: Sequence[str] = ()
) -> tuple[Any, set[str]]:
    """A model as transformers loads it.

    Args:
        source: See `resolved`.
        options: Format, task, labels, seed.
        tokenizer: For its padding token.
        dtype: Of what is not quantised, or `auto` for that of the files.
        left_out: Modules that are not to be quantised.

    Returns:
        The model, and the names of the parameters that its files lack and that were drawn.

    Raises:
        ConfigError: If its files are not those of such a model.
    """
    copy = copies.read_manifest(source)
    if copy is not None and copy.format == "mixed":
        return _mixed_copy(source, copy, options), set()
    torch.manual_seed(seeds.integer(options.seed, "new-parameters"))
    arguments: dict[str, Any] = {
        "revision": options.revision or "main",
        "dtype": dtype,
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    quantisation = formats.transformers_config(options.format, options.compute, left_out)
    if quantisation is not None and copy is None:
        arguments["quantization_config"] = quantisation
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
    except LOADING as error:
        raise ConfigError(
            f"model.source={options.source}: expected a {options.task} model with safetensors weights, got: "
            f"{first_line(error)} Check the directory or hub id, model.revision, and the network."
        ) from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    return model, set(info["missing_keys"])


def _mixed_copy(source: str, copy: copies.Manifest, options: BaseOptions) -> Any:
    """A model from the files of a mixed copy: built without weights, its layers replaced, then filled."""
    if options.task != "causal-lm":
        raise ConfigError(
            f"model.source={options.source}: expected task=causal-lm with a mixed copy, got {options.task}."
        )
    dtype = formats.DTYPES[copy.compute]
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        with init_empty_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        for module, number_format in copy.formats.items():
            plain = model.get_submodule(module)
            parent, _, name = module.rpartition(".")
            made = mixed.empty(
                plain.in_features, plain.out_features, plain.bias is not None, number_format, copy.compute
            )
            setattr(model.get_submodule(parent), name, made)
        mixed.fill(model, load_file(Path(source) / WEIGHTS), copy.formats)
        model.tie_weights()
    except LOADING as error:
        raise ConfigError(
            f"model.source={options.source}: expected the files of a mixed copy, got: {first_line(error)} Make the copy again."
        ) from None
    mixed.mark(model)
    return model


def first_line(error: BaseException) -> str:
    """The first line of an error's text.

    Args:
        error: Anything.

    Returns:
        Its kind where it has no text.
    """
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _check_format(model: Any, copy: copies.Manifest, source: str) -> None:
    """Raise where the files of a copy are in another format than its manifest says."""
    layers = {type(module).__name__ for module in model.modules()} & {"Linear4bit", "Linear8bitLt"}
    expected = {"nf4": {"Linear4bit"}, "int8": {"Linear8bitLt"}}.get(copy.format, set())
    if copy.format != "mixed" and layers != expected:
        raise ConfigError(
            f"{source}: expected files in {copy.format}, as {copies.MANIFEST} says, got others. Make the copy again."
        )


def _of_copy(source: str, copy: copies.Manifest) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The compensation factors of a copy, if it has some."""
    if not copy.compensation:
        return {}
    file = Path(source) / copies.COMPENSATION
    try:
        return compensation.from_files(load_file(file))
    except LOADING as error:
        raise ConfigError(
            f"{file}: expected compensation factors, got: {first_line(error)} Make the copy again."
        ) from None
