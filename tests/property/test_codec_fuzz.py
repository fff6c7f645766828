"""Untrusted bytes: they decode to an adapter that can be sent on, or raise `UpdateRejected`; nothing else happens."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from lamina.protos.adapter import Adapter
from lamina.protos.codec import WIRE_FORMATS, WireFormat, decode, decode_update, encode, encode_update
from lamina.protos.errors import UpdateRejected
from lamina.protos.messages import Update
from tests.property.oracles import adapter_of, arrays

formats = pytest.mark.parametrize("wire", WIRE_FORMATS)
words = st.text(st.characters(codec="utf-8"), max_size=12)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def survives(payload: bytes) -> None:
    """Decodes to a float32 adapter that can be sent on, or is refused; nothing else happens."""
    for read in (decode, lambda given: decode_update(given).adapter):
        with suppress(UpdateRejected), np.errstate(all="ignore"):
            adapter = read(payload)
            assert all(value.dtype == np.float32 for value in arrays(adapter).values())
            assert same_nan_bits(decode(encode(adapter, "fp32")), adapter)


def same_nan_bits(first: Adapter, second: Adapter) -> bool:
    ours, theirs = arrays(first), arrays(second)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k], equal_nan=True) for k in ours)


def valid(wire: WireFormat) -> bytes:
    update = Update("run", 1, "site", "0" * 64, adapter_of(1), 10, {"train_loss": 1.0}, {"epsilon": 2.0}, b"s")
    return encode_update(update, wire, rng())


VALID: Mapping[str, bytes] = {wire: valid(wire) for wire in WIRE_FORMATS}


@given(payload=st.binary(max_size=400))
@example(b"")
@example(struct.pack("<Q", 2) + b"{}")
@example(struct.pack("<Q", 2) + b"[]")
@example(struct.pack("<Q", 2**63) + b"{}")
@example(struct.pack("<Q", 5000) + b"[" * 5000)
@settings(max_examples=300)
def test_any_bytes_decode_or_are_refused(payload: bytes) -> None:
    survives(payload)


@formats
@given(data=st.data())
@settings(max_examples=200)
def test_a_damaged_message_decodes_or_is_refused(wire: WireFormat, data: st.DataObject) -> None:
    payload = bytearray(VALID[wire])
    header = 8 + int.from_bytes(payload[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, header + 8)) % len(payload)
        payload[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(payload)))
    survives(bytes(payload[:cut]) + data.draw(st.binary(max_size=9)))


@formats
def test_every_truncation_is_refused(wire: WireFormat) -> None:
    for length in range(len(VALID[wire])):
        with pytest.raises(UpdateRejected) as caught:
            decode_update(VALID[wire][:length])
        assert caught.value.reason == "malformed"


def message(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


META = {"wire": "fp32", "scales": '{"q": 1.0}'}
A, B = tensor("F32", [1, 2], 0, 8), tensor("F32", [2, 1], 8, 16)


def test_the_message_that_the_refusals_below_spoil_is_a_good_one() -> None:
    got = decode(message({"__metadata__": META, "q.lora_A.weight": A, "q.lora_B.weight": B}, bytes(16)))
    assert got.lora["q"].shape == (2, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q.lora_A.weight": tensor("F16", [1, 4], 0, 8)}, "malformed"),
        ({"q.lora_A.weight": tensor("F64", [1, 1], 0, 8)}, "malformed"),
        ({"q.lora_A.weight": tensor("I8", [1, 8], 0, 8)}, "malformed"),
        ({"q.lora_A.weight": tensor("PICKLE", [1, 2], 0, 8)}, "malformed"),
        ({"q.lora_A.weight": tensor("F32", [2, 2], 0, 8)}, "malformed"),
        ({"q.lora_A.weight": tensor("F32", [2**62, 2**62], 0, 8)}, "malformed"),
        ({"q.lora_B.weight": tensor("F32", [2, 1], 0, 8)}, "malformed"),
        ({"q.lora_B.weight": tensor("F32", [2, 1], 4, 12)}, "malformed"),
        ({"q.lora_B.weight": tensor("F32", [2, 1], 12, 20)}, "malformed"),
        ({"q.lora_B.weight": tensor("F32", [1, 2], 8, 16)}, "schema"),
        ({"q.lora_B.weight": tensor("F32", [2], 8, 16)}, "schema"),
        ({"q.lora_B.weight": None}, "malformed"),
        ({"v.lora_B.weight": tensor("F32", [0, 1], 16, 16)}, "schema"),
        ({"__metadata__": META | {"wire": "int8"}}, "malformed"),
        ({"__metadata__": META | {"wire": "fp64"}}, "malformed"),
        ({"__metadata__": META | {"wire": 3}}, "malformed"),
        ({"__metadata__": {"wire": "fp32"}}, "schema"),
        ({"__metadata__": META | {"scales": '{"q": 1, "v": 1}'}}, "schema"),
        ({"__metadata__": None}, "malformed"),
    ],
)
def test_a_header_that_lies_is_refused(change: dict[str, Any], reason: str) -> None:
    header = {"__metadata__": META, "q.lora_A.weight": A, "q.lora_B.weight": B} | change
    with pytest.raises(UpdateRejected) as caught:
        decode(message(header, bytes(16)))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "scales", [f'{{"q": {bad}}}' for bad in ("0", "-1", "NaN", "Infinity", "true", '"1"', "null", "[]")]
)
def test_scales_that_are_no_positive_number_are_refused(scales: str) -> None:
    with pytest.raises(UpdateRejected, match="scales"):
        decode(
            message({"__metadata__": META | {"scales": scales}, "q.lora_A.weight": A, "q.lora_B.weight": B}, bytes(16))
        )


def test_one_name_for_two_places_is_refused() -> None:
    first, second = json.dumps(A), json.dumps(B)
    twice = f'{{"__metadata__": {json.dumps(META)}, "q.lora_A.weight": {first}, "q.lora_A.weight": {second}}}'
    with pytest.raises(UpdateRejected):
        decode(message(twice.encode(), bytes(16)))


def test_a_message_above_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(UpdateRejected) as caught:
        decode(b"not even parsed" * 10, max_bytes=100)
    assert caught.value.reason == "too-large"
    assert decode(VALID["fp32"], max_bytes=len(VALID["fp32"])).lora


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
FIELDS = {"run_id": "r", "round": 1, "client_id": "c", "parent_release_hash": "", "num_examples": 1, "metrics": {}}
FIELDS |= {"privacy": None, "signature": ""}


@given(data=st.data())
@settings(max_examples=300)
def test_claims_of_any_type_decode_or_are_refused(data: st.DataObject) -> None:
    fields: Any = dict(FIELDS)
    for name in data.draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=3)):
        fields[name] = data.draw(json_values)
    if data.draw(st.integers(0, 9)) == 0:
        fields = data.draw(json_values)
    extra = data.draw(st.sampled_from([{}, {"scales": json.dumps(data.draw(json_values))}]))
    update = json.dumps(fields) if data.draw(st.booleans()) else data.draw(words)
    survives(
        message(
            {"__metadata__": META | extra | {"update": update}, "q.lora_A.weight": A, "q.lora_B.weight": B}, bytes(16)
        )
    )


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        *[
            (name, bad)
            for name in ("run_id", "client_id", "parent_release_hash", "signature")
            for bad in (1, None, ["x"])
        ],
        *[(name, bad) for name in ("round", "num_examples") for bad in (True, 1.0, "1", None)],
        *[
            (name, bad)
            for name in ("metrics", "privacy")
            for bad in ({"x": "1"}, {"x": True}, {"x": None}, [1], {"x": 10**400})
        ],
        ("metrics", None),
        ("signature", "zz"),
    ],
)
def test_a_claim_of_the_wrong_type_is_refused(field: str, bad: object) -> None:
    def claimed(fields: dict[str, Any]) -> bytes:
        tensors = {"q.lora_A.weight": np.zeros((1, 2), np.float32), "q.lora_B.weight": np.zeros((2, 1), np.float32)}
        return bytes(save(tensors, META | {"update": json.dumps(fields)}))

    assert decode_update(claimed(FIELDS)).round == 1
    with pytest.raises(UpdateRejected, match="fields of an update"):
        decode_update(claimed(FIELDS | {field: bad}))
    with pytest.raises(UpdateRejected, match="fields of an update"):
        decode_update(claimed({name: value for name, value in FIELDS.items() if name != field}))


def test_row_scales_that_overflow_decode_in_silence() -> None:
    tensors = {"q.lora_A.weight": np.full((1, 2), 127, np.int8), "q.lora_B.weight": np.zeros((2, 1), np.int8)}
    tensors["q.lora_A.weight.row_scale"] = np.array([3e38], np.float32)
    tensors["q.lora_B.weight.row_scale"] = np.array([np.inf], np.float32)
    decode(bytes(save(tensors, {"wire": "int8", "scales": '{"q": 1.0}'})))
