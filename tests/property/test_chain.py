"""Laws of the hash chain: any change of a log is found, at the record where it was made."""

from __future__ import annotations

import hashlib
import io
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.protos import chain
from lamina.protos.chain import GENESIS, Head
from tests.logs import SITES, Event, coordinator, history, keys_of_sites, unsigned, verified, witnessed, written

LINES, HEADS = history(rounds=2)
LOG = "".join(LINES).encode()
INDEX = range(len(LINES))
indices = st.sampled_from(INDEX)


def record_of(offset: int) -> int:
    return LOG[:offset].count(b"\n")


def named(changed: bytes, offset: int) -> None:
    """What must be found after one byte was replaced: the record in which it is, and everything before it is good.

    A newline belongs to the record that it ends: without it, that record and the next are one line, which is bad. Without the
    last newline of all, the log is torn.
    """
    found, n = verified(changed), record_of(offset)
    assert (found.records, found.head) == (n, HEADS[n - 1] if n else GENESIS)
    if offset == len(LOG) - 1:
        assert found.bad is None
        assert found.torn_bytes == len(LINES[-1])
    else:
        assert found.bad is not None
        assert (found.bad.line, found.bad.n) == (n + 1, n)
        assert found.torn_bytes == 0
    assert not found.intact


@settings(max_examples=300)
@given(st.integers(0, len(LOG) - 1), st.integers(1, 255))
def test_any_changed_byte_is_found_at_its_record(offset: int, mask: int) -> None:
    named(LOG[:offset] + bytes([LOG[offset] ^ mask]) + LOG[offset + 1 :], offset)


def test_every_flipped_bit_is_found() -> None:
    # A keyed hash in place of the signature, so that all bits of a small log can be tried.
    def mac(domain: str, statement: bytes) -> bytes:
        return hashlib.sha512(domain.encode() + statement).digest()

    events: list[Event] = [("begin", {"a": 1.5}), ("round", {"round": 1, "b": "\n"})]
    lines, heads = written(events, lambda digest: mac("log-head", digest))
    fields = chain.countersignature("north", heads[0], mac("log-witness", chain.witness_statement("north", heads[0])))
    lines += written([("countersign", fields)], lambda digest: mac("log-head", digest), heads[-1])[0]
    log = "".join(lines).encode()

    def check(text: bytes) -> chain.Verified:
        return chain.verify(
            chain.lines_of(io.BytesIO(text)), b"", keys_of_sites, lambda _, domain, said, tag: tag == mac(domain, said)
        )

    assert check(log).intact
    for offset in range(len(log)):
        n = log[:offset].count(b"\n")
        for bit in range(8):
            found = check(log[:offset] + bytes([log[offset] ^ (1 << bit)]) + log[offset + 1 :])
            assert found.records == n, (offset, bit)
            assert (found.bad is not None and found.bad.n == n) != (offset == len(log) - 1), (offset, bit)


@settings(max_examples=100)
@given(st.integers(0, len(LOG)), st.binary(min_size=1, max_size=40))
def test_inserted_bytes_are_found_at_their_record(offset: int, more: bytes) -> None:
    found, n = verified(LOG[:offset] + more + LOG[offset:]), record_of(offset)
    assert found.bad is not None or found.torn_bytes == len(more)
    if found.bad is None:
        assert n == len(LINES)
    else:
        assert found.bad.n == n


@settings(max_examples=100)
@given(st.integers(0, len(LOG) - 1), st.integers(1, 2000))
def test_removed_bytes_are_found_unless_they_are_the_end(offset: int, count: int) -> None:
    rest = LOG[offset + count :]
    found = verified(LOG[:offset] + rest)
    n = record_of(offset)
    if rest:
        assert found.bad is not None
        assert found.bad.n == n
    else:
        assert found.bad is None
        assert (found.records, found.torn_bytes) == (n, offset - sum(map(len, LINES[:n])))
        # What the log cannot show, whoever saw a later head can.
        cut = chain.against(HEADS, found)
        assert [one.witness for one in cut] == HEADS[n:]
        assert {one.why for one in cut} == {"truncated"}


@given(indices)
def test_a_removed_record_is_found(i: int) -> None:
    found = verified(LINES[:i] + LINES[i + 1 :])
    assert found.records == i
    if i == INDEX[-1]:
        assert found.intact
        assert [one.why for one in chain.against([HEADS[-1]], found)] == ["truncated"]
    else:
        assert found.bad is not None
        assert (found.bad.line, found.bad.n, found.bad.kind) == (i + 1, i, json.loads(LINES[i + 1])["kind"])


@given(indices, indices)
def test_swapped_records_are_found(i: int, j: int) -> None:
    swapped = list(LINES)
    swapped[i], swapped[j] = swapped[j], swapped[i]
    found = verified(swapped)
    if i == j:
        assert found.intact
    else:
        assert found.bad is not None
        assert found.bad.n == min(i, j)


@given(indices, st.integers(0, len(LINES)))
def test_a_repeated_record_is_found(i: int, at: int) -> None:
    found = verified([*LINES[:at], LINES[i], *LINES[at:]])
    assert found.bad is not None
    # Put before itself, the first of the two is in its place.
    assert found.bad.n == (at + 1 if i == at else at)


@given(st.integers(0, len(LINES)), st.booleans())
def test_a_record_of_the_coordinators_own_cannot_be_put_between(at: int, by_coordinator: bool) -> None:
    before = HEADS[at - 1] if at else GENESIS
    more, _ = written([("round", {"round": 9})], coordinator if by_coordinator else unsigned, before)
    found = verified(LINES[:at] + more + LINES[at:])
    if by_coordinator and at == len(LINES):
        assert found.intact  # that is how a log grows
    else:
        assert found.bad is not None
        assert found.bad.n == (at + 1 if by_coordinator else at)


@given(st.integers(1, len(LINES) - 1), st.integers(1, len(LINES) - 1))
def test_a_record_of_another_branch_is_found(i: int, at: int) -> None:
    """The owner signed two continuations, each whole; a record of one does not fit into the other, though its number does."""
    i, at = sorted((i, at))
    branch, _ = written([("round", {"round": 9})] * (len(LINES) - i), after=HEADS[i - 1])
    assert verified(LINES[:i] + branch).intact
    for mixed in ([*LINES[:at], *branch[at - i :]], [*LINES[:i], *branch[: at - i], *LINES[at:]]):
        found = verified(mixed)
        if at == i:
            assert found.intact
        else:
            assert found.bad is not None
            assert (found.bad.n, found.bad.fault.why) == (at, "prev")


@given(indices)
def test_an_owner_who_writes_the_end_anew_is_found_by_the_sites(i: int) -> None:
    """The owner has the coordinator's key, so the chain and its signatures hold; the countersigned heads do not."""
    events = [(json.loads(line)["kind"], json.loads(line)["fields"]) for line in LINES[i:]]
    kind, fields = events[0]
    kept = [HEADS[3], HEADS[6]]  # of the two rounds, which both sites saw
    alone, _ = written([("round", {"round": 1, "loss": 0.1})], after=HEADS[i - 1] if i else GENESIS)
    cut = verified(LINES[:i] + alone)
    assert cut.intact
    assert [one.witness for one in chain.against(kept, cut)] == [head for head in kept if head.n >= i]

    anew, _ = written([(kind, {**fields, "loss": 0.1}), *events[1:]], after=HEADS[i - 1] if i else GENESIS)
    found = verified(LINES[:i] + anew)
    bad = {head.n for head in kept if head.n >= i}
    if kind == "countersign":
        assert found.bad is not None
        assert (found.bad.n, found.bad.fault.why) == (i, "countersignature")
    elif bad:
        # The first countersignature of a head that is no more.
        assert found.bad is not None
        assert (found.bad.n, found.bad.fault.why) == (min(bad) + 1, "rewritten")
    else:
        raise AssertionError("every record but the countersignatures is before a head that was seen")


@settings(max_examples=100)
@given(st.lists(st.one_of(st.binary(max_size=80), st.text(max_size=80), st.sampled_from(LINES)), max_size=6))
def test_nothing_raises(lines: list[bytes | str]) -> None:
    found = verified(lines)
    assert found.records == len(found.hashes) <= found.lines
    assert found.head == (HEADS[found.records - 1] if found.records else GENESIS)
    str(found.bad)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(["client_id", "n", "hash", "statement", "signature", "x"]), JSON))
def test_no_fields_of_a_countersignature_raise(fields: dict[str, object]) -> None:
    lines, _ = written([("countersign", {**witnessed("north", HEADS[3]), **fields})], after=HEADS[-1])
    found = verified([*LINES, *lines])
    assert found.intact == (not fields)
    if found.bad is not None:
        assert (found.bad.n, found.bad.fault.why) == (len(LINES), "countersignature")


@settings(max_examples=100)
@given(st.lists(st.dictionaries(st.text(max_size=8), JSON, max_size=4), max_size=4))
def test_whatever_json_holds_can_be_logged(fields: list[dict[str, object]]) -> None:
    lines, heads = written([("round", one) for one in fields])
    found = verified("".join(lines).encode())
    assert found.intact
    assert list(found.hashes) == [head.hash for head in heads]
    assert [json.loads(line)["fields"] for line in lines] == fields


@given(st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=32, max_size=32)), max_size=5))
def test_kept_heads_survive_their_file(kept: list[tuple[int, bytes]]) -> None:
    heads = [Head(n, digest.hex()) for n, digest in kept]
    assert chain.witness_heads("".join(map(chain.witness_line, heads)), "kept") == heads
    assert {found.witness for found in chain.against(heads, verified(LINES))} == set(heads) - set(HEADS)
    assert set(SITES) == set(verified(LINES).countersigned)
