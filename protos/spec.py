"""The negotiated schema of a run: which modules are adapted, their shapes, the labels, and the base model's hashes.

The coordinator needs only this file to check adapters and to write them out; it never loads the model.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lamina.protos.adapter import Adapter, Array, LoraFactors
from lamina.protos.errors import AdapterMismatch, ConfigError


@dataclass(frozen=True, eq=False)
class AdapterSpec:
    """What every adapter of a run must fit.

    Attributes:
        modules: Module name -> (d_out, d_in) of its frozen weight.
        task: `causal-lm` or `sequence-classification`.
        labels: Ordered label list; empty for causal-lm.
        dense: Name -> initial value, float32, of each parameter that is trained whole.
        base_model: What the base was called: a name, directory or hub id.
        hashes: SHA-256 (hex) over `weights`, `config`, `tokenizer` and `chat_template` of the full-precision base.
        fan_in_fan_out: Whether the base keeps the weights of these modules transposed, as GPT-2 does.
    """

    modules: Mapping[str, tuple[int, int]]
    task: str = "causal-lm"
    labels: tuple[str, ...] = ()
    dense: Mapping[str, Array] = field(default_factory=dict)
    base_model: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    def clamped(self, rank: int, module: str) -> int:
        """A rank cut to what the module's shape admits.

        Args:
            rank: The rank asked for.
            module: A module of this spec.

        Returns:
            min(rank, d_out, d_in).
        """
        return min(rank, *self.modules[module])

    def check(self, adapter: Adapter, where: str = "adapter", sides: str = "AB") -> None:
        """Raise unless the adapter fits: known modules, their shapes, known dense parameters, their shapes.

        Args:
            adapter: Any adapter. Modules may be missing: a client need not train them all.
            where: Put before the message, such as `client 17, round 3`.
            sides: The factors that it must hold, or `core`; one that is not named must have width 0.

        Raises:
            AdapterMismatch: Naming the first module that does not fit.
        """
        for module, factors in adapter.lora.items():
            self._check_module(module, factors, where, sides)
        for name, value in adapter.dense.items():
            if name not in self.dense:
                raise AdapterMismatch(f"{where}: expected dense parameters {sorted(self.dense)}, got {name!r}.")
            if value.shape != self.dense[name].shape:
                raise AdapterMismatch(
                    f"{where}: expected {name} of shape {self.dense[name].shape}, got {value.shape}. "
                    "Check that both sides have one label list."
                )

    def _check_module(self, module: str, factors: LoraFactors, where: str, sides: str) -> None:
        if module not in self.modules:
            raise AdapterMismatch(f"{where}: expected modules of the spec, got {module!r}. Check lora.target_modules.")
        d_out, d_in = (size if side in sides else 0 for side, size in zip("BA", self.modules[module], strict=True))
        rank = factors.rank
        if (factors.core is not None) != (sides == "core"):
            wanted, got = ("a lora_core", "none") if sides == "core" else ("no lora_core", "one")
            raise AdapterMismatch(
                f"{where}: expected {wanted} for {module}, got {got}. Check strategy.name on both sides."
            )
        if factors.A.shape != (rank, d_in) or factors.B.shape != (d_out, rank):
            raise AdapterMismatch(
                f"{where}: expected {module}.lora_A of shape (r, {d_in}) and lora_B of shape ({d_out}, r), "
                f"got {factors.A.shape} and {factors.B.shape}. Check that both sides have one base model."
            )

    def to_json(self) -> str:
        """The spec as JSON text, dense values as base64 of little-endian float32.

        Returns:
            A document that `from_json` reads.
        """
        dense = {
            name: {"shape": list(v.shape), "float32": base64.b64encode(v.astype("<f4").tobytes()).decode()}
            for name, v in self.dense.items()
        }
        document = {
            "schema": 1,
            "task": self.task,
            "labels": list(self.labels),
            "base_model": self.base_model,
            "hashes": dict(self.hashes),
            "fan_in_fan_out": self.fan_in_fan_out,
            "modules": {name: list(shape) for name, shape in self.modules.items()},
            "dense": dense,
        }
        return json.dumps(document, indent=1)


def from_json(text: str | bytes, where: str = "spec.json") -> AdapterSpec:
    """Read a spec.

    Args:
        text: What `AdapterSpec.to_json` wrote; bytes as UTF-8.
        where: File name for messages.

    Returns:
        The spec.

    Raises:
        ConfigError: If the text is no spec.
    """
    try:
        document = json.loads(text)
        dense = {
            name: np.frombuffer(base64.b64decode(v["float32"]), dtype="<f4").reshape(v["shape"]).astype(np.float32)
            for name, v in document["dense"].items()
        }
        labels, hashes = tuple(document["labels"]), dict(document["hashes"])
        texts = (document["task"], document["base_model"], *labels, *hashes.values())
        if not all(isinstance(one, str) for one in texts):
            raise TypeError("task, base_model, a label or a hash is no text")
        return AdapterSpec(
            modules={name: (int(shape[0]), int(shape[1])) for name, shape in document["modules"].items()},
            task=document["task"],
            labels=labels,
            dense=dense,
            base_model=document["base_model"],
            hashes=hashes,
            fan_in_fan_out=bool(document.get("fan_in_fan_out", False)),
        )
    except (
        ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        got = f"{type(error).__name__}: {error}"[:200]
        raise ConfigError(f"{where}: expected a spec written by `lamina spec MODEL`, got {got}.") from None


def read(path: Path) -> AdapterSpec:
    """Read `spec.json`.

    Args:
        path: The file.

    Returns:
        The spec.

    Raises:
        ConfigError: If the file is missing or no spec.
    """
    try:
        return from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: expected a spec file, got {error}. Write one with `lamina spec MODEL`.") from None
