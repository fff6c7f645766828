"""The safetensors layout of untrusted content: the library checks it, and tensors are read one by one where they lie."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from lamina.protos.adapter import Array

MAX_HEADER_BYTES = 32 * 1024**2
# Empty arrays take no bytes, so their shapes could be beyond what numpy holds; no parameter of a model comes near.
MAX_DIMENSIONS, MAX_SIZE = 16, 2**40


class LayoutError(Exception):
    """Content that is no safetensors file of known number formats."""


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies.

    Attributes:
        source: The whole content, or its file.
        dtype: Of its numbers.
        shape: Of the array.
        start: Offset of its first byte.
        num_bytes: Its length.
    """

    source: bytes | Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def read(self) -> Array:
        """The array; a fresh one from a file, a read-only view of content in memory."""
        if isinstance(self.source, bytes):
            flat = np.frombuffer(self.source, self.dtype, self.num_bytes // self.dtype.itemsize, self.start)
            return flat.reshape(self.shape)
        with self.source.open("rb", buffering=0) as file:
            file.seek(self.start)
            flat = np.fromfile(file, self.dtype, self.num_bytes // self.dtype.itemsize)
        if flat.nbytes != self.num_bytes:
            raise OSError(f"{self.source.name}: expected {self.num_bytes} bytes at {self.start}, got {flat.nbytes}.")
        return flat.reshape(self.shape)


_NAMES = {"float32": "F32", "float16": "F16", "uint16": "U16", "int8": "I8"}


def canonical(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose bytes depend on its content alone; the library writes metadata in an order of the moment.

    Args:
        tensors: Name -> C-contiguous array, float32, float16, uint16 or int8.
        metadata: Of the file.

    Returns:
        The file; each array is copied once.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ordered, offset = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])), 0
    for name, array in ordered:
        ends = [offset, offset + array.nbytes]
        header[name] = {"dtype": _NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pieces = (array.reshape(-1).data.cast("B") for _, array in ordered if array.nbytes)
    return b"".join((len(text).to_bytes(8, "little"), text, *pieces))


def parse(source: bytes | Path, num_bytes: int, known: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file, checked by the library before anything is believed.

    Args:
        source: The content, or its file.
        num_bytes: Its length.
        known: safetensors' name of a number format -> numpy's.

    Returns:
        Metadata, and name -> tensor; no array is read.

    Raises:
        LayoutError: If the header is none, lies about lengths, overlaps, leaves gaps, or names an unknown format.
    """
    head = _head(source, num_bytes)
    try:
        header = json.loads(head)
        _checked_by_library(source)
    except (safetensors.SafetensorError, ValueError, RecursionError, OSError) as error:
        raise LayoutError(f"got one that does not parse: {error}") from None
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, part in header.items():
        if part["dtype"] not in known:
            raise LayoutError(f"got {name} of format {part['dtype']}, not one of {sorted(known)}")
        # numpy multiplies the lengths although one of them is 0.
        if len(part["shape"]) > MAX_DIMENSIONS or math.prod(max(1, size) for size in part["shape"]) > MAX_SIZE:
            raise LayoutError(f"got {name} of {len(part['shape'])} dimensions, or too long ones")
        start, stop = part["data_offsets"]
        dtype = np.dtype(known[part["dtype"]])
        tensors[name] = Tensor(source, dtype, tuple(part["shape"]), 8 + len(head) + start, stop - start)
    _check_tiling(tensors, 8 + len(head), num_bytes)
    return metadata, tensors


def _check_tiling(tensors: Mapping[str, Tensor], start: int, num_bytes: int) -> None:
    """A second look at what the library has checked: with a name twice in a header, it may have read the other entry."""
    for tensor in sorted(tensors.values(), key=lambda one: (one.start, one.num_bytes)):
        if tensor.start != start or tensor.num_bytes != math.prod(tensor.shape) * tensor.dtype.itemsize:
            raise LayoutError("got tensors that overlap, leave gaps or are not of their shape's length")
        start += tensor.num_bytes
    if start != num_bytes:
        raise LayoutError(f"got {num_bytes} bytes where its tensors end at {start}")


def _head(source: bytes | Path, num_bytes: int) -> bytes:
    if isinstance(source, bytes):
        first = source[:8]
    else:
        with source.open("rb") as file:
            first = file.read(8)
    size = int.from_bytes(first, "little")
    if len(first) < 8 or size > min(MAX_HEADER_BYTES, num_bytes - 8):
        raise LayoutError(f"got {num_bytes} bytes without its header")
    if isinstance(source, bytes):
        return source[8 : 8 + size]
    with source.open("rb") as file:
        file.seek(8)
        return file.read(size)


def _checked_by_library(source: bytes | Path) -> None:
    if isinstance(source, bytes):
        safetensors.deserialize(source)  # type: ignore[no-untyped-call]
    else:
        with safetensors.safe_open(str(source), "numpy"):
            pass
