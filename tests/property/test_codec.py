"""The codec: what each number format loses, that it loses it once, how long a message is, and what hostile bytes do."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lamina.protos.adapter import Adapter, LoraFactors, prefix
from lamina.protos.codec import (
    BYTES_PER_NUMBER,
    WIRE_FORMATS,
    WireFormat,
    decode,
    decode_update,
    encode,
    encode_update,
    from_bf16,
    to_bf16,
    to_int8,
)
from lamina.protos.errors import AdapterMismatch, UpdateRejected
from lamina.protos.layout import canonical
from lamina.protos.messages import Update
from tests.property.oracles import adapter_of, arrays, federations, first_updates, normal, same_bits

formats = pytest.mark.parametrize("wire", WIRE_FORMATS)
numbers = st.integers(0, 2**32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Values ---------------------------------------------------------------------------------------------------------------


def bound(name: str, value: NDArray[Any], wire: WireFormat) -> NDArray[Any]:
    """The largest error of one rounding, number by number."""
    magnitude = np.abs(value.astype(np.float64))
    if wire == "fp32" or (wire == "int8" and not name.endswith((".A", ".B", ".core"))):
        return np.zeros_like(magnitude)
    if wire == "bf16":
        # 8 significant bits: half a unit in the last place is 2^-8 of the value; subnormals are 2^-133 apart.
        return np.maximum(2.0**-8 * magnitude, 2.0**-134)
    if wire == "fp16":
        # 11 significant bits, subnormals 2^-24 apart.
        return np.maximum(2.0**-11 * magnitude, 2.0**-25)
    # A row of A or of a core or a column of B moves by less than one step. A step is 1/127 of the largest entry, itself rounded
    # to 16 bits: 2^-16 more, and 2^-24 for the division.
    step = magnitude.max(axis=0 if name.endswith(".B") else 1, keepdims=True, initial=0) / 127
    return np.broadcast_to(step * (1 + 2.0**-15), magnitude.shape)


@formats
@given(seed=numbers, rank=st.integers(0, 20), size=st.sampled_from([1e-6, 1.0, 300.0]), cored=st.booleans())
def test_a_message_loses_no_more_than_its_format(
    wire: WireFormat, seed: int, rank: int, size: float, cored: bool
) -> None:
    sent = adapter_of(seed, max(rank, 1), size, cored)
    if rank == 0:
        sent = Adapter({m: prefix(f, 0) for m, f in sent.lora.items()}, sent.dense)
    got = decode(encode(sent, wire, rng(seed)))
    assert {m: f.scale for m, f in got.lora.items()} == {m: f.scale for m, f in sent.lora.items()}
    theirs = arrays(got)
    for name, value in arrays(sent).items():
        assert theirs[name].dtype == np.float32
        assert theirs[name].shape == value.shape
        assert (np.abs(theirs[name].astype(np.float64) - value) <= bound(name, value, wire)).all()
    if wire == "fp32":
        assert same_bits(got, sent)


@formats
@given(seed=numbers, size=st.sampled_from([1e-38, 1e-6, 1.0, 1e4]), cored=st.booleans())
def test_encoding_what_was_decoded_gives_the_same_bytes(wire: WireFormat, seed: int, size: float, cored: bool) -> None:
    first = encode(adapter_of(seed, size=size, cored=cored), wire, rng(seed))
    assert encode(decode(first), wire, rng(seed + 1)) == first


@given(seed=numbers, size=st.sampled_from([1e-30, 1e-6, 1.0, 1e30]))
def test_int8_rows_come_again(seed: int, size: float) -> None:
    steps, scales = to_int8(normal((40, 30), seed) * np.float32(size), rng(seed))
    again, same_scales = to_int8(steps.astype(np.float32) * scales[:, None], rng(seed + 1))
    assert np.array_equal(again, steps)
    assert np.array_equal(same_scales, scales)


def test_every_int8_row_reaches_127_steps() -> None:
    steps, _ = to_int8(normal((200_000, 2), 1), rng())
    assert (np.abs(steps).max(axis=1) == 127).all()


def test_int8_rounding_is_unbiased() -> None:
    # Of each row the first entry sets a step of exactly 1, the others stand between two steps. By Hoeffding's inequality
    # the mean of n draws misses by 0.01 with a probability below 2 exp(-2 n 0.01^2) = 2e-17 for n = 200 000.
    values = np.array([-126.3, -63.5, -0.999, -0.25, 0.001, 0.5, 0.75, 99.9])
    rows = np.full((len(values), 200_001), 127.0, np.float32)
    rows[:, 1:] = values[:, None]
    steps, scales = to_int8(rows, rng())
    assert (scales == 1).all()
    assert steps[:, 1:].mean(axis=1) == pytest.approx(values, abs=0.01)
    assert (np.abs(steps[:, 1:] - rows[:, 1:]) < 1).all()
    assert (steps[:, 0] == 127).all()


def test_int8_keeps_zeros_and_needs_a_generator() -> None:
    steps, scales = to_int8(np.zeros((2, 5), np.float32), rng())
    assert not steps.any()
    assert not scales.any()
    with pytest.raises(AdapterMismatch, match="rng"):
        encode(adapter_of(0), "int8")


def test_bf16_rounds_as_torch_does_bit_for_bit() -> None:
    torch = pytest.importorskip("torch")
    some = np.arange(0, 2**32, 65_521, dtype=np.uint64).astype(np.uint32)
    edges = [0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x00018000, 0x007FFFFF, 0x00800000]  # subnormal and least
    edges += [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000]  # ties, greatest, inf
    nans = [0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    positive = np.array(edges + nans, np.uint32)
    values = np.concatenate([some, positive, positive | np.uint32(0x80000000)]).view(np.float32)
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    ours, nan = to_bf16(values), np.isnan(values)
    assert np.array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(from_bf16(ours[nan])).all()
    assert np.array_equal(to_bf16(from_bf16(ours)), ours)


def test_fp16_refuses_what_does_not_fit() -> None:
    for size, fits in [(65504.0, True), (65519.0, True), (65520.0, False)]:
        adapter = Adapter({"q_proj": LoraFactors(np.full((1, 2), size, np.float32), np.ones((3, 1), np.float32))})
        if fits:
            assert (decode(encode(adapter, "fp16")).lora["q_proj"].A == 65504).all()
        else:
            with pytest.raises(AdapterMismatch, match="65504"):
                encode(adapter, "fp16")


# Length ---------------------------------------------------------------------------------------------------------------


@formats
@given(federation=federations())
def test_a_message_is_as_long_as_its_header_and_its_numbers(wire: WireFormat, federation: Any) -> None:
    for update in first_updates(federation):
        factors = update.adapter.lora.values()
        # rank * (m + n) numbers each, and under int8 a float32 scale for each row of A and column of B.
        low_rank = sum(
            f.rank * sum(f.shape) * BYTES_PER_NUMBER[wire] + (8 * f.rank if wire == "int8" else 0) for f in factors
        )
        dense = sum(v.size for v in update.adapter.dense.values()) * (4 if wire == "int8" else BYTES_PER_NUMBER[wire])
        for payload in (encode(update.adapter, wire, rng()), encode_update(update, wire, rng())):
            assert len(payload) == 8 + int.from_bytes(payload[:8], "little") + low_rank + dense


# Updates --------------------------------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8"), max_size=12)
floats = st.dictionaries(words, st.floats(allow_nan=False), max_size=3)


@given(
    words,
    st.integers(0, 2**40),
    words,
    words,
    st.integers(0, 2**60),
    floats,
    st.none() | floats,
    st.binary(max_size=64),
)
def test_every_field_of_an_update_comes_back(
    run: str, number: int, client: str, parent: str, n: int, metrics: Any, privacy: Any, signature: bytes
) -> None:
    update = Update(run, number, client, parent, adapter_of(3), n, metrics, privacy, signature)
    got = decode_update(encode_update(update, "fp32"))
    assert same_bits(got.adapter, update.adapter)
    for field in (
        "run_id",
        "round",
        "client_id",
        "parent_release_hash",
        "num_examples",
        "metrics",
        "privacy",
        "signature",
    ):
        assert getattr(got, field) == getattr(update, field)


# Names, shapes and order ------------------------------------------------------------------------------------------------


@formats
def test_one_adapter_has_one_encoding(wire: WireFormat) -> None:
    assert len({encode(adapter_of(0), wire, rng()) for _ in range(64)}) == 1


@formats
def test_the_order_in_which_an_adapter_came_about_does_not_show(wire: WireFormat) -> None:
    lora = {name: adapter_of(seed).lora["layers.0.q_proj"] for seed, name in enumerate("ab")}
    other = Adapter(dict(reversed(lora.items())))
    assert encode(other, wire, rng()) == encode(Adapter(lora), wire, rng())


@pytest.mark.parametrize("name", ["norm.row_scale", "norm.row_scale.weight"])
def test_a_dense_parameter_may_be_called_row_scale(name: str) -> None:
    assert list(decode(encode(Adapter({}, {name: np.ones(3, np.float32)}), "fp32")).dense) == [name]


def test_a_dense_parameter_may_be_a_scalar() -> None:
    got = decode(encode(Adapter({}, {"logit_scale": np.array(2.0, np.float32)}), "fp32"))
    assert got.dense["logit_scale"].shape == ()


def test_a_core_that_fits_no_factors_is_refused() -> None:
    """Cut from honest messages: of another rank, without its factors, without its row scales, or with those of empty factors."""
    cored = adapter_of(0, cored=True)
    name, (f,) = "layers.0.q_proj", cored.lora.values()
    base = {f"{name}.lora_A.weight": f.A, f"{name}.lora_B.weight": f.B}
    metadata = {"wire": "fp32", "scales": json.dumps({name: f.scale})}
    assert decode(canonical(base, metadata)).lora[name].core is None
    for tensors in (
        {**base, f"{name}.lora_core.weight": np.zeros((2, 2), np.float32)},
        {**base, f"{name}.lora_core.weight": np.zeros((3, 2), np.float32)},
        {**base, f"{name}.lora_core.weight": np.zeros(3, np.float32)},
        {**base, "layers.1.q_proj.lora_core.weight": np.zeros((3, 3), np.float32)},
        {**base, ".lora_core.weight": np.zeros((3, 3), np.float32)},
    ):
        with pytest.raises(UpdateRejected) as caught:
            decode(canonical(tensors, metadata))
        assert caught.value.reason == "schema"
    steps = {
        f"{name}.lora_A.weight": np.zeros((3, 0), np.int8), f"{name}.lora_B.weight": np.zeros((0, 3), np.int8),
        f"{name}.lora_core.weight": np.ones((3, 3), np.int8),
    }  # fmt: skip
    scales = {f"{name}.lora_core.weight.row_scale": np.ones(3, np.float32)}
    assert np.array_equal(
        arrays(decode(canonical({**steps, **scales}, metadata | {"wire": "int8"})))[f"{name}.core"], np.ones((3, 3))
    )
    with pytest.raises(UpdateRejected, match="row scales"):
        decode(canonical(steps, metadata | {"wire": "int8"}))
    stray = {f"{name}.lora_A.weight.row_scale": np.ones(3, np.float32)}
    assert set(decode(canonical({**steps, **scales, **stray}, metadata | {"wire": "int8"})).dense) == set(stray)
