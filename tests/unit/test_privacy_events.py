"""Events and claims: there and back, and nothing that is no event passes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.protos.errors import ConfigError
from lamina.protos.privacy.events import CLAIMED, Claim, Event, from_claim, from_json, to_claim, to_json

POSITIVE = st.floats(1e-9, 1e9)
EVENTS = st.builds(
    Event,
    client_id=st.text(max_size=20),
    round=st.integers(0, 10**6),
    noise_multiplier=POSITIVE,
    sample_rate=st.floats(1e-12, 1.0),
    steps=st.integers(1, 2**53),
    clip=POSITIVE,
    unit=st.sampled_from(["record", "user", "client"]),
)
ONE = Event("north", 3, 1.1, 0.05, 10, 1.0)


@given(EVENTS)
def test_an_event_comes_back_to_the_bit(event: Event) -> None:
    assert from_json(json.loads(json.dumps(to_json(event))), "here") == event


@given(EVENTS, st.floats(1e-12, 0.5), st.floats(0, 1e6))
def test_a_claim_comes_back_to_the_bit(event: Event, delta: float, epsilon: float) -> None:
    claim = Claim(event, delta, epsilon)
    numbers = json.loads(json.dumps(to_claim(claim)))
    assert tuple(numbers) == CLAIMED
    assert from_claim(numbers, event.client_id, event.round, event.unit) == claim


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (name, bad)
            for name in ("noise_multiplier", "sample_rate", "clip")
            for bad in (0, -1, math.nan, math.inf, "1", None, True)
        ),
        *((name, bad) for name in ("round", "steps") for bad in (-1, 1.5, "1", None, True, 2**53 + 1, 10**400)),
        *((name, 10**400) for name in ("noise_multiplier", "sample_rate", "clip")),
        ("sample_rate", 1.0000001),
        ("unit", "row"),
        ("unit", ["record"]),
        ("unit", None),
        ("client_id", 7),
        ("client_id", None),
        ("mechanism", "laplace"),
        ("mechanism", None),
        ("relation", "replace-one"),
        ("epsilon", 0.0),
    ],
)
def test_what_is_no_event_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="here: expected an event of a private mechanism"):
        from_json({**to_json(ONE), field: value}, "here")


@pytest.mark.parametrize("field", list(to_json(ONE)))
def test_an_event_without_a_field_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match="here: expected an event"):
        from_json({key: value for key, value in to_json(ONE).items() if key != field}, "here")


@pytest.mark.parametrize("document", [[], {}, "x", 3, None, [["mechanism", 1]]])
def test_what_is_no_document_is_refused(document: Any) -> None:
    with pytest.raises(ConfigError, match="here: expected an event"):
        from_json(document, "here")


CLAIM = to_claim(Claim(ONE, 1e-5, 2.0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, bad) for name in CLAIMED for bad in (math.nan, math.inf, -math.inf, -1.0)),
        *((name, 0.0) for name in CLAIMED if name != "epsilon"),
        ("steps", 1.5),
        ("steps", 1e300),
        ("delta", 1.0),
        ("sample_rate", 2.0),
        ("sigma", 1.0),
    ],
)
def test_what_is_no_claim_is_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match="client north, round 3, privacy"):
        from_claim({**CLAIM, field: value}, "north", 3, "record")


@pytest.mark.parametrize("field", CLAIMED)
def test_a_claim_without_a_number_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match="expected the numbers"):
        from_claim({key: value for key, value in CLAIM.items() if key != field}, "north", 3, "record")
