"""Adapters and updates to bytes and back: safetensors layout, four number formats, every check before use.

Formats: `fp32`; `bf16` and `fp16`, rounded to nearest even; `int8` with one float32 scale per rank row (a row of A, a
column of B, a row of a core) and stochastic rounding, unbiased but for the row's largest entry, whose relative error is below
2**-16.
Decoding and encoding again gives the same numbers in every format, so an adapter that nobody trained costs nothing.
Dense parameters travel in float32 under int8. Values are not trusted: finiteness and shapes are checked by the receiver.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lamina.protos.adapter import Adapter, Array, Lazy, LoraFactors
from lamina.protos.blobs import Blob
from lamina.protos.errors import AdapterMismatch, UpdateRejected
from lamina.protos.layout import LayoutError, Tensor, canonical, parse
from lamina.protos.messages import Update

WireFormat = Literal["fp32", "bf16", "fp16", "int8"]
WIRE_FORMATS: tuple[WireFormat, ...] = ("fp32", "bf16", "fp16", "int8")
BYTES_PER_NUMBER: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}

MAX_MESSAGE_BYTES = 16 * 1024**3
_DTYPES: Mapping[str, tuple[str, Any]] = {
    "fp32": ("F32", np.float32),
    "bf16": ("U16", np.uint16),
    "fp16": ("F16", np.float16),
    "int8": ("I8", np.int8),
}
_A, _B, _CORE = ".lora_A.weight", ".lora_B.weight", ".lora_core.weight"
_FACTORS = (_A, _B, _CORE)
_ROW_SCALE = ".row_scale"


def to_bf16(values: Array) -> Array:
    """Round float32 to bfloat16, nearest even, kept as its 16 bits.

    Args:
        values: Float array, any shape.

    Returns:
        uint16 array of the same shape. NaN stays NaN.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    """The float32 values of bfloat16 bits.

    Args:
        bits: uint16 array.

    Returns:
        float32 array of the same shape.
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_int8(values: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Stochastically round each row to int8 steps of its own scale.

    The scale keeps 16 bits of mantissa, so that `127 * scale` is exact and encoding what was decoded gives the same
    bytes. Entries within 2**-14 of a step are taken as that step.

    Args:
        values: (rows, columns), finite.
        rng: Source of the rounding.

    Returns:
        int8 (rows, columns) and float32 scales (rows,); a zero row has scale 0.
    """
    values = np.asarray(values, dtype=np.float32)
    largest = np.abs(values).max(axis=1, initial=0.0).astype(np.float32)
    bits = (largest / np.float32(127)).view(np.uint32)
    scales = ((bits + 0x80) & np.uint32(0xFFFFFF00)).view(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(scales[:, None] > 0, values.astype(np.float64) / scales[:, None].astype(np.float64), 0.0)
    # The scale may have been rounded up: the largest entry is 127 steps all the same, or a second encoding would shrink it.
    steps = np.where(np.abs(values) == largest[:, None], np.sign(steps) * 127.0, steps)
    near = np.rint(steps)
    drawn = np.floor(steps + rng.random(steps.shape))
    steps = np.where(np.abs(steps - near) < 2.0**-14, near, drawn)
    return np.clip(steps, -127, 127).astype(np.int8), scales


def encode(adapter: Adapter, wire: WireFormat, rng: np.random.Generator | None = None) -> bytes:
    """Adapter to bytes.

    Args:
        adapter: Finite float arrays.
        wire: Number format of the factors.
        rng: Needed by `int8` only.

    Returns:
        A safetensors file with `wire` and `scales` in its metadata.

    Raises:
        AdapterMismatch: If a number overflows fp16, or `int8` comes without `rng`.
    """
    tensors, metadata = _tensors(adapter, wire, rng)
    return canonical(tensors, metadata)


def _tensors(
    adapter: Adapter, wire: WireFormat, rng: np.random.Generator | None
) -> tuple[dict[str, Array], dict[str, str]]:
    tensors: dict[str, Array] = {}
    # In the order of names, so that stochastic rounding does not depend on how the adapter came about.
    for module, factors in sorted(adapter.lora.items()):
        tensors.update(_packed(module + _A, factors.A, wire, rng))
        tensors.update({k: v.T if v.ndim == 2 else v for k, v in _packed(module + _B, factors.B.T, wire, rng).items()})
        if factors.core is not None:
            tensors.update(_packed(module + _CORE, factors.core, wire, rng))
    for name, value in sorted(adapter.dense.items()):
        shaped = value.reshape(1, -1)
        dense_wire: WireFormat = "fp32" if wire == "int8" else wire
        tensors.update({k: v.reshape(value.shape) for k, v in _packed(name, shaped, dense_wire, rng).items()})
    scales = {module: factors.scale for module, factors in adapter.lora.items()}
    return {k: np.asarray(v, order="C") for k, v in tensors.items()}, {
        "wire": wire,
        "scales": json.dumps(scales, sort_keys=True),
    }


def _packed(name: str, values: Array, wire: WireFormat, rng: np.random.Generator | None) -> dict[str, Array]:
    if wire == "fp32":
        return {name: values.astype(np.float32, copy=False)}
    if wire == "bf16":
        return {name: to_bf16(values)}
    if wire == "fp16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.isinf(half).any():
            raise AdapterMismatch(f"{name}: a number above 65504 does not fit fp16. Use wire=bf16 or fp32.")
        return {name: half}
    if rng is None:
        raise AdapterMismatch("int8 needs a random generator for its rounding. Pass rng.")
    steps, scales = to_int8(values, rng)
    return {name: steps} if values.size == 0 else {name: steps, name + _ROW_SCALE: scales}


@dataclass(frozen=True)
class _Parsed:
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def _parse(payload: bytes | Path, num_bytes: int, max_bytes: int) -> _Parsed:
    if num_bytes > max_bytes:
        raise UpdateRejected("too-large", f"expected at most {max_bytes} bytes, got {num_bytes}. Lower the rank.")
    try:
        metadata, tensors = parse(payload, num_bytes, dict(_DTYPES.values()))
    except LayoutError as error:
        raise UpdateRejected("malformed", f"expected a safetensors file, {error}. Send it again.") from None
    return _Parsed(tensors, metadata)


def decode(payload: bytes, max_bytes: int = MAX_MESSAGE_BYTES) -> Adapter:
    """Bytes to an adapter of float32 arrays.

    Args:
        payload: What `encode` made, or anything else.
        max_bytes: Refuse larger payloads before anything is parsed.

    Returns:
        The adapter as the receiver holds it.

    Raises:
        UpdateRejected: For any payload that `encode` could not have made.
    """
    return loaded(_adapter(_parse(payload, len(payload), max_bytes)))


def opened(blob: Blob, max_bytes: int = MAX_MESSAGE_BYTES) -> Adapter:
    """A blob to an adapter of float32 arrays; from a file, a module is read when it is asked for.

    Args:
        blob: What `encode` made, or anything else.
        max_bytes: Refuse larger blobs before anything is parsed.

    Returns:
        The adapter. From a file its mappings hold no arrays, so that many adapters take the memory of one layer.

    Raises:
        UpdateRejected: For any content that `encode` could not have made.
    """
    if isinstance(blob.content, bytes):
        return decode(blob.content, max_bytes)
    return _adapter(_parse(blob.content, blob.num_bytes, max_bytes))


def loaded(adapter: Adapter) -> Adapter:
    """The same adapter with every array in memory.

    Args:
        adapter: Perhaps a lazy one.

    Returns:
        Plain dictionaries of arrays.
    """
    return Adapter(dict(adapter.lora.items()), dict(adapter.dense.items()))


def _adapter(parsed: _Parsed) -> Adapter:
    """Check names, number formats and shapes, all from the header; arrays are read later."""
    try:
        scales = json.loads(parsed.metadata.get("scales", "{}"))
        wire = parsed.metadata["wire"]
        code = _DTYPES[wire][1]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UpdateRejected(
            "malformed", "expected metadata `wire` and `scales`. Send it with lamina's codec."
        ) from None
    if not isinstance(scales, dict) or not all(_is_number(value) for value in scales.values()):
        raise UpdateRejected("malformed", "expected `scales` to map modules to positive numbers.")
    tensors = parsed.tensors
    row_scales = {name + _ROW_SCALE for name, tensor in tensors.items() if _by_row(name, tensor, wire)}
    names = [name for name in tensors if name not in row_scales]
    for name in names:
        _check_format(name, tensors, wire, code)
    a_side = {name[: -len(_A)] for name in names if name.endswith(_A)}
    b_side = {name[: -len(_B)] for name in names if name.endswith(_B)}
    cores = {name[: -len(_CORE)] for name in names if name.endswith(_CORE)}
    if a_side != b_side or a_side != set(scales) or not cores <= a_side:
        odd = sorted((a_side ^ b_side) | (a_side ^ set(scales)) | (cores - a_side))[:3]
        raise UpdateRejected(
            "schema", f"expected lora_A, lora_B and a scale for each module, one is missing for {odd}."
        )
    for module in a_side:
        a, b = tensors[module + _A].shape, tensors[module + _B].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UpdateRejected("schema", f"expected lora_A (r, d_in) and lora_B (d_out, r), got {a} and {b}.")
        if module in cores and (core := tensors[module + _CORE].shape) != (a[0], a[0]):
            raise UpdateRejected("schema", f"expected lora_core ({a[0]}, {a[0]}), got {core}.")

    def values(name: str) -> Array:
        return _unpacked(name, tensors, wire)

    def factors(module: str) -> LoraFactors:
        core = values(module + _CORE) if module in cores else None
        return LoraFactors(values(module + _A), values(module + _B), float(scales[module]), core)

    dense = dict.fromkeys(name for name in names if not name.endswith(_FACTORS))
    return Adapter(Lazy(dict.fromkeys(sorted(a_side)), factors), Lazy(dense, values))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12


def _by_row(name: str, tensor: Tensor, wire: str) -> bool:
    """Whether a tensor has a scale for each of its rows; one without numbers has none."""
    return wire == "int8" and name.endswith(_FACTORS) and 0 not in tensor.shape


def _check_format(name: str, tensors: Mapping[str, Tensor], wire: str, code: Any) -> None:
    tensor, factor = tensors[name], name.endswith(_FACTORS)
    expected = code if factor or wire != "int8" else np.float32
    if tensor.dtype != expected:
        raise UpdateRejected("malformed", f"{name}: expected {wire} numbers, got {tensor.dtype}.")
    if not _by_row(name, tensor, wire):
        return
    scales = tensors.get(name + _ROW_SCALE)
    shape = tensor.shape
    rows = -1 if len(shape) != 2 else shape[1] if name.endswith(_B) else shape[0]
    if scales is None or scales.dtype != np.float32 or scales.shape != (rows,):
        raise UpdateRejected("malformed", f"{name}: expected {rows} float32 row scales.")


def _unpacked(name: str, tensors: Mapping[str, Tensor], wire: str) -> Array:
    values = tensors[name].read()
    if wire == "bf16":
        return from_bf16(values)
    if not _by_row(name, tensors[name], wire):
        return values.astype(np.float32)
    scales = tensors[name + _ROW_SCALE].read()
    with np.errstate(over="ignore", invalid="ignore"):  # hostile scales: finiteness is admission's to check
        return values.astype(np.float32) * (scales[None, :] if name.endswith(_B) else scales[:, None])


def encode_update(update: Update, wire: WireFormat, rng: np.random.Generator | None = None) -> bytes:
    """A client's update to bytes: the adapter's tensors, all else in the metadata.

    Args:
        update: The update.
        wire: Number format of the factors.
        rng: Needed by `int8` only.

    Returns:
        A safetensors file.

    Raises:
        AdapterMismatch: See `encode`.
    """
    tensors, metadata = _tensors(update.adapter, wire, rng)
    fields = {
        "run_id": update.run_id,
        "round": update.round,
        "client_id": update.client_id,
        "parent_release_hash": update.parent_release_hash,
        "num_examples": update.num_examples,
        "metrics": dict(update.metrics),
        "privacy": None if update.privacy is None else dict(update.privacy),
        "signature": update.signature.hex(),
    }
    return canonical(tensors, metadata | {"update": json.dumps(fields)})


def decode_update(payload: bytes, max_bytes: int = MAX_MESSAGE_BYTES) -> Update:
    """Bytes to an update.

    Args:
        payload: Untrusted bytes.
        max_bytes: Refuse larger payloads before anything is parsed.

    Returns:
        The update with float32 arrays. Its claims are unchecked: that is admission's part.

    Raises:
        UpdateRejected: For any payload that `encode_update` could not have made.
    """
    return _update(_parse(payload, len(payload), max_bytes), loaded)


def opened_update(blob: Blob, max_bytes: int = MAX_MESSAGE_BYTES) -> Update:
    """A blob to an update; from a file, a module's factors are read when they are asked for.

    Args:
        blob: Untrusted content.
        max_bytes: Refuse larger blobs before anything is parsed.

    Returns:
        The update. Its claims are unchecked: that is admission's part.

    Raises:
        UpdateRejected: For any content that `encode_update` could not have made.
    """
    if isinstance(blob.content, bytes):
        return decode_update(blob.content, max_bytes)
    return _update(_parse(blob.content, blob.num_bytes, max_bytes), lambda lazy: lazy)


def _update(parsed: _Parsed, held: Callable[[Adapter], Adapter]) -> Update:
    try:
        fields = json.loads(parsed.metadata["update"])
        update = Update(
            run_id=_typed(fields["run_id"], str),
            round=_typed(fields["round"], int),
            client_id=_typed(fields["client_id"], str),
            parent_release_hash=_typed(fields["parent_release_hash"], str),
            num_examples=_typed(fields["num_examples"], int),
            metrics={_typed(k, str): float(_typed(v, (int, float))) for k, v in fields["metrics"].items()},
            privacy=None
            if fields["privacy"] is None
            else {_typed(k, str): float(_typed(v, (int, float))) for k, v in fields["privacy"].items()},
            signature=bytes.fromhex(_typed(fields["signature"], str)),
            adapter=held(_adapter(parsed)),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        raise UpdateRejected("malformed", "expected the fields of an update in the metadata. Send it again.") from None
    return update


def _typed(value: Any, kind: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError
    return value
