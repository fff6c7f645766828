"""Adapters and updates to bytes and back: safetensors layout, four number formats, every check before use.

Formats: `fp32`; `bf16` and `fp16`, rounded to nearest even; `int8` with one float32 scale per rank row (a row of A, a
column of B) and stochastic rounding, unbiased but for the row's largest entry, whose relative error is below 2**-16.
Decoding and encoding again gives the same numbers in every format, so an adapter that nobody trained costs nothing.
Dense parameters travel in float32 under int8. Values are not trusted: finiteness and shapes are checked by the receiver.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import safetensors
from safetensors.numpy import save

from lamina.protos.adapter import Adapter, Array, LoraFactors
from lamina.protos.errors import AdapterMismatch, UpdateRejected
from lamina.protos.messages import Update

WireFormat = Literal["fp32", "bf16", "fp16", "int8"]
WIRE_FORMATS: tuple[WireFormat, ...] = ("fp32", "bf16", "fp16", "int8")
BYTES_PER_NUMBER: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}

MAX_MESSAGE_BYTES = 16 * 1024**3
MAX_HEADER_BYTES = 32 * 1024**2
_DTYPES: Mapping[str, tuple[str, Any]] = {
    "fp32": ("F32", np.float32),
    "bf16": ("U16", np.uint16),
    "fp16": ("F16", np.float16),
    "int8": ("I8", np.int8),
}
_A, _B = ".lora_A.weight", ".lora_B.weight"
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
    return canonical(save(tensors, metadata))


def canonical(file: bytes) -> bytes:
    """A safetensors file with its header in sorted order: the library writes metadata in a random one.

    Args:
        file: Any safetensors file.

    Returns:
        The same tensors and metadata; equal content gives equal bytes.
    """
    size = int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[8 + size :]


def _tensors(
    adapter: Adapter, wire: WireFormat, rng: np.random.Generator | None
) -> tuple[dict[str, Array], dict[str, str]]:
    tensors: dict[str, Array] = {}
    # In the order of names, so that stochastic rounding does not depend on how the adapter came about.
    for module, factors in sorted(adapter.lora.items()):
        tensors.update(_packed(module + _A, factors.A, wire, rng))
        tensors.update({k: v.T if v.ndim == 2 else v for k, v in _packed(module + _B, factors.B.T, wire, rng).items()})
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
        return {name: values.astype(np.float32)}
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
    return {name: steps, name + _ROW_SCALE: scales}


@dataclass(frozen=True)
class _Parsed:
    tensors: dict[str, Array]
    metadata: dict[str, str]


def _parse(payload: bytes, max_bytes: int) -> _Parsed:
    if len(payload) > max_bytes:
        raise UpdateRejected("too-large", f"expected at most {max_bytes} bytes, got {len(payload)}. Lower the rank.")
    if len(payload) < 8 or int.from_bytes(payload[:8], "little") > min(MAX_HEADER_BYTES, len(payload)):
        raise UpdateRejected("malformed", f"expected a safetensors header, got {len(payload)} bytes. Send it again.")
    try:
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        parts = safetensors.deserialize(payload)  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise UpdateRejected(
            "malformed", f"expected a safetensors file, got one that does not parse: {error}"
        ) from None
    metadata = header.get("__metadata__") or {}
    known = dict(_DTYPES.values())
    tensors = {}
    for name, part in parts:
        if part["dtype"] not in known:
            raise UpdateRejected("malformed", f"{name}: expected one of {sorted(known)}, got {part['dtype']}.")
        tensors[name] = np.frombuffer(part["data"], dtype=known[part["dtype"]]).reshape(part["shape"])
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
    parsed = _parse(payload, max_bytes)
    return _adapter(parsed)


def _adapter(parsed: _Parsed) -> Adapter:
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
    row_scales = {name + _ROW_SCALE for name in parsed.tensors if name.endswith((_A, _B))} if wire == "int8" else set()
    values = {name: _unpacked(name, parsed.tensors, wire, code) for name in parsed.tensors if name not in row_scales}
    a_side = {name[: -len(_A)] for name in values if name.endswith(_A)}
    b_side = {name[: -len(_B)] for name in values if name.endswith(_B)}
    if a_side != b_side or a_side != set(scales):
        odd = sorted((a_side ^ b_side) | (a_side ^ set(scales)))[:3]
        raise UpdateRejected(
            "schema", f"expected lora_A, lora_B and a scale for each module, one is missing for {odd}."
        )
    try:
        lora = {m: LoraFactors(values[m + _A], values[m + _B], float(scales[m])) for m in sorted(a_side)}
    except AdapterMismatch as error:
        raise UpdateRejected("schema", str(error)) from None
    dense = {name: value for name, value in values.items() if not name.endswith((_A, _B))}
    return Adapter(lora, dense)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12


def _unpacked(name: str, tensors: Mapping[str, Array], wire: str, code: Any) -> Array:
    values, factor = tensors[name], name.endswith((_A, _B))
    expected = code if factor or wire != "int8" else np.float32
    if values.dtype != expected:
        raise UpdateRejected("malformed", f"{name}: expected {wire} numbers, got {values.dtype}.")
    if wire == "bf16":
        return from_bf16(values)
    if wire != "int8" or not factor:
        return values.astype(np.float32)
    scales = tensors.get(name + _ROW_SCALE)
    rows = values.shape[0] if name.endswith(_A) and values.ndim == 2 else values.shape[-1] if values.ndim == 2 else -1
    if scales is None or scales.dtype != np.float32 or scales.shape != (rows,):
        raise UpdateRejected("malformed", f"{name}: expected {rows} float32 row scales.")
    with np.errstate(over="ignore", invalid="ignore"):  # hostile scales: finiteness is admission's to check
        return values.astype(np.float32) * (scales[:, None] if name.endswith(_A) else scales[None, :])


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
    return canonical(save(tensors, metadata | {"update": json.dumps(fields)}))


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
    parsed = _parse(payload, max_bytes)
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
            adapter=_adapter(parsed),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        raise UpdateRejected("malformed", "expected the fields of an update in the metadata. Send it again.") from None
    return update


def _typed(value: Any, kind: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError
    return value
