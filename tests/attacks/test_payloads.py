"""Attack: bytes that are no update. Refused before anything large is allocated, counted, and the round goes on."""

from __future__ import annotations

import json
import pickle
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from lamina.protos import codec
from lamina.protos.codec import decode_update, encode_update
from lamina.protos.errors import UpdateRejected
from lamina.protos.messages import Update
from lamina.server.admission import size_cap_bytes
from tests.federation import attacked, budget, campaign, oversized, reasons, spec, trained, without_the_attacker
from tests.runs import same_bits


def container(header: bytes, body: bytes = b"", claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + body


def nested(depth: int) -> bytes:
    return container(b'{"a":' + b"[" * depth + b"]" * depth + b"}")


def with_metadata(sent: Update, /, **changes: Any) -> bytes:
    """An honest update's tensors with other metadata."""
    payload = encode_update(sent, "fp32")
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + size])
    for key, value in changes.items():
        header["__metadata__"][key] = value
    return container(json.dumps(header).encode(), payload[8 + size :])


def field(sent: Update, /, **changes: Any) -> bytes:
    """An honest update whose fields are replaced by what JSON allows and Python does not expect."""
    payload = encode_update(sent, "fp32")
    size = int.from_bytes(payload[:8], "little")
    fields = json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["update"]) | changes
    return with_metadata(sent, update=json.dumps(fields))


def claims(shape: list[int], size: int) -> bytes:
    return container(json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode(), bytes(16))


BYTES = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "zeros": bytes(4096),
    "a header length beyond the file": container(b"{}", claimed=2**63),
    "a header length of all ones": container(b"{}", claimed=2**64 - 1),
    "a deep header": nested(5000),
    "a deeper header": nested(200_000),
    "a header that is a list": container(b"[]"),
    "a header that is null": container(b"null"),
    "metadata that is a list": container(b'{"__metadata__": []}'),
    "metadata of numbers": container(b'{"__metadata__": {"wire": 1, "scales": 2, "update": 3}}'),
    "a tensor of 2^62 numbers": claims([2**31, 2**31], 16),
    "a tensor beyond the file": claims([1024], 4096),
    "a tensor of negative size": claims([-4], 16),
    "offsets that run backwards": container(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', bytes(4)),
    "a number format of our own": container(b'{"x":{"dtype":"F128","shape":[1],"data_offsets":[0,16]}}', bytes(16)),
    "doubles": bytes(save({"x": np.zeros(3)}, {"wire": "fp32", "scales": "{}"})),
    "no metadata": bytes(save({"x": np.zeros(3, np.float32)})),
    "a pickle": pickle.dumps({"lora": [1, 2, 3]}),
    "text": b"Dear coordinator, please accept my update." * 20,
    "not UTF-8": container(b'{"\xff\xfe": 1}'),
}


@pytest.mark.parametrize("name", list(BYTES))
def test_foreign_bytes_are_malformed(name: str) -> None:
    one = campaign()
    after = attacked(one, lambda *_: BYTES[name])
    assert reasons(after) == [("2", "malformed")]
    assert same_bits(after.state.adapter, without_the_attacker(one).state.adapter)


def test_an_oversized_payload_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    one = campaign()
    parse = codec._parse

    def watched(payload: bytes, num_bytes: int, max_bytes: int) -> Any:
        if num_bytes > max_bytes:
            monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("parsed before the size was checked"))
        try:
            return parse(payload, num_bytes, max_bytes)
        finally:
            monkeypatch.undo()

    assert len(oversized()) > size_cap_bytes(spec(), budget(2))
    monkeypatch.setattr(codec, "_parse", watched)
    assert reasons(attacked(one, lambda *_: oversized())) == [("2", "too-large")]


@pytest.mark.parametrize("rank", [1, 2, 7])
@pytest.mark.parametrize("wire", codec.WIRE_FORMATS)
def test_the_size_cap_admits_every_honest_update(rank: int, wire: codec.WireFormat) -> None:
    one = campaign(ranks=(rank, rank, rank), wire=wire)
    after = attacked(one, lambda _, update: encode_update(update, wire, np.random.default_rng(0)))
    assert reasons(after) == []


FIELDS: dict[str, Any] = {
    "a round that is text": {"round": "1"},
    "a round that is true": {"round": True},
    "a round with a fraction": {"round": 1.0},
    "a client that is a number": {"client_id": 2},
    "examples that are text": {"num_examples": "10"},
    "examples that are infinite": {"num_examples": float("inf")},
    "metrics that are a list": {"metrics": [1]},
    "a metric that is text": {"metrics": {"train_loss": "low"}},
    "a metric beyond a float": {"metrics": {"train_loss": 10**400}},
    "privacy that is text": {"privacy": "yes"},
    "a signature that is no hex": {"signature": "zz"},
    "no fields at all": None,
}


@pytest.mark.parametrize("name", list(FIELDS))
def test_fields_of_another_type_are_malformed(name: str) -> None:
    changes = FIELDS[name]
    after = attacked(
        campaign(), lambda _, u: with_metadata(u, update="null") if changes is None else field(u, **changes)
    )
    assert reasons(after) == [("2", "malformed")]


@pytest.mark.parametrize(
    "scales",
    [
        "[]",
        "{",
        '{"block.q_proj": "2"}',
        '{"block.q_proj": NaN}',
        '{"block.q_proj": -1}',
        '{"block.q_proj": 1e999}',
        "[" * 9000,
    ],
)
def test_scales_that_are_no_positive_numbers_are_refused(scales: str) -> None:
    after = attacked(campaign(), lambda _, update: with_metadata(update, scales=scales))
    assert [reason for _, reason in reasons(after)] in (["malformed"], ["schema"])


@pytest.mark.parametrize("wire", ["fp64", "", "__class__", "int8", "bf16"])
def test_a_wire_format_that_the_tensors_are_not_in_is_refused(wire: str) -> None:
    after = attacked(campaign(), lambda _, update: with_metadata(update, wire=wire))
    assert reasons(after) == [("2", "malformed")]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_damaged_update_is_refused_or_decodes_to_something_checked(data: st.DataObject) -> None:
    one = campaign()
    payloads: list[bytes] = []
    attacked(one, lambda _, update: payloads.append(encode_update(update, "fp32")) or payloads[0])  # type: ignore[func-returns-value]
    content = bytearray(payloads[0])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    for payload in (bytes(content), bytes(content[:cut])):
        reason = "malformed"
        try:
            decode_update(payload)
        except UpdateRejected as error:
            reason = error.reason
        assert reason in ("malformed", "schema", "too-large")


def test_the_wrong_client_of_a_damaged_round_is_still_one_rejection() -> None:
    one = campaign()
    after = attacked(one, lambda instruction, _: encode_update(trained(one, instruction), "fp32")[:-1])
    assert reasons(after) == [("2", "malformed")]
