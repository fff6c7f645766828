"""`lamina quantise`: a copy of a base in fewer bits, with its manifest; made beside the target and moved there whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lamina.client.hashes import hash_chat_template, hash_config, hash_tokenizer
from lamina.client.loading import (
    WEIGHTS,
    BaseOptions,
    load_model,
    load_tokenizer,
    resolved,
    weights_hash,
)
from lamina.client.quantised import compensation, copies, formats, mixed
from lamina.client.quantised.copies import Manifest
from lamina.client.quantised.layers import linear_layers, not_quantised
from lamina.protos.errors import ConfigError

_COPIED = ("nf4", "int8", "mixed", "bf16")


@dataclass(frozen=True)
class Wanted:
    """What copy to make.

    Attributes:
        source: The full-precision base.
        output: Where; must not be there yet, or be empty.
        format: `nf4`, `int8`, `mixed` or `bf16`.
        compute: Of activations and of what is not quantised.
        bits: Budget of `mixed`, a weight.
        compensation: Rank of compensation factors, 0 for none.
        revision: Commit of a hub id.
    """

    source: str
    output: Path
    format: str = "nf4"
    compute: str = "bf16"
    bits: float = 5.0
    compensation: int = 0
    revision: str = ""


def make(wanted: Wanted, say: Callable[[str], None]) -> Manifest:
    """Make a copy.

    Args:
        wanted: Which.
        say: Told what is going on.

    Returns:
        The copy's manifest.

    Raises:
        ConfigError: If the base cannot be loaded, the format is none that is copied, or the target is taken.
        OSError: If the disk does not take it; nothing is left then.
    """
    formats.check(wanted.format, wanted.compute, "format")
    if wanted.format not in _COPIED:
        raise ConfigError(f"format={wanted.format}: expected one of {', '.join(_COPIED)} for a copy.")
    if wanted.compensation < 0:
        raise ConfigError(f"compensation={wanted.compensation}: expected a rank of at least 0.")
    if wanted.output.exists() and (not wanted.output.is_dir() or any(wanted.output.iterdir())):
        raise ConfigError(f"{wanted.output}: expected no such folder, or an empty one. Name another, or remove it.")
    source = resolved(wanted.source)
    if copies.read_manifest(source) is not None:
        raise ConfigError(f"{wanted.source}: expected a full-precision base, got a quantised copy.")
    wanted.output.parent.mkdir(parents=True, exist_ok=True)
    part = wanted.output.with_name(f".{wanted.output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        manifest = _made(wanted, source, part, say)
        if wanted.output.exists():
            wanted.output.rmdir()
        part.rename(wanted.output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def _made(wanted: Wanted, source: str, part: Path, say: Callable[[str], None]) -> Manifest:
    tokenizer = load_tokenizer(source, wanted.revision)
    options = BaseOptions(wanted.source, wanted.revision, format="fp32", compute=wanted.compute)
    say(f"reading {wanted.source}")
    exact, missing = load_model(source, options, tokenizer, "auto")
    if missing:
        raise ConfigError(f"{wanted.source}: expected weights for every parameter, none for {sorted(missing)[:5]}.")
    base = {
        "weights": weights_hash(exact, missing),
        "config": hash_config(exact.config),
        "tokenizer": hash_tokenizer(tokenizer),
        "chat_template": hash_chat_template(tokenizer),
    }
    linears = linear_layers(exact)
    say(f"quantising {len(linears)} matrices to {wanted.format}")
    chosen: dict[str, str] = {}
    if wanted.format == "mixed":
        chosen = mixed.chosen(exact, linears, wanted.bits)
        smaller, _ = load_model(source, options, tokenizer, "auto")
        mixed.quantise(smaller, chosen, wanted.compute)
        _save_mixed(smaller, part)
    else:
        options = BaseOptions(wanted.source, wanted.revision, format=wanted.format, compute=wanted.compute)
        left_out = not_quantised(exact, wanted.format, wanted.compute)
        smaller, _ = load_model(source, options, tokenizer, formats.DTYPES[wanted.compute], left_out)
        smaller.save_pretrained(part)
    if wanted.compensation and wanted.format != "bf16":
        say(f"compensation of rank {wanted.compensation}")
        weights = {module: exact.get_submodule(module).weight.detach() for module in linears}
        found = compensation.of_model(smaller, weights, wanted.compensation, formats.DTYPES[wanted.compute])
        save_file(compensation.to_files(found), part / copies.COMPENSATION)
    tokenizer.save_pretrained(part)
    manifest = Manifest(
        format=wanted.format,
        compute=wanted.compute,
        base_model=wanted.source,
        base=base,
        versions={name: _version(name) for name in ("torch", "transformers", "bitsandbytes")},
        files={},
        formats=chosen,
        compensation=wanted.compensation if wanted.format != "bf16" else 0,
    )
    return copies.write_manifest(part, manifest)


def _save_mixed(model: Any, part: Path) -> None:
    """Configuration and tensors; a tensor that two names share is written under the first of them."""
    model.config.save_pretrained(part)
    seen: dict[int, str] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() and seen.setdefault(tensor.data_ptr(), name) != name:
            continue
        tensors[name] = tensor.detach().contiguous()
    save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
