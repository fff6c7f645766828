"""Text of the audited data that would like to be more than text, and figures that are none: the page stays a page."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.audits.page import render
from tests.audited import leaking, private, violated
from tests.pages import EVIL, Page, refers_outside, svgs
from tests.unit.test_audit_page import AUDIT_TAGS

Json = dict[str, Any]
SCHEMA_ONLY = {"schema": 1}


def mapped(value: Any, leaf: Callable[[Any], Any], name: Callable[[str], str] = str) -> Any:
    """The same document with every leaf, and every name that the audit did not choose itself, replaced."""
    if isinstance(value, dict):
        return {name(key): mapped(one, leaf, name) for key, one in value.items()}
    return [mapped(one, leaf, name) for one in value] if isinstance(value, list) else leaf(value)


def hostile(text: str) -> Iterator[Json]:
    """Documents in which every text is `text`, and in which every name that comes from a run is too."""
    for make in (private, leaking, violated):
        document = mapped(make(), lambda value: text if isinstance(value, str) else value)
        document["signature"] = dict.fromkeys(("name", "organisation", "fingerprint", "algorithm", "value"), text)
        document |= {"command": text, "versions": {text: text}}
        yield document
        for key in ("claim.per_client", "membership.attacks", "exposure.canaries", "reconstruction", "subject.hashes"):
            *path, last = key.split(".")
            at = document
            for part in path:
                at = at[part] or {}
            inner = at.get(last) or {}
            at[last] = {f"{text}{n}": one for n, one in enumerate(inner.values())}
        for one in document["defences"] or []:
            one["recall"] = one["chance"] = {text: 0.5}
        for one in document["reconstruction"].values():
            one["by_client"] = {text: {"recall": 0.5, "chance": 0.1}}
            one["notes"] = {"tuned": {"values": {text: 0.5}}}
        yield document


def sound(raw: str) -> None:
    assert not refers_outside(raw)
    assert set(Page(raw).tags) <= AUDIT_TAGS
    assert raw.count("<html") == raw.count("</html>") == raw.count("<main>") == raw.count("</main>") == 1
    raw.encode()  # no lone surrogate
    assert not {chr(n) for n in (0, 8, 11, 27, 127)} & set(raw)
    svgs(raw)  # each parses as XML
    assert not re.search(r'\b(?:[xyd]|x1|x2|cx|cy|width)="[^"]*(?:nan|inf)', raw)


@pytest.mark.parametrize(
    "text",
    [
        EVIL,
        "</pre></main><script>alert(1)</script>",
        "' onmouseover='alert(1)",
        '" onload="alert(1)"><img src=x onerror=alert(1)>',
        "</title></style><svg/onload=alert(1)>",
        "<mark>&lt;b&gt;</mark>&#60;script&#62;",
        "]]><!-- {0} {value} %s",
    ],
)
def test_no_text_becomes_markup(text: str) -> None:
    for document in hostile(text):
        raw = render(document)
        sound(raw)
        assert "<script" not in raw
        assert "<img" not in raw
        page = Page(raw)
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        # It is there for a person to read, as it was written.
        readable = text.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
        assert "".join(readable.split()) in "".join("".join(page.words).split())


@pytest.mark.parametrize("sign", ["\u202e", "\u2066", "\u200f", "\u061c", "\u200b", "\ufeff"])
def test_signs_that_turn_or_hide_text_are_spelt_out(sign: str) -> None:
    for document in hostile(f"safe{sign}evil"):
        raw = render(document)
        sound(raw)
        assert sign not in raw
        assert f"safe‹U+{ord(sign):04X}›evil" in raw


def test_text_of_another_direction_keeps_to_itself() -> None:
    document = leaking()
    document["reasons"] = ["שלום 12 عالم"]
    raw = render(document)
    assert "<bdi>שלום 12 عالم</bdi>" in raw
    assert raw.count('<pre dir="auto">') == raw.count("<pre")


def test_megabytes_are_clipped() -> None:
    for document in hostile("<b>" * 700_000):
        raw = render(document)
        assert len(raw) < 2_000_000
        sound(raw)
        assert "characters more" in raw
    many = leaking()
    many["reconstruction"]["peer"]["examples"] *= 30_000
    many["reconstruction"]["peer"]["by_client"] = {f"c{n}": {"recall": 1.0, "chance": 0.0} for n in range(50_000)}
    many["membership"]["attacks"] = {f"a{n}": {"auc": 0.5, "roc": [[0.1, 0.1]] * 5000} for n in range(2000)}
    many["novelty"]["samples"] = [{"text": "x" * 5000, "shared": ["x"] * 500}] * 5000
    many["limits"] = many["reasons"] = ["x" * 10_000] * 10_000
    many["checks"] = [{"name": "noise"}] * 10_000
    many["defences"] = many["defences"] * 5000
    many["subject"]["hashes"] = {f"h{n}": "0" * 64 for n in range(100_000)}
    raw = render(many)
    assert len(raw) < 2_000_000
    sound(raw)


ODD: list[Any] = [None, math.nan, -math.inf, 1e308, 5e-324, 10**400, -1, 0, True, "8", [], [[]], {"value": {}}]


@pytest.mark.parametrize("odd", ODD, ids=lambda value: repr(value)[:12])
def test_no_figure_breaks_the_page(odd: Any) -> None:
    every = violated() | {"defences": leaking()["defences"], "extraction": leaking()["extraction"]}
    sound(render(mapped(every, lambda value: value if isinstance(value, str) else copy.deepcopy(odd)) | SCHEMA_ONLY))
    for key, inner in every.items():
        render(every | {key: odd} | SCHEMA_ONLY)
        if isinstance(inner, dict):
            sound(render(every | {key: dict.fromkeys(inner, odd)} | SCHEMA_ONLY))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(st.data())
def test_whatever_stands_anywhere_the_page_is_a_page(data: st.DataObject) -> None:
    document = copy.deepcopy(data.draw(st.sampled_from([FIRST, SECOND])))
    for _ in range(data.draw(st.integers(1, 4))):
        at: Any = document
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = data.draw(st.sampled_from(keys))
            deeper = at[key]
            if not (isinstance(deeper, dict | list) and deeper) or data.draw(st.integers(0, 3)) == 0:
                at[key] = copy.deepcopy(data.draw(JSON))  # some values are shared
                break
            at = deeper
    sound(render(document | SCHEMA_ONLY))


FIRST, SECOND = private(), leaking()
