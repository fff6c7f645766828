"""The audit's page: what it says of each document, and what stands beside every figure."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.audits.page import marking, reading, render, words
from lamina.protos.errors import ConfigError
from lamina.protos.pages.charts import escape
from tests.audited import leaking, private, violated
from tests.pages import TAGS, Page, refers_outside, svgs

Json = dict[str, Any]
AUDIT_TAGS = {*TAGS.split(), "ul", "li", "b", "br", "bdi", "mark"}


def text_of(document: Json) -> str:
    """The page's words, without tags; narrow spaces as plain ones."""
    return re.sub(r"\s+", " ", Page(render(document)).text)


def chart(document: Json, label: str) -> ET.Element:
    return next(svg for svg in svgs(render(document)) if svg.attrib.get("aria-label") == label)


def lines(svg: ET.Element) -> dict[str, list[tuple[float, float]]]:
    """Class of each line -> its points."""
    found = {}
    for group in svg.iter("g"):
        for path in (one for one in group if one.attrib.get("class") == "line"):
            numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", path.attrib["d"].replace("h.01", ""))]
            found[group.attrib["class"].strip()] = list(zip(numbers[::2], numbers[1::2]))
    return found


@pytest.mark.parametrize("make", [private, leaking, violated])
def test_a_page_is_whole_and_refers_to_nothing(make: Any) -> None:
    document = make()
    raw = render(document)
    assert not refers_outside(raw)
    assert set(Page(raw).tags) <= AUDIT_TAGS
    assert len(svgs(raw)) > 10
    assert "text of the audited data" in text_of(document)
    assert render(json.loads(json.dumps(document))) == raw  # so that a page can be held against its document


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        ("consistent", "Nothing in this audit found more than the claim of ε = 8 allows"),
        ("violated", "found more than the claim of ε = 8 allows"),
        ("under-powered", "could not have refuted it even if every one of its guesses had been right"),
        ("no-claim", "promises no ε"),
        (None, "did not come to an end"),
        ("certified", "did not come to an end"),
    ],
)
def test_the_verdict_is_a_plain_sentence_with_its_reasons(verdict: str | None, says: str) -> None:
    text = text_of(private() | {"verdict": verdict, "reasons": ["Because of this.", "And of that."]})
    assert says in text
    assert "Because of this. And of that." in text
    assert text.index(says) < text.index("Because of this.") < text.index("Mechanism and ledger")


def test_the_claim_is_explained() -> None:
    text = text_of(private())
    assert "one row of a site's data, whatever its length" in text
    assert "data with and without one record. Replacing one record counts as two such steps" in text
    assert "more than 2,981 times as likely" in text  # e^8
    assert "holds against the coordinator too" in text
    client = text_of(violated())
    assert "everything that one client has" in client
    assert "holds against all but the coordinator itself" in client
    assert "what ε means" not in text_of(leaking())


def test_checks_say_what_was_expected_and_measured() -> None:
    text = text_of(violated())
    assert "the noise is as strong as claimed 20 times less noise than the ledger was charged for." in text
    assert "standard deviation 3.12 · C 0.156 · C fails" in text
    assert re.search(r"batches are drawn at random as claimed The run keeps no batches\. .* not measured", text)


def test_epsilon_by_round_has_the_budget_line() -> None:
    drawn = chart(private(), "ε by round")
    assert [text.text for text in drawn.iter("text") if "end" in text.attrib.get("class", "")] == [
        "budget 8",
        "spent 7.98",
    ]
    assert len(next(iter(lines(drawn).values()))) == 20
    reset = private()
    reset["mechanism"]["epsilon_reported_by_round"] = [0.8] * 20
    assert "Dashed: what the run itself reported" in text_of(reset)
    assert set(lines(chart(reset, "ε by round"))) == {"c0", "c1 d1"}
    assert "Dashed" not in text_of(private())


def test_roc_is_drawn_on_log_axes_with_chance_and_the_claims_curve() -> None:
    drawn = lines(chart(private(), "ROC curves of attacks on planted canaries"))
    chance, allowed = drawn["ref d1"], drawn["c6 d2"]
    slopes = {round((b[1] - a[1]) / (b[0] - a[0]), 1) for a, b in pairwise(chance)}
    assert len(slopes) == 1  # a straight diagonal, which on mixed or linear axes it would not be
    assert all(a[1] < c[1] - 1 for a, c in zip(allowed[:-2], chance[:-2]))  # upwards is smaller
    assert {f"c{n} d0" for n in range(5)} <= set(drawn)
    assert "c6 d2" not in lines(chart(leaking(), "ROC curves of attacks on planted canaries"))


def test_every_attack_has_interval_and_chance_level() -> None:
    document = violated()
    one = document["membership"]["attacks"]["calibrated"]
    text = text_of(document)
    low, high = one["auc_interval"]
    assert f"{one['auc']:.3f} {low:.3f} to {high:.3f}" in text
    assert "calibrated (chosen beforehand)" in text
    assert "Upright strokes mark chance, an AUC of 0.5" in text
    rate = one["tpr_at_fpr"]["0.01"]
    percents = [f"{100 * value:.3g} %" for value in (rate["value"], *rate["interval"])]
    assert f"{percents[0]} {percents[1]} to {percents[2]} chance 1 %" in text
    assert text.count("not measurable with 400 others") == 5
    assert "not measurable with 90 others" in text_of(private())  # the natural rows have a number of their own


def test_bounds_stand_beside_claim_and_ceilings() -> None:
    text = text_of(violated())
    assert re.search(r"for any mechanism holds whatever the noise is 4\.70 .*? 4\.90 4 for Gaussian noise", text)
    assert "Of 800 canaries" in text
    assert "391 guesses were right; by chance it would be 200" in text
    assert "A bound above the true ε comes out in at most 5 % of audits" in text
    assert "Only the bound for Gaussian noise could have refuted the claim of 8" in text_of(private())
    small = private()
    small["one_run"] |= {"ceiling": 3.25, "ceiling_fdp": 5.75}
    assert "could not have refuted the claim even by guessing right every time" in text_of(small)
    assert "39 (33.50 to 44.00)" in text
    endless = violated()
    endless["client_canaries"] |= {"epsilon": None, "interval": [None, None], "refused": 3}
    assert "3 of their updates were refused" in text_of(endless)
    assert "no finite estimate" in text_of(endless)
    assert "Nothing was claimed that it could refute" in text_of(leaking())


def test_recovery_stands_beside_chance_and_a_view_that_does_not_apply_says_why() -> None:
    text = text_of(leaking())
    assert "another client 91 % chance 11.5 %" in text
    assert "the coordinator under secure sums stack sends every client's adapter to all" in text
    assert "single clients 118 tokens, 3 clients" in text
    assert re.search(
        r"diagnosis 75 % chance 12\.5 % 25 % chance 12\.5 % 50 % chance 6\.25 % 12\.5 % chance 6\.25 % 0 %", text
    )
    assert re.search(
        r"trained model, its training text 31 % .*? 9\.4 public base model, the same text 2 % .*? 1\.1", text
    )
    assert "rare among 1,024 " in text
    assert "14 of 20" in text


def test_each_kind_of_canary_has_a_ceiling_of_its_own() -> None:
    document = leaking()
    document["exposure"] |= {"ceiling": 9.0, "candidates": 512}
    document["exposure"]["canaries"]["new-token"] |= {"ceiling": 10.0, "candidates": 1024}
    text = text_of(document)
    assert re.search(r"rare among 512 9\.1 10\.0 .*? 1\.4 9\.0 14 of 20", text)
    assert re.search(r"new-token among 1,024 10\.0 10\.0 .*? 1\.4 10\.0 20 of 20", text)


def test_a_page_without_text_does_not_say_that_it_has_any() -> None:
    document = leaking()
    document["settings"] = {**(document.get("settings") or {}), "show_text": False}
    assert "left out of this page" in text_of(document)
    assert "Keep it as carefully" not in text_of(document)


def test_invented_notes_are_not_the_runs_headline() -> None:
    text = text_of(leaking())
    assert "Training tokens recovered 98 % by the coordinator; chance 11.5 %" in text
    alone = leaking()
    alone["reconstruction"] = {"malicious-coordinator": alone["reconstruction"]["malicious-coordinator"]}
    assert "Training tokens recovered" not in text_of(alone)


def test_what_is_null_is_named_once_and_leaves_no_empty_section() -> None:
    keys = (
        "claim",
        "mechanism",
        "membership",
        "exposure",
        "one_run",
        "client_canaries",
        "extraction",
        "novelty",
        "defences",
    )
    bare = private() | dict.fromkeys(keys) | {"checks": [], "reconstruction": {}, "signature": None}
    text = text_of(bare)
    gap = text[text.index("Not measured in this audit:") :]
    for name in ("membership", "bounds on ε from one run", "exposure", "reconstruction", "other defences", "recital"):
        assert name in gap
    assert "What could each party read?" not in text
    assert "Nobody signed this audit" in text
    for key in private():
        for document in (private() | {key: None}, {name: value for name, value in private().items() if name != key}):
            if key != "schema":
                assert "What this audit cannot say" in text_of(document)


@pytest.mark.parametrize("schema", [None, 2, "1"])
def test_another_schema_is_refused(schema: Any) -> None:
    with pytest.raises(ConfigError, match="expected schema 1"):
        render(private() | {"schema": schema})


def test_shared_pieces_are_marked_as_often_as_both_have_them() -> None:
    left, right = marking.side_by_side("the cat and the dog", "dog the")
    assert left == "<mark>the</mark> cat and the <mark>dog</mark>"
    assert right == "<mark>dog the</mark>"
    assert marking.side_by_side(["Ber", "gen", " <"], ["gen"]) == ("Ber<mark>gen</mark> &lt;", "<mark>gen</mark>")


def test_a_continuation_is_marked_to_where_it_departs() -> None:
    assert marking.continued("in May 1961, then", "in May 1962, then") == (
        "<mark>in May </mark>1961, then",
        "<mark>in May </mark>1962, then",
    )
    assert marking.containing("ab<ab", ["ab", "", None, "zz"]) == "<mark>ab</mark>&lt;<mark>ab</mark>"


def markless(markup: str) -> str:
    return re.sub("</?mark>", "", markup)


@given(st.text(max_size=60), st.text(max_size=60))
def test_marking_changes_no_text(left: str, right: str) -> None:
    for made in (marking.side_by_side(left, right), marking.continued(left, right)):
        expected = (escape(reading.plain(left)), escape(reading.plain(right)))
        assert (markless(made[0]), markless(made[1])) == expected


def test_a_claim_has_a_curve_only_where_it_is_about_what_is_attacked() -> None:
    """Balle and Wang 2018: (1, 1e-5) needs noise of 3.7306 at sensitivity 1, that is mu = 1/3.7306."""
    one = private()
    one["claim"]["epsilon"] = 1.0
    assert words.shift_of(one) == pytest.approx(1 / 3.7306, abs=1e-4)
    for odd in ({"epsilon": None}, {"epsilon": 1e9}, {"delta": 0.0}, {"delta": 1}):
        assert words.shift_of(private() | {"claim": private()["claim"] | odd}) is None
    drawn = {
        unit: tuple(
            "c6 d2"
            in lines(
                chart(private() | {"claim": private()["claim"] | {"unit": unit}}, f"ROC curves of attacks on {of}")
            )
            for of in ("planted canaries", "the run's own rows")
        )
        for unit in ("record", "user", "client")
    }
    assert drawn == {"record": (True, True), "user": (True, False), "client": (False, False)}


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (None, "–"),
        (0.0, "0 %"),
        (0.115, "11.5 %"),
        (1.0, "100 %"),
        (0.001, "0.1 %"),
        (0.00999, "1 %"),
        (1e-6, "1.0 × 10⁻⁴ %"),
    ],
)
def test_shares_are_percentages(share: float | None, shown: str) -> None:
    assert words.percent(share).replace("\u202f", " ") == shown


@pytest.mark.parametrize("value", [True, False, None, "1", float("nan"), float("inf"), 10**400, [1.0]])
def test_only_finite_numbers_are_figures(value: Any) -> None:
    assert reading.number({"figures": {"auc": value}}, "figures.auc") is None
    assert reading.number({"figures": {"auc": 1}}, "figures.auc") == 1.0


def test_only_what_is_clearly_above_chance_is_coloured() -> None:
    """Noise that hides the tokens leaves recall within 0.06 of chance."""
    colours = [words.leaking(recall, 0.1) for recall in (None, 0.05, 0.1, 0.159, 0.161, 0.9)]
    assert colours == ["c6", "c6", "c6", "c6", "c1", "c1"]


def test_rows_that_stand_for_canaries_are_called_rows() -> None:
    document = private()
    assert "by the toss of a coin" in render(document)
    document["membership"]["of"] = "rows"
    assert "rows of the run stand for canaries" in render(document)
    assert "by the toss of a coin" not in render(document)
