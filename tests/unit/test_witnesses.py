"""What binds the owner of a log: heads that sites countersign, and heads that they keep."""

from __future__ import annotations

from typing import Any

import pytest

from lamina.protos import chain
from lamina.protos.chain import GENESIS, Fault, Head
from lamina.protos.errors import ConfigError
from tests.logs import history, public, sign, verified, verify_signature, witnessed, written


def countersigned(**changes: Any) -> Fault | None:
    """A countersignature of record 3 with changes, as the last record of a log."""
    lines, heads = history(rounds=1)
    fields = {key: value for key, value in (witnessed("north", heads[3]) | changes).items() if value is not ...}
    found = verified([*lines, *written([("countersign", fields)], after=heads[-1])[0]])
    if found.bad is None:
        return None
    assert found.bad.n == len(lines)
    return found.bad.fault


def test_a_countersignature_is_of_this_head_by_this_site() -> None:
    _, heads = history(rounds=1)
    south = witnessed("south", heads[3])
    assert countersigned() is None
    forged: list[dict[str, Any]] = [
        {"signature": south["signature"]},
        {"signature": ""},
        {"signature": "00" * 64},
        {"signature": 5},
        {"signature": "zz"},
        {"client_id": "south"},
        {"client_id": "south", "statement": south["statement"]},
        {"client_id": "west"},
        {"client_id": 5},
        {"client_id": ["north"]},
        {"client_id": ...},
        {"client_id": "\ud800" * 500},
        {"n": 2},
        {"n": True},
        {"n": -1},
        {"n": 2**70},
        witnessed("north", Head(2**53, heads[3].hash)),
        witnessed("north", Head(True, heads[1].hash)),
        witnessed("north", Head(-1, heads[-1].hash)),
        {"hash": heads[2].hash},
        {"hash": None},
        {"statement": ...},
        {"statement": south["statement"]},
        {"statement": None},
        {"more": 1},
        {"\ud800": 1},
        {"signature": sign("north", chain.HEAD_DOMAIN, chain.witness_statement("north", heads[3])).hex()},
    ]
    for changes in forged:
        fault = countersigned(**changes)
        assert fault is not None, changes
        assert fault.why == "countersignature", changes
        assert len(fault.expected + fault.found) < 400


@pytest.mark.parametrize(
    "seen",
    [Head(3, "ab" * 32), Head(3, "\ud800"), Head(6, "ab" * 32), Head(2**52, "ab" * 32)],
    ids=["another hash", "no hash", "itself", "the future"],
)
def test_a_countersigned_head_that_is_not_in_the_log_shows_that_it_was_rewritten(seen: Head) -> None:
    fault = countersigned(**witnessed("north", seen))
    assert fault is not None
    assert fault.why == "rewritten"
    assert 'client "north" countersigned' in fault.expected


def test_the_coordinator_can_ask_before_it_logs() -> None:
    _, heads = history(rounds=1)
    known = dict(enumerate(head.hash for head in heads))
    fields = witnessed("north", heads[3])
    assert chain.countersignature_fault(fields, known.get, public("north"), verify_signature) is None
    wrong = chain.countersignature_fault(fields, known.get, public("south"), verify_signature)
    assert wrong is not None
    assert wrong.why == "countersignature"
    assert chain.countersignature_fault(fields, lambda n: None, public("north"), verify_signature) == Fault(
        "rewritten",
        f'record 3 with the hash "{heads[3].hash}" that client "north" countersigned',
        "no such record before",
    )


def test_heads_that_sites_kept() -> None:
    lines, heads = history(rounds=1)
    found = verified(lines)
    other = Head(2, "ab" * 32)
    beyond = Head(6, "cd" * 32)
    assert chain.against([GENESIS, *heads], found) == []
    assert [(one.witness, one.why) for one in chain.against([heads[0], beyond, other], found)] == [
        (beyond, "truncated"),
        (other, "rewritten"),
    ]
    assert [one.why for one in chain.against(heads[4:], verified(lines[:4]))] == ["truncated", "truncated"]
    assert [one.why for one in chain.against([Head(-1, "ab" * 32)], found)] == ["rewritten"]
    # Only what is good counts.
    assert [one.why for one in chain.against(heads[:3], verified([lines[0], "junk\n", *lines[2:]]))] == [
        "truncated"
    ] * 2


def test_a_file_of_heads() -> None:
    _, heads = history(rounds=1)
    text = "".join(map(chain.witness_line, [GENESIS, *heads]))
    assert chain.witness_heads(text, "kept.txt") == [GENESIS, *heads]
    assert chain.witness_heads("", "kept.txt") == []
    for line in (
        "junk",
        "1",
        f"1  {'a' * 64}",
        f"-2 {'a' * 64}",
        f"1 {'A' * 64}",
        f"1 {'a' * 63}",
        f"1 {'a' * 64} x",
        "",
    ):
        with pytest.raises(ConfigError, match=r"kept\.txt, line 2"):
            chain.witness_heads(chain.witness_line(heads[0]) + line + "\n", "kept.txt")
