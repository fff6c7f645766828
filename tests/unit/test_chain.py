"""The hash chain: the one text of a record, what a check of a log finds, heads that sites keep."""

from __future__ import annotations

import hashlib
import io
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from lamina.protos import chain
from lamina.protos.chain import GENESIS, Fault, Head, Record
from lamina.protos.errors import LaminaError
from tests.logs import (
    SITES,
    TIME,
    coordinator,
    history,
    keys_of_sites,
    public,
    sign,
    unsigned,
    verified,
    verify_signature,
    witnessed,
    written,
)


def code(lines: list[str] | bytes) -> str:
    bad = verified(lines).bad
    assert bad is not None
    return bad.fault.why


def rehashed(signer: Any = coordinator, /, **changes: Any) -> str:
    """A first record whose values are replaced and whose hash and signature then are made right."""
    body = {"n": 0, "time": TIME, "kind": "begin", "fields": {}, "prev": GENESIS.hash} | changes
    digest = hashlib.sha256(bytes(32) + chain.canonical_json(body)).hexdigest()
    record = body | {"hash": digest, "signature": signer(bytes.fromhex(digest)).hex()}
    return chain.canonical_json(record).decode() + "\n"


def test_a_record_is_what_the_format_says() -> None:
    line, head = chain.extended(GENESIS, "begin", {"run_id": "r", "é": [1, 0.5, None]}, TIME, coordinator)
    # Written out by hand: prev as 32 bytes, then the canonical text of the other four fields and prev.
    fields = '{"run_id":"r","\\u00e9":[1,0.5,null]}'
    text = f'{{"fields":{fields},"kind":"begin","n":0,"prev":"{"0" * 64}","time":"{TIME}"}}'
    digest = hashlib.sha256(bytes(32) + text.encode()).hexdigest()
    assert head == Head(0, digest)
    signature = sign("coordinator", "log-head", bytes.fromhex(digest)).hex()
    assert line == (
        f'{{"fields":{fields},"hash":"{digest}","kind":"begin","n":0,"prev":"{"0" * 64}",'
        f'"signature":"{signature}","time":"{TIME}"}}\n'
    )
    second, after = chain.extended(head, "round", {}, TIME, coordinator)
    assert json.loads(second)["prev"] == digest
    assert after.n == 1


def test_a_whole_log_is_intact() -> None:
    lines, heads = history(rounds=2)
    found = verified(lines)
    assert found.intact
    assert (found.records, found.lines, found.head) == (9, 9, heads[-1])
    assert list(found.hashes) == [head.hash for head in heads]
    assert found.countersigned == {site: [heads[3], heads[6]] for site in SITES}
    assert verified("".join(lines).encode()) == found
    assert verified([]).records == 0
    assert verified([]).head == GENESIS


def test_a_log_without_keys_is_its_chain_only() -> None:
    lines, _ = written([("begin", {}), ("round", {"round": 1})], unsigned)
    head = Head(1, json.loads(lines[1])["hash"])
    more, _ = written([("countersign", chain.countersignature("north", head, b""))], unsigned, head)
    found = chain.verify(lines + more, None, keys_of_sites, verify_signature)
    assert found.intact
    assert found.countersigned == {"north": [head]}
    # With a key, the same log is not signed; without one, a signed log is not unsigned.
    assert code(lines) == "signature"
    signed = chain.verify(history()[0], None, keys_of_sites, verify_signature).bad
    assert signed is not None
    assert (signed.n, signed.fault.why) == (0, "signature")
    claimed = [("countersign", witnessed("north", head))]
    bad = chain.verify(lines + written(claimed, unsigned, head)[0], None, keys_of_sites, verify_signature).bad
    assert bad is not None
    assert (bad.n, bad.fault.why) == (2, "countersignature")


FORMS = {
    "true for n": {"n": True},
    "a float for n": {"n": 0.0},
    "text for n": {"n": "0"},
    "no kind": {"kind": ""},
    "upper case": {"kind": "Begin"},
    "a kind with a newline": {"kind": "begin\n"},
    "a kind of 65 letters": {"kind": "k" * 65},
    "a list of fields": {"fields": []},
    "no fields": {"fields": None},
    "another zone": {"time": "2026-05-01T12:00:00.000+00:00"},
    "a day that is none": {"time": "2026-02-30T12:00:00.000Z"},
    "digits of another script": {"time": "２026-05-01T12:00:00.000Z"},
    "a number for time": {"time": 0},
    "an extra field": {"more": 1},
    "a field that is no text": {"\ud800": 1},
    "fields 33 deep": {"fields": {"a": json.loads("[" * 31 + "]" * 31)}},
}


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_a_right_hash_and_signature_do_not_excuse_the_form(changes: dict[str, Any]) -> None:
    assert code([rehashed(**changes)]) == "form"


def test_a_form_at_its_limits_is_good() -> None:
    assert verified([rehashed()]).intact
    assert verified([rehashed(fields={"a": json.loads("[" * 30 + "]" * 30)}, kind="k" * 64)]).intact
    assert verified([rehashed(time="2026-05-01T12:00:00Z")]).intact


@pytest.mark.parametrize("field", ["n", "time", "kind", "fields", "prev", "hash", "signature"])
def test_each_field_is_needed_and_of_its_type(field: str) -> None:
    whole = json.loads(rehashed())
    lacking = {key: value for key, value in whole.items() if key != field}
    assert code([chain.canonical_json(lacking).decode() + "\n"]) == "form"
    others: list[Any] = [None, 7, True, [], {"a": 1}, "é", "\ud800"]
    for other in others:
        changed = chain.canonical_json(whole | {field: other}).decode() + "\n"
        assert code([changed]) in ("form", "number", "hash")


TEXTS = {
    "a space": lambda line: line.replace(":", ": ", 1),
    "a space at the end": lambda line: line[:-1] + " \n",
    "a carriage return": lambda line: line[:-1] + "\r\n",
    "a key twice": lambda line: line.replace('"kind"', '"kind":"begin","kind"'),
    "another order": lambda line: json.dumps(dict(reversed(json.loads(line).items())), separators=(",", ":")) + "\n",
    "an escape": lambda line: line.replace("begin", "\\u0062egin"),
    "another number": lambda line: line.replace('"n":0', '"n":-0'),
    "a long number": lambda line: line.replace('"n":0', '"n":' + "1" * 5000),
    "infinity": lambda line: line.replace('"n":0', '"n":1e999'),
    "not a number": lambda line: line.replace('"n":0', '"n":NaN'),
    "upper case hash": lambda line: line.replace(json.loads(line)["hash"], json.loads(line)["hash"].upper()),
    "upper case signature": lambda line: line.replace(
        json.loads(line)["signature"], json.loads(line)["signature"].upper()
    ),
    "no signature": lambda line: line.replace(json.loads(line)["signature"], ""),
    "a byte order mark": lambda line: "\ufeff" + line,
    "a surrogate": lambda line: line.replace("begin", "\ud800"),
    "a zero": lambda line: "\0" + line,
    "an empty line": lambda line: "\n" + line,
    "two at once": lambda line: line[:-1] + line,
    "a list": lambda line: f"[{line[:-1]}]\n",
}


@pytest.mark.parametrize("change", TEXTS.values(), ids=TEXTS)
def test_another_text_of_the_same_record_is_none(change: Any) -> None:
    lines, _ = written([("begin", {"a": 1})])
    changed = change(lines[0])
    assert changed != lines[0]
    bad = verified([changed]).bad
    assert bad is not None
    assert (bad.line, bad.n) == (1, 0)
    assert bad.fault.why in ("form", "signature")


GARBAGE = {
    "deep lists": b"[" * 900_000 + b"\n",
    "deep objects": b'{"a":' * 180_000 + b"\n",
    "a closed depth": b"[" * 50_000 + b"]" * 50_000 + b"\n",
    "utf-16": '{"n":0}'.encode("utf-16") + b"\n",
    "not utf-8": b'{"n":"\xff"}\n',
    "an empty object": b"{}\n",
    "null": b"null\n",
    "a number": b"1\n",
    "zeros": bytes(4096) + b"\n",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_a_finding(garbage: bytes) -> None:
    lines, heads = history(rounds=1)
    found = verified([*lines[:2], garbage, *lines[2:]])
    assert found.bad is not None
    assert (found.bad.line, found.bad.n, found.bad.kind, found.bad.fault.why) == (3, 2, None, "form")
    assert (found.records, found.head, found.lines) == (2, heads[1], len(lines) + 1)
    assert len(str(found.bad)) < 400


def test_a_line_beyond_the_cap_is_not_held_and_not_read() -> None:
    lines, _ = written([("begin", {"a": ""}), ("round", {})])
    room = chain.LINE_CAP_BYTES - len(lines[0])
    fitting = written([("begin", {"a": "x" * room})])[0][0]
    assert len(fitting) == chain.LINE_CAP_BYTES
    assert verified([fitting]).intact
    with pytest.raises(LaminaError, match="at most 1048576 bytes"):
        written([("begin", {"a": "x" * (room + 1)})])
    for end in (b"\n", b"", b"\n" + lines[1].encode()):
        file = io.BytesIO(lines[0].encode() + b"x" * (3 * chain.LINE_CAP_BYTES) + end)
        pieces = list(chain.lines_of(file))
        assert max(map(len, pieces)) == chain.LINE_CAP_BYTES + 1
        found = verified(pieces)
        assert found.bad is not None
        assert (found.bad.n, found.bad.fault.why, found.torn_bytes) == (1, "length", 0)
        assert found.lines == len(pieces) == 2 + bool(end.strip())


def test_a_torn_end_is_neither_intact_nor_bad() -> None:
    lines, heads = history(rounds=1)
    whole = "".join(lines).encode()
    last = len(lines[-1])
    for cut in range(1, last):
        found = verified(whole[:-cut])
        assert found.bad is None
        assert not found.intact
        assert (found.torn_bytes, found.records, found.head) == (last - cut, len(lines) - 1, heads[-2])
    assert verified(whole[:-last]).intact
    # Amid the log it is a bad record: no crash leaves lines after it.
    found = verified([*lines[:2], lines[2][:-1], *lines[3:]])
    assert found.bad is not None
    assert (found.bad.line, found.bad.n, found.bad.fault.why, found.torn_bytes) == (3, 2, "newline", 0)


def test_only_the_first_bad_record_is_named_and_a_torn_end_beside_it() -> None:
    lines, _ = history(rounds=1)
    found = verified([lines[0], lines[1].replace("north", "nerth"), "junk\n", lines[2][:50]])
    assert found.bad is not None
    assert (found.bad.n, found.bad.kind, found.bad.fault.why) == (1, "register", "hash")
    assert (found.torn_bytes, found.lines, found.records) == (50, 4, 1)
    assert "line 2, n 1 (register): hash: expected hash" in str(found.bad)


def test_a_record_can_be_refused_by_the_caller() -> None:
    lines, _ = history(rounds=1)
    told: list[int] = []

    def accept(record: Record) -> Fault | None:
        told.append(record.n)
        return Fault("mine", "another", record.kind) if record.n == 2 else None

    found = chain.verify(lines, public("coordinator"), keys_of_sites, verify_signature, accept)
    assert found.bad is not None
    assert (found.bad.n, found.bad.fault) == (2, Fault("mine", "another", "register"))
    assert told == [0, 1, 2]


def test_another_key_or_domain_is_no_signature() -> None:
    wrong = {
        "a site's key": lambda digest: sign("north", chain.HEAD_DOMAIN, digest),
        "another domain": lambda digest: sign("coordinator", chain.WITNESS_DOMAIN, digest),
        "another statement": lambda digest: sign("coordinator", chain.HEAD_DOMAIN, digest.hex().encode()),
        "none": unsigned,
    }
    for signer in wrong.values():
        assert code([rehashed(signer)]) == "signature"


def test_an_empty_signature_is_none_whatever_the_caller_would_take() -> None:
    lines, heads = history(rounds=1)

    def bad(lines: list[str]) -> tuple[int, str] | None:
        found = chain.verify(lines, b"key", keys_of_sites, lambda *_: True).bad
        return None if found is None else (found.n, found.fault.why)

    assert bad(lines) is None
    assert bad([rehashed(unsigned)]) == (0, "signature")
    fields = chain.countersignature("north", heads[3], b"")
    assert bad([*lines, *written([("countersign", fields)], after=heads[-1])[0]]) == (6, "countersignature")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Begin", {}),
        ("", {}),
        ("begin", {"a": float("nan")}),
        ("begin", {"a": float("inf")}),
        ("begin", {"a": {1, 2}}),
        ("begin", {"a": b"bytes"}),
        ("begin", {"a": {10: 0, 9: 0}}),  # sorted as numbers, not as the texts that they become
        ("begin", {"a": {1: 0, "1": 0}}),
        ("begin", {"a": {1: 0, "b": 0}}),
        ("begin", {"a": json.loads("[" * 40 + "]" * 40)}),
    ],
)
def test_what_a_check_would_refuse_is_never_written(kind: str, fields: dict[str, Any]) -> None:
    with pytest.raises(LaminaError, match=r"event log, record 0 .*expected"):
        chain.extended(GENESIS, kind, fields, TIME, coordinator)


def test_a_signature_of_another_length_or_time_of_another_form_is_never_written() -> None:
    with pytest.raises(LaminaError, match="signature"):
        chain.extended(GENESIS, "begin", {}, TIME, lambda digest: b"short")
    with pytest.raises(LaminaError, match="time"):
        chain.extended(GENESIS, "begin", {}, "yesterday", coordinator)


def test_times_are_utc() -> None:
    noon = datetime(2026, 5, 1, 14, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    assert chain.timestamp(noon) == "2026-05-01T12:00:00.123Z"
    assert chain.timestamp(datetime(2026, 5, 1, 12, tzinfo=UTC)) == TIME
    with pytest.raises(LaminaError, match="zone"):
        chain.timestamp(datetime(2026, 5, 1, 12))
