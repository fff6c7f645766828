"""Hostile updates by the thousand: honest ones that are changed with knowledge of what they are made of.

An update is a length, a JSON header and a body. A mutation changes the header as a document, as text or as bytes, the numbers of
the body, the claims in the metadata, or the whole. All comes from one seeded generator, so that a seed names a payload.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lamina.protos.adapter import Adapter, LoraFactors
from lamina.protos.codec import WIRE_FORMATS, encode_update
from lamina.protos.messages import Budget, Update
from lamina.protos.spec import AdapterSpec
from lamina.server.admission import Expected

MODULES: Mapping[str, tuple[int, int]] = {"a.q": (5, 4), "b.up": (3, 6)}
RANK = 2


def spec() -> AdapterSpec:
    return AdapterSpec(MODULES, dense={"head": np.zeros((2, 3), np.float32), "bias": np.zeros(3, np.float32)})


def expected() -> Expected:
    budget = Budget(dict.fromkeys(MODULES, RANK), dict.fromkeys(MODULES, 4), dict.fromkeys(MODULES, 2.0))
    return Expected("run", 3, "site", "f" * 64, spec(), budget, Adapter(), max_norm=50.0)


def honest(wire: Any) -> bytes:
    rng = np.random.default_rng(7)
    lora = {
        module: LoraFactors(
            rng.normal(size=(RANK, d_in)).astype(np.float32), rng.normal(size=(d_out, RANK)).astype(np.float32), 2.0
        )
        for module, (d_out, d_in) in MODULES.items()
    }
    dense = {"head": rng.normal(size=(2, 3)).astype(np.float32), "bias": np.ones(3, np.float32)}
    update = Update("run", 3, "site", "f" * 64, Adapter(lora, dense), 10, {"train_loss": 1.0}, {"epsilon": 1.0}, b"s")
    return encode_update(update, wire, np.random.default_rng(1))


HONEST: Mapping[str, bytes] = {wire: honest(wire) for wire in WIRE_FORMATS}


@dataclass
class Payload:
    """An update in its parts.

    Attributes:
        header: Parsed.
        body: The numbers.
        text: The header as bytes, where it is no longer a document.
        claimed: Length that is claimed for the header, where it is a lie.
        cut: Bytes that are kept of the whole.
        more: Bytes after it.
    """

    header: dict[str, Any]
    body: bytearray
    text: bytes | None = None
    claimed: int | None = None
    cut: int | None = None
    more: bytes = b""
    used: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__" and isinstance(self.header[name], dict)]

    def written(self) -> bytes:
        text = self.text if self.text is not None else json.dumps(self.header).encode("utf-8", "surrogatepass")
        size = len(text) if self.claimed is None else self.claimed
        whole = struct.pack("<Q", size % 2**64) + text + bytes(self.body) + self.more
        return whole if self.cut is None else whole[: self.cut]


def parsed(content: bytes) -> Payload:
    size = int.from_bytes(content[:8], "little")
    return Payload(json.loads(content[8 : 8 + size]), bytearray(content[8 + size :]))


SIZES = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    16,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**40 + 1,
    2**53,
    2**62,
    2**63,
    2**64 - 1,
    2**64,
)
FLOATS = (float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e30, 1e19, 1e5, 1e-45, -0.0)
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "run", "\ud800",
    "\0", "../../etc/passwd", "ab" * 400, [], {}, [[]], {"": {}}, [1, 2], {"train_loss": "x"}, {"train_loss": 1e400},
)  # fmt: skip
NAMES = (
    "a.q.lora_A.weight", "a.q.lora_B.weight", "b.up.lora_A.weight", "head", "bias", "", ".lora_A.weight", "x.lora_A.weight",
    "x.lora_B.weight", "../../x", "head.row_scale", "a.q.lora_A.weight.row_scale", "a.q.lora_A.weight.row_scale.row_scale",
    "a.q.lora_core.weight", "x.lora_core.weight", "b.up.lora_core.weight.row_scale", "a.q", "__metadata__", "\u202e", "a" * 300,
    "a.q.lora_A.weight.lora_A.weight",
)  # fmt: skip
TYPES = ("F32", "F16", "BF16", "U16", "I8", "U8", "F64", "I64", "BOOL", "F8_E4M3", "F4", "C64", "", "f32", "PICKLE")
CLAIMS = ("run_id", "round", "client_id", "parent_release_hash", "num_examples", "metrics", "privacy", "signature")


def entry(p: Payload, rng: random.Random) -> dict[str, Any] | None:
    names = p.names()
    found = p.header[rng.choice(names)] if names else None
    return found if isinstance(found, dict) else None


def a_shape(p: Payload, rng: random.Random) -> None:
    one = entry(p, rng)
    if one is None or not isinstance(one.get("shape"), list):
        return
    dims = list(one["shape"])
    kind = rng.randrange(6)
    if kind == 0:
        dims = [rng.choice(SIZES) for _ in range(rng.randrange(5))]
    elif kind == 1:
        dims.reverse()
    elif kind == 2:
        dims.insert(rng.randrange(len(dims) + 1), rng.choice((0, 1)))
    elif kind == 3 and dims:
        dims[rng.randrange(len(dims))] += rng.choice((-1, 1))
    elif kind == 4:
        dims += [1] * rng.randrange(1, 80)
    else:
        dims = [int(np.prod(dims))] if rng.random() < 0.5 else []
    one["shape"] = dims


def offsets(p: Payload, rng: random.Random) -> None:
    one, other = entry(p, rng), entry(p, rng)
    if one is None or other is None:
        return
    kind = rng.randrange(4)
    if kind == 0:
        one["data_offsets"], other["data_offsets"] = other.get("data_offsets"), one.get("data_offsets")
    elif kind == 1:
        one["data_offsets"] = other.get("data_offsets")
    elif kind == 2:
        one["data_offsets"] = [rng.choice(SIZES), rng.choice(SIZES)]
    elif isinstance(one.get("data_offsets"), list) and one["data_offsets"]:
        place = rng.randrange(len(one["data_offsets"]))
        one["data_offsets"] = [x + rng.choice((-4, -1, 1, 4)) * (i == place) for i, x in enumerate(one["data_offsets"])]


def a_type(p: Payload, rng: random.Random) -> None:
    one = entry(p, rng)
    if one is not None:
        one["dtype"] = rng.choice(TYPES)


def a_member(p: Payload, rng: random.Random) -> None:
    """A part of an entry is gone, or is of another kind."""
    one = entry(p, rng)
    if one:
        key = rng.choice(sorted(one))
        if rng.random() < 0.5:
            del one[key]
        else:
            one[key] = rng.choice(ODD)


def rename(p: Payload, rng: random.Random) -> None:
    names = p.names()
    if names:
        old = rng.choice(names)
        p.header[rng.choice(NAMES)] = p.header.pop(old)


def drop(p: Payload, rng: random.Random) -> None:
    names = p.names()
    if names:
        p.header.pop(rng.choice(names))


def drop_whole(p: Payload, rng: random.Random) -> None:
    """A tensor with its bytes; the others move up."""
    names = [n for n in p.names() if isinstance(p.header[n].get("data_offsets"), list)]
    if not names:
        return
    gone = p.header.pop(rng.choice(names))["data_offsets"]
    if len(gone) != 2 or not all(isinstance(x, int) for x in gone) or gone[1] > len(p.body) or gone[0] > gone[1]:
        return
    del p.body[gone[0] : gone[1]]
    for name in p.names():
        at = p.header[name].get("data_offsets")
        if isinstance(at, list) and all(isinstance(x, int) for x in at):
            p.header[name]["data_offsets"] = [x - (gone[1] - gone[0]) * (x >= gone[1]) for x in at]


def add_empty(p: Payload, rng: random.Random) -> None:
    dims = [rng.choice(SIZES) for _ in range(rng.randrange(4))]
    dims.insert(rng.randrange(len(dims) + 1), 0)
    end = len(p.body)
    p.header[rng.choice(NAMES)] = {"dtype": rng.choice(TYPES[:5]), "shape": dims, "data_offsets": [end, end]}


def add_pair(p: Payload, rng: random.Random) -> None:
    """A module of empty factors, whose rank is whatever."""
    rank, end, module = rng.choice(SIZES), len(p.body), rng.choice(("a.q", "x", "../x"))
    dtype = rng.choice(TYPES[:5])
    for name, dims in ((".lora_A.weight", [rank, 0]), (".lora_B.weight", [0, rank])):
        p.header[module + name] = {"dtype": dtype, "shape": dims, "data_offsets": [end, end]}


def add_full(p: Payload, rng: random.Random) -> None:
    count, end = rng.randrange(1, 9), len(p.body)
    p.body += bytes(4 * count)
    p.header[rng.choice(NAMES)] = {"dtype": "F32", "shape": [count], "data_offsets": [end, end + 4 * count]}


def add_many(p: Payload, rng: random.Random) -> None:
    end = len(p.body)
    for index in range(rng.choice((10, 300, 3000))):
        p.header[f"t{index}"] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}


def metadata(p: Payload, rng: random.Random) -> None:
    found = p.header.get("__metadata__")
    if not isinstance(found, dict) or rng.random() < 0.1:
        p.header["__metadata__"] = rng.choice(ODD)
        return
    key = rng.choice(("wire", "scales", "update", "more"))
    kind = rng.randrange(4)
    if kind == 0:
        found.pop(key, None)
    elif kind == 1:
        found[key] = rng.choice(ODD)
    elif kind == 2:
        found[key] = json.dumps(rng.choice(ODD))
    else:
        deep = rng.choice((5, 500, 5000))
        found[key] = rng.choice(("fp32", "bf16", "fp16", "int8", "[" * deep, "[" * deep + "]" * deep, '{"a":' * deep))


def inner(p: Payload, key: str) -> dict[str, Any] | None:
    """The document within the metadata, or None where it is none any more."""
    found = p.header.get("__metadata__")
    if not isinstance(found, dict):
        return None
    try:
        document = json.loads(found[key])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def claims(p: Payload, rng: random.Random) -> None:
    document = inner(p, "update")
    if document is None:
        return
    name = rng.choice(CLAIMS)
    if rng.random() < 0.2:
        document.pop(name, None)
    elif name == "round" and rng.random() < 0.5:
        document[name] = rng.choice((2, 4, 2**63, -3))
    elif name == "num_examples" and rng.random() < 0.7:
        document[name] = rng.choice((0, -1, 1, 10**9, 10**9 + 1, 10**300))
    else:
        document[name] = rng.choice(ODD)
    p.header["__metadata__"]["update"] = json.dumps(document)


def scales(p: Payload, rng: random.Random) -> None:
    document = inner(p, "scales")
    if document is None:
        return
    if rng.random() < 0.2 and document:
        document.pop(rng.choice(sorted(document)))
    else:
        value = rng.choice((*ODD, 2.0, 2.0000001, 1e-300, 1e11, 1e12))
        document[rng.choice(("a.q", "b.up", "x", ""))] = value
    p.header["__metadata__"]["scales"] = json.dumps(document)


def numbers(p: Payload, rng: random.Random) -> None:
    """Some numbers of the body, or all of them."""
    form = rng.choice(("<f", "<e"))
    width = struct.calcsize(form)
    places = range(0, len(p.body) - width + 1, width)
    if not places:
        return
    value = rng.choice(FLOATS)
    try:
        packed = struct.pack(form, value)
    except OverflowError:
        packed = b"\xff\x7b"  # the largest of fp16
    for at in places if rng.random() < 0.3 else [rng.choice(places)]:
        p.body[at : at + width] = packed


def bits(p: Payload, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 5)):
        if p.body:
            p.body[rng.randrange(len(p.body))] ^= 1 << rng.randrange(8)


def text(p: Payload, rng: random.Random) -> None:
    """The header's text: bytes changed, taken out, put in, said twice, or in another encoding."""
    content = bytearray(p.text if p.text is not None else json.dumps(p.header).encode("utf-8", "surrogatepass"))
    kind = rng.randrange(8)
    at = rng.randrange(len(content) + 1)
    if kind == 0 and content:
        content[at % len(content)] = rng.randrange(256)
    elif kind == 1:
        del content[at : at + rng.randrange(1, 9)]
    elif kind == 2:
        content[at:at] = rng.choice(
            (b"\xff", b"\0", b'"', b"}", b"{", b"[", b" " * 50, b"\\ud800", b"1e999", b"NaN", b"-0")
        )
    elif kind == 3:
        content += b" " * rng.choice((1, 7, 1000))
    elif kind == 4:
        content = bytearray(
            content.decode("utf-8", "replace").encode(
                rng.choice(("utf-16", "utf-32", "utf-8-sig", "latin-1")), "replace"
            )
        )
    elif kind == 5 and p.names():
        again = json.dumps({rng.choice(p.names()): p.header[rng.choice(p.names())]})[1:-1]
        content = bytearray(content[:-1] + b", " + again.encode("utf-8", "surrogatepass") + b"}")
    elif kind == 6:
        again = json.dumps({"__metadata__": {"wire": "fp32", "scales": "{}", "update": "{}"}})[1:-1]
        content = bytearray(content[:-1] + b", " + again.encode() + b"}")
    else:
        deep = rng.choice((10, 1000, 30_000))
        content = bytearray(rng.choice((b"[", b'{"a":')) * deep)
    p.text = bytes(content)


def length(p: Payload, rng: random.Random) -> None:
    p.claimed = rng.choice(
        (0, 1, 2, 8, len(p.written()) - 8, len(p.written()), 2**31, 2**63, 2**64 - 1, rng.randrange(5000))
    )


def ends(p: Payload, rng: random.Random) -> None:
    if rng.random() < 0.5:
        p.cut = rng.randrange(len(p.written()) + 1)
    else:
        p.more = bytes(rng.randrange(1, 40))


def fat(p: Payload, rng: random.Random) -> None:
    """About the size that admission takes at most, and beyond."""
    p.header["__metadata__"] = {
        **(p.header.get("__metadata__") or {}),
        "more": "x" * rng.choice((10_000, 1_040_000, 1_100_000)),
    }


MUTATIONS: Mapping[str, Callable[[Payload, random.Random], None]] = {
    one.__name__: one
    for one in (
        a_shape, offsets, a_type, a_member, rename, drop, drop_whole, add_empty, add_pair, add_full, add_many, metadata,
        claims, scales, numbers, bits, text, length, ends, fat,
    )
}  # fmt: skip
_RARE = {"fat": 0.02, "add_many": 0.05, "text": 0.7, "length": 0.3, "ends": 0.4}


def mutated(rng: random.Random) -> tuple[bytes, list[str]]:
    """A payload and the names of what was done to it."""
    p = parsed(HONEST[rng.choice(WIRE_FORMATS)])
    names = list(MUTATIONS)
    chosen = rng.choices(names, [_RARE.get(name, 1.0) for name in names], k=rng.choice((0, 1, 1, 1, 2, 2, 3, 5)))
    for name in chosen:
        try:
            MUTATIONS[name](p, rng)
        except (TypeError, AttributeError, ValueError, KeyError, RecursionError):
            continue  # an earlier mutation has left nothing to change in this way
    try:
        content = p.written()
    except (ValueError, RecursionError):
        content = bytes(p.body)
    if rng.random() < 0.03:
        other = HONEST[rng.choice(WIRE_FORMATS)]
        content = content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other)) :]
    return content, chosen
